"""A plan decides how per-example gradients are computed: by which engine and families, and at what cost.

A plan is made and checked (the guard) on a first batch. `Planned` runs it in a loop, plans anew for a batch that takes
another path through the model, and checks again from time to time.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch

from influence.func.engine.batch import batch_size, check_function, check_params, split_leaves, take
from influence.func.engine.batched import BatchedPlan, Family, Route, batched_rows, make_feeds
from influence.func.engine.ops import FAMILIES
from influence.func.engine.ops.any import MASKED, VMAP
from influence.func.engine.reference import explain_torch, vmap_problem
from influence.func.engine.trace import (
    AnotherPath,
    CannotTrace,
    NeedsOtherExamples,
    Trace,
    TracedUse,
    UseKey,
    tensors_of,
    trace,
)
from influence.func.transform.chain import Transform
from influence.func.transform.folding import Block, Folded, Part
from influence.func.transform.layout import Layout, ParamLayout
from influence.terminal import human
from influence.types import Batch, LossFn, Params, Rows

GUARD_TOLERANCE = {torch.float64: (1e-5, 1e-6), torch.float32: (1e-2, 1e-3)}
"""Largest relative error that the guard lets pass, and the share of the whole gradient below which a block's error is
measured against that share instead; half precision: (0.1, 0.01). Honest float32 models read 1e-7, or 2e-3 under
bfloat16 autocast; wrong plans 0.1."""

CHECKED = 4
"""Examples of a batch whose rows are compared. A wrong plan moves an axis or misses a use, so it is wrong for most
examples; a plain backward over all of them takes longer than the rows did."""


def guard_limit(params: Params) -> float:
    """Return the largest relative error that the guard lets pass."""
    return GUARD_TOLERANCE.get(next(iter(params.values())).dtype, (0.1, 0.01))[0]


def guard(
    plan: BatchedPlan, loss_fn: LossFn, params: Params, batch: Batch, rows: Rows | None = None, seed: int = 0
) -> tuple[float | None, str]:
    """Check `Σ_n c_n row_n = ∇ Σ_n c_n ℓ_n` over a few examples `n`, with random weights `c`, by a plain backward.

    The rows are those of the whole batch, the backward is of the few alone. So it catches a misplaced example axis,
    which an unweighted sum over all of them cannot see, and rows which hold anything of another example. `rows` is the
    linear part of the rows, where it is at hand; `seed` chooses examples and weights.

    Returns:
        The largest relative error and the block where it is; `None` and the reason where the examples show nothing.
    """
    n = batch_size(batch)
    if rows is None:
        rows, _ = batched_rows(plan, loss_fn, params, batch)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=generator)[:CHECKED].sort().values
    weights = torch.rand(len(chosen), generator=generator, dtype=torch.float64) + 0.5
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = loss_fn(leaves, batch if len(chosen) == n else take(batch, chosen))
        total = (losses * weights.to(losses)).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    plain = {
        name: (torch.zeros_like(p) if g is None else g)[None]
        for (name, p), g in zip(params.items(), found, strict=True)
    }
    got = {name: torch.tensordot(weights.to(row), row[chosen], 1)[None] for name, row in rows.items()}
    return compare_rows(got, plan.folded.linear_rows(plain), next(iter(params.values())).dtype)


def compare_rows(got: Rows, expected: Rows, dtype: torch.dtype) -> tuple[float | None, str]:
    """Return the largest relative error between two sets of rows, and where it is; or why there is none."""
    floor = GUARD_TOLERANCE.get(dtype, (0.1, 0.01))[1]
    finite = all(bool(torch.isfinite(row).all()) for row in expected.values())
    if not finite:
        return None, "the gradient of the batch is not finite"
    whole = sum(float(row.double().square().sum()) for row in expected.values()) ** 0.5
    if whole == 0 and not any(bool(row.any()) for row in got.values()):
        return None, "the gradient of the batch is zero"
    worst, where = 0.0, ""
    for name, row in expected.items():
        scale = max(float(row.double().norm()), floor * whole)
        error = float((got[name].double() - row.double()).norm())
        relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
        if not relative <= worst:
            worst, where = relative, name
    return worst, where


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


def make_plan(
    loss_fn: LossFn, params: Params, batch: Batch, transform: Transform | None = None, engine: str = "auto"
) -> Plan:
    """Decide how per-example gradients of a function are computed, and check it on a first batch.

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


def _try_trace(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Trace | None, Exception | None]:
    """Trace a function that is known to run; where the probes are what it cannot bear, say so."""
    try:
        return trace(loss_fn, params, batch), None
    except (RuntimeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return None, error


def _family(key: UseKey, use: TracedUse) -> Family | None:
    """Return the family of operations that describes a use; `None` if none does."""
    family = FAMILIES.get(key.op) if len(use.outputs) == 1 and use.outputs[0] is not None else None
    return family if family is not None and family.serves(use) else None


def choose_route(key: UseKey, use: TracedUse) -> Route:
    """Choose the family that serves a use.

    Raises:
        CannotTrace: if none can.
    """
    family = _family(key, use)
    if family is None:
        if not all(use.outputs):
            raise CannotTrace(f"{key} mixes examples, or its result has no example axis")
        family = VMAP if VMAP.serves(use) else MASKED
    return Route(family, use.inputs, use.outputs)


def traced_layout(params: Params, traced: Trace | None) -> Layout:
    """Return the layout of a hand-written function's parameters, from how they are used."""
    found: dict[str, dict[str, Any]] = {name: {"family": "bare"} for name in params}
    for key, use in () if traced is None else traced.uses.items():
        family = _family(key, use)
        told = {} if family is None or family.layout is None else family.layout(use)
        for name, what in told.items():
            if what["family"] != "linear" or found[name]["family"] == "bare":
                found[name] = what
    return Layout({name: ParamLayout(tuple(p.shape), p.dtype, p.device, **found[name]) for name, p in params.items()})


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
    uses: dict[str, list[tuple[UseKey, TracedUse]]] = {}
    for key, use in traced.uses.items():
        for name in key.params:
            uses.setdefault(name, []).append((key, use))
    costs = []
    for block in folded.blocks:
        names, flops = [], 0
        for part in block.parts:
            for key, use in uses.get(part.source, ()):
                family = routes[key].family
                names.append(family.name)
                flops += _flops(use, family, part, folded.layout[part.source])
        rule = " + ".join(dict.fromkeys(names)) or "unused"
        costs.append(_cost(folded, block, shapes, rule, not block.linear, flops))
    return tuple(costs)


def _cost(
    folded: Folded, block: Block, shapes: dict[str, tuple[int, ...]], rule: str, is_folded: bool, flops: int
) -> BlockCost:
    row = shapes.get(block.into, next(iter(shapes.values())))
    size = prod(row) * folded.layout[block.parts[0].source].dtype.itemsize
    return BlockCost(block.name, block.original, row, rule, is_folded, flops, size)


def _flops(use: TracedUse, family: Family, part: Part, layout: ParamLayout) -> int:
    """Return the cost of one use per example beyond forward and input-backward, by multiply-adds counted twice."""
    if part.right is None or family.see is None or not layout.is_matrix:
        return 2 * prod(layout.shape)
    out = tensors_of(use.call.run())[0]  # of three examples
    count = out.numel() // out.shape[family.channel] // 3
    left, right = part.left, part.right
    sides = sum(side.source * side.size for side in (left, right) if side.dense)
    return 2 * count * (sides + left.size * right.size)


BatchStep: TypeAlias = Callable[..., Any]


class Program(NamedTuple):
    """A plan and what executes it.

    Attributes:
        plan: the plan.
        step: the value of a batch.
        shown: the same value, and the linear part of the examples' rows that it was made of; where a step has none to
            show, a check computes them.
    """

    plan: Plan
    step: BatchStep
    shown: Callable[[Params, Batch], tuple[Any, Rows]] | None = None


class Planned:
    """A step that was planned on a first batch: call it with parameters and a batch.

    A batch which takes the model along another path than the planned one (a mask where there was none) gets a plan of
    its own, once. The batched engine's check against a plain backward is repeated, on other examples, whenever the
    batches, or the batch shapes, are twice as many as at the last check that showed something.

    Attributes:
        plans: what is executed, in the order in which they were needed.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        make: Callable[[Params, Batch], tuple[Plan, BatchStep] | Program],
        params: Params,
        batch: Batch,
    ) -> None:
        """Plan for a first batch."""
        self._loss_fn, self._make = loss_fn, make
        self.plans = [Program(*make(params, batch))]
        self._calls, self._shapes, self._checked = 0, {example_shapes(batch)}, self.plan.guard is not None
        self._at_check = (1, 1)

    @property
    def plan(self) -> Plan:
        """The first plan."""
        return self.plans[0].plan

    def __call__(self, params: Params, batch: Batch, *more: Any) -> Any:
        """Return the step's value on a batch; what else the step takes is passed on."""
        if self.plan.provisional:
            self.plans = [Program(*self._make(params, batch))]
            self._checked = self.plan.guard is not None
        self._calls += 1
        self._shapes.add(example_shapes(batch))
        calls, shapes = self._at_check
        due = not self._checked or self._calls >= 2 * calls or len(self._shapes) >= 2 * shapes
        for made in self.plans:
            try:
                if due and self._calls > 1:
                    return self._checking(made, params, batch, *more)
                return made.step(params, batch, *more)
            except AnotherPath:
                continue
        self.plans.append(Program(*self._make(params, batch)))
        return self.plans[-1].step(params, batch, *more)

    def _checking(self, made: Program, params: Params, batch: Batch, *more: Any) -> Any:
        """Return the step's value, once its rows are known to be right."""
        plan, rows = made.plan.batched, None
        if plan is None:
            return made.step(params, batch, *more)
        if made.shown is None:
            value = made.step(params, batch, *more)
        else:
            value, rows = made.shown(params, batch)
        error, where = guard(plan, self._loss_fn, params, batch, rows, self._calls)
        if error is not None and not error <= guard_limit(params):
            raise EngineError(
                f"the plan of the first batch is wrong for this one: Σ c·row = ∇ Σ c·ℓ fails at {where!r}, relative "
                f"error {error:.2g}. The model takes another path that does not show; rows since the last check (it is "
                "repeated whenever batches or shapes have doubled) may be wrong. Use engine='vmap' or 'loop'"
            )
        if error is not None:
            self._checked, self._at_check = True, (self._calls, len(self._shapes))
        return value


def example_shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shape of one example in every tensor of a batch."""
    return tuple(tuple(leaf.shape[1:]) for leaf in split_leaves(batch)[0])
