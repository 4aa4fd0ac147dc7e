"""Linearising: derivatives of derivatives by `vjp` alone, by `torch.func` for all vectors at once or by autograd.

Forward mode would cost as much, fused kernels and many models refuse it, and it is not the transpose of backward
everywhere: it moves the row of an embedding's `padding_idx`, which has no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from influence.func.attention import under_vmap
from influence.func.engines import explain_torch
from influence.types import Batch, Params

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
