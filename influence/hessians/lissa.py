r"""Inverse-vector products by the truncated Neumann series, LiSSA (Agarwal et al. 2017; Koh & Liang 2017)."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.loss.losses import widen
from influence.hessians.cg import NotConverged, Solution
from influence.hessians.products import Product, Vectors, add, largest_eigenvalue, norms

ROUNDING = 1e-3
"""By how much rounding may lengthen a residual that should only shrink."""


def solve(product: Product | Sequence[Product], rhs: Vectors, damping: float, *, scale: float, depth: int) -> Solution:
    r"""Estimate `x` in `(H + δ I) x = b` by a recursion of fixed depth.

    $$h_0 = b, \qquad h_{j+1} = b + \Bigl(I - \frac{H_j + δ I}{σ}\Bigr) h_j, \qquad x = h_{depth} / σ$$

    with `σ` the scale and `H_j` the product of step `j`: always the same, or one batch's after another. It converges if
    all eigenvalues of every `H_j + δ I` lie in `(0, 2σ)`; with one product the error shrinks by
    `max |1 - (λ + δ) / σ|` each step, so a `σ` just above the largest eigenvalue
    (`products.largest_eigenvalue`) and a depth of several `σ / δ` are needed. With several products the
    answer also has their noise, which a larger `σ` averages over more steps; they should be of batches of one size.

    Cost: `depth` products, and one with each of the products for the residuals; memory: three times that of `rhs`.

    Args:
        product: `v ↦ H v`; or a sequence of products, one per batch (`[ggn_product(loss_fn, params, [batch]) for batch
            in batches]`), taken in this order, again from the first after the last.
        rhs: the right-hand sides `b`.
        damping: `δ ≥ 0`.
        scale: `σ`.
        depth: how many steps.

    Returns:
        The answer, in at least float32. Its residuals are those of the mean product; its history has those of each
        step's own product before.

    Raises:
        ValueError: if an option is out of range.
        NotConverged: if the recursion diverges: its answer is, or becomes, worse than `x = 0`.

    Example:
        >>> import torch
        >>> operator = lambda v: {"w": v["w"] * torch.tensor([1.0, 3.0])}
        >>> x = solve(operator, {"w": torch.tensor([[2.0, 4.0]])}, damping=1.0, scale=4.0, depth=50).x["w"]
        >>> x.round(decimals=4)
        tensor([[1., 1.]])
    """
    products = list(product) if isinstance(product, Sequence) else [product]
    _check(products, damping, scale, depth)
    b = {name: widen(x.detach()) for name, x in rhs.items()}
    size = norms(b)

    def residual(apply: Product, x: Vectors) -> tuple[Vectors, Float[Tensor, " q"]]:
        r = add(b, add(apply(x), x, damping), -1.0)
        return r, torch.where(size > 0, norms(r) / torch.where(size > 0, size, 1.0), 0.0)

    # where every step shrinks, ‖x‖ ≤ ‖b‖ / δ, and ‖A_j x‖ ≤ 2 σ ‖x‖
    most = 1.0 if len(products) == 1 else 1 + 2 * scale / damping if damping else float("inf")
    x = {name: v / scale for name, v in b.items()}
    history = []
    for step in range(depth):
        r, relative = residual(products[step % len(products)], x)
        if not bool((relative.isfinite() & (relative <= most + ROUNDING)).all()):
            raise NotConverged(_diverged(products, b, damping, scale, step, relative))
        x = add(x, r, 1 / scale)
        history.append(relative)
    final = residual(_mean(products), x)[1]
    if not bool((final <= 1 + ROUNDING).all()):
        raise NotConverged(_diverged(products, b, damping, scale, depth, final))
    return Solution(x, final, torch.full_like(size, depth, dtype=torch.int64), torch.stack([*history, final]))


def _mean(products: Sequence[Product]) -> Callable[[Vectors], Vectors]:
    def product(vectors: Vectors) -> Vectors:
        total = products[0](vectors)
        for other in products[1:]:
            total = add(total, other(vectors))
        return {name: x / len(products) for name, x in total.items()}

    return product


def _check(products: Sequence[Product], damping: float, scale: float, depth: int) -> None:
    if not products:
        raise ValueError("product is an empty sequence: pass a product, or one for each batch")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number, at least 0; got {damping}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a finite number above 0; got {scale}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1; got {depth}")


def _diverged(
    products: Sequence[Product], b: Vectors, damping: float, scale: float, step: int, relative: Float[Tensor, " q"]
) -> str:
    like = {name: x[0] for name, x in b.items()}
    largest = max((largest_eigenvalue(p, like, iterations=20) for p in products[:4]), key=abs) + damping
    worst = float(relative.nan_to_num(float("inf")).max())
    message = f"the recursion diverges: at step {step} a relative residual is {worst:.3g}. The "
    if 0 < largest < 2 * scale:
        return message + (
            f"largest eigenvalue of H + damping I is about {largest:.3g}, for which scale={scale:g} suffices, so one "
            f"may be negative (or another batch's larger): raise damping={damping:g}, use ggn_product, or raise scale"
        )
    if largest <= 0:
        return message + (
            f"eigenvalue of H + damping I of largest magnitude is about {largest:.3g}: raise damping={damping:g} above "
            f"{damping - largest:.3g}, or use ggn_product, which is positive semidefinite"
        )
    return message + (
        f"largest eigenvalue of H + damping I is at least about {largest:.3g}: raise scale={scale:g} to "
        f"{1.1 * largest:.3g} or more"
    )
