"""Serves any operation: by `vmap` of that operation, or with one example's output gradient at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.attention import under_vmap
from influence.func.engine.batched import Backward, Contributions, Family, Route, Saved, Scene, add_pieces
from influence.func.engine.ops.embedding import table_pieces
from influence.func.engine.trace import (
    Axis,
    Call,
    Probe,
    TracedUse,
    evaluate,
    known_axis,
    position_dim,
    tensors_of,
)
from influence.func.transform.folding import apply_part


def slices_agree(use: TracedUse) -> bool:
    """Whether an operation on one example's slices gives that example's slice, and `vmap` can run it."""
    call = use.call
    places = [i for i in call.data if use.inputs[i] is not None]
    if not places:
        return False
    inputs = [known_axis(use.inputs[i]).split(call.leaves[i], 3) for i in places]
    expected = [known_axis(axis).split(t, 3) for t, axis in zip(tensors_of(call.run()), use.outputs, strict=True)]

    def one(xs: list[Tensor]) -> list[Tensor]:
        return tensors_of(call.run(dict(zip(places, xs, strict=True))))

    try:
        with torch.no_grad(), under_vmap():
            got = torch.func.vmap(one)(inputs)
    except (RuntimeError, ValueError, IndexError):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-30))
        for a, b in zip(got, expected, strict=True)
    )


def by_vmap(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Serve the rows of a use by `vmap` of its own `vjp`, each example with a batch of one."""
    batched = [i for i in call.data if route.inputs[i] is not None]

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        inputs = [known_axis(route.inputs[i]).split(x, scene.n) for i, x in zip(batched, saved, strict=True)]
        return _leaf_gradients(call, scene, _per_position(lambda g: one(inputs, g), route, scene)(gs))

    def one(inputs: list[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
        cotangents = [known_axis(axis).split(g, scene.n) for g, axis in zip(gs, route.outputs, strict=True)]
        values = [call.leaves[i].value for i in call.probes]

        def single(xs: list[Tensor], cotangent: list[Tensor]) -> tuple[Tensor, ...]:
            def function(*params: Tensor) -> tuple[Tensor, ...]:
                replaced = dict(zip(batched, xs, strict=True)) | dict(zip(call.probes, params, strict=True))
                return tuple(tensors_of(call.run(replaced)))

            return torch.func.vjp(function, *values)[1](tuple(cotangent))

        with under_vmap():
            return list(torch.func.vmap(single)(inputs, cotangents))

    return [call.leaves[i] for i in batched], backward


def by_mask(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Serve the rows of a use by its own `vjp`, with one example's output gradient at a time."""
    data = call.data

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        values = [call.leaves[i].value for i in call.probes]

        def function(*params: Tensor) -> tuple[Tensor, ...]:
            replaced = dict(zip(data, saved, strict=True)) | dict(zip(call.probes, params, strict=True))
            return tuple(tensors_of(call.run(replaced)))

        pull = torch.func.vjp(function, *values)[1]

        def one(gs: Sequence[Tensor]) -> list[Tensor]:
            found = []
            for i in range(scene.n):
                cotangents = []
                for g, axis in zip(gs, route.outputs, strict=True):
                    chosen = torch.zeros_like(known_axis(axis).split(g, scene.n))
                    chosen[i] = known_axis(axis).split(g, scene.n)[i]
                    cotangents.append(_join(chosen, known_axis(axis), g.shape))
                found.append(pull(tuple(cotangents)))
            return [torch.stack(column) for column in zip(*found, strict=True)]

        return _leaf_gradients(call, scene, _per_position(one, route, scene)(gs))

    return [call.leaves[i] for i in data], backward


VMAP = Family("per-op vmap", (), slices_agree, rows=by_vmap)
MASKED = Family("masked", (), lambda use: True, rows=by_mask)


def _leaf_gradients(call: Call, scene: Scene, grads: Sequence[Tensor]) -> Contributions:
    return add_pieces(*(pull_back(call.leaves[i], grad, scene) for i, grad in zip(call.probes, grads, strict=True)))


def _per_position(serve: Callable[[Sequence[Tensor]], list[Tensor]], route: Route, scene: Scene) -> Any:
    """Run a rule that knows no positions once per position, everything else of the output gradient masked."""

    def run(gs: Sequence[Tensor]) -> list[Tensor]:
        if scene.keep is None:
            return serve(gs)
        found = []
        for t in range(scene.keep):
            masked = []
            for g, axis in zip(gs, route.outputs, strict=True):
                at = position_dim(known_axis(axis).split(g, scene.n), scene.keep, known_axis(axis)) - 1
                mask = torch.zeros(scene.keep, dtype=g.dtype, device=g.device)
                mask[t] = 1
                masked.append(g * _spread(mask, known_axis(axis), at, scene, g.ndim))
            found.append(serve(masked))
        return [torch.stack(column, dim=1) for column in zip(*found, strict=True)]

    return run


def _join(parts: Float[Tensor, "n ..."], axis: Axis, shape: torch.Size) -> Float[Tensor, "..."]:
    """Undo `Axis.split`."""
    if not axis.flat:
        return parts.squeeze(axis.dim + 1).movedim(0, axis.dim)
    return parts.movedim(0, axis.dim + 1 if axis.inner else axis.dim).reshape(shape)


def _spread(mask: Float[Tensor, " s"], axis: Axis, at: int, scene: Scene, ndim: int) -> Float[Tensor, "..."]:
    """Return a mask over positions in the shape in which it multiplies a whole batch."""
    if at == axis.dim and axis.flat:
        mask = mask.repeat_interleave(scene.n) if axis.inner else mask.repeat(scene.n)
    return mask.reshape([-1 if dim == at else 1 for dim in range(ndim)])


def pull_back(leaf: Probe, grad: Float[Tensor, "n ..."], scene: Scene) -> Contributions:
    """Feed the gradient of what a probe stands for, `[n, *value shape]`, back to the parameters it came from."""
    source = leaf.source
    if isinstance(source, str):
        return dense_pieces(source, grad, scene)
    looked_up = table_pieces(source, grad, scene)
    if looked_up is not None:
        return looked_up
    base = {name: scene.values[name] for name in leaf.names}
    pull = torch.func.vjp(lambda params: evaluate(source, params), base)[1]
    flat = grad if scene.keep is None else grad.flatten(0, 1)
    with under_vmap():
        found = torch.func.vmap(lambda cotangent: pull(cotangent)[0])(flat)
    if scene.keep is not None:
        found = {name: value.unflatten(0, grad.shape[:2]) for name, value in found.items()}
    return add_pieces(*(dense_pieces(name, value, scene) for name, value in found.items()))


def dense_pieces(name: str, grad: Float[Tensor, "n ..."], scene: Scene) -> Contributions:
    """Feed a gradient at hand, `[n, *shape]`, or `[n, s, *shape]` with positions kept."""
    layout = scene.params[name]
    grad = grad.to(scene.values[name].dtype)
    oriented = layout.orient(grad if scene.keep is None else grad.flatten(0, 1))
    pieces: Contributions = {}
    for feed in scene.feeds.get(name, ()):
        piece = apply_part(feed.part, oriented)
        pieces[feed.slot] = piece if scene.keep is None else piece.unflatten(0, grad.shape[:2])
    return pieces
