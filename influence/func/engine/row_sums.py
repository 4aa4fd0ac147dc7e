r"""Reducing: sums of a function of every example's row, `Σ_n f(G_n)`, with few whole gradients alive at any time.

Where a block is used once, its rows are formed a few examples at a time in the backward, reduced, and gone. A block
that is used several times has a row only when all its uses are summed, so its rows are kept until then.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import ALIVE, BatchedPlan, Runner, attach
from influence.func.engine.contributions import Piece, Route, Scene, some_of
from influence.func.engine.rules import RULES
from influence.func.engine.trace import Call, probe
from influence.func.loss.losses import widen
from influence.func.transform.folding import Block, Folded
from influence.types import Batch, Params, Rows

Head: TypeAlias = Callable[[Params, Batch], tuple[Tensor, Any]]
"""`(params, batch) -> (output, what it says of it)`: what cotangents are pulled back from."""


class Anchored(Runner):
    """The watcher of a run whose taps sum what they see; some blocks have rows all the same.

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


Run = TypeVar("Run", bound=Anchored)


def watched(
    plan: BatchedPlan, make: Callable[[Scene], Run], head: Head, params: Params, batch: Batch
) -> tuple[Tensor, Any, Run]:
    """Run a function of parameters with every use watched.

    Args:
        plan: what the batched engine executes.
        make: makes the watcher.
        head: the function.
        params: the parameters.
        batch: the batch.

    Returns:
        The output, what the head says of it, and the watcher, whose backward takes cotangents.
    """
    plain = {name: p.detach() for name, p in params.items()}
    run = make(Scene(batch_size(batch), None, dict(plan.folded.layout.params), plan.feeds, plain))
    probes = {name: probe(p, name, (name,), run) for name, p in plain.items()}
    out, said = head(probes, batch)  # type: ignore[arg-type]
    return out, said, run


Reduction: TypeAlias = Callable[[Tensor | None, Tensor], Tensor]
"""`(total or None, rows [n, …]) -> total`: it may add in place to a total which it made."""


class Reduce(Anchored):
    """The watcher of one run.

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
        saved, rule = RULES[route.rule](call, route, self.scene)

        def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor | None]:
            found: Rows = {}
            for slot, piece in rule(saved, gs).items():
                block = feeds[slot].block
                if block.name in self.once:
                    self.reduce(block, piece)
                else:
                    row = block.finish_linear(some_of(piece, slice(None)))
                    found[block.into] = found[block.into] + row if block.into in found else row
            return [*(found.get(name) for name in kept), None]

        return attach(out, saved, backward, [*(self.zeros[name] for name in kept), self.anchor])

    def reduce(self, block: Block, piece: Tensor | Piece) -> None:
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


class Whole:
    """The identity as a linear map of a block's rows: they are then formed a few examples at a time."""

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Return the rows."""
        return rows


def piecewise(folded: Folded) -> Folded:
    """Return a folded transform whose rows are formed a few examples at a time."""
    blocks = tuple(b if b.linear else replace(b, linear=(Whole(),)) for b in folded.blocks)
    return replace(folded, blocks=blocks)
