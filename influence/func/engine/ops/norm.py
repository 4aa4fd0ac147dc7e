"""Norms: `layer_norm`, `rms_norm`, `group_norm`, whose parameters scale and shift a normalised input."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from influence.func.engine.batched import Backward, Contributions, Family, Route, Saved, Scene, add_pieces
from influence.func.engine.ops.any import dense_pieces
from influence.func.engine.ops.elementwise import reduce_to
from influence.func.engine.trace import Call, TracedUse, base_name, known_axis, op_name

NAMES = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}
"""The arguments of each."""


def serves(use: TracedUse) -> bool:
    """Whether scale and shift are parameters, and examples lie outside what is normalised."""
    op, call, out_axis = op_name(use.call.func), use.call, known_axis(use.outputs[0])
    named = call.arguments(NAMES[op])
    leaves = [named.get("weight"), named.get("bias")]
    if any(leaf is not None and base_name(leaf) is None for leaf in leaves):
        return False
    if op == "group_norm":
        return out_axis.dim < 1 and not out_axis.flat
    return out_axis.dim < named["input"].ndim - len(named["normalized_shape"])


def layout(use: TracedUse) -> dict[str, dict[str, Any]]:
    """Return what a use tells of its scale and shift."""
    return {name: {"family": "norm"} for name in use.call.params}


def rows(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Serve the rows of a use: `g ⊙ normalised(x)` for the scale, `g` for the shift, summed over what they share."""
    op = op_name(call.func)
    named = call.arguments(NAMES[op])
    weight, bias = base_name(named["weight"]), base_name(named.get("bias"))
    x, eps, axis = named["input"], named["eps"], known_axis(route.outputs[0])

    def normalised(x: Tensor) -> Tensor:
        if op == "group_norm":
            return F.group_norm(x, named["num_groups"], None, None, 1e-5 if eps is None else eps)
        if op == "rms_norm":
            return F.rms_norm(x, named["normalized_shape"], None, eps)
        return F.layer_norm(x, named["normalized_shape"], None, None, 1e-5 if eps is None else eps)

    def feed(name: str, grad: Tensor) -> Contributions:
        shape = tuple(scene.values[name].shape)
        aligned = shape + (1,) * (grad.ndim - 2) if op == "group_norm" else shape
        reduced = reduce_to(axis.split(grad, scene.n), aligned, scene.keep, axis)
        return dense_pieces(name, reduced.reshape(*reduced.shape[: reduced.ndim - len(aligned)], *shape), scene)

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        (g,) = gs
        scale = feed(weight, g * normalised(saved[0])) if weight is not None else {}
        return add_pieces(scale, feed(bias, g) if bias is not None else {})

    return [x] if weight is not None else [], backward


FAMILY = Family("norm", tuple(NAMES), serves, rows=rows, layout=layout)
