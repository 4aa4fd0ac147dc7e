"""Rows of any labels: what a fit sees of gradients where it needs no layer inputs, by whatever engine serves."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from influence.func.batched import cotangent_rows, tapped_losses
from influence.func.batches import batch_size
from influence.func.engines import loop_rows, vmap_rows
from influence.func.losses import widen
from influence.func.plan import Plan, make_plan
from influence.func.reduce import squares
from influence.func.transform import Transform
from influence.hessians.fitting import Sums, lasts
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


def squares_by_rows(
    loss_fn: LossFn,
    params: Params,
    first: Batch,
    transform: Transform,
    labels: Labels,
    turn: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[Plan, Callable[[Params, Batch], Sums]]:
    """Plan sums of squared rows, all of a batch's at once, each turned first where that does not separate.

    Args:
        loss_fn: the loss function.
        params: the parameters.
        first: a first batch.
        transform: what is wanted of the gradients.
        labels: whose gradients.
        turn: `(block, rows) -> rows`.

    Returns:
        The plan and its step.
    """
    plan = make_plan(loss_fn, params, first, transform, "auto")

    def sums(params: Params, batch: Batch) -> Sums:
        total: dict[str, Tensor] = {}
        for rows in label_rows(plan, loss_fn, params, batch, labels):
            for name, row in rows.items():
                total[name] = squares(total.get(name), row if turn is None else turn(name, widen(row)))
        return Sums({name: {"squares": value} for name, value in total.items()}, {}, batch_size(batch))

    return plan, sums
