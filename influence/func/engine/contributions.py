"""Contributions: what one use of a parameter adds to its per-example gradient, seen through each block's sides."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from influence.func.engine.attention import under_vmap
from influence.func.engine.trace import Axis, Call, Probe, evaluate
from influence.func.transform.folding import Block, Part, Side, apply_part
from influence.func.transform.layout import ParamLayout


@runtime_checkable
class Factor(Protocol):
    """One factor of an outer product, `[n, s, d]` or, with positions kept, `[n, s, r, d]`."""

    @property
    def memory(self) -> Tensor:
        """What to remember of a factor that no side makes smaller."""
        ...

    def through(self, side: Side) -> Tensor:
        """Return the factor after a matrix side, `[n, s, p]`."""
        ...

    def forget(self) -> "Factor":
        """Return the factor without its memory."""
        ...

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return `Σ_s (side factor_s + column) ⊗ other_s`, from what was remembered."""
        ...


def positions(x: Shaped[Tensor, "..."], axis: Axis, n: int, keep: int | None) -> Shaped[Tensor, "..."]:
    """Arrange a tensor whose last axis holds features as `[n, s, d]`, or `[n, keep, r, d]` where positions are kept.

    Args:
        x: the tensor.
        axis: its example axis.
        n: number of examples.
        keep: the number of positions, if they must stay apart.

    Returns:
        The rearranged tensor.
    """
    parts = axis.split(x, n)
    if keep is None:
        return parts.flatten(1, -2)
    moved = parts.movedim(position_dim(parts[..., 0], keep, axis), 1)
    return moved.reshape(n, keep, -1, moved.shape[-1])


def position_dim(parts: Shaped[Tensor, "n ..."], keep: int, axis: Axis) -> int:
    """Return the axis of token positions of a split tensor.

    Raises:
        ValueError: if there is none, or more than one that it could be.
    """
    dims = [dim for dim in range(1, parts.ndim) if parts.shape[dim] == keep]
    if axis.position is not None:
        dims = [axis.position + 1] if axis.position + 1 in dims else []
    elif keep == 1:
        dims = dims[:1]
    if len(dims) != 1:
        found = "no axis" if not dims else f"{len(dims)} axes that could be the one"
        raise ValueError(f"{found} of {keep} token positions in a use of shape {list(parts.shape[1:])} per example")
    return dims[0]


class Plain(NamedTuple):
    """A factor at hand."""

    x: Tensor

    @property
    def memory(self) -> Tensor:
        """The factor."""
        return self.x

    def through(self, side: Side) -> Tensor:
        """Return the factor after a side."""
        return side.apply(self.x)

    def forget(self) -> "Plain":
        """Return a factor that keeps nothing alive."""
        return Plain(torch.empty(0))

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        seen = side.apply(memory)
        return outer(seen if column is None else seen + column, other)


class OneHot(NamedTuple):
    """One-hot tokens, never formed: a side is looked up."""

    ids: Int[Tensor, "..."]
    size: int

    @property
    def memory(self) -> Tensor:
        """The tokens."""
        return self.ids

    def through(self, side: Side) -> Tensor:
        """Return the columns of a side's matrix at the tokens."""
        assert side.matrix is not None
        whole = F.pad(side.matrix, (side.start, side.source - side.stop))
        return F.embedding(self.ids, whole.mT)

    def forget(self) -> "OneHot":
        """Return the factor: tokens are small."""
        return self

    def meet(
        self, side: Side, memory: Tensor, other: Float[Tensor, "n ... q"], column: Tensor | None = None
    ) -> Float[Tensor, "n ... q"]:
        """Return `Σ_s (side onehot_s) ⊗ other_s`, `[n, size, q]`, by scattering; an embedding has no bias."""
        assert column is None
        out = other.new_zeros(*other.shape[:-2], self.size, other.shape[-1])
        return side.apply(out.scatter_add(-2, memory[..., None].expand_as(other), other).mT).mT


class Patches(NamedTuple):
    """The patches a convolution reads, `[n, groups · positions, channels · kernel]`: a side is a convolution."""

    x: Float[Tensor, "n c *space"]
    kernel: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def memory(self) -> Tensor:
        """The input, not its patches: they are unfolded when they are needed."""
        return self.x

    def forget(self) -> "Patches":
        """Return a factor that keeps nothing alive."""
        return self._replace(x=torch.empty(0, 0))

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        patches = self._replace(x=memory).unfold()
        return Plain(patches).meet(side, patches, other, column)

    def through(self, side: Side) -> Tensor:
        """Return the patches after a side: a convolution with the side's rows as kernels."""
        assert side.matrix is not None
        if side.stop - side.start != side.source:
            return side.apply(self.unfold())
        groups, q = self.settings["groups"], side.matrix.shape[0]
        weight = side.matrix.reshape(q, *self.kernel).repeat(groups, *(1 for _ in self.kernel))
        out = convolve(self.x, weight, self.settings)
        return out.reshape(out.shape[0], groups, q, -1).transpose(2, 3).flatten(1, 2)

    def unfold(self) -> Float[Tensor, "n gs ck"]:
        """Return the patches themselves."""
        rank, kernel = len(self.kernel) - 1, self.kernel[1:]
        stride, dilation = (expand(self.settings[key], rank) for key in ("stride", "dilation"))
        x = self.x
        pad = self.settings["padding"]
        if pad == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            widths = [(t // 2, t - t // 2) for t in totals]
        else:
            widths = [(p, p) for p in expand(0 if pad == "valid" else pad, rank)]
        x = F.pad(x, [w for pair in reversed(widths) for w in pair])
        for i in range(rank):
            span = dilation[i] * (kernel[i] - 1) + 1
            x = x.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
        n, groups = x.shape[0], self.settings["groups"]
        space = x.shape[2 : 2 + rank]
        x = x.reshape(n, groups, self.kernel[0], *space, *kernel)
        x = x.movedim(2, 2 + rank)
        return x.reshape(n, groups * space.numel(), -1)


def convolve(x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """Run the convolution of the weight's rank."""
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[weight.ndim - 2]
    return conv(x, weight, None, **settings)


def expand(value: int | tuple[int, ...] | list[int], rank: int) -> tuple[int, ...]:
    """Return a per-dimension setting as a tuple."""
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) if len(value) == rank else (value[0],) * rank


def outer(left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sum outer products over positions: `[n, s, p] × [n, s, q] -> [n, p, q]`, kept positions stay in front."""
    return left.mT @ right


Saved: TypeAlias = list[Tensor]


Piece: TypeAlias = Callable[[slice], Tensor]
"""A contribution that is formed for a few examples at a time: `piece(slice) -> [few, o, i]`."""
Pieces: TypeAlias = dict[int, Tensor | Piece]
"""Contributions by block; lazy where the block's linear maps need its whole gradient."""


class Feed(NamedTuple):
    """One block that a parameter feeds.

    Attributes:
        slot: number of the block.
        part: the sides its gradient goes through.
        block: the block.
        fused: whether a bias may ride on the weight of the same block (same left side, one form on the right).
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


def base_name(leaf: Any) -> str | None:
    """Return a leaf's parameter if it is one as it stands."""
    return leaf.source if isinstance(leaf, Probe) and isinstance(leaf.source, str) else None


def vector_pieces(name: str, v: Float[Tensor, "..."], scene: Scene, besides: Collection[int] = ()) -> Pieces:
    """Feed the gradient of a vector, `v [n, d]` or `[n, s, d]` with positions kept, to all blocks but some."""
    pieces: Pieces = {}
    for feed in scene.feeds.get(name, ()):
        if feed.slot in besides:
            continue
        left = feed.part.left.apply(v)
        pieces[feed.slot] = left if feed.part.right is None else _columns(left, column(feed.part, left), feed)
    return pieces


def _columns(left: Float[Tensor, "... p"], right: Float[Tensor, " q"], feed: Feed) -> Tensor | Piece:
    return (lambda some: left[some, ..., None] * right) if feed.block.linear else left[..., None] * right


def column(part: Part, like: Tensor) -> Float[Tensor, " q"]:
    """Return where a vector goes in its matrix block: the right side of an axis of length one."""
    assert part.right is not None
    return part.right.apply(torch.ones(1, dtype=like.dtype, device=like.device))


def dense_pieces(name: str, grad: Float[Tensor, "n ..."], scene: Scene) -> Pieces:
    """Feed a gradient at hand, `[n, *shape]`, or `[n, s, *shape]` with positions kept."""
    layout = scene.params[name]
    grad = grad.to(scene.values[name].dtype)
    flat = grad.flatten(0, 1) if scene.keep is not None else grad
    oriented = layout.orient(flat)
    pieces: Pieces = {}
    for feed in scene.feeds.get(name, ()):
        piece = apply_part(feed.part, oriented)
        pieces[feed.slot] = piece if scene.keep is None else piece.unflatten(0, grad.shape[:2])
    return pieces


def add_pieces(*many: Pieces) -> Pieces:
    """Add contributions block by block."""
    total: Pieces = {}
    for pieces in many:
        for slot, piece in pieces.items():
            total[slot] = _sum(total[slot], piece) if slot in total else piece
    return total


def _sum(a: Tensor | Piece, b: Tensor | Piece) -> Tensor | Piece:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    return lambda some: some_of(a, some) + some_of(b, some)


def some_of(piece: Tensor | Piece, some: slice) -> Tensor:
    """Return a contribution for some examples."""
    return piece[some] if isinstance(piece, Tensor) else piece(some)


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
    columns: list[Tensor | None] = []
    raw: int | None = None
    for feed in feeds:
        side = feed.part.left if known_is_left else right_side(feed)
        columns.append(None)
        if side.dense:
            seen = factor.through(side)
            saved.append(seen + column(bias_feeds[feed.slot].part, seen) if feed.slot in riding else seen)
            reads.append(len(saved) - 1)
        else:
            if feed.slot in riding:
                columns[-1] = column(bias_feeds[feed.slot].part, scene.values[name])
            if raw is None:
                saved.append(factor.memory)
                raw = len(saved) - 1
            reads.append(raw)

    late = factor.forget()

    dtype = scene.values[name].dtype

    def backward(saved: Sequence[Tensor], g: Tensor) -> Pieces:
        g = g.to(dtype)
        pieces: Pieces = {}
        for feed, read, constant in zip(feeds, reads, columns, strict=True):
            known, other = (feed.part.left, right_side(feed)) if known_is_left else (right_side(feed), feed.part.left)
            product = _Product(late, known, saved[read], other.apply(g), known_is_left, constant)
            pieces[feed.slot] = product if feed.block.linear else product(slice(None))
        if bias is not None:
            pieces = add_pieces(pieces, vector_pieces(bias, g.sum(-2), scene, riding))
        return pieces

    return saved, backward


@dataclass(frozen=True)
class _Product:
    """The sum of outer products of a known factor and an output gradient, for some examples."""

    factor: Factor
    known: Side
    memory: Tensor
    other: Tensor
    known_is_left: bool
    column: Tensor | None = None

    def __call__(self, some: slice) -> Tensor:
        memory, other = self.memory[some], self.other[some]
        if self.known.dense:  # under autocast, what was projected in the forward is in half precision
            piece = outer(memory.to(other.dtype), other)
        else:
            piece = self.factor.meet(self.known, memory, other, self.column)
        return piece if self.known_is_left else piece.mT


def right_side(feed: Feed) -> Side:
    """Return the input side of a matrix block."""
    assert feed.part.right is not None
    return feed.part.right


EMBEDDING_NAMES = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def without_padding(
    grad: Float[Tensor, "*s d"], ids: Int[Tensor, "*s"], padding_idx: int | None, size: int
) -> Float[Tensor, "*s d"]:
    """Return an embedding's output gradient without the padding token's, as torch has it."""
    if padding_idx is None:
        return grad
    return grad * (ids != padding_idx % size)[..., None]


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


def pull_back(leaf: Probe, grad: Float[Tensor, "n ..."], scene: Scene) -> Pieces:
    """Feed the gradient of what a probe stands for, `[n, *value shape]`, back to the parameters it came from."""
    source = leaf.source
    if isinstance(source, str):
        return dense_pieces(source, grad, scene)
    if source.func is F.embedding and scene.keep is None:
        named = Call(source.func, list(source.leaves), source.spec).arguments(EMBEDDING_NAMES)
        name = base_name(named["weight"])
        if name is not None and not (named["max_norm"] or named["scale_grad_by_freq"]):
            ids = named["input"].reshape(1, -1).expand(grad.shape[0], -1)
            size = scene.values[name].shape[0]
            saved, backward = outer_rule(name, OneHot(ids, size), 0, scene)
            g = grad.reshape(grad.shape[0], ids.shape[1], -1)
            return backward(saved, without_padding(g, ids, named["padding_idx"], size))
    base = {name: scene.values[name] for name in leaf.names}
    pull = torch.func.vjp(lambda params: evaluate(source, params), base)[1]
    flat = grad if scene.keep is None else grad.flatten(0, 1)
    with under_vmap():
        found = torch.func.vmap(lambda cotangent: pull(cotangent)[0])(flat)
    if scene.keep is not None:
        found = {name: value.unflatten(0, grad.shape[:2]) for name, value in found.items()}
    return add_pieces(*(dense_pieces(name, value, scene) for name, value in found.items()))
