"""Per-example gradients for fits that need no layer inputs, one set of rows for each label; works with every engine."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import cotangent_rows, tapped_losses
from influence.func.engine.plan import Plan
from influence.func.engine.reference import loop_rows, vmap_rows
from influence.func.engine.sums import squares
from influence.func.loss.losses import widen
from influence.hessians.method import BlockSums, FitSetup, Summing, Sums
from influence.types import Batch, Params, Rows


def sums_of_rows(plan: Plan, setup: FitSetup, moments: Callable[[str, Tensor], BlockSums]) -> Summing:
    """Return the sums of moments of a plan's rows, over every cotangent of the labels.

    Args:
        plan: the plan.
        setup: what the pass works with.
        moments: `(block, rows [n, …] in at least float32) -> sums over n`.

    Returns:
        The planned sums.
    """

    def sums(params: Params, batch: Batch, index: Int[Tensor, " n"] | None) -> Sums:
        total: dict[str, BlockSums] = {}
        for rows in _label_rows(plan, setup, params, batch, index):
            for name, row in rows.items():
                mine = total.setdefault(name, {})
                for key, value in moments(name, widen(row)).items():
                    mine[key] = mine[key] + value if key in mine else value
        return Sums(total, {}, batch_size(batch))

    return Summing(plan, sums)


def squares_of(name: str, row: Tensor) -> BlockSums:
    """Return the sum of a block's squared rows."""
    return {"squares": squares(None, row)}


def lasts(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last."""
    rest = iter(items)
    held = list(islice(rest, 1))
    for after in rest:
        yield held[0], False
        held = [after]
    for item in held:
        yield item, True


def _label_rows(
    plan: Plan, setup: FitSetup, params: Params, batch: Batch, index: Int[Tensor, " n"] | None
) -> Iterator[Rows]:
    """Yield rows after the plan's transform: once for data labels, once per draw or class for the others."""
    loss_fn, labels = setup.loss_fn, setup.labels
    if labels.source == "data" and plan.batched is None:
        rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
        yield plan.folded.rows(rows_of(loss_fn, params, batch))
        return
    if plan.batched is None:
        yield from _surrogate_rows(plan, setup, params, batch, index)
        return
    with torch.enable_grad():
        (out, said), taps = tapped_losses(plan.batched, lambda p, b: labels.head(loss_fn, p, b), params, batch)
        for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, index)):
            yield plan.folded.finish_rows(cotangent_rows(out, cotangent, taps.zeros, retain=not last))


def _surrogate_rows(
    plan: Plan, setup: FitSetup, params: Params, batch: Batch, index: Int[Tensor, " n"] | None
) -> Iterator[Rows]:
    """Yield rows of `⟨cotangent, outputs⟩`, a loss like any other, where the batched engine cannot serve."""
    loss_fn, labels = setup.loss_fn, setup.labels
    with torch.no_grad():
        out, said = labels.head(loss_fn, params, batch)
        cotangents = list(labels.cotangents(loss_fn, said, out, index))

    def surrogate(values: Params, both: Any) -> Tensor:
        outputs, _ = labels.head(loss_fn, values, both["batch"])
        return (outputs * both["cotangent"]).sum((1, 2))

    rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
    for cotangent in cotangents:
        yield plan.folded.rows(rows_of(surrogate, params, {"batch": batch, "cotangent": cotangent}))
