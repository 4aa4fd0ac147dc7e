r"""Shampoo: Kronecker factors of whole document gradients (Gupta et al. 2018), per example.

$$H \approx L \otimes R / \operatorname{tr} L, \quad L = \mathbb{E}[G_n G_n^\top], \quad R = \mathbb{E}[G_n^\top G_n]$$

Its trace is that of the Fisher of documents at any number of positions: positions are summed before anything is
squared. It needs rows alone, so it serves any transform and any engine.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from influence.func.engine.plan import make_plan
from influence.func.transform.chain import Transform
from influence.func.transform.folding import vectors
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit as fit_method
from influence.hessians.kronecker import MAX_SIDE, kronecker_factors, kronecker_method
from influence.hessians.label_rows import sums_of_rows
from influence.hessians.method import About, BlockSums, FitSetup, Method, Summing, Sums
from influence.types import Batch, LossFn, Params


def build(max_side: int = MAX_SIDE) -> Method:
    """Return Shampoo as a value, for `hessians.fit`.

    Args:
        max_side: a side of a block with more entries is kept as a diagonal.

    Returns:
        The method.
    """
    return kronecker_method("shampoo", max_side, partial(_sums, max_side), _assemble)


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
        transform: any transform; default `as_blocks()`.
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
    return fit_method(
        loss_fn,
        params,
        batches,
        build(max_side),
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        progress=progress,
    )


def _sums(max_side: int, setup: FitSetup, params: Params, batch: Batch) -> Summing:
    """Plan the sums of `G G^T` and `G^T G`."""
    plan = make_plan(setup.loss_fn, params, batch, setup.transform, "auto")
    if any(block.into != block.name for block in plan.folded.blocks):
        raise ValueError(
            f"shampoo has sides of blocks, and {setup.transform} adds all blocks into one vector, whose diagonal in "
            "random coordinates says nothing. Use hessians.autocorrelation, which has its dense second moment"
        )
    return sums_of_rows(plan, setup, partial(_moments, max_side))


def _moments(max_side: int, name: str, row: Tensor) -> BlockSums:
    if row.ndim != 3:
        return {"diagonal": vectors(row).square().sum(0)}
    by_left, by_right = row.transpose(0, 1).flatten(1), row.flatten(0, 1)
    o, i = row.shape[1:]
    return {
        "left": by_left.square().sum(1) if o > max_side else by_left @ by_left.mT,
        "right": by_right.square().sum(0) if i > max_side else by_right.mT @ by_right,
    }


def _assemble(about: About, sums: Sums) -> Factors:
    """Turn sums into factors; the trace is divided out of the right side."""

    def trace(name: str) -> Tensor:
        left = sums.blocks[name]["left"]
        return left.trace() if left.ndim == 2 else left.sum()

    return kronecker_factors(about, sums, trace)
