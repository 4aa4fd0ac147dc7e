r"""Gathering: sums over a batch of both factors of every block's gradient, in one forward and any number of backwards.

A block's gradient is a sum over positions, `G_n = Σ_s l_{ns} r_{ns}^T`: output gradient and input for a linear map. The
input is known in the forward pass, the output gradient when a cotangent of the losses arrives. Neither is kept for
longer than its sum needs, and what has no such factors (norms, biases, bare parameters) is gathered as rows.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from influence.func.engine.batched import BatchedPlan, attach, same_left
from influence.func.engine.contributions import (
    EMBEDDING_NAMES,
    Feed,
    OneHot,
    Patches,
    Route,
    Scene,
    base_name,
    column,
    positions,
)
from influence.func.engine.row_sums import Anchored, squares
from influence.func.engine.rules import CONV_NAMES, linear_input, linear_names
from influence.func.engine.trace import NO_POSITION, Axis, Call, UseKey
from influence.func.loss.losses import widen
from influence.func.transform.folding import Block, Side


def add_grams(a: Shaped[Tensor, "*d"], b: Shaped[Tensor, "*e"]) -> Shaped[Tensor, "*f"]:
    """Add two second moments, either of which may be a diagonal kept as a vector.

    Example:
        >>> import torch
        >>> add_grams(torch.ones(2, 2), torch.tensor([1.0, 2.0]))
        tensor([[2., 1.],
                [1., 3.]])
    """
    if a.ndim == b.ndim:
        return a + b
    whole, diagonal = (a, b) if a.ndim > b.ndim else (b, a)
    return whole + diagonal.diag()


@runtime_checkable
class Covariate(Protocol):
    """One factor at every position of every example."""

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return `Σ_n w_n Σ_s x_{ns} x_{ns}^T`, or its diagonal where only that is kept."""
        ...

    def energy(self) -> Float[Tensor, " n"]:
        """Return `Σ_s ‖x_{ns}‖²`."""
        ...


class Dense(NamedTuple):
    """Vectors `[n, s, d]`; zero where a position is padding.

    Attributes:
        x: the vectors.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n s d"]
    diagonal: bool = False

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None]
        if self.diagonal:
            return (weighted * x).sum((0, 1))
        return symmetric_product(weighted.flatten(0, 1), x.flatten(0, 1))

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2))


PANELS = 4
"""Panels of columns in which a symmetric product is formed: `(PANELS + 1) / (2 PANELS)` of the whole one's work."""

WIDE = 768
"""Entries from which on the panels save more than they cost."""


def symmetric_product(a: Float[Tensor, "m d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """Return `a^T b`, which is known to be symmetric, by its lower triangle of panels: torch has no such product.

    Example:
        >>> import torch
        >>> symmetric_product(torch.ones(3, 2), torch.ones(3, 2))
        tensor([[3., 3.],
                [3., 3.]])
    """
    d = a.shape[1]
    if d < WIDE:
        return a.mT @ b
    out = a.new_empty(d, d)
    edges = [d * k // PANELS for k in range(PANELS + 1)]
    for begin, end in pairwise(edges):
        panel = a[:, begin:].mT @ b[:, begin:end]
        out[begin:, begin:end] = panel
        out[begin:end, end:] = panel[end - begin :].mT
    return out


class Affine(NamedTuple):
    """Vectors `[n, s, d]` with a one behind each, which is never written there.

    Attributes:
        x: the vectors; zero where a position is padding.
        real: which positions count; `None` for all.
    """

    x: Float[Tensor, "n s d"]
    real: Bool[Tensor, "n s"] | None

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, `[d + 1, d + 1]`."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None]
        count = self._counts(x) if weight is None else self._counts(x) * weight
        corner = symmetric_product(weighted.flatten(0, 1), x.flatten(0, 1))
        edge = weighted.sum((0, 1))
        return torch.cat([torch.cat([corner, edge[:, None]], 1), torch.cat([edge, count.sum()[None]])[None]])

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares, the ones included."""
        x = widen(self.x)
        return x.square().sum((1, 2)) + self._counts(x)

    def _counts(self, like: Tensor) -> Float[Tensor, " n"]:
        n, s = self.x.shape[:2]
        return like.new_full((n,), s) if self.real is None else self.real.sum(1).to(like)


class Tokens(NamedTuple):
    """One-hot tokens `[n, s]`, scaled entry by entry: their second moment is exactly diagonal.

    Attributes:
        ids: the tokens.
        scale: what each token's entry is.
        real: which positions count.
    """

    ids: Int[Tensor, "n s"]
    scale: Float[Tensor, " d"]
    real: Bool[Tensor, "n s"]

    def _squares(self) -> Float[Tensor, "n s"]:
        return widen(self.scale).square()[self.ids] * self.real

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted counts of tokens."""
        squares = self._squares() if weight is None else self._squares() * weight[:, None]
        return torch.zeros_like(widen(self.scale)).index_add(0, self.ids.flatten(), squares.flatten())

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return self._squares().sum(1)


class Grouped(NamedTuple):
    """Output gradients of a grouped convolution, `[n, groups, s, d / groups]`: a group's rows see their own patches.

    Their second moment is block-diagonal.

    Attributes:
        x: the gradients.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n g s e"]
    diagonal: bool = False

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, group by group."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None, None]
        if self.diagonal:
            return (weighted * x).sum((0, 2)).flatten()
        a, b = (y.movedim(1, 0).flatten(1, 2) for y in (weighted, x))
        return torch.block_diag(*(a.mT @ b))

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2, 3))


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


BlockSums: TypeAlias = dict[str, Tensor]
"""Sums of one block over a batch, by name."""

FACTORED = ("linear", "conv", "embedding")
"""Rules whose contribution is a sum of outer products."""


class Pair(NamedTuple):
    """Both factors of one use of a block."""

    left: Covariate
    right: Covariate


Joint: TypeAlias = Callable[[Sequence[Pair]], BlockSums]
"""Sums that need both factors of all uses of a block together."""


class GatherPlan(NamedTuple):
    """Which blocks have factors.

    Attributes:
        batched: what the batched engine executes.
        uses: for each block with factors, how often it is used.
        rows: for each other block that is used, why it has rows instead.
        max_side: a side of more entries is kept as a diagonal.
    """

    batched: BatchedPlan
    uses: dict[str, int]
    rows: dict[str, str]
    max_side: int


def make_gather(batched: BatchedPlan, max_side: int) -> GatherPlan:
    """Decide which blocks of a plan have factors.

    Raises:
        ValueError: if a block's weight and bias go through different left sides.
    """
    uses: dict[str, int] = {}
    rows: dict[str, str] = {}
    for block in batched.folded.blocks:
        keys = [key for key in batched.routes if any(part.source in key.params for part in block.parts)]
        if not keys:
            continue
        why = _unfactored(block, keys, batched.routes)
        if why:
            rows[block.name] = why
        else:
            uses[block.name] = len(keys)
    return GatherPlan(batched, uses, rows, max_side)


def _unfactored(block: Block, keys: Sequence[UseKey], routes: Mapping[UseKey, Route]) -> str:
    if block.parts[0].right is None:
        return "a vector"
    weight = block.parts[0].source
    others = sorted({routes[key].rule for key in keys} - set(FACTORED))
    if others:
        return f"used by {', '.join(others)}"
    if len(block.parts) == 1:
        return ""
    if not same_left(block):
        raise ValueError(
            f"the weight and the bias of block {block.name!r} are scaled apart, so its gradient is no outer product at "
            "a position. Use as_blocks(bias=False), which makes the bias a block of its own"
        )
    alone = [key for key in keys if weight not in key.params]
    return f"its bias is also used by itself ({alone[0]})" if alone else ""


class Gather(Anchored):
    """The watcher of one run.

    Attributes:
        sums: what was gathered, by block.
        positions: how many real positions each block saw.
    """

    def __init__(self, plan: GatherPlan, joint: Joint | None, mask: Mask, scene: Scene) -> None:
        """Start a run.

        Args:
            plan: which blocks have factors.
            joint: sums of both factors together; `None` for the Gram matrix of each on its own.
            mask: which positions are tokens, where some are not.
            scene: the run.
        """
        super().__init__(plan.batched, scene, plan.rows)
        self.gather, self.joint, self.mask = plan, joint, mask
        self.sums: dict[str, BlockSums] = {block.name: {} for block in plan.batched.folded.blocks}
        self.positions: dict[str, int] = {}
        self._waiting: dict[str, list[Pair]] = {}
        self._seen: dict[tuple, tuple[Any, Tensor]] = {}

    def backward(self, out: Tensor, cotangent: Tensor, retain: bool) -> None:
        """Pull one cotangent back and add what it brings."""
        for name, row in self.pull(out, cotangent, retain):
            if row is not None:
                self.add(name, {"diagonal": squares(None, row).flatten()})
        for name in list(self._waiting):
            assert self.joint is not None
            self.add(name, self.joint(self._waiting.pop(name)))

    def add(self, name: str, sums: BlockSums) -> None:
        """Add to a block's sums."""
        mine = self.sums[name]
        for key, value in sums.items():
            mine[key] = add_grams(mine[key], value) if key in mine else value

    def tap(self, call: Call, out: Any, route: Route) -> Any:
        """Sum what is known of a use now, and the rest when its output gradient arrives."""
        fed = [feed for name in call.params for feed in self.scene.feeds[name]]
        if all(feed.block.name in self.gather.rows for feed in fed):
            return super().tap(call, out, route)
        use = USES[route.rule](call, route, self.scene, self.mask)
        kept = [(feed, self.know(feed, use)) for feed in fed if feed.part.source == use.weight]
        biases = [feed for feed in fed if feed.block.name in self.zeros]
        known_is_left, gradient, late_of, total = use.known_is_left, use.gradient, use.late, use.total
        del use  # the input lives no longer than its sum needs

        def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor | None]:
            g = gradient(gs[0])
            summed: dict[tuple, Tensor] = {}
            for feed, known in kept:
                side = feed.part.right if known_is_left else feed.part.left
                assert side is not None
                late = late_of(g, side, self.gather.max_side)
                if known is not None:
                    self.both(feed, Pair(known, late) if known_is_left else Pair(late, known))
                    continue
                key = _side_key(side)
                if key not in summed:
                    summed[key] = late.gram()
                self.add(feed.block.name, {"right" if known_is_left else "left": summed[key]})
            return [feed.part.left.apply(total(g)) for feed in biases] + [None]

        return attach(out, [], backward, [*(self.zeros[feed.block.name] for feed in biases), self.anchor])

    def know(self, feed: Feed, use: Seen) -> Covariate | None:
        """Sum the factor that is known now: the same input through the same side is summed once."""
        name = feed.block.name
        self.positions[name] = self.positions.get(name, 0) + use.count
        side = feed.part.left if use.known_is_left else feed.part.right
        assert side is not None
        riding = next((f for f in self.scene.feeds[use.bias] if f.slot == feed.slot), None) if use.bias else None
        beside = None if riding is None else riding.part
        if self.joint is not None:
            return use.known(side, beside, self.gather.max_side)
        beside_key = None if beside is None else _side_key(beside.right)
        key = (id(use.source), use.source._version, _side_key(side), beside_key)
        source, gram = self._seen.get(key, (None, None)) if use.shares else (None, None)
        if source is None or source() is not use.source or gram is None:
            gram = use.known(side, beside, self.gather.max_side).gram()
            self._seen[key] = (weakref.ref(use.source), gram)
        self.add(name, {"left" if use.known_is_left else "right": gram})
        return None

    def both(self, feed: Feed, pair: Pair) -> None:
        """Sum what needs both factors, once all uses of the block are here."""
        assert self.joint is not None
        if self.gather.uses[feed.block.name] == 1:
            self.add(feed.block.name, self.joint([pair]))
        else:
            self._waiting.setdefault(feed.block.name, []).append(pair)


def _side_key(side: Side | None) -> tuple:
    if side is None:
        return ()
    return (
        side.source,
        side.start,
        side.stop,
        side.before,
        side.after,
        id(side.matrix) if side.matrix is not None else 0,
    )
