"""The two rules that serve any operation: `vmap` of that one operation, and one example's output gradient at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.attention import under_vmap
from influence.func.engine.contributions import (
    Backward,
    Pieces,
    Route,
    Saved,
    Scene,
    add_pieces,
    position_dim,
    pull_back,
)
from influence.func.engine.trace import Axis, Call, known_axis, tensors_of


def one_op_vmap(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Any operation: `vmap` of its own `vjp`, each example with a batch of one."""
    batched = [i for i in call.data if route.inputs[i] is not None]

    def serve(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
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

    return [call.leaves[i] for i in batched], serve


def masked(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Any operation at all: its own `vjp`, with one example's output gradient at a time."""
    data = call.data

    def serve(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
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
                    cotangents.append(join(chosen, known_axis(axis), g.shape))
                found.append(pull(tuple(cotangents)))
            return [torch.stack(column) for column in zip(*found, strict=True)]

        return _leaf_gradients(call, scene, _per_position(one, route, scene)(gs))

    return [call.leaves[i] for i in data], serve


def _leaf_gradients(call: Call, scene: Scene, grads: Sequence[Tensor]) -> Pieces:
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
                masked.append(g * spread(mask, known_axis(axis), at, scene, g.ndim))
            found.append(serve(masked))
        return [torch.stack(column, dim=1) for column in zip(*found, strict=True)]

    return run


def join(parts: Float[Tensor, "n ..."], axis: Axis, shape: torch.Size) -> Float[Tensor, "..."]:
    """Undo `Axis.split`."""
    if not axis.flat:
        return parts.squeeze(axis.dim + 1).movedim(0, axis.dim)
    return parts.movedim(0, axis.dim + 1 if axis.inner else axis.dim).reshape(shape)


def spread(mask: Float[Tensor, " s"], axis: Axis, at: int, scene: Scene, ndim: int) -> Float[Tensor, "..."]:
    """Return a mask over positions in the shape in which it multiplies a whole batch."""
    if at == axis.dim and axis.flat:
        mask = mask.repeat_interleave(scene.n) if axis.inner else mask.repeat(scene.n)
    return mask.reshape([-1 if dim == at else 1 for dim in range(ndim)])
