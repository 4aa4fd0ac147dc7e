r"""Gathering: sums over a batch of both factors of every block's gradient, in one forward and any number of backwards.

A block's gradient is a sum over positions, `G_n = Σ_s l_{ns} r_{ns}^T`: output gradient and input for a linear map. The
input is known in the forward pass, the output gradient when a cotangent of the losses arrives. Neither is kept for
longer than its sum needs, and what has no such factors (norms, biases, bare parameters) is gathered as rows.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influence.func.axes import NO_POSITION, Axis
from influence.func.batched import BatchedPlan, Runner, Tap, same_left
from influence.func.contributions import EMBEDDING_NAMES, Feed, Route, Scene, base_name, column
from influence.func.covariates import Covariate, Dense, Grouped, Tokens, add_grams
from influence.func.factors import OneHot, Patches, positions
from influence.func.folding import Block
from influence.func.probe import Call, UseKey, probe
from influence.func.rules import CONV_NAMES, linear_input, linear_names
from influence.func.sides import Side
from influence.types import Rows

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
        rows: for each other block, why it has rows instead.
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
        why = _unfactored(block, keys, batched.routes)
        if why:
            rows[block.name] = why
        else:
            uses[block.name] = len(keys)
    return GatherPlan(batched, uses, rows, max_side)


def _unfactored(block: Block, keys: Sequence[UseKey], routes: Mapping[UseKey, Route]) -> str:
    if not keys:
        return "not used by the loss"
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


class Gather(Runner):
    """The watcher of one run.

    Attributes:
        sums: what was gathered, by block.
        positions: how many real positions each block saw.
        anchor: a zero that every tap depends on: its gradient is asked for so that every backward runs.
    """

    def __init__(self, plan: GatherPlan, joint: Joint | None, mask: Bool[Tensor, "n s"] | None, scene: Scene) -> None:
        """Start a run.

        Args:
            plan: which blocks have factors.
            joint: sums of both factors together; `None` for the Gram matrix of each on its own.
            mask: which positions are tokens, where some are not.
            scene: the run.
        """
        like = next(iter(scene.values.values()))
        self.anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        zeros = {
            block.name: scene.values[block.parts[0].source].new_zeros(()).expand(scene.n, *block.shape).requires_grad_()
            for block in plan.batched.folded.blocks
            if block.name in plan.rows
        }
        super().__init__(plan.batched, scene, zeros)
        self.gather, self.joint, self.mask = plan, joint, mask
        self.sums: dict[str, BlockSums] = {name: {} for name in (*plan.uses, *plan.rows)}
        self.positions: dict[str, int] = {}
        self._waiting: dict[str, list[Pair]] = {}
        self._seen: dict[tuple, tuple[Any, Tensor]] = {}

    def backward(self, out: Tensor, cotangent: Tensor, retain: bool) -> None:
        """Pull one cotangent back and add what it brings."""
        if not out.requires_grad:
            raise ValueError("no use of a parameter reaches the outputs of this batch")
        zeros = [self.anchor, *self.zeros.values()]
        found = torch.autograd.grad(out, zeros, cotangent, retain_graph=retain, allow_unused=True)[1:]
        for (name, zero), row in zip(self.zeros.items(), found, strict=True):
            wide = torch.zeros(zero.shape[1:], dtype=zero.dtype, device=zero.device) if row is None else row
            squares = wide if row is None else _squares(wide)
            self.add(name, {"diagonal": squares.flatten()})
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
        use = USES[route.rule](call, route, self)
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

        zeros = [self.zeros[feed.block.name] for feed in biases]
        return Tap.apply(backward, 1, 0, out, *zeros, self.anchor)

    def know(self, feed: Feed, use: "Seen") -> Covariate | None:
        """Sum the factor that is known now: the same input through the same side is summed once."""
        name = feed.block.name
        self.positions[name] = self.positions.get(name, 0) + use.count
        side = feed.part.left if use.known_is_left else feed.part.right
        assert side is not None
        riding = next((f for f in self.scene.feeds[use.bias] if f.slot == feed.slot), None) if use.bias else None
        beside = None if riding is None else riding.part
        if self.joint is not None:
            return use.known(side, beside, self.gather.max_side)
        key = (id(use.source), _side_key(side), None if beside is None else _side_key(beside.right))
        source, gram = self._seen.get(key, (None, None))
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

    def real(self, x: Tensor, axis: Axis, what: UseKey | str) -> Bool[Tensor, "n s"] | None:
        """Return which positions of a tensor, arranged as `positions` does, are tokens; `None` where all are.

        Raises:
            ValueError: if padding cannot be told from tokens.
        """
        if self.mask is None or axis.position == NO_POSITION:
            return None
        parts = axis.split(x, self.scene.n)
        at = None if axis.position is None else axis.position + 1
        if parts[..., 0].numel() == self.scene.n:
            return None
        if at is None or at >= parts.ndim - 1 or parts.shape[at] != self.mask.shape[1]:
            raise ValueError(
                f"{what} reads padded examples, and where its positions are cannot be told, so padding would count as "
                "data. Fit on batches without padding, or leave its parameters out (exclude=…)"
            )
        shape = [self.scene.n, *(parts.shape[dim] if dim == at else 1 for dim in range(1, parts.ndim - 1))]
        return self.mask.reshape(shape).expand(parts.shape[:-1]).flatten(1)


def _squares(row: Float[Tensor, "n ..."]) -> Float[Tensor, "..."]:
    wide = row if row.dtype == torch.float64 else row.float()
    return wide.square().sum(0)


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


@dataclass(frozen=True)
class Seen:
    """One use, with what is known of it in the forward pass.

    Attributes:
        weight: the parameter.
        bias: a bias of the same use.
        source: the tensor that came in.
        known_is_left: whether what came in belongs to the left side of the blocks.
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
    count: int
    known: Callable[[Side, Any, int], Covariate]
    gradient: Callable[[Tensor], Tensor]
    late: Callable[[Tensor, Side, int], Covariate]
    total: Callable[[Tensor], Tensor]


def _see_linear(call: Call, route: Route, run: Gather) -> Seen:
    weight, bias = linear_names(call)
    x, axis, x_is_first = linear_input(call, route)
    (out_axis,) = route.outputs
    assert out_axis is not None
    n = run.scene.n
    real = run.real(x, axis, weight)
    inputs = positions(x.detach().to(run.scene.values[weight].dtype), axis, n, None)

    def known(side: Side, beside: Any, max_side: int) -> Covariate:
        seen = side.apply(inputs)
        seen = seen if beside is None else seen + column(beside, seen)
        return Dense(seen if real is None else seen * real[..., None], seen.shape[-1] > max_side)

    def gradient(g: Tensor) -> Tensor:
        arranged = positions(g, out_axis, n, None)
        there = run.real(g, out_axis, weight)
        return arranged if there is None else arranged * there[..., None]

    return Seen(
        weight,
        bias,
        x,
        x_is_first != run.scene.params[weight].transposed,
        inputs.shape[0] * inputs.shape[1] if real is None else int(real.sum()),
        known,
        gradient,
        lambda g, side, max_side: Dense(side.apply(g), side.size > max_side),
        lambda g: g.sum(-2),
    )


def _see_conv(call: Call, route: Route, run: Gather) -> Seen:
    named = call.arguments(CONV_NAMES, {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    weight, bias, x = base_name(named["weight"]), base_name(named["bias"]), named["input"]
    assert weight is not None
    if run.mask is not None:
        raise ValueError(
            f"{weight} is a convolution over padded examples: its patches mix tokens and padding. Fit on batches "
            "without padding, or leave it out (exclude=…)"
        )
    settings, groups = {key: named[key] for key in CONV_NAMES[3:]}, int(named["groups"])
    values = run.scene.values[weight]
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
        patches.shape[0] * patches.shape[1],
        known,
        lambda g: g.flatten(2).mT,
        late,
        lambda g: g.sum(-2),
    )


def _see_embedding(call: Call, route: Route, run: Gather) -> Seen:
    named = call.arguments(EMBEDDING_NAMES)
    weight, ids = base_name(named["weight"]), named["input"]
    assert weight is not None
    place = next(i for i, leaf in enumerate(call.leaves) if leaf is ids)
    axis, (out_axis,) = route.inputs[place], route.outputs
    assert axis is not None
    assert out_axis is not None
    n = run.scene.n
    arranged = positions(ids[..., None], axis, n, None)[..., 0]
    values = run.scene.values[weight]
    masked = run.real(ids[..., None], axis, weight)
    real = torch.ones_like(arranged, dtype=torch.bool) if masked is None else masked
    if named["padding_idx"] is not None:
        real = real & (arranged != named["padding_idx"] % values.shape[0])

    def known(side: Side, beside: Any, max_side: int) -> Covariate:
        if side.dense:
            return Dense(OneHot(arranged, values.shape[0]).through(side) * real[..., None], side.size > max_side)
        scale = side.apply(values.new_ones(values.shape[0]))
        return Tokens(arranged, scale, real)

    return Seen(
        weight,
        None,
        ids,
        True,
        int(real.sum()),
        known,
        lambda g: positions(g, out_axis, n, None) * real[..., None],
        lambda g, side, max_side: Dense(side.apply(g), side.size > max_side),
        lambda g: g.sum(-2),
    )


USES: dict[str, Callable[[Call, Route, Gather], Seen]] = {
    "linear": _see_linear,
    "conv": _see_conv,
    "embedding": _see_embedding,
}


def gather(
    plan: GatherPlan,
    joint: Joint | None,
    head: "Callable[[Rows, Any], tuple[Tensor, Any]]",
    values: Rows,
    batch: Any,
    n: int,
    mask: Bool[Tensor, "n s"] | None,
) -> tuple[Tensor, Any, Gather]:
    """Run a function of parameters with every use watched.

    Args:
        plan: which blocks have factors.
        joint: sums of both factors together, or `None`.
        head: `(params, batch) -> (output, what it says of it)`.
        values: the parameters.
        batch: the batch.
        n: its number of examples.
        mask: which positions are tokens, where some are not.

    Returns:
        The output, what the head says of it, and the run: call `run.backward` with cotangents.
    """
    plain = {name: p.detach() for name, p in values.items()}
    scene = Scene(n, None, dict(plan.batched.folded.layout.params), plan.batched.feeds, plain)
    run = Gather(plan, joint, mask, scene)
    probes = {name: probe(p, name, (name,), run) for name, p in plain.items()}
    out, said = head(probes, batch)  # type: ignore[arg-type]
    return out, said, run
