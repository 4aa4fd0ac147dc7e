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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from influence.func.axes import Axis
from influence.func.factors import (
    Factor,
    OneHot,
    Patches,
    Plain,
    outer,
    position_dim,
    positions,
)
from influence.func.layout import ParamLayout
from influence.func.probe import Call, Expr, Probe, evaluate, op_name, tensors_of
from influence.func.sides import Side
from influence.func.transform import Block, Part, apply_part

Saved: TypeAlias = list[Tensor]
Pieces: TypeAlias = dict[int, Tensor]


class Feed(NamedTuple):
    """One block that a parameter feeds.

    Attributes:
        slot: number of the block.
        part: the sides its gradient goes through.
        block: the block.
        fused: whether a bias may ride on the weight of the same block (same left side, a matrix on the right).
    """

    slot: int
    part: Part
    block: Block
    fused: bool = False


class Scene(NamedTuple):
    """What every rule knows of the run.

    Attributes:
        n: number of examples.
        keep: number of token positions to keep apart, or `None`.
        params: layout of each parameter.
        feeds: the blocks each parameter feeds.
        values: plain values of the parameters.
    """

    n: int
    keep: int | None
    params: dict[str, ParamLayout]
    feeds: dict[str, list[Feed]]
    values: dict[str, Tensor]


class Route(NamedTuple):
    """How one use is served: decided in the plan.

    Attributes:
        rule: name of the rule.
        inputs: example axis of each plain tensor argument, by place.
        outputs: example axis of each tensor result.
    """

    rule: str
    inputs: dict[int, Axis | None]
    outputs: tuple[Axis | None, ...]


Backward: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Pieces]
Rule: TypeAlias = Callable[[Call, Route, Scene], tuple[Saved, Backward]]


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


def base_name(leaf: Any) -> str | None:
    """Return a leaf's parameter if it is one as it stands."""
    return leaf.source if isinstance(leaf, Probe) and isinstance(leaf.source, str) else None


def vector_pieces(name: str, v: Float[Tensor, "..."], scene: Scene) -> Pieces:
    """Feed the gradient of a vector: `v [n, d]`, or `[n, s, d]` with positions kept."""
    pieces: Pieces = {}
    for feed in scene.feeds.get(name, ()):
        left = feed.part.left.apply(v)
        pieces[feed.slot] = left if feed.part.right is None else left[..., None] * column(feed.part, left)
    return pieces


def column(part: Part, like: Tensor) -> Float[Tensor, " q"]:
    """Return where a vector goes in its matrix block: the right side of an axis of length one."""
    assert part.right is not None
    return part.right.apply(torch.ones(1, dtype=like.dtype, device=like.device))


def dense_pieces(name: str, grad: Float[Tensor, "n ..."], scene: Scene) -> Pieces:
    """Feed a gradient at hand, `[n, *shape]`, or `[n, s, *shape]` with positions kept."""
    layout = scene.params[name]
    flat = grad.flatten(0, 1) if scene.keep is not None else grad
    oriented = layout.orient(flat)
    pieces = {feed.slot: apply_part(feed.part, oriented) for feed in scene.feeds.get(name, ())}
    if scene.keep is None:
        return pieces
    return {slot: piece.unflatten(0, grad.shape[:2]) for slot, piece in pieces.items()}


def add_pieces(*many: Pieces) -> Pieces:
    """Add contributions block by block."""
    total: Pieces = {}
    for pieces in many:
        for slot, piece in pieces.items():
            total[slot] = total[slot] + piece if slot in total else piece
    return total


def outer_rule(
    name: str, factor: Factor, axis: int, scene: Scene, bias: str | None = None
) -> tuple[Saved, Callable[[Sequence[Tensor], Tensor], Pieces]]:
    """Serve a gradient of outer products, one factor of which is known now and the other is the output gradient.

    Args:
        name: the parameter.
        factor: the factor known now.
        axis: which axis of the stored parameter it belongs to.
        scene: the run.
        bias: a bias of the same use, added where it can ride along.

    Returns:
        What to remember, and the contribution once the other factor `g [n, s, d]` is here.
    """
    feeds = scene.feeds.get(name, [])
    known_is_left = (axis == 0) != scene.params[name].transposed
    bias_feeds = {feed.slot: feed for feed in scene.feeds.get(bias, ())} if bias else {}
    riding = {f.slot for f in feeds if f.fused and f.slot in bias_feeds and not known_is_left}
    saved: Saved = []
    reads: list[int] = []
    raw: int | None = None
    for feed in feeds:
        side = feed.part.left if known_is_left else _right(feed)
        if side.dense:
            seen = factor.through(side)
            saved.append(seen + column(bias_feeds[feed.slot].part, seen) if feed.slot in riding else seen)
            reads.append(len(saved) - 1)
        else:
            if raw is None:
                saved.append(factor.memory)
                raw = len(saved) - 1
            reads.append(raw)

    late = factor.forget()

    def backward(saved: Sequence[Tensor], g: Tensor) -> Pieces:
        pieces: Pieces = {}
        for feed, read in zip(feeds, reads, strict=True):
            known, other = (feed.part.left, _right(feed)) if known_is_left else (_right(feed), feed.part.left)
            g_side = other.apply(g)
            piece = outer(saved[read], g_side) if known.dense else late.meet(known, saved[read], g_side)
            pieces[feed.slot] = piece if known_is_left else piece.mT
        if bias is not None:
            rest = vector_pieces(bias, g.sum(-2), scene)
            pieces = add_pieces(pieces, {slot: piece for slot, piece in rest.items() if slot not in riding})
        return pieces

    return saved, backward


def linear(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`linear(x, W, b)`, `addmm(b, x, W)`, `x @ W`."""
    name, bias = linear_names(call)
    x, axis, x_is_first = linear_input(call, route)
    factor = Plain(positions(x, axis, scene.n, scene.keep))
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
    assert source is not None and axis is not None
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
    factor = Patches(x, kernel, settings)
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
            right = _right(feed)
            by_group = (patches if right.dense else right.apply(late._replace(x=patches).unfold())).reshape(
                n, groups, length, -1
            )
            full = (per_group @ by_group).flatten(1, 2)
            found[feed.slot] = feed.part.left.apply(full.mT).mT
        return add_pieces(found, pieces)

    return [factor.through(_right(feed)) if _right(feed).dense else x for feed in feeds], grouped


def _right(feed: Feed) -> Side:
    assert feed.part.right is not None
    return feed.part.right


EMBEDDING_NAMES = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def embedding(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`embedding(ids, W)`; torch gives the padding token no gradient, and so does this."""
    named = call.arguments(EMBEDDING_NAMES)
    name, ids = base_name(named["weight"]), named["input"]
    assert name is not None
    axis = route.inputs[_place(call, ids)]
    (out_axis,) = route.outputs
    assert axis is not None and out_axis is not None
    arranged = positions(ids[..., None], axis, scene.n, scene.keep)[..., 0]
    factor = one_hot(arranged, named["padding_idx"], scene.values[name].shape[0])
    saved, backward = outer_rule(name, factor, 0, scene)

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        return backward(saved, positions(gs[0], out_axis, scene.n, scene.keep))

    return saved, whole


def one_hot(ids: Tensor, padding_idx: int | None, size: int) -> OneHot:
    """Return tokens as one-hot factors; the padding token, negative or -1 for none in torch's kernels, is left out."""
    if padding_idx is None or padding_idx == -1:
        return OneHot(ids, size, None)
    return OneHot(ids, size, ids != padding_idx % size)


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
        reduced = reduce_to(axis.split(grad, scene.n), aligned, scene.keep)
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


def reduce_to(parts: Float[Tensor, "n ..."], shape: tuple[int, ...], keep: int | None) -> Float[Tensor, "n ..."]:
    """Sum `[n, *broadcast shape]` to `[n, *shape]`, the transpose of broadcasting; or `[n, keep, *shape]`."""
    if keep is None:
        lead = parts.ndim - 1 - len(shape)
        parts = parts.flatten(1, lead).sum(1) if lead else parts
        wide = [dim + 1 for dim, size in enumerate(shape) if size == 1 and parts.shape[dim + 1] != 1]
        return parts.sum(wide, keepdim=True) if wide else parts
    at = position_dim(parts, keep)
    aligned = len(shape) - (parts.ndim - at)
    if aligned < 0 or shape[aligned] == 1:
        spread = parts.movedim(at, 1).unsqueeze(at + 1)
    else:
        eye = torch.eye(keep, dtype=parts.dtype, device=parts.device)
        spread = parts[:, None] * eye.reshape(keep, *(keep if dim == at else 1 for dim in range(1, parts.ndim)))
    return reduce_to(spread.flatten(0, 1), shape, None).unflatten(0, (parts.shape[0], keep))


def elementwise(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """`add`, `sub`, `mul` of a parameter and data, and `expand`: the transpose of broadcasting."""
    (place,) = call.probes
    leaf, op = call.leaves[place], op_name(call.func)
    (axis,) = route.outputs
    assert axis is not None
    others = [call.leaves[i] for i in call.data]
    product = op in MULTIPLICATIONS
    negative = op in ("sub", "subtract", "__sub__") and place == 1 or op in ("rsub", "__rsub__") and place == 0
    saved: Saved = [others[0]] if product else []

    def whole(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        g = gs[0] * saved[0] if product else (-gs[0] if negative else gs[0])
        grad = reduce_to(axis.split(g, scene.n), tuple(leaf.value.shape), scene.keep)
        return pull_back(leaf, grad.to(leaf.value.dtype), scene)

    return saved, whole


ADDITIONS = {"add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub"}
MULTIPLICATIONS = {"mul", "multiply", "__mul__", "__rmul__"}
ELEMENTWISE = ADDITIONS | MULTIPLICATIONS | {"expand", "expand_as"}


def pull_back(leaf: Probe, grad: Float[Tensor, "n ..."], scene: Scene) -> Pieces:
    """Feed the gradient of what a probe stands for, `[n, *value shape]`, back to the parameters it came from."""
    source = leaf.source
    if isinstance(source, str):
        return dense_pieces(source, grad, scene)
    if op_name(source.func) == "embedding" and scene.keep is None:
        named = Call(source.func, list(source.leaves), source.spec).arguments(EMBEDDING_NAMES)
        name = base_name(named["weight"])
        if name is not None and not (named["max_norm"] or named["scale_grad_by_freq"]):
            ids = named["input"].reshape(1, -1).expand(grad.shape[0], -1)
            factor = one_hot(ids, named["padding_idx"], scene.values[name].shape[0])
            saved, backward = outer_rule(name, factor, 0, scene)
            return backward(saved, grad.reshape(grad.shape[0], ids.shape[1], -1))
    base = {name: scene.values[name] for name in leaf.names}
    _, pull = torch.func.vjp(lambda params: evaluate(source, params), base)
    flat = grad if scene.keep is None else grad.flatten(0, 1)
    found = torch.func.vmap(lambda cotangent: pull(cotangent)[0])(flat)
    if scene.keep is not None:
        found = {name: value.unflatten(0, grad.shape[:2]) for name, value in found.items()}
    return add_pieces(*(dense_pieces(name, value, scene) for name, value in found.items()))


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
                assert axis is not None
                at = [d for d in range(g.ndim) if d != axis.dim and g.shape[d] == scene.keep]
                if not at:
                    raise ValueError(f"no axis of {scene.keep} token positions in a result of shape {list(g.shape)}")
                mask = torch.zeros(scene.keep, dtype=g.dtype, device=g.device)
                mask[t] = 1
                masked.append(g * mask.reshape([-1 if d == at[0] else 1 for d in range(g.ndim)]))
            found.append(serve(masked))
        return [torch.stack(column, dim=1) for column in zip(*found, strict=True)]

    return run


def one_op_vmap(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Any operation: `vmap` of its own `vjp`, each example with a batch of one."""
    batched = [i for i in call.data if route.inputs[i] is not None]

    def serve(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Pieces:
        inputs = [_axis(route.inputs[i]).split(x, scene.n) for i, x in zip(batched, saved, strict=True)]
        return _leaf_gradients(call, scene, _per_position(lambda g: one(inputs, g), route, scene)(gs))

    def one(inputs: list[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
        cotangents = [_axis(axis).split(g, scene.n) for g, axis in zip(gs, route.outputs, strict=True)]
        values = [call.leaves[i].value for i in call.probes]

        def single(xs: list[Tensor], cotangent: list[Tensor]) -> tuple[Tensor, ...]:
            def function(*params: Tensor) -> tuple[Tensor, ...]:
                replaced = dict(zip(batched, xs, strict=True)) | dict(zip(call.probes, params, strict=True))
                return tuple(tensors_of(call.run(replaced)))

            return torch.func.vjp(function, *values)[1](tuple(cotangent))

        with MathAttention():
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

        _, pull = torch.func.vjp(function, *values)

        def one(gs: Sequence[Tensor]) -> list[Tensor]:
            found = []
            for i in range(scene.n):
                cotangents = []
                for g, axis in zip(gs, route.outputs, strict=True):
                    chosen = torch.zeros_like(_axis(axis).split(g, scene.n))
                    chosen[i] = _axis(axis).split(g, scene.n)[i]
                    cotangents.append(join(chosen, _axis(axis), g.shape))
                found.append(pull(tuple(cotangents)))
            return [torch.stack(column) for column in zip(*found, strict=True)]

        return _leaf_gradients(call, scene, _per_position(one, route, scene)(gs))

    return [call.leaves[i] for i in data], serve


def _axis(axis: Axis | None) -> Axis:
    assert axis is not None
    return axis


def join(parts: Float[Tensor, "n ..."], axis: Axis, shape: torch.Size) -> Float[Tensor, "..."]:
    """Undo `Axis.split`."""
    if not axis.flat:
        return parts.squeeze(axis.dim + 1).movedim(0, axis.dim)
    return parts.movedim(0, axis.dim + 1 if axis.inner else axis.dim).reshape(shape)


class MathAttention(torch.overrides.TorchFunctionMode):
    """Computes attention by plain operations: the fused kernels have no batching rule for `vmap`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled dot-product attention, let all else pass."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        named = dict(zip(names, args, strict=False)) | kwargs
        return attention(**named)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention, `softmax(q k^T · scale + mask) v`, as plain operations."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None:
        blocked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if blocked else scores + attn_mask
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


RULES: dict[str, Rule] = {
    "linear": linear,
    "conv": conv,
    "embedding": embedding,
    "norm": norm,
    "elementwise": elementwise,
    "per-op vmap": one_op_vmap,
    "masked": masked,
}
