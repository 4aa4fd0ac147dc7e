"""Elementwise operations of a parameter and data (`add`, `sub`, `mul`), and `expand`: broadcasting, transposed."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.batched import Backward, Contributions, Family, Route, Saved, Scene
from influence.func.engine.ops.any import pull_back
from influence.func.engine.trace import Axis, Call, TracedUse, known_axis, op_name, position_dim, tensors_of

SUBTRACTED = {"sub": 1, "subtract": 1, "__sub__": 1, "rsub": 0, "__rsub__": 0}
"""Operations that subtract, and which of their arguments is subtracted."""
MULTIPLICATIONS = {"mul", "multiply", "__mul__", "__rmul__"}
OF_TWO = {"add", "__add__", "__radd__", *SUBTRACTED, *MULTIPLICATIONS}


def serves(use: TracedUse) -> bool:
    """Whether there is one parameter, at most one other tensor, and no example axis in the parameter."""
    call, op, out_axis = use.call, op_name(use.call.func), known_axis(use.outputs[0])
    if len(call.probes) != 1 or len(call.data) > 1 or (op in MULTIPLICATIONS and len(call.data) != 1):
        return False
    if op in OF_TWO and len(call.leaves) != 2:
        return False
    value = call.leaves[call.probes[0]].value
    aligned = out_axis.dim - (tensors_of(call.run())[0].ndim - value.ndim)
    return aligned < 0 or value.shape[aligned] == 1


def rows(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Serve the rows of a use: `±g`, or `g` times the other factor, summed over the axes that were broadcast."""
    (place,) = call.probes
    leaf, op, axis = call.leaves[place], op_name(call.func), known_axis(route.outputs[0])
    product, negative = op in MULTIPLICATIONS, place == SUBTRACTED.get(op)
    saved: Saved = [call.leaves[call.data[0]]] if product else []

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        g = gs[0] * saved[0] if product else (-gs[0] if negative else gs[0])
        grad = reduce_to(axis.split(g, scene.n), tuple(leaf.value.shape), scene.keep, axis)
        return pull_back(leaf, grad.to(leaf.value.dtype), scene)

    return saved, backward


FAMILY = Family("elementwise", (*OF_TWO, "expand", "expand_as"), serves, rows=rows)


def reduce_to(
    parts: Float[Tensor, "n ..."], shape: tuple[int, ...], keep: int | None, axis: Axis
) -> Float[Tensor, "n ..."]:
    """Sum `[n, *broadcast shape]` to `[n, *shape]`, the transpose of broadcasting; or `[n, keep, *shape]`."""
    if keep is None:
        lead = parts.ndim - 1 - len(shape)
        parts = parts.flatten(1, lead).sum(1) if lead else parts
        wide = [dim + 1 for dim, size in enumerate(shape) if size == 1 and parts.shape[dim + 1] != 1]
        return parts.sum(wide, keepdim=True) if wide else parts
    at = position_dim(parts, keep, axis)
    aligned = len(shape) - (parts.ndim - at)
    if aligned < 0 or shape[aligned] == 1:
        spread = parts.movedim(at, 1).unsqueeze(at + 1)
    else:
        eye = torch.eye(keep, dtype=parts.dtype, device=parts.device)
        spread = parts[:, None] * eye.reshape(keep, *(keep if dim == at else 1 for dim in range(1, parts.ndim)))
    return reduce_to(spread.flatten(0, 1), shape, None, axis).unflatten(0, (parts.shape[0], keep))
