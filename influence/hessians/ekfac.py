r"""EK-FAC: eigenvalues measured in the Kronecker eigenbasis (George et al. 2018; Grosse et al. 2023).

$$\lambda = \frac1N \sum_n (Q_S^\top G_n Q_A)^{\odot 2}$$

the best diagonal in that basis: `‖H - Q diag(λ) Q^T‖_F` is least, and never above K-FAC's. Positions are summed
before anything is squared, so documents of any length have their exact second moment there.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import make_feeds
from influence.func.engine.plan import Plan, make_plan
from influence.func.engine.sums import Reduce, piecewise, squares, watched
from influence.func.fold import Sink
from influence.func.transform.chain import Step, Transform, chain
from influence.func.transform.curvature import replaced
from influence.func.transform.folding import Block, Folded, Part, with_sides
from influence.func.transform.precondition import fitted_under
from influence.hessians import kfac
from influence.hessians.factors import Factors
from influence.hessians.fitting import (
    About,
    FitStep,
    Sums,
    check_batches,
    checked,
    describe,
    lasts,
    run,
    squares_of,
    sum_sink,
    sums_of_rows,
)
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
    max_side: int = kfac.MAX_SIDE,
    progress: bool = True,
) -> Factors:
    """Fit K-FAC factors and correct their eigenvalues: two passes, so `batches` must be iterable twice.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batches: batches, seen twice.
        transform: a separable transform; default `as_blocks(bias=True)`.
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
    check_batches(batches)
    if iter(batches) is iter(batches):
        raise ValueError("EK-FAC sees the batches twice: pass a list (or anything that can be iterated again)")
    fitted = kfac.fit(
        loss_fn,
        params,
        batches,
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        max_side=max_side,
        progress=progress,
    )
    return correct(fitted, loss_fn, params, batches, progress=progress)


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
        >>> batch = {"input": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "labels": torch.zeros(2, 1)}
        >>> kfac = hessians.kfac.fit(loss_fn, params, [batch], labels="exact")
        >>> hessians.ekfac.correct(kfac, loss_fn, params, [batch]).blocks["weight"].corrected
        tensor([[2., 8.]])
    """
    plan = partial(_plan, factors, loss_fn, params, transform)
    return run(plan, partial(sink, factors), batches, progress, "eigenvalues")


def step(
    factors: Factors, loss_fn: LossFn, params: Params, batch: Batch, *, transform: Transform | None = None
) -> FitStep:
    """Plan the sums of a batch, for a fold of your own with `sink(factors, step)`."""
    return _plan(factors, loss_fn, params, transform, batch)


def sink(factors: Factors, step: FitStep) -> Sink:
    """Return the sink that folds a step's sums into corrected factors."""
    return sum_sink(step.about, partial(finalize, factors))


def finalize(factors: Factors, about: About, sums: Sums) -> Factors:
    """Turn sums of squares into corrected eigenvalues."""
    blocks = {
        name: replaced(c, sums.blocks[name]["squares"] / sums.documents) if len(c.bases) == 2 else c
        for name, c in factors.blocks.items()
    }
    return replace(about.factors(sums, blocks), positions=factors.positions, notes=factors.notes)


def rotation(factors: Factors) -> Transform:
    """Return the transform into the eigenbasis of every block, where it is a Kronecker product."""

    def extend(folded: Folded) -> Folded:
        def sides(block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
            bases = factors.blocks[block.name].bases
            if len(bases) == 1:
                return None, None
            left, right = (None if basis.vectors is None else basis.vectors.mT for basis in bases)
            return left, right

        return with_sides(folded, sides)

    return Transform((Step("rotation", {"factors": factors.digest}, extend, {}, needs=("as_blocks",)),))


def _plan(factors: Factors, loss_fn: LossFn, params: Params, transform: Transform | None, first: Batch) -> FitStep:
    chosen = fitted_under(factors, transform)
    factors.check_model(loss_fn, params)
    if not any(len(c.bases) == 2 for c in factors.blocks.values()):
        raise ValueError(
            f"{factors!r} has no Kronecker factors to correct: dense and diagonal curvature is exact in its own basis"
        )
    turned, labels = chain(chosen, rotation(factors)), factors.labels
    labels.check(loss_fn)

    def make(params: Params, batch: Batch) -> tuple[Plan, Any]:
        plan = make_plan(loss_fn, params, batch, checked(turned), "auto")
        folded = turned.bind(plan.layout)
        if plan.batched is None or folded.finish:
            plan = make_plan(loss_fn, params, batch, turned, "auto")
            return plan, sums_of_rows(plan, loss_fn, labels, squares_of)
        pieces = piecewise(folded)
        batched = plan.batched._replace(folded=pieces, feeds=make_feeds(pieces))

        def sums(params: Params, batch: Batch) -> Sums:
            n = batch_size(batch)
            with torch.enable_grad():
                head = partial(labels.head, loss_fn)
                watcher = partial(Reduce, batched, squares)
                out, said, found = watched(batched, watcher, head, params, batch)
                for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, batch)):
                    found.backward(out, cotangent, retain=not last)
            return Sums(_filled(factors, found.sums), {}, n)

        return plan, sums

    def about(plan: Plan) -> About:
        shapes = {name: c.shape for name, c in factors.blocks.items()}
        before = any(c.corrected is not None for c in factors.blocks.values())
        return describe(factors.method if before else f"e{factors.method}", loss_fn, params, chosen, labels, shapes)

    return FitStep(loss_fn, params, first, make, about)


def _filled(factors: Factors, found: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return every block's sum; a block that no gradient reached has zeros."""
    like = next(iter(found.values()), torch.zeros(()))
    return {
        name: {"squares": found[name] if name in found else like.new_zeros(c.shape)}
        for name, c in factors.blocks.items()
    }
