r"""Shampoo: Kronecker factors of whole document gradients (Gupta et al. 2018), per example.

$$H \approx L \otimes R / \operatorname{tr} L, \quad L = \mathbb{E}[G_n G_n^\top], \quad R = \mathbb{E}[G_n^\top G_n]$$

Its trace is that of the Fisher of documents at any number of positions: positions are summed before anything is
squared. It needs rows alone, so it serves any transform and any engine.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from influence.func.engine.plan import Plan, make_plan
from influence.func.fold import Sink
from influence.func.numbers import check_number
from influence.func.transform.chain import Transform
from influence.func.transform.folding import vectors
from influence.hessians.factors import Factors
from influence.hessians.fitting import (
    About,
    BlockSums,
    FitStep,
    Sums,
    default_transform,
    describe,
    kronecker,
    run,
    sum_sink,
    sums_of_rows,
)
from influence.hessians.kfac import MAX_SIDE
from influence.hessians.labels import Labels
from influence.types import Batch, LossFn, Params


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    labels: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    max_side: int = MAX_SIDE,
    progress: bool = True,
) -> Factors:
    """Fit Shampoo's factors in one pass; a batch's rows are alive at a time.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batches: batches, seen once.
        transform: any transform; default `as_blocks(bias=True)`.
        labels: `"sampled"`, `"data"` or `"exact"`, as in `kfac.fit`.
        seed: of the sampled labels.
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = {"input": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "labels": torch.zeros(2, 1)}
        >>> hessians.shampoo.fit(loss_fn, params, [batch], labels="exact").blocks["weight"].dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    plan = partial(_plan, loss_fn, params, transform, Labels(labels, seed, draws), max_side)
    return run(plan, sink, batches, progress, "Shampoo")


def step(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    transform: Transform | None = None,
    labels: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    max_side: int = MAX_SIDE,
) -> FitStep:
    """Plan the sums of a batch, for a fold of your own; see `kfac.step`."""
    return _plan(loss_fn, params, transform, Labels(labels, seed, draws), max_side, batch)


def sink(step: FitStep) -> Sink:
    """Return the sink that folds a step's sums into factors."""
    return sum_sink(step.about, finalize)


def _plan(
    loss_fn: LossFn, params: Params, transform: Transform | None, labels: Labels, max_side: int, first: Batch
) -> FitStep:
    check_number("max_side", max_side, 0)
    chosen = default_transform(transform)
    labels.check(loss_fn)

    def make(params: Params, batch: Batch) -> tuple[Plan, Any]:
        plan = make_plan(loss_fn, params, batch, chosen, "auto")
        if any(block.into != block.name for block in plan.folded.blocks):
            raise ValueError(
                f"shampoo has sides of blocks, and {chosen} adds all blocks into one vector, whose diagonal in random "
                "coordinates says nothing. Use hessians.autocorrelation, which has its dense second moment"
            )

        return plan, sums_of_rows(plan, loss_fn, labels, partial(_moments, max_side))

    def about(plan: Plan) -> About:
        return describe("shampoo", loss_fn, params, chosen, labels, plan.folded.row_shapes)

    return FitStep(loss_fn, params, first, make, about)


def _moments(max_side: int, name: str, row: Tensor) -> BlockSums:
    if row.ndim != 3:
        return {"diagonal": vectors(row).square().sum(0)}
    by_left, by_right = row.transpose(0, 1).flatten(1), row.flatten(0, 1)
    o, i = row.shape[1:]
    return {
        "left": by_left.square().sum(1) if o > max_side else by_left @ by_left.mT,
        "right": by_right.square().sum(0) if i > max_side else by_right.mT @ by_right,
    }


def finalize(about: About, sums: Sums) -> Factors:
    """Turn sums into factors; the trace is divided out of the right side."""

    def trace(name: str) -> Tensor:
        left = sums.blocks[name]["left"]
        return left.trace() if left.ndim == 2 else left.sum()

    return kronecker(about, sums, trace)
