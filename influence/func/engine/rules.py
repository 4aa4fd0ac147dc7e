"""Routes: which rule serves which use of a parameter, and what a function's uses tell of its parameters' layout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.func.engine.any_op import masked, one_op_vmap
from influence.func.engine.attention import under_vmap
from influence.func.engine.contributions import (
    EMBEDDING_NAMES,
    Backward,
    OneHot,
    Patches,
    Pieces,
    Plain,
    Route,
    Rule,
    Saved,
    Scene,
    add_pieces,
    base_name,
    dense_pieces,
    outer_rule,
    positions,
    pull_back,
    reduce_to,
    right_side,
    vector_pieces,
    without_padding,
)
from influence.func.engine.trace import (
    Axis,
    Call,
    CannotTrace,
    Expr,
    Probe,
    Trace,
    Use,
    UseKey,
    known_axis,
    op_name,
    tensors_of,
)
from influence.func.transform.layout import Layout, ParamLayout
from influence.types import Params


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


def traced_layout(params: Params, traced: Trace | None) -> Layout:
    """Return the layout of a hand-written function's parameters, from how they are used."""
    found: dict[str, dict[str, Any]] = {name: {"family": "bare"} for name in params}
    for key, use in () if traced is None else traced.uses.items():
        rule = _structural_rule(key, use)
        if rule == "linear":
            _, weight, bias, stored_in_out = linear_arguments(use.call)
            source = matrix_source(weight)
            assert source is not None
            name, flipped = source
            if found[name]["family"] == "bare":
                found[name] = {"family": "linear", "transposed": stored_in_out != flipped, "bias": base_name(bias)}
        elif rule == "conv":
            named = use.call.arguments(CONV_NAMES, {"groups": 1})
            name = base_name(named["weight"]) or ""
            found[name] = {"family": "conv", "groups": named["groups"], "bias": base_name(named["bias"])}
        elif rule in ("embedding", "norm"):
            for name in key.params:
                found[name] = {"family": rule}
    kept = {}
    for name, p in params.items():
        kept[name] = ParamLayout(tuple(p.shape), p.dtype, p.device, **found[name])
    return Layout(kept)


def choose_route(key: UseKey, use: Use) -> Route:
    """Choose the rule of one use.

    Raises:
        CannotTrace: if no rule can serve it.
    """
    rule = _structural_rule(key, use)
    if rule is None:
        if not all(use.outputs):
            raise CannotTrace(f"{key} mixes examples, or its result has no example axis")
        rule = "per-op vmap" if _slices_agree(use) else "masked"
    return Route(rule, use.inputs, use.outputs)


def _structural_rule(key: UseKey, use: Use) -> str | None:
    """Return the rule that an operation's name and arguments allow."""
    op, call = key.op, use.call
    axes_known = all(use.outputs) and len(use.outputs) == 1
    if not axes_known:
        return None
    (out_axis,) = use.outputs
    assert out_axis is not None
    if op in ("linear", "addmm", "matmul", "__matmul__", "mm"):
        x, weight, bias, _ = linear_arguments(call)
        axis = _input_axis(use, x)
        plain_bias = bias is None or base_name(bias) is not None or not isinstance(bias, Probe)
        extra = op == "addmm" and len(call.leaves) != 3
        fits = axis is not None and axis.dim < x.ndim - 1 and matrix_source(weight) is not None
        return "linear" if fits and plain_bias and not extra and not isinstance(x, Probe) else None
    if op in ("conv1d", "conv2d", "conv3d"):
        named = call.arguments(CONV_NAMES)
        axis = _input_axis(use, named["input"])
        bias_fits = (
            named["bias"] is None or base_name(named["bias"]) is not None or not isinstance(named["bias"], Probe)
        )
        fits = base_name(named["weight"]) is not None and axis == Axis(0) and bias_fits
        return "conv" if fits and named["input"].ndim == named["weight"].value.ndim else None
    if op == "embedding" and call.func is torch.nn.functional.embedding:
        named = call.arguments(EMBEDDING_NAMES)
        simple = not (named["max_norm"] or named["scale_grad_by_freq"])
        known = _input_axis(use, named["input"]) is not None and base_name(named["weight"]) is not None
        return "embedding" if simple and known else None
    if op in NORM_NAMES:
        named = call.arguments(NORM_NAMES[op])
        leaves = [named.get("weight"), named.get("bias")]
        bases = all(base_name(leaf) is not None for leaf in leaves if leaf is not None)
        normalised = 1 if op == "group_norm" else len(named["normalized_shape"])
        last = 1 if op == "group_norm" else named["input"].ndim - normalised
        return "norm" if bases and out_axis.dim < last and not (op == "group_norm" and out_axis.flat) else None
    if op in ELEMENTWISE:
        return "elementwise" if _elementwise_fits(use, op, out_axis) else None
    return None


def _elementwise_fits(use: Use, op: str, out_axis: Axis) -> bool:
    call = use.call
    if len(call.probes) != 1 or len(call.data) > 1 or (op in MULTIPLICATIONS and len(call.data) != 1):
        return False
    if op in ADDITIONS | MULTIPLICATIONS and len(call.leaves) != 2:
        return False
    value = call.leaves[call.probes[0]].value
    out = tensors_of(call.run())[0]
    aligned = out_axis.dim - (out.ndim - value.ndim)
    return aligned < 0 or value.shape[aligned] == 1


def _input_axis(use: Use, leaf: Any) -> Axis | None:
    for place, axis in use.inputs.items():
        if use.call.leaves[place] is leaf:
            return axis
    return None


def _slices_agree(use: Use) -> bool:
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
