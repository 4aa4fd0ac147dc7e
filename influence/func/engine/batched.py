r"""The batched engine: one forward, one backward, and every probe's rows arrive with their example axis.

Each use of a parameter gets a tap: an identity on the operation's result whose backward hands the rule's contribution
to a zero `Z[n, p, q]` as if it were that zero's gradient. One `grad` of `Σ_n ℓ_n` with respect to all `Z` then is the
rows, because example n's outputs move example n's loss alone. No weight gradient is formed, nothing is stored but the
projected factors, and fused attention works in both directions.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.batch import batch_size, check_losses
from influence.func.engine.contributions import Backward, Feed, Piece, Route, Scene, some_of
from influence.func.engine.rules import RULES
from influence.func.engine.trace import AnotherPath, Call, Keys, UseKey, derive, probe, tensors_of
from influence.func.transform.folding import Block, Folded
from influence.types import Batch, LossFn, Params, Rows


class BatchedPlan(NamedTuple):
    """What the batched engine executes.

    Attributes:
        folded: the bound transform.
        routes: the rule of each use.
        alone: operations on parameters alone.
        feeds: the blocks each parameter feeds, every side on its device and in its dtype.
    """

    folded: Folded
    routes: dict[UseKey, Route]
    alone: frozenset[UseKey]
    feeds: dict[str, list[Feed]]

    def rows(self, loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Rows, Float[Tensor, " n"]]:
        """Return the linear part of the rows, and the losses."""
        return batched_rows(self, loss_fn, params, batch)


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
        for part in block.parts:
            feeds[part.source].append(Feed(slot, part, block, rides(block)))
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
    """Return the linear part of the rows by one backward over taps.

    Args:
        plan: what to execute.
        loss_fn: the loss function.
        params: plain parameters.
        batch: the batch.
        keep: number of token positions to keep apart, or `None`.

    Returns:
        Rows `{name: [n, *shape]}` (`[n, keep, *shape]` where positions are kept), and the losses.
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
    watcher: "Callable[[BatchedPlan, Scene, Rows], Runner] | None" = None,
    keep: int | None = None,
) -> "tuple[Any, Runner]":
    """Run a loss function with every parameter tapped.

    Returns:
        What it returns, and the run, which holds the zeros.
    """
    probes, run = tap(plan, params, batch_size(batch), watcher, keep)
    return loss_fn(probes, batch), run


def tap(
    plan: BatchedPlan,
    params: Params,
    n: int,
    watcher: "Callable[[BatchedPlan, Scene, Rows], Runner] | None" = None,
    keep: int | None = None,
    live: bool = False,
) -> "tuple[Params, Runner]":
    """Return parameters that tap each of their uses, to be called with, and the run, which holds the zeros.

    Args:
        plan: what to execute.
        params: the parameters.
        n: how many examples will come.
        watcher: the run's kind.
        keep: number of token positions to keep apart, or `None`.
        live: whether gradients flow on to the parameters themselves, as in training.
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
    run = (watcher or Runner)(plan, scene, zeros)
    used = params if live else values
    return {name: probe(p, name, (name,), run) for name, p in used.items()}, run


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
        saved, backward = RULES[route.rule](call, route, self.scene)
        finish = Contribution(
            backward, {feed.slot: feed for feed in fed}, names, self.scene.n, self.scene.keep is not None
        )
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


class Contribution(NamedTuple):
    """A rule's backward, followed by the linear maps of each block."""

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

    def finish(self, block: Block, piece: Tensor | Piece) -> Tensor:
        """Take a block's whole gradients through its linear maps, a few examples at a time."""
        few = max(ALIVE // prod(block.separable_shape), 1)
        rows = []
        for begin in range(0, self.n, few):
            some = some_of(piece, slice(begin, begin + few))
            flat = block.finish_linear(some.flatten(0, 1) if self.keeps else some)
            rows.append(flat.unflatten(0, some.shape[:2]) if self.keeps else flat)
        return rows[0] if len(rows) == 1 else torch.cat(rows)
