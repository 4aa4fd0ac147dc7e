"""The plan: which engine, which rule at each use, what it costs; decided once, printed on request."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence.func.axes import known_axis
from influence.func.batched import BatchedPlan, make_feeds
from influence.func.batches import batch_size, sample
from influence.func.contributions import Route
from influence.func.engines import explain_torch, vmap_problem
from influence.func.factors import positions
from influence.func.folding import Block, Folded
from influence.func.guard import guard, guard_limit
from influence.func.layout import Layout, ParamLayout
from influence.func.probe import UseKey, tensors_of
from influence.func.routes import choose_route, traced_layout
from influence.func.trace import (
    CannotTrace,
    Inspection,
    NeedsOtherExamples,
    Trace,
    Use,
    check_losses,
    check_unmixed,
    trace,
)
from influence.func.transform import Transform
from influence.types import Batch, LossFn, Params

ENGINES = ("auto", "batched", "vmap", "loop")


class EngineError(ValueError):
    """An engine cannot serve a function; the message names the engine, the reason and the way out."""


class BlockCost(NamedTuple):
    """A line of the plan: one block."""

    name: str
    shape: tuple[int, ...]
    row: tuple[int, ...]
    rule: str
    folded: bool
    flops: int
    bytes: int


class Plan(NamedTuple):
    """What will be executed, decided once.

    Attributes:
        engine: `batched`, `vmap` or `loop`.
        transform: what is wanted of the gradients.
        folded: the same, bound to the layout.
        batched: what the batched engine executes, if it is the one.
        costs: a line per block.
        notes: why this engine, and what the transform's author should know.
        guard: the largest relative error of `Σ c_n row_n = ∇ Σ c_n ℓ_n` on a few examples, if they showed anything.
        provisional: whether the first batch told too little; a later one may get a better plan.
    """

    engine: str
    transform: Transform
    folded: Folded
    batched: BatchedPlan | None
    costs: tuple[BlockCost, ...]
    notes: tuple[str, ...]
    guard: float | None = None
    provisional: bool = False

    @property
    def layout(self) -> Layout:
        """The parameters' layout."""
        return self.folded.layout

    def __str__(self) -> str:
        """Return the plan as a table."""
        head = f"engine: {self.engine}" + (
            "" if self.guard is None else f" (checked: Σ c·row = ∇ Σ c·ℓ to {self.guard:.1e})"
        )
        width = max([5, *(len(cost.name) for cost in self.costs)])
        lines = [
            head,
            f"{'block':{width}}  {'shape':>14}  {'row':>14}  {'route':24} {'folded':6} {'FLOPs':>9} {'bytes':>9}",
        ]
        for cost in self.costs:
            shape, row = ("×".join(map(str, s)) or "1" for s in (cost.shape, cost.row))
            folded = "yes" if cost.folded else "no"
            lines.append(
                f"{cost.name:{width}}  {shape:>14}  {row:>14}  {cost.rule[:24]:24} {folded:6} "
                f"{human(cost.flops):>9} {human(cost.bytes):>9}"
            )
        flops, size = (sum(getattr(cost, field) for cost in self.costs) for field in ("flops", "bytes"))
        lines.append(
            f"per example: {human(flops)} FLOPs on top of forward and input-backward, {human(size)} bytes of rows"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def human(number: int | float) -> str:
    """Return a number with a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.0f}{prefix}" if not prefix else f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"


def make_plan(
    loss_fn: LossFn, params: Params, batch: Batch, transform: Transform | None = None, engine: str = "auto"
) -> Plan:
    """Decide how per-example gradients of a function are computed, and check it on a batch.

    Args:
        loss_fn: `(params, batch) -> losses[n]`.
        params: the parameters to differentiate.
        batch: a first batch, of the kind that will come.
        transform: what is wanted of the gradients.
        engine: `auto`, `batched`, `vmap` or `loop`.

    Returns:
        The plan.

    Raises:
        EngineError: if the engine that was asked for cannot serve.
        ValueError: if the function is not a pure function of one loss per example.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    check_params(params)
    batch_size(batch)
    transform = transform or Transform()
    known: Layout | None = getattr(loss_fn, "layout", None)
    routing = check_function(loss_fn, params, batch)
    needed = engine in ("auto", "batched") or known is None
    traced, problem = _try_trace(loss_fn, params, batch) if needed else (None, None)
    reason = None if problem is None else (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    if routing and traced is not None:
        reason = f"values decide where elements go ({', '.join(sorted(routing))}), as in a mixture of experts"
    if reason and engine == "batched":
        raise EngineError(f"engine='batched' cannot serve this function: {reason}. Use engine='auto', 'vmap' or 'loop'")
    layout = known.restrict(params) if known is not None else traced_layout(params, traced)
    folded = transform.bind(layout)
    notes = list(folded.warnings)
    of_loss = getattr(loss_fn, "note", None)
    notes += [said] if of_loss is not None and (said := of_loss(params, batch)) else []
    if engine in ("auto", "batched"):
        try:
            if traced is None or reason:
                raise EngineError(reason or "no trace")
            return _batched_plan(loss_fn, params, batch, transform, folded, traced, notes)
        except (EngineError, CannotTrace) as error:
            if engine == "batched":
                raise EngineError(
                    f"engine='batched' cannot serve this function: {error}. Use engine='auto', 'vmap' or 'loop'"
                ) from error
            notes.append(f"not batched: {error}")
    chosen = engine if engine in ("vmap", "loop") else "vmap"
    if chosen == "vmap":
        meaning = vmap_problem(loss_fn, params, batch)
        if meaning and engine == "vmap":
            raise EngineError(f"engine='vmap' cannot serve this function: {meaning}. Use engine='auto' or 'loop'")
        if meaning:
            notes.append(f"not vmap: {meaning}")
            chosen = "loop"
    shapes = folded.row_shapes
    costs = tuple(_cost(folded, block, shapes, f"whole {chosen}", False, 0) for block in folded.blocks)
    provisional = isinstance(problem, NeedsOtherExamples)
    return Plan(chosen, transform, folded, None, costs, tuple(notes), provisional=provisional)


def check_params(params: Params) -> None:
    """Refuse parameters which are no dictionary of floating-point tensors.

    Raises:
        ValueError: naming the first that is not.
    """
    if not isinstance(params, dict) or not params:
        raise ValueError("params must be a dictionary {name: tensor} with at least one entry, as functionalize returns")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"parameter {name!r} must be a floating-point tensor to have a gradient; got {kind}")


def check_function(loss_fn: LossFn, params: Params, batch: Batch) -> set[str]:
    """Refuse what is not a differentiable, pure function of one loss per example, by running it on few examples.

    Returns:
        Names of operations by which it routes elements by their values.

    Raises:
        ValueError: saying what it does instead.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("no gradient exists under torch.inference_mode(); leave it, or use torch.no_grad()")
    inspection = Inspection()
    with inspection, torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        few = loss_fn(leaves, sample(batch, 2))
    with inspection, torch.no_grad():
        more = loss_fn(params, sample(batch, 3))
    check_losses(few, 2)
    check_losses(more, 3)
    check_unmixed(few, more)
    if not _reaches(few, leaves):
        raise ValueError(
            f"the losses have no gradient with respect to any of {', '.join(list(params)[:5])}: the function does not "
            "use these parameters, or computes under torch.no_grad() or detach()"
        )
    return inspection.routing


def _reaches(out: Tensor, leaves: Params) -> bool:
    """Whether a backward from a tensor would come to one of some leaves."""
    wanted, seen, nodes = {id(leaf) for leaf in leaves.values()}, set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
    return False


def _try_trace(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Trace | None, Exception | None]:
    """Trace a function that is known to run; where the probes are what it cannot bear, say so."""
    try:
        return trace(loss_fn, params, batch), None
    except (RuntimeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return None, error


def _batched_plan(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    transform: Transform,
    folded: Folded,
    traced: Trace,
    notes: list[str],
) -> Plan:
    routes = {key: choose_route(key, use) for key, use in traced.uses.items()}
    plan = BatchedPlan(folded, routes, traced.alone, make_feeds(folded))
    costs = _costs(folded, traced, routes)
    try:
        error, where = guard(plan, loss_fn, params, batch)
    except (RuntimeError, ValueError, IndexError) as problem:
        raise EngineError(f"it fails on the first batch: {explain_torch(str(problem))}") from problem
    if error is None:
        notes.append(f"not checked yet: {where}")
    elif not error <= guard_limit(params):
        raise EngineError(f"the check Σ c·row = ∇ Σ c·ℓ fails at {where!r}: relative error {error:.2g}")
    unused = sorted(set(params) - {name for key in (*routes, *traced.alone) for name in key.params})
    if unused:
        notes.append(f"{len(unused)} parameters are not used by the loss; their rows are zero: {', '.join(unused[:5])}")
    return Plan("batched", transform, folded, plan, costs, tuple(notes), error)


def _costs(folded: Folded, traced: Trace, routes: dict[UseKey, Route]) -> tuple[BlockCost, ...]:
    shapes = folded.row_shapes
    uses: dict[str, list[tuple[UseKey, Use]]] = {}
    for key, use in traced.uses.items():
        for name in key.params:
            uses.setdefault(name, []).append((key, use))
    costs = []
    for block in folded.blocks:
        rules, flops = [], 0
        for part in block.parts:
            for key, use in uses.get(part.source, ()):
                rules.append(routes[key].rule)
                flops += _flops(use, routes[key], part, folded.layout[part.source])
        rule = " + ".join(dict.fromkeys(rules)) or "unused"
        costs.append(_cost(folded, block, shapes, rule, not block.linear, flops))
    return tuple(costs)


def _cost(
    folded: Folded, block: Block, shapes: dict[str, tuple[int, ...]], rule: str, is_folded: bool, flops: int
) -> BlockCost:
    row = shapes.get(block.into, next(iter(shapes.values())))
    size = prod(row) * folded.layout[block.parts[0].source].dtype.itemsize
    return BlockCost(block.name, block.original, row, rule, is_folded, flops, size)


def _flops(use: Use, route: Route, part: Any, layout: ParamLayout) -> int:
    """Return the cost of one use per example beyond forward and input-backward, by multiply-adds counted twice."""
    if part.right is None or route.rule not in ("linear", "embedding", "conv") or not layout.is_matrix:
        return 2 * prod(layout.shape)
    out = tensors_of(use.call.run())[0]
    (axis,) = use.outputs
    count = positions(out, known_axis(axis), 3, None).shape[1] if route.rule != "conv" else out[0, 0].numel()
    left, right = part.left, part.right
    sides = sum(side.source * side.size for side in (left, right) if side.dense)
    return 2 * count * (sides + left.size * right.size)
