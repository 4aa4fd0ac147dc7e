r"""Autocorrelation: the dense second moment of every block's rows, for rows that were made small.

$$H = \frac1N \sum_n x_n x_n^\top, \qquad x_n = \text{vec}(\text{row}_n)$$

of rows after any transform: projected, scaled, normalised. It is exact for the rows it sees; what a projection threw
away before, no curvature of the rest brings back: `eigen_whiten` chooses what is kept by the curvature itself.
"""

from collections.abc import Iterable
from math import prod

from torch import Tensor

from influence.func.engine.plan import Plan, make_plan
from influence.func.transform.chain import Transform
from influence.func.transform.curvature import Curvature, decompose
from influence.func.transform.folding import vectors
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit as fit_method
from influence.hessians.label_rows import sums_of_rows
from influence.hessians.labels import Labels
from influence.hessians.method import About, BlockSums, FitSetup, Method, Pass, Summing, Sums
from influence.types import Batch, LossFn, Params

MAX_ROW = 16384
"""The longest row whose dense Gram matrix is formed: 1 GB, and minutes to decompose."""


def build() -> Method:
    """Return the dense second moment of rows as a value, for `hessians.fit`; its default labels are the data's.

    Returns:
        The method.
    """
    one = Pass("autocorrelation", _sums, _assemble)
    return Method("autocorrelation", (one,), lambda shape: prod(shape) * (prod(shape) + 1), default_labels="data")


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    labels: str = "data",
    seed: int = 0,
    draws: int = 1,
    progress: bool = True,
) -> Factors:
    """Fit the dense second moment of rows in one pass.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batches: batches, seen once.
        transform: any transform, as `chain(as_blocks(), project(16), unit_norm())`; default `as_blocks()`, for small
            models.
        labels: `"data"`, `"sampled"` or `"exact"`, as in `kfac.fit`.
        seed: of the sampled labels.
        draws: labels per position.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors, one dense basis per block.

    Raises:
        ValueError: if a row is too long for a dense matrix, or rows are normalised and labels are no single draw.

    Example:
        >>> import torch
        >>> from influence import hessians
        >>> rows = {"x": torch.tensor([[2.0, 0.0], [0.0, 4.0]])}
        >>> ell = lambda p, b: (b["x"] * p["w"]).sum(1)
        >>> factors = hessians.autocorrelation.fit(ell, {"w": torch.zeros(2)}, [rows])
        >>> factors.blocks["w"].dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    return fit_method(
        loss_fn,
        params,
        batches,
        build(),
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        progress=progress,
    )


def _sums(setup: FitSetup, params: Params, batch: Batch) -> Summing:
    """Plan the sums of `x x^T`."""
    plan = make_plan(setup.loss_fn, params, batch, setup.transform, "auto")
    _check(plan, setup.labels)
    return sums_of_rows(plan, setup, _gram)


def _gram(name: str, row: Tensor) -> BlockSums:
    x = vectors(row)
    return {"gram": x.mT @ x}


def _check(plan: Plan, labels: Labels) -> None:
    long = {name: prod(shape) for name, shape in plan.folded.row_shapes.items() if prod(shape) > MAX_ROW}
    if long:
        name, size = max(long.items(), key=lambda item: item[1])
        raise ValueError(
            f"rows of {len(long)} blocks are too long for a dense second moment ({name!r} has {size:,} entries, the "
            f"most is {MAX_ROW:,}): add project(…) to the transform, or use hessians.kfac or hessians.shampoo"
        )
    if plan.folded.finish and (labels.source == "exact" or labels.draws > 1):
        raise ValueError(
            f"labels={labels.source!r} with draws={labels.draws} splits an example's gradient into parts, and "
            f"{plan.transform} would normalise each of them. Use labels='data', or 'sampled' with draws=1"
        )


def _assemble(about: About, sums: Sums) -> Factors:
    """Turn sums into factors."""
    blocks = {
        name: Curvature(shape, (decompose(sums.blocks[name]["gram"] / sums.documents, f"block {name!r}"),))
        for name, shape in about.shapes.items()
    }
    return about.factors(sums, blocks)
