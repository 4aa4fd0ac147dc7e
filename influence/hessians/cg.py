r"""Inverse-vector products by conjugate gradients, for every query at once."""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence.func.loss.losses import widen
from influence.hessians.products import Product, Vectors, add, inner, norms, scale


class NotConverged(RuntimeError):
    """An iteration did not reach what was asked of it."""


class Solution(NamedTuple):
    """Solutions of `A x = b`, one for each query.

    Attributes:
        x: the solutions.
        residuals: `‖b - A x‖ / ‖b‖`, computed from `x` itself; 0 where `b` is 0.
        iterations: steps taken.
        history: the residuals before the first step and after each; their last row is `residuals`.
    """

    x: Vectors
    residuals: Float[Tensor, " q"]
    iterations: Int[Tensor, " q"]
    history: Float[Tensor, "k q"]


def solve(
    product: Product,
    rhs: Vectors,
    damping: float,
    *,
    preconditioner: Product | None = None,
    start: Vectors | None = None,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
    on_failure: str = "error",
) -> Solution:
    r"""Solve `(H + δ I) x = b` by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    $$α = \frac{⟨r, M r⟩}{⟨p, A p⟩}, \quad x ← x + α p, \quad r ← r - α A p, \quad p ← M r + β p, \quad
    β = \frac{⟨r, M r⟩_{new}}{⟨r, M r⟩}$$

    with `A = H + δ I` and numbers of its own for each query. A query is done when its residual is, as recomputed from
    `x`; where rounding has carried the recursion away from it, the recursion starts again from the truth. A query that
    is done is left alone, and costs no more products.

    Cost of an iteration: one product with the queries that are not done; memory: five times that of `rhs`.

    Args:
        product: `v ↦ H v`, symmetric.
        rhs: the right-hand sides `b`.
        damping: `δ ≥ 0`; `H + δ I` must be positive definite.
        preconditioner: `r ↦ M r`, symmetric positive definite, near the inverse of `A`: an EK-FAC inverse, for example.
        start: where to start; default 0.
        tolerance: the relative residual that is asked for.
        max_iterations: default 10 for each unknown, at most 1000.
        on_failure: what to do where the tolerance is not reached: `"error"` or `"warn"`.

    Returns:
        The solutions, in at least float32.

    Raises:
        ValueError: if an option is out of range, or `H + δ I` or the preconditioner is not positive definite.
        NotConverged: if a query does not reach the tolerance and `on_failure="error"`.

    Example:
        >>> import torch
        >>> operator = lambda v: {"w": v["w"] * torch.tensor([1.0, 3.0])}
        >>> x = solve(operator, {"w": torch.tensor([[2.0, 4.0]])}, damping=1.0, tolerance=1e-6).x["w"]
        >>> x.round(decimals=4)
        tensor([[1., 1.]])
    """
    b = {name: widen(x.detach()) for name, x in rhs.items()}
    limit = min(10 * sum(x[:1].numel() for x in b.values()), 1000) if max_iterations is None else max_iterations
    _check(b, damping, tolerance, limit, on_failure)
    size = norms(b)

    def damped(v: Vectors) -> Vectors:
        return add(product(v), v, damping)

    def relative(r: Vectors) -> Float[Tensor, " q"]:
        return torch.where(size > 0, norms(r) / torch.where(size > 0, size, 1.0), 0.0)

    x = {name: torch.zeros_like(v) for name, v in b.items()}
    r = b
    if start is not None:
        x = scale((size > 0).float(), {name: start[name].detach().to(v) for name, v in b.items()})
        r = add(b, damped(x), -1.0)
    history = [relative(r)]
    live = history[0] > tolerance
    fresh, steps, p, old = live, torch.zeros_like(live, dtype=torch.int64), x, torch.ones_like(size)
    while bool(live.any()) and len(history) <= limit:
        z = r if preconditioner is None else _only(preconditioner, r, live)
        rho = inner(r, z)
        if preconditioner is not None:
            _check_preconditioner(rho, live, len(history))
        p = add(z, p, torch.where(live & ~fresh, rho / old, 0.0))
        image = _only(damped, p, live)
        curvature = inner(p, image)
        _check_curvature(curvature, inner(p, p), damping, live, len(history))
        alpha = torch.where(live, rho / torch.where(live, curvature, 1.0), 0.0)
        x, r, old, steps = add(x, p, alpha), add(r, image, -alpha), torch.where(live, rho, 1.0), steps + live
        residual = torch.where(live, relative(r), history[-1])
        fresh = live & (residual <= tolerance)
        if bool(fresh.any()):
            r = add(r, add(add(b, _only(damped, x, fresh), -1.0), r, -1.0), fresh.float())
            residual = torch.where(fresh, relative(r), residual)
        live = live & (residual > tolerance)
        history.append(residual)
    if bool(live.any()):
        history[-1] = torch.where(live, relative(add(b, _only(damped, x, live), -1.0)), history[-1])
        message = _failure(history[-1], live, len(history) - 1, tolerance)
        if on_failure == "error":
            raise NotConverged(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return Solution(x, history[-1], steps, torch.stack(history))


def _only(function: Product, vectors: Vectors, chosen: Bool[Tensor, " q"]) -> Vectors:
    """Apply a function to the chosen vectors; the others become 0."""
    at = chosen.nonzero()[:, 0]
    images = function({name: x[at] for name, x in vectors.items()})
    return {name: torch.zeros_like(x).index_copy(0, at, images[name].to(x)) for name, x in vectors.items()}


def _check(b: Vectors, damping: float, tolerance: float, limit: int, on_failure: str) -> None:
    """Refuse options before the first product."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number, at least 0; got {damping}")
    if limit < 1:
        raise ValueError(f"max_iterations must be at least 1; got {limit}")
    if on_failure not in ("error", "warn"):
        raise ValueError(f"on_failure must be 'error' or 'warn'; got {on_failure!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1); got {tolerance}")
    dtype = next(iter(b.values())).dtype
    if tolerance < torch.finfo(dtype).eps:
        raise ValueError(
            f"tolerance={tolerance} is below the rounding of {dtype}, {torch.finfo(dtype).eps:.2g}, so no residual can "
            "reach it: take parameters and right-hand sides in float64, or a tolerance such as 1e-5"
        )
    for name, x in b.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"rhs[{name!r}] is not finite; look for the example with per_example_grads")


def _check_curvature(
    curvature: Float[Tensor, " q"], square: Float[Tensor, " q"], damping: float, live: Bool[Tensor, " q"], step: int
) -> None:
    bad = live & ~((curvature > 0) & curvature.isfinite())
    if not bool(bad.any()):
        return
    query = int(bad.nonzero()[0, 0])
    if not bool(curvature[query].isfinite()):
        raise ValueError(f"the product of query {query} is not finite at iteration {step}: compute in a wider dtype")
    quotient = float(curvature[query] / square[query])
    raise ValueError(
        f"H + damping I is not positive definite: at iteration {step} query {query} met a direction p with "
        f"p^T (H + damping I) p / p^T p = {quotient:.3g}. damping={damping:g} is too small for an indefinite Hessian: "
        f"raise it above {damping - quotient:.3g}, or use ggn_product, which is positive semidefinite"
    )


def _check_preconditioner(rho: Float[Tensor, " q"], live: Bool[Tensor, " q"], step: int) -> None:
    bad = live & ~((rho > 0) & rho.isfinite())
    if bool(bad.any()):
        query = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"the preconditioner M is not positive definite: at iteration {step} query {query} met a residual r with "
            f"r^T M r = {float(rho[query]):.3g}; raise its damping, or leave it out"
        )


def _failure(residuals: Float[Tensor, " q"], live: Bool[Tensor, " q"], steps: int, tolerance: float) -> str:
    missed = live.nonzero()[:, 0].tolist()
    worst = sorted(missed, key=lambda query: -float(residuals[query]))[:4]
    listed = ", ".join(f"{float(residuals[query]):.2g} (query {query})" for query in worst)
    return (
        f"{len(missed)} of {len(live)} queries did not converge in {steps} iterations: relative residuals {listed}, "
        f"tolerance={tolerance:g}. Raise damping or max_iterations, pass a preconditioner (an EK-FAC inverse), compute "
        "in float64, or take a larger tolerance"
    )
