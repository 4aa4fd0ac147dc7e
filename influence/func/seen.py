"""Seen: what a use of a parameter shows of both factors of its gradient, one when it runs, one in the backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from influence.func.axes import NO_POSITION, Axis
from influence.func.contributions import EMBEDDING_NAMES, Route, Scene, base_name, column
from influence.func.covariates import Affine, Covariate, Dense, Grouped, Tokens
from influence.func.factors import OneHot, Patches, positions
from influence.func.probe import Call
from influence.func.rules import CONV_NAMES, linear_input, linear_names
from influence.func.sides import Side

Mask: TypeAlias = Bool[Tensor, "n s"] | None
"""Which positions of a batch are tokens; `None` where all are."""


@dataclass(frozen=True)
class Seen:
    """One use, with what is known of it in the forward pass.

    Attributes:
        weight: the parameter.
        bias: a bias of the same use.
        source: the tensor that came in.
        known_is_left: whether what came in belongs to the left side of the blocks.
        shares: whether another use of `source` by the same kind of operation sees the same factor.
        count: number of real positions.
        known: `(side, the bias's part or None, max_side) -> covariate` of what came in.
        gradient: arranges the output gradient.
        late: `(arranged gradient, side, max_side) -> covariate`.
        total: the output gradient summed over positions, `[n, o]`.
    """

    weight: str
    bias: str | None
    source: Tensor
    known_is_left: bool
    shares: bool
    count: int
    known: Callable[[Side, Any, int], Covariate]
    gradient: Callable[[Tensor], Tensor]
    late: Callable[[Tensor, Side, int], Covariate]
    total: Callable[[Tensor], Tensor]


def _see_linear(call: Call, route: Route, scene: Scene, mask: Mask) -> Seen:
    weight, bias = linear_names(call)
    x, axis, x_is_first = linear_input(call, route)
    (out_axis,) = route.outputs
    assert out_axis is not None
    n = scene.n
    tokens = real(x, axis, scene.n, mask, weight)
    inputs = positions(x.detach().to(scene.values[weight].dtype), axis, n, None)

    def known(side: Side, beside: Any, max_side: int) -> Covariate:
        if beside is not None and behind(side, beside.right) and side.size <= max_side:
            x = inputs[..., side.start : side.stop]
            return Affine(x if tokens is None else x * tokens[..., None], tokens)
        seen = side.apply(inputs)
        seen = seen if beside is None else seen + column(beside, seen)
        return Dense(seen if tokens is None else seen * tokens[..., None], seen.shape[-1] > max_side)

    def gradient(g: Tensor) -> Tensor:
        arranged = positions(g, out_axis, n, None)
        there = real(g, out_axis, scene.n, mask, weight)
        return arranged if there is None else arranged * there[..., None]

    return Seen(
        weight,
        bias,
        x,
        x_is_first != scene.params[weight].transposed,
        True,
        inputs.shape[0] * inputs.shape[1] if tokens is None else int(tokens.sum()),
        known,
        gradient,
        lambda g, side, max_side: Dense(side.apply(g), side.size > max_side),
        lambda g: g.sum(-2),
    )


def behind(side: Side, beside: Side) -> bool:
    """Whether a bias's side only puts a one behind what a weight's side only selects."""
    return side.selects and beside.selects and (side.before, side.after) == (0, 1) and beside.after == 0


def _see_conv(call: Call, route: Route, scene: Scene, mask: Mask) -> Seen:
    named = call.arguments(CONV_NAMES, {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    weight, bias, x = base_name(named["weight"]), base_name(named["bias"]), named["input"]
    assert weight is not None
    if mask is not None:
        raise ValueError(
            f"{weight} is a convolution over padded examples: its patches mix tokens and padding. Fit on batches "
            "without padding, or leave it out (exclude=…)"
        )
    settings, groups = {key: named[key] for key in CONV_NAMES[3:]}, int(named["groups"])
    values = scene.values[weight]
    patches = Patches(x.detach().to(values.dtype), tuple(values.shape[1:]), settings).unfold()

    def known(side: Side, beside: Any, max_side: int) -> Covariate:
        seen = side.apply(patches)
        return Dense(seen if beside is None else seen + column(beside, seen), seen.shape[-1] > max_side)

    def late(g: Tensor, side: Side, max_side: int) -> Covariate:
        if groups == 1:
            return Dense(side.apply(g), side.size > max_side)
        if not side.trivial and side.dense:
            raise ValueError(
                f"{weight} is a grouped convolution, whose groups see inputs of their own: after a matrix on its "
                "output side it has no Kronecker factors. Fit before the projection, or leave it out (exclude=…)"
            )
        by_group = side.apply(g).mT.unflatten(1, (groups, -1)).mT
        return Grouped(by_group, side.size > max_side)

    return Seen(
        weight,
        bias,
        x,
        False,
        False,
        patches.shape[0] * patches.shape[1],
        known,
        lambda g: g.flatten(2).mT,
        late,
        lambda g: g.sum(-2),
    )


def _see_embedding(call: Call, route: Route, scene: Scene, mask: Mask) -> Seen:
    named = call.arguments(EMBEDDING_NAMES)
    weight, ids = base_name(named["weight"]), named["input"]
    assert weight is not None
    place = next(i for i, leaf in enumerate(call.leaves) if leaf is ids)
    axis, (out_axis,) = route.inputs[place], route.outputs
    assert axis is not None
    assert out_axis is not None
    n = scene.n
    arranged = positions(ids[..., None], axis, n, None)[..., 0]
    values = scene.values[weight]
    masked = real(ids[..., None], axis, scene.n, mask, weight)
    live = torch.ones_like(arranged, dtype=torch.bool) if masked is None else masked
    if named["padding_idx"] is not None:
        live = live & (arranged != named["padding_idx"] % values.shape[0])

    def known(side: Side, beside: Any, max_side: int) -> Covariate:
        if side.dense:
            return Dense(OneHot(arranged, values.shape[0]).through(side) * live[..., None], side.size > max_side)
        scale = side.apply(values.new_ones(values.shape[0]))
        return Tokens(arranged, scale, live)

    return Seen(
        weight,
        None,
        ids,
        True,
        False,
        int(live.sum()),
        known,
        lambda g: positions(g, out_axis, n, None) * live[..., None],
        lambda g, side, max_side: Dense(side.apply(g), side.size > max_side),
        lambda g: g.sum(-2),
    )


USES: dict[str, Callable[[Call, Route, Scene, Mask], Seen]] = {
    "linear": _see_linear,
    "conv": _see_conv,
    "embedding": _see_embedding,
}


def real(x: Shaped[Tensor, "..."], axis: Axis, n: int, mask: Mask, what: str) -> Bool[Tensor, "n s"] | None:
    """Return which positions of a tensor, arranged as `positions` does, are tokens; `None` where all are.

    Raises:
        ValueError: if padding cannot be told from tokens.
    """
    if mask is None or axis.position == NO_POSITION:
        return None
    parts = axis.split(x, n)
    if parts[..., 0].numel() == n:
        return None
    at = None if axis.position is None else axis.position + 1
    if at is None or at >= parts.ndim - 1 or parts.shape[at] != mask.shape[1]:
        raise ValueError(
            f"{what} reads padded examples, and where its positions are cannot be told, so padding would count as "
            "data. Fit on batches without padding, or leave its parameters out (exclude=…)"
        )
    shape = [n, *(parts.shape[dim] if dim == at else 1 for dim in range(1, parts.ndim - 1))]
    return mask.reshape(shape).expand(parts.shape[:-1]).flatten(1)
