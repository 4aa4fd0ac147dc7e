"""Plans in a loop: one for each path that batches take through a model, checked again and again."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from influence.func.axes import AnotherPath
from influence.func.batches import split_leaves
from influence.func.guard import guard, guard_limit
from influence.func.plan import EngineError, Plan
from influence.types import Batch, LossFn, Params, Rows

Step: TypeAlias = Callable[[Params, Batch], Any]


class Made(NamedTuple):
    """A plan and what executes it.

    Attributes:
        plan: the plan.
        step: the value of a batch.
        shown: the same value, and the linear part of the examples' rows that it was made of; where a step has none to
            show, a check computes them.
    """

    plan: Plan
    step: Step
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
        make: Callable[[Params, Batch], tuple[Plan, Step] | Made],
        params: Params,
        batch: Batch,
    ) -> None:
        """Plan for a first batch."""
        self._loss_fn, self._make = loss_fn, make
        self.plans = [Made(*make(params, batch))]
        self._calls, self._shapes, self._checked = 0, {example_shapes(batch)}, self.plan.guard is not None
        self._at_check = (1, 1)

    @property
    def plan(self) -> Plan:
        """The first plan."""
        return self.plans[0].plan

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Return the step's value on a batch."""
        if self.plan.provisional:
            self.plans = [Made(*self._make(params, batch))]
            self._checked = self.plan.guard is not None
        self._calls += 1
        self._shapes.add(example_shapes(batch))
        calls, shapes = self._at_check
        due = not self._checked or self._calls >= 2 * calls or len(self._shapes) >= 2 * shapes
        for made in self.plans:
            try:
                return self._checking(made, params, batch) if due and self._calls > 1 else made.step(params, batch)
            except AnotherPath:
                continue
        self.plans.append(Made(*self._make(params, batch)))
        return self.plans[-1].step(params, batch)

    def _checking(self, made: Made, params: Params, batch: Batch) -> Any:
        """Return the step's value, once its rows are known to be right."""
        plan, rows = made.plan.batched, None
        if plan is None:
            return made.step(params, batch)
        if made.shown is None:
            value = made.step(params, batch)
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
