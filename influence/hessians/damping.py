r"""Choosing the damping without retraining: fit the damped curvature to the Hessian the parameters were trained in.

A model trained with weight decay `α` (or stopped early, which acts like it) sits at a minimum of a regularised
objective, and what leaving a document out does to it is governed by that objective's Hessian, `F + α I`. So `c` is
chosen to make `H + c λ̄ I` its nearest multiple in Stein's loss, the divergence of two Gaussians (James & Stein 1961):

$$\min_s\, \mathrm{KL}\bigl(\mathcal N(0, F + α I)\,\big\|\,\mathcal N(0, s\,(H + c\barλ I))\bigr) = \text{const} +
\tfrac12 \Bigl[\sum_k \log d_k + D \log \frac1D \sum_k \frac{v_k + α}{d_k}\Bigr]$$

with `d_k = λ_k + c λ̄` in the eigenbasis of `H` and `v_k` the second moment there of documents' gradients, the diagonal
of `F`: of `F` nothing else enters. It is also the expected negative log-likelihood of what has covariance `F + α I`.
Where `H = F` the answer is `c = α / λ̄`; what a Kronecker product, few documents or drawn labels miss raises it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.plan import make_plan
from influence.func.transform.chain import Stage, Transform
from influence.func.transform.curvature import Curvature, inverse_weights, replaced
from influence.func.transform.precondition import fitted_under, without_curvature
from influence.hessians import ekfac
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit_pass
from influence.hessians.label_rows import squares_of, sums_of_rows
from influence.hessians.labels import Labels
from influence.hessians.method import About, FitSetup, Pass, Summing, Sums
from influence.types import Batch, LossFn, Params


def implied_regularization(
    loss_fn: LossFn, params: Params, batches: Iterable[Batch], start: Params | None = None
) -> float:
    r"""Return the weight decay under which these parameters would be stationary.

    $$α = -\frac{\langle \bar g,\, θ - θ_0 \rangle}{\|θ - θ_0\|^2}, \qquad
    \bar g = \frac1N \sum_n \nabla \ell_n(θ)$$

    the least-squares solution of `ḡ + α (θ - θ_0) = 0`, which holds with the true `α` at a minimum of
    `(1/N) Σ ℓ_n + (α/2) ‖θ - θ_0‖²`. Without weight decay, a gradient flow stopped after time `t` has `ḡ_k = λ e^{-λt}
    (θ_0 - θ^*)_k` along an eigenvector, so `α` is a mean of `λ / (e^{λt} - 1) ≈ 1/t`: the ridge that early stopping
    amounts to (Ali et al. 2019).

    Args:
        loss_fn: a loss function.
        params: the trained parameters.
        batches: all documents they were trained on; those of a sample leave sampling noise in `ḡ`.
        start: what the parameters are pulled to: zero for weight decay (the default), the initial (pretrained)
            parameters for early stopping.

    Returns:
        `α`, in units of the mean over documents of the loss as reduced.

    Raises:
        ValueError: if the gradient does not pull against anything, so that no weight decay explains it.

    Example:
        >>> import torch
        >>> ell = lambda p, b: (p["w"] - b).square().sum(1) / 2
        >>> implied_regularization(ell, {"w": torch.tensor([2.0])}, [torch.tensor([[2.0], [4.0]])])  # 3 / (1 + α) = 2
        0.5
    """
    if start is not None and start.keys() != params.keys():
        raise ValueError(
            f"start and params have other names; they differ in {sorted(start.keys() ^ params.keys())[:4]}"
        )
    moved = {name: p.detach().double() - (start[name].double() if start else 0) for name, p in params.items()}
    length = sum(float(d.square().sum()) for d in moved.values())
    along, documents = 0.0, 0
    for batch in batches:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            total = loss_fn(leaves, batch).sum()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(found, moved.values(), strict=True)
        along += sum(float((g.double() * d).sum()) for g, d in pairs if g is not None)
        documents += batch_size(batch)
    if not documents:
        raise ValueError("batches is empty: pass at least one batch (an iterator that was used up holds none)")
    if not along < 0:
        raise ValueError(
            f"the mean gradient of these {documents:,} documents does not pull away from {'start' if start else 'zero'}"
            f" (⟨ḡ, θ - θ_0⟩ = {along / documents:.3g}, ‖θ - θ_0‖² = {length:.3g}), so no weight decay explains "
            "it. Pass all documents the model was trained on, start= its initial parameters, or "
            "regularization= yourself"
        )
    return -along / documents / length


DEFINITE = ("damped", "absolute", "factored")
"""Inversions that divide by something positive everywhere, so that `H^{-1}` is the inverse of a covariance."""


class DampingCurve(NamedTuple):
    """How well each damping fits; `print` it, or plot `criterion` over `candidates` (logarithmic).

    Attributes:
        candidates: the dampings tried, ascending.
        criterion: nats per direction, up to a constant; smaller is better.
        per_block: the same for each block alone, per direction of that block.
        best: the candidate with the smallest criterion.
        regularization: `α`, as given or as implied.
        inversion: the inversion they are for.
    """

    candidates: Float[Tensor, " m"]
    criterion: Float[Tensor, " m"]
    per_block: dict[str, Float[Tensor, " m"]]
    best: float
    regularization: float
    inversion: str

    def __str__(self) -> str:
        """Return a table and the choice, with a warning where the grid ends too early."""
        lines = [
            f"damping for inversion={self.inversion!r}, regularization {self.regularization:.3g}; criterion in nats "
            "per direction above the best",
            f"{'damping':>9} {'criterion':>10}",
        ]
        at = int(self.criterion.argmin())
        for k, (c, value) in enumerate(zip(self.candidates, self.criterion - self.criterion[at], strict=True)):
            lines.append(f"{float(c):9.3g} {float(value):10.4f}{'  best' if k == at else ''}")
        alone = sorted(float(self.candidates[curve.argmin()]) for curve in self.per_block.values())
        lines.append(f"blocks alone would take {alone[0]:.3g} to {alone[-1]:.3g}")
        if at in (0, len(self.candidates) - 1):
            which, way = ("smallest", "smaller") if at == 0 else ("largest", "larger")
            lines.append(f"warning: the best is the {which} candidate: pass candidates= with {way} ones")
        return "\n".join(lines)


def select_damping(
    factors: Factors,
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    regularization: float | None = None,
    start: Params | None = None,
    candidates: Sequence[float] | Float[Tensor, " m"] | None = None,
    inversion: str = "damped",
    labels: str | None = None,
    transform: Transform | None = None,
    progress: bool = True,
) -> DampingCurve:
    r"""Choose the damping whose curvature is nearest to the Hessian of the regularised objective.

    A help and no oracle. It optimises how well `H + c λ̄ I` fits `F + α I`, block by block and in Stein's loss, which
    is what the exact leave-one-out of a quadratic objective needs; it knows nothing of blocks that act on one another,
    of curvature beyond Gauss-Newton, or of an optimiser that preconditions. With `regularization=0` it is the held-out
    likelihood of gradients alone, which says how noisy the factors are and nothing about leaving documents out: that
    depends on the regularisation with which the model was trained, and no gradient covariance knows it.

    Against exact retraining (`tests/test_damping.py`) the correlation at the selected damping is within 0.03 of the
    best on ridge regressions, where a constant 0.1 loses up to 0.26 and the likelihood alone up to 0.67; on small
    networks within 0.04 with Kronecker factors and 0.08 with dense ones, where 0.1 does as well.

    The scale `s` is free in each block: how much too large an approximation is there does not move the damping, and
    blocks' criteria add up.

    Costs one backward per batch for the implied `α`, and one pass as of `ekfac.correct` (dense factors: whole rows);
    then a few operations in float64 per eigenvalue and candidate.

    Args:
        factors: any factors; those fitted on part of the documents are damped more.
        loss_fn: the loss function they were fitted with.
        params: the parameters they were fitted at.
        batches: the training documents whose influence is asked for; with `regularization` given any of them, or
            held-out ones, which damp a little more.
        regularization: `α`, the weight decay on the mean over documents of the loss as reduced, in the units of rows'
            curvature; by default `implied_regularization`.
        start: what the parameters are pulled to, for the implied one; default zero.
        candidates: dampings to try, ascending; default 1e-4 to 10, four a decade (`"absolute"`: times the mean
            eigenvalue of all blocks).
        inversion: `"damped"`, `"absolute"` or `"factored"`.
        labels: whose gradients `F` is made of; default those of the factors, but where these are the data's and the
            loss has a likelihood, `"sampled"`: an empirical Fisher has other units than `α`.
        transform: the transform the factors were fitted under, where a loaded file could not restore it.
        progress: show a progress bar where there is a terminal.

    Returns:
        The curve and its best candidate.

    Raises:
        ValueError: if an option is out of range, the parameters are others, or `α` cannot be implied.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = {"input": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "labels": torch.zeros(2, 1)}
        >>> factors = hessians.kfac.fit(loss_fn, params, [batch], labels="exact")  # eigenvalues 2 and 8, mean 5
        >>> grid = [0.05, 0.1, 0.2, 0.4]
        >>> select_damping(factors, loss_fn, params, [batch], regularization=1.0, candidates=grid).best
        0.2
    """
    chosen = fitted_under(factors, transform)
    factors.check_model(loss_fn, params)
    grid = _grid(factors, candidates, inversion)
    source = _labels(factors, loss_fn, labels)
    source.check(loss_fn)
    if regularization is None:
        # in blocks and heads, as in parameters, weight decay is a multiple of the identity
        apart = [step.name for step in chosen.steps if step.stage >= Stage.SCALE]
        if apart:
            raise ValueError(
                f"the implied regularization is that of parameters, and {apart[0]}(…) makes other coordinates of them: "
                "pass regularization= in the units of the rows' curvature (the relative damping α / λ̄ survives a "
                "projection: select it on factors of whole blocks)"
            )
        if iter(batches) is iter(batches):
            raise ValueError(
                "the batches are seen twice, once for the regularization they imply: pass a list (or anything that can "
                "be iterated again), or regularization="
            )
        regularization = implied_regularization(loss_fn, params, batches, start)
    if not (regularization >= 0 and regularization < float("inf")):
        raise ValueError(f"regularization must be a finite number, at least 0; got {regularization}")
    measured = _measure(factors, loss_fn, params, batches, chosen, source, progress)
    per_block, sizes = {}, {}
    for name, curvature in factors.blocks.items():
        if name in without_curvature(factors):
            continue
        seen = measured.blocks[name].eigenvalues.flatten().double()
        alive = _alive(curvature, seen)
        if alive.any():
            wanted = seen[alive] + regularization
            grids = (inverse_weights(curvature, -1.0, c, inversion, name).grid for c in grid.tolist())
            per_block[name] = torch.stack([stein(weights.flatten()[alive], wanted) for weights in grids])
            sizes[name] = int(alive.sum())
    if not sizes:
        raise ValueError("no block has any curvature, in the factors or in these batches: there is nothing to damp")
    criterion = torch.stack([per_block[name] * size for name, size in sizes.items()]).sum(0) / sum(sizes.values())
    best = float(grid[criterion.argmin()])
    return DampingCurve(grid, criterion, per_block, best, float(regularization), inversion)


def stein(multipliers: Float[Tensor, " d"], moments: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    r"""Return Stein's loss of the best multiple of a covariance, per direction and up to a constant.

    $$\frac1{2D} \Bigl[\sum_k \log d_k + D \log \frac1D \sum_k \frac{t_k}{d_k}\Bigr]$$

    Args:
        multipliers: `1/d_k`, positive.
        moments: `t_k`, the second moments in the covariance's eigenbasis.

    Returns:
        The loss, in nats.

    Example:
        >>> import torch
        >>> one = torch.ones(2)
        >>> float(stein(one, 5 * one) - stein(one, one)) == float(torch.tensor(5.0).log()) / 2
        True
    """
    return ((multipliers * moments).mean().log() - multipliers.log().mean()) / 2


def _grid(
    factors: Factors, candidates: Sequence[float] | Float[Tensor, " m"] | None, inversion: str
) -> Float[Tensor, " m"]:
    """Return the candidates, having checked that every block can be inverted with them."""
    if inversion not in DEFINITE:
        raise ValueError(
            f"inversion must be one of {', '.join(DEFINITE)}, which invert a covariance; got {inversion!r}, and others "
            "give some directions no weight at all"
        )
    if candidates is None:
        grid = torch.logspace(-4, 1, 21, dtype=torch.float64)
        grid = grid * factors.mean if inversion == "absolute" else grid
    else:
        grid = torch.as_tensor(candidates, dtype=torch.float64).flatten()
    rising = grid.numel() > 0 and bool((grid > 0).all() and torch.isfinite(grid).all() and (grid.diff() > 0).all())
    if not rising:
        raise ValueError(f"candidates must be positive, finite and ascending, at least one; got {grid.tolist()[:6]}")
    for name, curvature in factors.blocks.items():
        if name not in without_curvature(factors):
            inverse_weights(curvature, -1.0, float(grid[0]), inversion, f"block {name!r}")
    return grid


def _labels(factors: Factors, loss_fn: LossFn, source: str | None) -> Labels:
    if source is None:
        drawn = factors.labels.source == "data" and getattr(loss_fn, "likelihood", None) is not None
        source = "sampled" if drawn else factors.labels.source
    return factors.labels._replace(source=source)


def _alive(curvature: Curvature, seen: Float[Tensor, " d"]) -> Tensor:
    """Return the directions in which there is any curvature, fitted or seen: the others carry no score."""
    fitted = curvature.eigenvalues.flatten()
    rounding = max(curvature.shape) * torch.finfo(fitted.dtype).eps
    dead = (fitted.double() <= rounding * fitted.max()) & (seen <= rounding**2 * seen.max())
    return ~dead


def _measure(
    factors: Factors,
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    chosen: Transform,
    labels: Labels,
    progress: bool,
) -> Factors:
    """Return the factors with the second moments of documents' gradients in every block's eigenbasis as eigenvalues."""
    kinds = {c.kind for c in factors.blocks.values()}
    sums = _sums_of_rotated if "dense" in kinds or kinds == {"diagonal"} else ekfac.sums_in_basis
    return fit_pass(
        Pass("damping", sums, _moments), FitSetup(loss_fn, chosen, labels, factors), params, batches, progress
    )


def _moments(about: About, sums: Sums) -> Factors:
    factors = about.setup.factors
    assert factors is not None
    blocks = {name: replaced(c, sums.blocks[name]["squares"] / sums.documents) for name, c in factors.blocks.items()}
    return about.factors(sums, blocks)


def _sums_of_rotated(setup: FitSetup, params: Params, batch: Batch) -> Summing:
    """Plan sums of squares of rotated rows: for dense bases, which do not separate."""
    factors = setup.factors
    assert factors is not None
    plan = make_plan(setup.loss_fn, params, batch, setup.transform, "auto")
    return sums_of_rows(plan, setup, lambda name, row: squares_of(name, factors.blocks[name].rotate(row)))
