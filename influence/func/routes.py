"""Routes: which rule serves which use of a parameter, and what a function's uses tell of its parameters' layout."""

from typing import Any

import torch
from torch import Tensor

from influence.func.attention import under_vmap
from influence.func.axes import Axis, known_axis
from influence.func.contributions import EMBEDDING_NAMES, Route, base_name
from influence.func.layout import Layout, ParamLayout
from influence.func.probe import Probe, UseKey, tensors_of
from influence.func.rules import (
    ADDITIONS,
    CONV_NAMES,
    ELEMENTWISE,
    MULTIPLICATIONS,
    NORM_NAMES,
    linear_arguments,
    matrix_source,
)
from influence.func.trace import CannotTrace, Trace, Use
from influence.types import Params


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
