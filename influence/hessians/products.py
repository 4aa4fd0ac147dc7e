r"""Exact curvature as products with vectors, and the algebra of vectors over all parameters together.

With `N` examples in all batches and `ℓ_n` the loss of one, as reduced,

$$H = \frac1N Σ_n ∇^2 ℓ_n, \qquad G = \frac1N Σ_n J_n^T F_n J_n, \qquad F = \frac1N Σ_n g_n g_n^T .$$

A product is a pure function of vectors, and costs a few gradients per vector.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from influence.func.engine.attention import under_vmap
from influence.func.engine.batch import batch_size, take
from influence.func.engine.reference import explain_torch
from influence.func.loss.likelihood import Likelihood
from influence.func.loss.losses import widen
from influence.hessians.labels import check_weight
from influence.types import Batch, LossFn, Params

Vectors: TypeAlias = dict[str, Tensor]
"""`q` vectors over all parameters, `{parameter: [q, *shape]}`."""

Vjp: TypeAlias = Callable[[Callable[[Any], tuple[Any, Any]], Any], tuple[Any, Callable[[Any], Any], Any]]
"""`(x ↦ (value, aux), x) -> value, u ↦ J^T u, aux`, where `u ↦ J^T u` can be differentiated again."""


class Calculus(NamedTuple):
    """One way to differentiate: a function at a point; and how to apply `v ↦ A v` to each of `q` vectors."""

    vjp: Vjp
    each: Callable[[Callable[[Vectors], Vectors], Vectors], Vectors]


Local: TypeAlias = Callable[[Calculus, Params, Batch, Vectors], Vectors]
"""The product with one batch's curvature, summed over its examples."""


def choose(what: str, local: Local, params: Params, example: Batch) -> Calculus:
    """Return the first calculus that can take one example, `torch.func` for all vectors at once if possible."""
    problems = []
    for calculus in (TRANSFORMS, AUTOGRAD):
        try:
            with torch.no_grad(), under_vmap():
                local(calculus, params, example, {name: p[None] for name, p in params.items()})
        except (RuntimeError, TypeError) as error:
            problems.append(explain_torch(str(error)))
        else:
            return calculus
    raise ValueError(
        f"{what} needs this function differentiated twice, and torch can do so neither by torch.func ({problems[0]}) "
        f"nor by autograd ({problems[1]})"
    )


def push_of(by: Calculus, value: Tensor, pull: Callable[[Tensor], Params]) -> Callable[[Vectors], Tensor]:
    """Return `v ↦ J v`, as the transpose of `u ↦ J^T u`."""
    push = by.vjp(lambda u: (pull(u), ()), torch.zeros_like(value))[1]
    return lambda v: push(v).detach()


def _transform(function: Callable[[Any], tuple[Any, Any]], at: Any) -> tuple[Any, Callable[[Any], Any], Any]:
    value, pull, aux = torch.func.vjp(function, at, has_aux=True)  # type: ignore[misc]
    return value, lambda u: pull(u)[0], aux


def _record(function: Callable[[Any], tuple[Any, Any]], at: Any) -> tuple[Any, Callable[[Any], Any], Any]:
    with torch.enable_grad():
        leaves = tree_map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), at)
        value, aux = function(leaves)
    flat, spec = tree_flatten(leaves)

    def pull(u: Any) -> Any:
        with torch.enable_grad():
            pairs = zip(tree_leaves(value), tree_leaves(u), strict=True)
            total = torch.stack([(x * along.to(x)).sum() for x, along in pairs]).sum()
            if not total.requires_grad:
                return tree_map(torch.zeros_like, leaves)
            return tree_unflatten(torch.autograd.grad(total, flat, create_graph=True, materialize_grads=True), spec)

    return value, pull, aux


def _one_by_one(function: Callable[[Vectors], Vectors], vectors: Vectors) -> Vectors:
    q = next(iter(vectors.values())).shape[0]
    found = [function({name: v[i] for name, v in vectors.items()}) for i in range(q)]
    return {name: torch.stack([x[name].detach() for x in found]) for name in vectors}


TRANSFORMS = Calculus(_transform, lambda function, vectors: torch.func.vmap(function)(vectors))
"""`torch.func`, all vectors at once."""

AUTOGRAD = Calculus(_record, _one_by_one)
"""The last resort, one vector at a time: it runs what `torch.func` cannot, as an old-style `autograd.Function`."""


Product: TypeAlias = Callable[[Vectors], Vectors]
"""A linear operator, applied to `q` vectors at once."""


def hessian_product(loss_fn: LossFn, params: Params, batches: Iterable[Batch]) -> Product:
    r"""Return `v ↦ H v`, with the Hessian `H = (1/N) Σ_n ∇² ℓ_n` of the mean loss (Pearlmutter 1994).

    Cost of a product: a gradient, and for each of the `q` vectors about two more; memory: `q + 1` times a gradient's.

    Args:
        loss_fn: `(params, batch) -> losses[n]`.
        params: the parameters.
        batches: the batches, which every product goes through once.

    Returns:
        The product. Vectors meet the model in its own dtype and are summed over batches in at least float32.

    Raises:
        ValueError: if the batches can be gone through only once, or torch cannot differentiate the function twice.

    Example:
        >>> import torch
        >>> product = hessian_product(lambda p, x: x * p["w"].pow(3).sum(), {"w": torch.ones(2)}, [torch.ones(4)])
        >>> product({"w": torch.eye(2)})["w"]
        tensor([[6., 0.],
                [0., 6.]])
    """

    def local(by: Calculus, params: Params, batch: Batch, vectors: Vectors) -> Vectors:
        def gradient(p: Params) -> tuple[Params, Any]:
            total, pull, _ = by.vjp(lambda p: (widen(loss_fn(p, batch)).sum(), ()), p)
            return pull(torch.ones_like(total)), ()

        return by.each(by.vjp(gradient, params)[1], vectors)  # a Hessian is symmetric: H v = H^T v

    return _mean("the Hessian", local, params, batches)


def ggn_product(loss_fn: LossFn, params: Params, batches: Iterable[Batch]) -> Product:
    r"""Return `v ↦ G v`, with the generalised Gauss-Newton matrix (Schraudolph 2002), the true Fisher information.

    $$G = \frac1N Σ_n Σ_t w_{nt} J_{nt}^T F_z J_{nt}$$

    with `J_nt` the Jacobian of the outputs at a position, `F_z` the Hessian there of the loss in them, and `w_nt` the
    weight of the position in the example's loss. Positive semidefinite.

    Cost of a product: a gradient, and for each of the `q` vectors about 1.5 more; memory: `q + 1` times a gradient's,
    outputs `[n, t, v]` included.

    Args:
        loss_fn: what `functionalize` returns for a loss with a likelihood.
        params: the parameters.
        batches: the batches, which every product goes through once.

    Returns:
        The product. Vectors meet the model in its own dtype and are summed over batches in at least float32.

    Raises:
        ValueError: if the loss has no likelihood or a weight is negative, the batches can be gone through only once, or
            torch cannot differentiate the function twice.

    Example:
        >>> import torch
        >>> from influence import functionalize
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> product = ggn_product(loss_fn, params, [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))])
        >>> product({"weight": torch.tensor([[[1.0, 0.0]]])})["weight"]
        tensor([[[1., 2.]]])
    """
    if not hasattr(loss_fn, "natural"):
        raise ValueError(
            "loss_fn has no likelihood, so it has no Gauss-Newton matrix; make it by "
            "functionalize(loss='cross_entropy' or 'squared_error'), or use hessian_product or fisher_product"
        )
    likelihood: Likelihood = loss_fn.likelihood  # type: ignore[attr-defined]

    def local(by: Calculus, params: Params, batch: Batch, vectors: Vectors) -> Vectors:
        outputs, pull, weight = by.vjp(lambda p: tuple(loss_fn.natural(p, batch)), params)
        outputs, weight, push = outputs.detach(), check_weight(weight)[..., None], push_of(by, outputs, pull)

        def product(v: Vectors) -> Vectors:
            return pull((weight * likelihood.curvature(outputs, push(v))).to(outputs))

        return by.each(product, vectors)

    return _mean("the Gauss-Newton matrix", local, params, batches)


def fisher_product(loss_fn: LossFn, params: Params, batches: Iterable[Batch]) -> Product:
    r"""Return `v ↦ F v`, with the empirical Fisher information of the data's own labels.

    $$F = \frac1N Σ_n g_n g_n^T, \qquad g_n = ∇ℓ_n$$

    No per-example gradient is formed: `⟨g_n, v⟩` is the loss's derivative along `v`, and weights its gradient.

    Cost of a product: a gradient, and for each of the `q` vectors about 1.5 more; memory: `q + 1` times a gradient's.

    Args:
        loss_fn: `(params, batch) -> losses[n]`.
        params: the parameters.
        batches: the batches, which every product goes through once.

    Returns:
        The product. Vectors meet the model in its own dtype and are summed over batches in at least float32.

    Raises:
        ValueError: if the batches can be gone through only once, or torch cannot differentiate the function twice.

    Example:
        >>> import torch
        >>> product = fisher_product(lambda p, x: x @ p["w"], {"w": torch.ones(2)}, [torch.tensor([[1.0, 2.0]])])
        >>> product({"w": torch.eye(2)})["w"]
        tensor([[1., 2.],
                [2., 4.]])
    """

    def local(by: Calculus, params: Params, batch: Batch, vectors: Vectors) -> Vectors:
        losses, pull, _ = by.vjp(lambda p: (loss_fn(p, batch), ()), params)
        push = push_of(by, losses, pull)
        return by.each(lambda v: pull(push(v)), vectors)

    return _mean("the empirical Fisher", local, params, batches)


def largest_eigenvalue(product: Product, like: Params, iterations: int = 50, seed: int = 0) -> float:
    """Estimate the eigenvalue of largest magnitude of a symmetric operator, with its sign, by power iteration.

    The estimate is a Rayleigh quotient, so its magnitude is at most the eigenvalue's.

    Args:
        product: the operator.
        like: the parameters.
        iterations: how many products.
        seed: of the vector that is started from.

    Returns:
        The estimate; 0 if the operator takes that vector to 0.

    Raises:
        ValueError: if `iterations` is less than 1.

    Example:
        >>> import torch
        >>> operator = lambda v: {"w": v["w"] * torch.tensor([1.0, -5.0])}
        >>> round(largest_eigenvalue(operator, {"w": torch.zeros(2)}), 3)
        -5.0
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    generator, quotient = torch.Generator().manual_seed(seed), 0.0
    vector = {n: widen(torch.randn((1, *p.shape), generator=generator).to(p.device, p.dtype)) for n, p in like.items()}
    for _ in range(iterations):
        length = norms(vector)
        if not bool(length > 0):
            return 0.0
        vector = scale(1 / length, vector)
        image = product(vector)
        quotient, vector = float(inner(vector, image)), image
    return quotient


def inner(a: Vectors, b: Vectors) -> Float[Tensor, " q"]:
    """Return the inner product of each vector with its counterpart, over all parameters, in at least float32."""
    return torch.stack([(widen(x) * widen(b[name])).reshape(x.shape[0], -1).sum(1) for name, x in a.items()]).sum(0)


def norms(a: Vectors) -> Float[Tensor, " q"]:
    """Return the norm of each vector over all parameters."""
    return inner(a, a).sqrt()


def scale(by: Float[Tensor, " q"], a: Vectors) -> Vectors:
    """Return each vector times its own number."""
    return {name: by.to(x).reshape(-1, *[1] * (x.ndim - 1)) * x for name, x in a.items()}


def add(a: Vectors, b: Vectors, times: Float[Tensor, " q"] | float = 1.0) -> Vectors:
    """Return `a + times · b`, with one number for all vectors or one for each."""
    step = scale(times, b) if isinstance(times, Tensor) else {name: times * x for name, x in b.items()}
    return {name: x + step[name] for name, x in a.items()}


def _mean(what: str, local: Local, params: Params, batches: Iterable[Batch]) -> Product:
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches is one batch, a {type(batches).__name__}; pass a list of batches, [batch]")
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be gone through once, and every product goes through "
            "all batches; pass list(batches), or a DataLoader"
        )
    plain = {name: p.detach() for name, p in params.items()}
    first = next(iter(batches), None)
    if first is None:
        raise ValueError(f"{what} is a mean over examples, and there is no batch")
    calculus = choose(what, local, plain, take(first, slice(0, min(1, batch_size(first)))))

    def product(vectors: Vectors) -> Vectors:
        _check(vectors, plain)
        tangents = {name: vectors[name].detach().to(p) for name, p in plain.items()}
        total: Vectors = {name: torch.zeros_like(widen(v)) for name, v in tangents.items()}
        count = 0
        with torch.no_grad(), under_vmap():
            for batch in batches:
                total = add(total, local(calculus, plain, batch, tangents))
                count += batch_size(batch)
        return {name: x / count for name, x in total.items()}

    return product


def _check(vectors: Vectors, params: Params) -> None:
    """Refuse vectors over other parameters."""
    if set(vectors) != set(params):
        raise ValueError(
            f"vectors must be over the {len(params)} parameters of the product; they differ in "
            f"{sorted(set(vectors) ^ set(params))[:4]}"
        )
    q = next(iter(vectors.values())).shape[:1]
    for name, p in params.items():
        v = vectors[name]
        if v.ndim != p.ndim + 1 or v.shape != (*q, *p.shape):
            raise ValueError(
                f"vectors[{name!r}] must be [q, {', '.join(map(str, p.shape))}], with one q for all parameters; got "
                f"{list(v.shape)}. One vector v is v[None]"
            )
