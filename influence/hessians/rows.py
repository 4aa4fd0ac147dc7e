"""Rows of any labels: what a fit sees of gradients where it needs no layer inputs, by whatever engine serves."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from influence.func.batched import cotangent_rows, tapped_losses
from influence.func.batches import batch_size
from influence.func.engines import loop_rows, vmap_rows
from influence.func.losses import widen
from influence.func.plan import Plan
from influence.func.reduce import squares
from influence.hessians.fitting import BlockSums, Sums, lasts
from influence.hessians.labels import Labels
from influence.types import Batch, LossFn, Params, Rows


def label_rows(plan: Plan, loss_fn: LossFn, params: Params, batch: Batch, labels: Labels) -> Iterator[Rows]:
    """Yield the rows that each cotangent brings, after the plan's transform.

    Args:
        plan: the plan.
        loss_fn: the loss function.
        params: the parameters.
        batch: the batch.
        labels: where labels come from.

    Yields:
        Rows `{block: [n, …]}`, once for data labels, once per draw for sampled ones.
    """
    if labels.source == "data" and plan.batched is None:
        rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
        yield plan.folded.rows(rows_of(loss_fn, params, batch))
        return
    if plan.batched is None:
        yield from _surrogate_rows(plan, loss_fn, params, batch, labels)
        return
    with torch.enable_grad():
        (out, said), taps = tapped_losses(plan.batched, lambda p, b: labels.head(loss_fn, p, b), params, batch)
        for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, batch)):
            yield plan.folded.finish_rows(cotangent_rows(out, cotangent, taps.zeros, retain=not last))


def _surrogate_rows(plan: Plan, loss_fn: LossFn, params: Params, batch: Batch, labels: Labels) -> Iterator[Rows]:
    """Yield rows of `⟨cotangent, outputs⟩`, a loss like any other, where the batched engine cannot serve."""
    with torch.no_grad():
        out, said = labels.head(loss_fn, params, batch)
        cotangents = list(labels.cotangents(loss_fn, said, out, batch))

    def surrogate(values: Params, both: Any) -> Tensor:
        outputs, _ = labels.head(loss_fn, values, both["batch"])
        return (outputs * both["cotangent"]).sum((1, 2))

    rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
    for cotangent in cotangents:
        yield plan.folded.rows(rows_of(surrogate, params, {"batch": batch, "cotangent": cotangent}))


def sums_of_rows(
    plan: Plan, loss_fn: LossFn, labels: Labels, moments: Callable[[str, Tensor], BlockSums]
) -> Callable[[Params, Batch], Sums]:
    """Return the step that sums moments of a plan's rows, over every cotangent of the labels.

    Args:
        plan: the plan.
        loss_fn: the loss function.
        labels: whose gradients.
        moments: `(block, rows [n, …] in at least float32) -> sums over n`.

    Returns:
        `(params, batch) -> Sums`.
    """

    def sums(params: Params, batch: Batch) -> Sums:
        total: dict[str, BlockSums] = {}
        for rows in label_rows(plan, loss_fn, params, batch, labels):
            for name, row in rows.items():
                mine = total.setdefault(name, {})
                for key, value in moments(name, widen(row)).items():
                    mine[key] = mine[key] + value if key in mine else value
        return Sums(total, {}, batch_size(batch))

    return sums


def squares_of(name: str, row: Tensor) -> BlockSums:
    """Return the sum of a block's squared rows."""
    return {"squares": squares(None, row)}
