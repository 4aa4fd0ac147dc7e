r"""Sums over a batch, for curvature fits: of functions of rows, and of both factors of every block.

**Rows**, `Σ_n f(G_n)`: where a block is used once, its rows are formed a few examples at a time in the backward,
reduced, and gone. A block that is used several times has a row only when all its uses are summed, so its rows are kept
until then.

**Factors**: a block's gradient is a sum over positions, `G_n = Σ_s l_{ns} r_{ns}^T`. What came in is known in the
forward pass, the output gradient when a cotangent of the losses arrives. Neither is kept for longer than its sum needs,
and what has no such factors (norms, biases, bare parameters) is summed as rows.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import (
    ALIVE,
    BatchedPlan,
    Factor,
    Feed,
    Lazy,
    Route,
    Runner,
    Scene,
    Use,
    attach,
    contributions,
    same_left,
    some_of,
)
from influence.func.engine.trace import Call, UseKey, probes
from influence.func.loss.losses import widen
from influence.func.transform.folding import Block, Folded, Side
from influence.types import Batch, Params, Rows


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


OutputFn: TypeAlias = Callable[[Params, Batch], tuple[Tensor, Any]]
"""`(params, batch) -> (output, what it says of it)`: what cotangents are pulled back from."""


class Anchored(Runner):
    """Watches a run whose taps sum what they see; some blocks have rows all the same.

    Attributes:
        anchor: a zero that every tap depends on: its gradient is asked for so that every backward runs.
    """

    def __init__(self, plan: BatchedPlan, scene: Scene, with_rows: Collection[str]) -> None:
        """Start a run; the named blocks have rows."""
        like = next(iter(scene.values.values()))
        self.anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        zeros = {
            block.into: scene.values[block.parts[0].source].new_zeros(()).expand(scene.n, *block.shape).requires_grad_()
            for block in plan.folded.blocks
            if block.name in with_rows
        }
        super().__init__(plan, scene, zeros)

    def pull(self, out: Tensor, cotangent: Tensor, retain: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Pull one cotangent back through every tap; yield the rows of blocks that have them."""
        if not out.requires_grad:
            raise ValueError("no use of a parameter reaches the outputs of this batch")
        zeros = [self.anchor, *self.zeros.values()]
        found = torch.autograd.grad(out, zeros, cotangent, retain_graph=retain, allow_unused=True)
        yield from zip(self.zeros, found[1:], strict=True)


Watching = TypeVar("Watching", bound=Anchored)


def watched(
    plan: BatchedPlan, make: Callable[[Scene], Watching], head: OutputFn, params: Params, batch: Batch
) -> tuple[Tensor, Any, Watching]:
    """Run a function of parameters with every use watched by what `make` makes.

    Returns:
        The output, what the head says of it, and the watcher, whose backward takes cotangents.
    """
    plain = {name: p.detach() for name, p in params.items()}
    run = make(Scene(batch_size(batch), None, dict(plan.folded.layout.params), plan.feeds, plain))
    out, said = head(probes(plain, run), batch)
    return out, said, run


Reduction: TypeAlias = Callable[[Tensor | None, Tensor], Tensor]
"""`(total or None, rows [n, …]) -> total`: it may add in place to a total which it made."""


class Reduce(Anchored):
    """Watches one run and sums a function of every example's rows.

    Attributes:
        sums: what was summed, by block.
    """

    def __init__(self, plan: BatchedPlan, reduction: Reduction, scene: Scene) -> None:
        """Start a run."""
        self.once = used_once(plan)
        super().__init__(plan, scene, {block.name for block in plan.folded.blocks} - self.once)
        self.reduction, self.sums = reduction, dict[str, Tensor]()

    def tap(self, call: Call, out: Any, route: Route) -> Any:
        """Reduce a use's rows when its output gradient arrives."""
        feeds = {feed.slot: feed for name in call.params for feed in self.scene.feeds[name]}
        kept = list(dict.fromkeys(f.block.into for f in feeds.values() if f.block.name not in self.once))
        saved, rows = contributions(call, route, self.scene)

        def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor | None]:
            found: Rows = {}
            for slot, piece in rows(saved, gs).items():
                block = feeds[slot].block
                if block.name in self.once:
                    self.reduce(block, piece)
                else:
                    row = block.finish_linear(some_of(piece, slice(None)))
                    found[block.into] = found[block.into] + row if block.into in found else row
            return [*(found.get(name) for name in kept), None]

        return attach(out, saved, backward, [*(self.zeros[name] for name in kept), self.anchor])

    def reduce(self, block: Block, piece: Tensor | Lazy) -> None:
        """Reduce a block's rows, a few examples at a time."""
        few = max(ALIVE // prod(block.separable_shape), 1)
        for begin in range(0, self.scene.n, few):
            rows = block.finish_linear(some_of(piece, slice(begin, begin + few)))
            self.sums[block.name] = self.reduction(self.sums.get(block.name), rows)

    def backward(self, out: Tensor, cotangent: Tensor, retain: bool) -> None:
        """Pull one cotangent back and add what it brings."""
        for name, row in self.pull(out, cotangent, retain):
            if row is not None:
                self.sums[name] = self.reduction(self.sums.get(name), row)


def squares(total: Tensor | None, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "..."]:
    """Add the squares of rows, in at least float32: one pass over memory per row."""
    first = 0
    if total is None:
        total, first = widen(rows[0]).square(), 1
    for row in widen(rows)[first:]:
        total.addcmul_(row, row)
    return total


def used_once(plan: BatchedPlan) -> frozenset[str]:
    """Return the blocks that are used at one place, whose contribution there is the whole row."""
    once = set()
    for block in plan.folded.blocks:
        sources = {part.source for part in block.parts}
        keys = [key for key in plan.routes if sources & set(key.params)]
        if len(keys) == 1 and block.into == block.name:
            once.add(block.name)
    return frozenset(once)


class _Identity:
    """The identity as a linear map of a block's rows: they are then formed a few examples at a time."""

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Return the rows."""
        return rows


def piecewise(folded: Folded) -> Folded:
    """Return a folded transform whose rows are formed a few examples at a time."""
    blocks = tuple(b if b.linear else replace(b, linear=(_Identity(),)) for b in folded.blocks)
    return replace(folded, blocks=blocks)


BlockSums: TypeAlias = dict[str, Tensor]
"""Sums of one block over a batch, by name."""


class Pair(NamedTuple):
    """Both factors of one use of a block."""

    left: Factor
    right: Factor


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
    others = sorted({routes[key].family.name for key in keys if routes[key].family.see is None})
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
    """Watches one run and sums both factors of every block that has them; of the others, squares of rows.

    Attributes:
        sums: what was gathered, by block.
        positions: how many real positions each block saw.
    """

    def __init__(self, plan: GatherPlan, joint: Joint | None, mask: Bool[Tensor, "n s"] | None, scene: Scene) -> None:
        """Start a run; `joint` sums both factors together, without it each has a Gram matrix."""
        super().__init__(plan.batched, scene, plan.rows)
        self.gather, self.joint, self.masked = plan, joint, scene._replace(mask=mask)
        self.sums: dict[str, BlockSums] = {block.name: {} for block in plan.batched.folded.blocks}
        self.positions: dict[str, int] = {}
        self._waiting: dict[str, list[Pair]] = {}
        self._grams: dict[tuple, tuple[Any, Tensor, int]] = {}

    def backward(self, out: Tensor, cotangent: Tensor, retain: bool) -> None:
        """Pull one cotangent back and add what it brings."""
        for name, row in self.pull(out, cotangent, retain):
            if row is not None:
                self.row(name, row)
        for name in list(self._waiting):
            assert self.joint is not None
            self.add(name, self.joint(self._waiting.pop(name)))

    def row(self, name: str, row: Shaped[Tensor, "n ..."]) -> None:
        """Sum the rows of a block that has no factors."""
        self.add(name, {"diagonal": squares(None, row).flatten()})

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
        assert route.family.see is not None
        use = route.family.see(call, route, self.masked)
        kept = [(feed, self.know(feed, use)) for feed in fed if feed.part.source == use.weight]
        biases = [feed for feed in fed if feed.block.name in self.zeros]
        known_is_left, arrange, late_of = use.known_is_left, use.arrange, use.late
        del use  # the input lives no longer than its sum needs

        def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor | None]:
            g = arrange(gs[0])
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
            return [feed.part.left.apply(g.sum(-2)) for feed in biases] + [None]

        return attach(out, [], backward, [*(self.zeros[feed.block.name] for feed in biases), self.anchor])

    def know(self, feed: Feed, use: Use) -> Factor | None:
        """Sum the factor that is known now; return it instead where both are needed together."""
        name = feed.block.name
        side = feed.part.left if use.known_is_left else feed.part.right
        assert side is not None
        riding = next((f for f in self.scene.feeds[use.bias] if f.slot == feed.slot), None) if use.bias else None
        factor = None
        if self.joint is None:
            gram, count = self.gram(use, side, riding)
            self.add(name, {"left" if use.known_is_left else "right": gram})
        else:
            factor = use.known.factor(side, riding, self.gather.max_side)
            count = factor.positions
        self.positions[name] = self.positions.get(name, 0) + count
        return factor

    def gram(self, use: Use, side: Side, bias: Feed | None) -> tuple[Tensor, int]:
        """Return the Gram matrix of what came in, and how many positions: of one input behind one side once."""
        source = use.source
        key = (
            id(source),
            None if source is None else source._version,
            _side_key(side),
            _side_key(None if bias is None else bias.part.right),
        )
        known = self._grams.get(key)
        if known is not None and source is not None and known[0]() is source:
            return known[1], known[2]
        factor = use.known.factor(side, bias, self.gather.max_side)
        gram, count = factor.gram(), factor.positions
        if source is not None:
            self._grams[key] = (weakref.ref(source), gram, count)
        return gram, count

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
