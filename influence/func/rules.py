r"""One rule per family of operations: what to remember of a use, and how its gradient becomes a contribution.

Every rule answers the same question. An operation `y = f(x, w)` is seen; later its output gradient `g` arrives. What
does the use add to the per-example gradient of `w`, seen through each block's `L` and `R`? A rule returns what it
remembers and a pure function of that and `g`.

| rule | operations | contribution |
|---|---|---|
| linear | `linear`, `addmm`, `matmul` with the weight on the right | `Σ_s (L g_s)(R x_s)^T` |
| conv | `conv1d`, `conv2d`, `conv3d` | the same over patches: `R` becomes a convolution |
| embedding | `embedding` | `Σ_s L[:, id_s] (R g_s)^T` |
| norm | `layer_norm`, `rms_norm`, `group_norm` | `Σ_s g_s ⊙ x̂_s`, `Σ_s g_s` |
| elementwise | `add`, `mul`, `expand` and their kin | `Σ g` or `Σ g ⊙ x` over what was broadcast |
| per-op vmap | anything else whose arguments show the examples | `vmap` of that one operation's `vjp` |
| masked | anything else whose result shows them | its `vjp`, one example's gradient at a time |
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from influence.func.any_op import masked, one_op_vmap
from influence.func.axes import Axis
from influence.func.contributions import (
    EMBEDDING_NAMES,
    Backward,
    Pieces,
    Route,
    Rule,
    Saved,
    Scene,
    add_pieces,
    base_name,
    dense_pieces,
    outer_rule,
    pull_back,
    reduce_to,
    right_side,
    vector_pieces,
    without_padding,
)
from influence.func.factors import OneHot, Patches, Plain, positions
from influence.func.probe import Call, Expr, Probe, op_name


def matrix_source(leaf: Any) -> tuple[str, bool] | None:
    """Return `(parameter, flipped)` if a leaf is a 2-D parameter or its transpose."""
    if not isinstance(leaf, Probe) or leaf.value.ndim != 2:
        return None
    source, flipped = leaf.source, False
    while isinstance(source, Expr):
        inner = source.leaves[0]
        if op_name(source.func) not in ("t", "__get__.T", "__get__.mT", "transpose") or not isinstance(inner, Probe):
            return None
        if inner.value.ndim != 2:
            return None
        source, flipped = inner.source, not flipped
    return source, flipped


def linear(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`linear(x, W, b)`, `addmm(b, x, W)`, `x @ W`."""
    name, bias = linear_names(call)
    x, axis, x_is_first = linear_input(call, route)
    factor = Plain(positions(x.to(scene.values[name].dtype), axis, scene.n, scene.keep))
    saved, backward = outer_rule(name, factor, 0 if x_is_first else 1, scene, bias)
    (out_axis,) = route.outputs
    assert out_axis is not None

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        return backward(saved, positions(gs[0], out_axis, scene.n, scene.keep))

    return saved, whole


def linear_arguments(call: Call) -> tuple[Any, Any, Any, bool]:
    """Return `(x, weight, bias, whether the weight is [i, o])` of a linear map."""
    op = op_name(call.func)
    if op == "linear":
        named = call.arguments(("input", "weight", "bias"))
        return named["input"], named["weight"], named["bias"], False
    if op == "addmm":
        named = call.arguments(("input", "mat1", "mat2"))
        return named["mat1"], named["mat2"], named["input"], True
    named = call.arguments(("input", "other"))
    return named["input"], named["other"], None, True


def linear_names(call: Call) -> tuple[str, str | None]:
    """Return the parameters of a linear map: its weight, and its bias if that is one."""
    _, weight, bias, _ = linear_arguments(call)
    source = matrix_source(weight)
    assert source is not None
    return source[0], base_name(bias)


def linear_input(call: Call, route: Route) -> tuple[Tensor, Axis, bool]:
    """Return the input of a linear map, its example axis, and whether it belongs to the stored weight's first axis."""
    x, weight, _, stored_in_out = linear_arguments(call)
    source, axis = matrix_source(weight), route.inputs[_place(call, x)]
    assert source is not None
    assert axis is not None
    return x, axis, stored_in_out != source[1]


def _place(call: Call, leaf: Tensor) -> int:
    return next(i for i, other in enumerate(call.leaves) if other is leaf)


CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def conv(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`conv1d`, `conv2d`, `conv3d` over a batch."""
    named = call.arguments(CONV_NAMES, {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    name, bias, x = base_name(named["weight"]), base_name(named["bias"]), named["input"]
    assert name is not None
    settings = {key: named[key] for key in CONV_NAMES[3:]}
    kernel = tuple(scene.values[name].shape[1:])
    groups = settings["groups"]
    if scene.keep is not None:
        raise ValueError(f"{name}: a convolution has no token positions; leave it out with exclude=[...]")
    factor = Patches(x.to(scene.values[name].dtype), kernel, settings)
    late = factor.forget()
    feeds = scene.feeds.get(name, [])
    if groups == 1:
        saved, backward = outer_rule(name, factor, 1, scene, bias)

        def simple(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
            return backward(saved, gs[0].flatten(2).mT)

        return saved, simple

    def grouped(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        g = gs[0].flatten(2)
        pieces = vector_pieces(bias, g.sum(-1), scene) if bias else {}
        n, o, length = g.shape
        per_group = g.reshape(n, groups, o // groups, length)
        found: Pieces = {}
        for feed, patches in zip(feeds, saved, strict=True):
            right = right_side(feed)
            by_group = (patches if right.dense else right.apply(late._replace(x=patches).unfold())).reshape(
                n, groups, length, -1
            )
            full = (per_group @ by_group).flatten(1, 2)
            found[feed.slot] = feed.part.left.apply(full.mT).mT
        return add_pieces(found, pieces)

    return [factor.through(right_side(feed)) if right_side(feed).dense else x for feed in feeds], grouped


def embedding(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`embedding(ids, W)`; torch gives the padding token no gradient, and so does this."""
    named = call.arguments(EMBEDDING_NAMES)
    name, ids = base_name(named["weight"]), named["input"]
    assert name is not None
    axis = route.inputs[_place(call, ids)]
    (out_axis,) = route.outputs
    assert axis is not None
    assert out_axis is not None
    arranged = positions(ids[..., None], axis, scene.n, scene.keep)[..., 0]
    size = scene.values[name].shape[0]
    saved, backward = outer_rule(name, OneHot(arranged, size), 0, scene)

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        g = positions(gs[0], out_axis, scene.n, scene.keep)
        return backward(saved, without_padding(g, arranged, named["padding_idx"], size))

    return saved, whole


def norm(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`layer_norm`, `rms_norm`, `group_norm`: scale and shift of a normalised input."""
    op = op_name(call.func)
    named = call.arguments(NORM_NAMES[op])
    weight, bias = base_name(named["weight"]), base_name(named.get("bias"))
    x, eps = named["input"], named["eps"]
    (axis,) = route.outputs
    assert axis is not None

    def normalised(x: Tensor) -> Tensor:
        if op == "group_norm":
            return F.group_norm(x, named["num_groups"], None, None, 1e-5 if eps is None else eps)
        if op == "rms_norm":
            return F.rms_norm(x, named["normalized_shape"], None, eps)
        return F.layer_norm(x, named["normalized_shape"], None, None, 1e-5 if eps is None else eps)

    def feed(name: str, grad: Tensor) -> Pieces:
        shape = tuple(scene.values[name].shape)
        aligned = shape + (1,) * (grad.ndim - 2) if op == "group_norm" else shape
        reduced = reduce_to(axis.split(grad, scene.n), aligned, scene.keep, axis)
        return dense_pieces(name, reduced.reshape(*reduced.shape[: reduced.ndim - len(aligned)], *shape), scene)

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        (g,) = gs
        scale = feed(weight, g * normalised(saved[0])) if weight is not None else {}
        return add_pieces(scale, feed(bias, g) if bias is not None else {})

    return [x] if weight is not None else [], whole


NORM_NAMES = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}


def elementwise(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`add`, `sub`, `mul` of a parameter and data, and `expand`: the transpose of broadcasting."""
    (place,) = call.probes
    leaf, op = call.leaves[place], op_name(call.func)
    (axis,) = route.outputs
    assert axis is not None
    others = [call.leaves[i] for i in call.data]
    product = op in MULTIPLICATIONS
    subtracted = {"sub": 1, "subtract": 1, "__sub__": 1, "rsub": 0, "__rsub__": 0}
    negative = place == subtracted.get(op)
    saved: Saved = [others[0]] if product else []

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        g = gs[0] * saved[0] if product else (-gs[0] if negative else gs[0])
        grad = reduce_to(axis.split(g, scene.n), tuple(leaf.value.shape), scene.keep, axis)
        return pull_back(leaf, grad.to(leaf.value.dtype), scene)

    return saved, whole


ADDITIONS = {"add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub"}


MULTIPLICATIONS = {"mul", "multiply", "__mul__", "__rmul__"}


ELEMENTWISE = ADDITIONS | MULTIPLICATIONS | {"expand", "expand_as"}


RULES: dict[str, Rule] = {
    "linear": linear,
    "conv": conv,
    "embedding": embedding,
    "norm": norm,
    "elementwise": elementwise,
    "per-op vmap": one_op_vmap,
    "masked": masked,
}
