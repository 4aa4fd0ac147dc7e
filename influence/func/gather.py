r"""Gathering: sums over a batch of both factors of every block's gradient, in one forward and any number of backwards.

A block's gradient is a sum over positions, `G_n = Σ_s l_{ns} r_{ns}^T`: output gradient and input for a linear map. The
input is known in the forward pass, the output gradient when a cotangent of the losses arrives. Neither is kept for
longer than its sum needs, and what has no such factors (norms, biases, bare parameters) is gathered as rows.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from influence.func.anchored import Anchored
from influence.func.batched import BatchedPlan, attach, same_left
from influence.func.contributions import Feed, Route, Scene
from influence.func.covariates import Covariate, add_grams
from influence.func.folding import Block
from influence.func.probe import Call, UseKey
from influence.func.reduce import squares
from influence.func.seen import USES, Mask, Seen
from influence.func.sides import Side

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
