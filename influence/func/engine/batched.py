r"""The batched engine computes the rows of all examples in one forward and one backward.

Each use of a parameter gets a tap: an identity on the operation's result whose backward hands the use's contribution
to a zero `Z[n, p, q]` as if it were that zero's gradient. One `grad` of `Σ_n ℓ_n` with respect to all `Z` then is the
rows, because example n's outputs move example n's loss alone. No weight gradient is formed, nothing is stored but the
projected factors, and fused attention works in both directions.

The `Family` of an operation (`ops/`, one a file) describes what its uses contribute: for most as a `Use`, a sum over
positions of outer products of what came in and the output gradient.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from influence.func.engine.batch import batch_size, check_losses
from influence.func.engine.trace import AnotherPath, Axis, Call, Keys, TracedUse, UseKey, derive, probes, tensors_of
from influence.func.transform.folding import Block, Folded, Part, Side
from influence.func.transform.layout import ParamLayout
from influence.types import Batch, LossFn, Params, Rows


class Feed(NamedTuple):
    """One block that a parameter feeds.

    Attributes:
        slot: number of the block.
        part: the sides its gradient goes through.
        block: the block.
        fused: whether a bias may ride on the weight of the same block (same left side, one form on the right).
        column: where a vector goes in a matrix block: the right side of an axis of length one.
    """

    slot: int
    part: Part
    block: Block
    fused: bool = False
    column: Float[Tensor, " q"] | None = None


class Scene(NamedTuple):
    """What every family knows of the run.

    Attributes:
        n: number of examples.
        keep: number of token positions to keep apart, or `None`.
        params: layout of each parameter.
        feeds: the blocks each parameter feeds.
        values: plain values of the parameters.
        mask: which positions are tokens, where padding must not count; `None` where all are.
    """

    n: int
    keep: int | None
    params: dict[str, ParamLayout]
    feeds: dict[str, list[Feed]]
    values: dict[str, Tensor]
    mask: Bool[Tensor, "n s"] | None = None


class Route(NamedTuple):
    """How one use is served: decided in the plan.

    Attributes:
        family: the family of operations that serves it.
        inputs: example axis of each plain tensor argument, by place.
        outputs: example axis of each tensor result.
    """

    family: "Family"
    inputs: dict[int, Axis | None]
    outputs: tuple[Axis | None, ...]


Saved: TypeAlias = list[Tensor]
Lazy: TypeAlias = Callable[[slice], Tensor]
"""A contribution that is formed for a few examples at a time: `piece(slice) -> [few, o, i]`."""
Contributions: TypeAlias = dict[int, Tensor | Lazy]
"""Contributions by block; lazy where the block's linear maps need its whole gradient."""
Backward: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Contributions]
"""`(what was saved, output gradients) -> contributions`."""
Meet: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(what was saved, the other factor) -> their sum of outer products over positions`."""


@runtime_checkable
class Factor(Protocol):
    """One factor of a block's gradient behind its side, at every position of every example; zero at padding."""

    @property
    def positions(self) -> int:
        """How many positions count."""
        ...

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return `Σ_n w_n Σ_s x_{ns} x_{ns}^T`, or its diagonal where only that is kept."""
        ...

    def energy(self) -> Float[Tensor, " n"]:
        """Return `Σ_s ‖x_{ns}‖²`."""
        ...


@runtime_checkable
class Input(Protocol):
    """What came in to a use, `[n, s, d]` or, with positions kept, `[n, s, r, d]`, before any side."""

    @property
    def memory(self) -> Tensor:
        """What to remember of it where no side makes it smaller."""
        ...

    def forget(self) -> "Input":
        """Return it without its memory."""
        ...

    def through(self, side: Side) -> Tensor:
        """Return it behind a matrix side, `[n, s, p]`."""
        ...

    def meet(self, side: Side, memory: Tensor, other: Tensor, constant: Tensor | None = None) -> Tensor:
        """Return `Σ_s (side x_s + constant) ⊗ other_s`, from what was remembered."""
        ...

    def factor(self, side: Side, bias: "Feed | None", max_side: int) -> Factor:
        """Return the factor behind a side, a bias that rides along included; longer sides keep a diagonal."""
        ...


class Use(NamedTuple):
    r"""One use of a matrix, whose gradient is a sum of outer products, `G_n = Σ_s l_{ns} r_{ns}^T`.

    One of the factors came in, the other is the output gradient. Rows (`outer_products`), sums of rows and of factors
    (`sums`) are functions of it.

    Attributes:
        weight: the parameter.
        bias: a bias of the same use.
        known: what came in.
        known_is_left: whether what came in belongs to the left side of the blocks.
        arrange: arranges an output gradient as `known` is; it holds no input.
        late: `(arranged gradient, side, max_side) -> factor`.
        source: the tensor that came in, where other uses of it see the same factor.
    """

    weight: str
    bias: str | None
    known: Input
    known_is_left: bool
    arrange: Callable[[Tensor], Tensor]
    late: Callable[[Tensor, Side, int], Factor]
    source: Tensor | None = None


class Family(NamedTuple):
    """A family of operations.

    Attributes:
        name: as a plan shows it.
        operations: the torch functions it is asked about, by name.
        serves: whether the arguments of a use with one result are such as it can serve.
        see: `(call, route, scene) -> Use`, where the gradient is a sum of outer products.
        rows: `(call, route, scene) -> (what to save, backward)`: its contributions, where `see` does not tell them.
        layout: what a use tells of its parameters: fields of their `ParamLayout`, by name.
        channel: the axis of the result that holds a matrix's outputs.
    """

    name: str
    operations: tuple[str, ...]
    serves: Callable[[TracedUse], bool]
    see: Callable[[Call, Route, Scene], Use] | None = None
    rows: Callable[[Call, Route, Scene], tuple[Saved, Backward]] | None = None
    layout: Callable[[TracedUse], dict[str, dict[str, Any]]] | None = None
    channel: int = -1


def contributions(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Return what to save of a use, and its contributions once the output gradient is here."""
    see, rows = route.family.see, route.family.rows
    if rows is not None:
        return rows(call, route, scene)
    assert see is not None
    return outer_products(see(call, route, scene), scene)


def outer_products(use: Use, scene: Scene) -> tuple[Saved, Backward]:
    """Return the contributions `Σ_s l_s ⊗ r_s` of a use.

    A matrix side is applied to what came in now, and only that is saved; a bias rides along as a constant.
    """
    weight, bias, known, known_is_left, arrange = use[:5]
    feeds, dtype = scene.feeds.get(weight, []), scene.values[weight].dtype
    bias_feeds = {feed.slot: feed for feed in scene.feeds.get(bias, ())} if bias else {}
    riding = {f.slot: bias_feeds[f.slot] for f in feeds if f.fused and f.slot in bias_feeds and not known_is_left}
    saved: Saved = []
    reads: list[tuple[int, Meet]] = []
    raw: int | None = None
    for feed in feeds:
        side = feed.part.left if known_is_left else right_side(feed)
        beside = riding.get(feed.slot)
        if side.dense:
            x = known.through(side)
            saved.append(x if beside is None else x + column(beside, x))
            reads.append((len(saved) - 1, outer))
            continue
        if raw is None:
            raw, forgotten = len(saved), known.forget()
            saved.append(known.memory)
        constant = None if beside is None else column(beside, scene.values[weight])
        reads.append((raw, partial(forgotten.meet, side, constant=constant)))

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        g = arrange(gs[0]).to(dtype)
        pieces: Contributions = {}
        for feed, (read, meet) in zip(feeds, reads, strict=True):
            other = (right_side(feed) if known_is_left else feed.part.left).apply(g)
            product = partial(_product, meet, saved[read], other, known_is_left)
            pieces[feed.slot] = product if feed.block.linear else product(slice(None))
        if bias is not None:
            pieces = add_pieces(pieces, vector_pieces(bias, g.sum(-2), scene, riding))
        return pieces

    return saved, backward


def _product(meet: Meet, memory: Tensor, other: Tensor, known_is_left: bool, some: slice) -> Tensor:
    """Return the sum of outer products of what came in and an output gradient, for some examples."""
    piece = meet(memory[some], other[some])
    return piece if known_is_left else piece.mT


def outer(left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sum outer products over positions: `[n, s, p] × [n, s, q] -> [n, p, q]`, kept positions stay in front."""
    return left.to(right.dtype).mT @ right  # under autocast, what was projected in the forward is in half precision


def right_side(feed: Feed) -> Side:
    """Return the input side of a matrix block."""
    assert feed.part.right is not None
    return feed.part.right


def column(feed: Feed, like: Tensor) -> Float[Tensor, " q"]:
    """Return where a vector goes in its matrix block, as another tensor is."""
    assert feed.column is not None
    return feed.column.to(like)


def vector_pieces(name: str, v: Float[Tensor, "..."], scene: Scene, besides: Collection[int] = ()) -> Contributions:
    """Feed the gradient of a vector, `v [n, d]` or `[n, s, d]` with positions kept, to all blocks but some."""
    pieces: Contributions = {}
    for feed in scene.feeds.get(name, ()):
        if feed.slot in besides:
            continue
        left = feed.part.left.apply(v)
        pieces[feed.slot] = left if feed.column is None else _columns(left, column(feed, left), feed)
    return pieces


def _columns(left: Float[Tensor, "... p"], right: Float[Tensor, " q"], feed: Feed) -> Tensor | Lazy:
    return (lambda some: left[some, ..., None] * right) if feed.block.linear else left[..., None] * right


def add_pieces(*many: Contributions) -> Contributions:
    """Add contributions block by block."""
    total: Contributions = {}
    for pieces in many:
        for slot, piece in pieces.items():
            total[slot] = _sum(total[slot], piece) if slot in total else piece
    return total


def _sum(a: Tensor | Lazy, b: Tensor | Lazy) -> Tensor | Lazy:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    return lambda some: some_of(a, some) + some_of(b, some)


def some_of(piece: Tensor | Lazy, some: slice) -> Tensor:
    """Return a contribution for some examples."""
    return piece[some] if isinstance(piece, Tensor) else piece(some)


class BatchedPlan(NamedTuple):
    """What the batched engine executes.

    Attributes:
        folded: the bound transform.
        routes: the family that serves each use.
        alone: operations on parameters alone.
        feeds: the blocks each parameter feeds, every side on its device and in its dtype.
    """

    folded: Folded
    routes: dict[UseKey, Route]
    alone: frozenset[UseKey]
    feeds: dict[str, list[Feed]]


class Tap(torch.autograd.Function):
    """An identity whose backward gives each zero its contribution."""

    @staticmethod
    def forward(ctx: Any, backward: Any, results: int, saved: int, *tensors: Tensor) -> Any:
        """Return the results as they are; `tensors` holds them, then what to remember, then the zeros."""
        ctx.rule, ctx.saved_count = backward, saved
        ctx.save_for_backward(*tensors[results : results + saved])
        out = tuple(t.detach() for t in tensors[:results])
        return out if results > 1 else out[0]

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        """Pass the gradient on, and return the contributions as the zeros' gradients."""
        saved = ctx.saved_count
        found = ctx.rule(ctx.saved_tensors, gs)
        kept = (None,) * saved
        return (None, None, None, *gs, *kept, *found)


def make_feeds(folded: Folded) -> dict[str, list[Feed]]:
    """Return the blocks that each parameter feeds, ready to run."""
    feeds: dict[str, list[Feed]] = {name: [] for name in folded.layout.params}
    for slot, block in enumerate(folded.blocks):
        fused = rides(block)
        for part in block.parts:
            layout, right = folded.layout[part.source], part.right
            one = torch.ones(1, dtype=layout.dtype, device=layout.device)
            column = None if right is None or layout.is_matrix else right.apply(one)
            feeds[part.source].append(Feed(slot, part, block, fused, column))
    return feeds


def rides(block: Block) -> bool:
    """Whether a bias may be added to the input of its weight, as a constant: same left side, one form on the right."""
    rights = [part.right for part in block.parts if part.right is not None]
    return len(rights) == len(block.parts) == 2 and rights[0].dense == rights[1].dense and same_left(block)


def same_left(block: Block) -> bool:
    """Whether the two parts of a block go through the same left side."""
    a, b = (part.left for part in block.parts)
    if (a.start, a.stop, a.before, a.after) != (b.start, b.stop, b.before, b.after):
        return False
    if a.matrix is None or b.matrix is None:
        return a.matrix is b.matrix
    return a.matrix.shape == b.matrix.shape and torch.equal(a.matrix, b.matrix)


def batched_rows(
    plan: BatchedPlan, loss_fn: LossFn, params: Params, batch: Batch, keep: int | None = None
) -> tuple[Rows, Float[Tensor, " n"]]:
    """Return the linear part of the rows by one backward over taps, and the losses.

    Rows are `{name: [n, *shape]}`, or `[n, keep, *shape]` where `keep` token positions stay apart.
    """
    with torch.enable_grad():
        losses, run = tapped_losses(plan, loss_fn, params, batch, keep=keep)
        check_losses(losses, batch_size(batch))
        return cotangent_rows(losses, None, run.zeros), losses.detach()


def tapped_losses(
    plan: BatchedPlan,
    loss_fn: Callable[[Params, Batch], Any],
    params: Params,
    batch: Batch,
    keep: int | None = None,
) -> "tuple[Any, Runner]":
    """Run a loss function with every parameter tapped; return what it returns, and the run, which holds the zeros."""
    tapped, run = tap(plan, params, batch_size(batch), keep)
    return loss_fn(tapped, batch), run


def tap(
    plan: BatchedPlan,
    params: Params,
    n: int,
    keep: int | None = None,
    live: bool = False,
) -> "tuple[Params, Runner]":
    """Return parameters that tap each of their uses, to be called with, and the run, which holds the zeros.

    With `live`, gradients flow on to the parameters themselves, as in training.
    """
    lead = (n,) if keep is None else (n, keep)
    values = {name: p.detach() for name, p in params.items()}
    scene = Scene(n, keep, dict(plan.folded.layout.params), plan.feeds, values)
    zeros: Rows = {}
    for block in plan.folded.blocks:
        like = values[block.parts[0].source]
        if block.into not in zeros:
            shared = block.into != block.name
            dtype = torch.promote_types(like.dtype, torch.float32) if shared else like.dtype
            zeros[block.into] = like.new_zeros((), dtype=dtype).expand(*lead, *block.shape).requires_grad_()
    run = Runner(plan, scene, zeros)
    used = params if live else values
    return probes(used, run), run


def cotangent_rows(out: Tensor, cotangent: Tensor | None, zeros: Rows, retain: bool = False) -> Rows:
    """Pull a cotangent of the losses back to the zeros; none means all ones."""
    weight = torch.ones_like(out) if cotangent is None else cotangent
    if not out.requires_grad:
        raise ValueError(
            "no use of a parameter reaches the losses of this batch: they are used where a probe cannot see it "
            "(inside vmap or an autograd.Function), or gradients are off (torch.inference_mode)"
        )
    found = torch.autograd.grad(out, list(zeros.values()), weight, retain_graph=retain, allow_unused=True)
    return {
        name: zero.new_zeros(zero.shape) if row is None else row
        for (name, zero), row in zip(zeros.items(), found, strict=True)
    }


class Runner:
    """The watcher of one run: taps each use as the plan says."""

    def __init__(self, plan: BatchedPlan, scene: Scene, zeros: Rows) -> None:
        """Start a run."""
        self.plan, self.scene, self.zeros, self.keys = plan, scene, zeros, Keys()

    def __call__(self, call: Call) -> Any:
        """Run an operation on parameters; keep it a probe, or tap its result."""
        out = call.run()
        results = tensors_of(out)
        if not results:
            return out
        key = self.keys(call)
        if key in self.plan.alone:
            return derive(call, out, self)
        route = self.plan.routes.get(key)
        if route is None and not torch.is_grad_enabled():
            return out  # nothing comes back from there
        if route is None or route.inputs.keys() != set(call.data):
            raise AnotherPath(f"{key} was not seen when the plan was made: the model takes another path on this batch")
        return self.tap(call, out, route)

    def tap(self, call: Call, out: Any, route: Route) -> Any:
        """Return an operation's result with its contribution to the zeros attached."""
        fed = [feed for name in call.params for feed in self.scene.feeds[name]]
        names = list(dict.fromkeys(feed.block.into for feed in fed))
        saved, backward = contributions(call, route, self.scene)
        finish = _Finish(backward, {feed.slot: feed for feed in fed}, names, self.scene.n, self.scene.keep is not None)
        return attach(out, saved, finish, [self.zeros[name] for name in names])


def attach(out: Any, saved: Sequence[Tensor], backward: Backward | Any, zeros: Sequence[Tensor]) -> Any:
    """Return an operation's result whose backward hands `backward(saved, gs)` to the zeros, one for each."""
    results = tensors_of(out)
    tapped = Tap.apply(backward, len(results), len(saved), *results, *saved, *zeros)
    if isinstance(out, Tensor):
        return tapped
    fresh = iter(tapped if len(results) > 1 else (tapped,))
    return type(out)(next(fresh) if isinstance(item, Tensor) else item for item in out)


ALIVE = 1 << 20
"""Entries of a block's whole gradients that are alive at once, where linear maps need them: what a cache holds."""


class _Finish(NamedTuple):
    """The backward of a use, followed by the linear maps of each block."""

    backward: Backward
    feeds: dict[int, Feed]
    names: list[str]
    n: int
    keeps: bool

    def __call__(self, saved: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what this use adds to each zero."""
        found: Rows = {}
        for slot, piece in self.backward(saved, gs).items():
            block = self.feeds[slot].block
            row = self.finish(block, piece) if block.linear else some_of(piece, slice(None))
            found[block.into] = found[block.into] + row if block.into in found else row
        return [found.get(name) for name in self.names]

    def finish(self, block: Block, piece: Tensor | Lazy) -> Tensor:
        """Take a block's whole gradients through its linear maps, a few examples at a time."""
        few = max(ALIVE // prod(block.separable_shape), 1)
        rows = []
        for begin in range(0, self.n, few):
            some = some_of(piece, slice(begin, begin + few))
            flat = block.finish_linear(some.flatten(0, 1) if self.keeps else some)
            rows.append(flat.unflatten(0, some.shape[:2]) if self.keeps else flat)
        return rows[0] if len(rows) == 1 else torch.cat(rows)
