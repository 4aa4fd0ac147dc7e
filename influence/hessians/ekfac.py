r"""EK-FAC: eigenvalues measured in the Kronecker eigenbasis (George et al. 2018; Grosse et al. 2023).

$$\lambda = \frac1N \sum_n (Q_S^\top G_n Q_A)^{\odot 2}$$

the best diagonal in that basis: `‖H - Q diag(λ) Q^T‖_F` is least, and never above K-FAC's. Positions are summed
before anything is squared, so documents of any length have their exact second moment there.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import make_feeds
from influence.func.engine.plan import make_plan
from influence.func.engine.sums import Reduce, piecewise, squares, watched
from influence.func.transform.chain import Step, Transform, chain
from influence.func.transform.curvature import replaced
from influence.func.transform.folding import Block, Folded, Part, with_sides
from influence.func.transform.precondition import fitted_under
from influence.hessians import kfac
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit as fit_method
from influence.hessians.fitting import fit_pass
from influence.hessians.kronecker import MAX_SIDE
from influence.hessians.label_rows import lasts, squares_of, sums_of_rows
from influence.hessians.method import About, FitSetup, Method, Pass, Summing, Sums
from influence.types import Batch, LossFn, Params


def build(base: Method | None = None) -> Method:
    """Return the eigenvalue correction of a Kronecker method as a value, for `hessians.fit`.

    The base's passes fit the eigenbasis, one more measures the eigenvalues in it.

    Args:
        base: K-FAC, TKFAC or Shampoo; default `kfac.build()`.

    Returns:
        The method.

    Raises:
        ValueError: if the base has no Kronecker factors.

    Example:
        >>> from influence import hessians
        >>> hessians.ekfac.build(hessians.tkfac.build())
        ekfac(base='tkfac', max_side=8192)
    """
    base = kfac.build() if base is None else base
    if not base.kronecker:
        raise ValueError(
            f"base={base} has no Kronecker factors, whose eigenvalues could be corrected: use hessians.kfac.build(), "
            "hessians.tkfac.build() or hessians.shampoo.build()"
        )
    return Method(
        "ekfac",
        (*base.passes, CORRECTION),
        lambda shape: base.entries(shape) + (prod(shape) if len(shape) == 2 else 0),
        base.default_labels,
        {"base": base.name, **base.options},
    )


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
    """Fit K-FAC factors and correct their eigenvalues: two passes, so `batches` must be iterable twice.

    `hessians.fit(loss_fn, params, batches, hessians.ekfac.build(hessians.tkfac.build()))` corrects another method's.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batches: batches, seen twice.
        transform: a separable transform; default `as_blocks()`.
        labels: `"sampled"`, `"data"` or `"exact"`, as in `kfac.fit`.
        seed: of the sampled labels.
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.
        progress: show progress bars where there is a terminal.

    Returns:
        The corrected factors.

    Raises:
        ValueError: if batches can be seen only once.
    """
    return fit_method(
        loss_fn,
        params,
        batches,
        build(kfac.build(max_side)),
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        progress=progress,
    )


def correct(
    factors: Factors,
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    progress: bool = True,
) -> Factors:
    """Measure the eigenvalues of fitted factors in their own basis, with the labels they were fitted with.

    Costs two rotations and one outer product per position and block on top of a forward and a backward without weight
    gradients; a few examples' gradients of one block are alive at a time.

    Args:
        factors: Kronecker factors (K-FAC, TKFAC, Shampoo).
        loss_fn: the loss function they were fitted with.
        params: the parameters they were fitted at.
        batches: the batches, seen once.
        transform: the transform they were fitted under, where a loaded file could not restore it.
        progress: show a progress bar where there is a terminal.

    Returns:
        Factors with corrected eigenvalues.

    Raises:
        ValueError: if there is nothing to correct, or the parameters or the transform are others.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1))
        >>> kfac = hessians.kfac.fit(loss_fn, params, [batch], labels="exact")
        >>> hessians.ekfac.correct(kfac, loss_fn, params, [batch]).blocks["weight"].corrected
        tensor([[2., 8.]])
    """
    setup = FitSetup(loss_fn, fitted_under(factors, transform), factors.labels, factors)
    return fit_pass(CORRECTION, setup, params, batches, progress)


def rotate(factors: Factors) -> Transform:
    """Return the transform into the eigenbasis of every block, where it is a Kronecker product."""

    def extend(folded: Folded) -> Folded:
        def sides(block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
            bases = factors.blocks[block.name].bases
            if len(bases) == 1:
                return None, None
            left, right = (None if basis.vectors is None else basis.vectors.mT for basis in bases)
            return left, right

        return with_sides(folded, sides)

    return Transform((Step("rotate", {"factors": factors.digest}, extend, needs_blocks=True),))


def sums_in_basis(setup: FitSetup, params: Params, batch: Batch) -> Summing:
    """Plan the sums of `(Q_S^T G_n Q_A)²` of every block of the factors at hand."""
    factors, loss_fn, labels = setup.factors, setup.loss_fn, setup.labels
    assert factors is not None
    if not any(len(c.bases) == 2 for c in factors.blocks.values()):
        raise ValueError(
            f"{factors!r} has no Kronecker factors to correct: dense and diagonal curvature is exact in its own basis"
        )
    turned = chain(setup.transform, rotate(factors))
    plan = make_plan(loss_fn, params, batch, kfac.checked(turned), "auto")
    folded = turned.bind(plan.layout)
    if plan.batched is None or folded.finish:
        plan = make_plan(loss_fn, params, batch, turned, "auto")
        return sums_of_rows(plan, setup, squares_of)
    pieces = piecewise(folded)
    batched = plan.batched._replace(folded=pieces, feeds=make_feeds(pieces))

    def sums(params: Params, batch: Batch, index: Int[Tensor, " n"] | None) -> Sums:
        n = batch_size(batch)
        with torch.enable_grad():
            head = partial(labels.head, loss_fn)
            watcher = partial(Reduce, batched, squares)
            out, said, found = watched(batched, watcher, head, params, batch)
            for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, index)):
                found.backward(out, cotangent, retain=not last)
        return Sums(_filled(factors, found.sums), {}, n)

    return Summing(plan, sums)


def _assemble(about: About, sums: Sums) -> Factors:
    """Turn sums of squares into corrected eigenvalues."""
    factors = about.setup.factors
    assert factors is not None
    blocks = {
        name: replaced(c, sums.blocks[name]["squares"] / sums.documents) if len(c.bases) == 2 else c
        for name, c in factors.blocks.items()
    }
    before = any(c.corrected is not None for c in factors.blocks.values())
    method = factors.method if before else f"e{factors.method}"
    return replace(about.factors(sums, blocks), method=method, positions=factors.positions, notes=factors.notes)


CORRECTION = Pass("eigenvalues", sums_in_basis, _assemble)
"""Measures the eigenvalues of the factors that the pass before it fitted."""


def _filled(factors: Factors, found: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return every block's sum; a block that no gradient reached has zeros."""
    like = next(iter(found.values()), torch.zeros(()))
    return {
        name: {"squares": found[name] if name in found else like.new_zeros(c.shape)}
        for name, c in factors.blocks.items()
    }
