"""Plans in a loop: one for each path that batches take through a model, checked again and again."""

from collections.abc import Callable
from typing import Any

from influence.func.axes import AnotherPath
from influence.func.batches import split_leaves
from influence.func.plan import EngineError, Plan, guard, guard_limit
from influence.types import Batch, LossFn, Params


class Planned:
    """A step that was planned on a first batch: call it with parameters and a batch.

    A batch which takes the model along another path than the planned one (a mask where there was none) gets a plan of
    its own, once. The batched engine's check against a plain backward is repeated whenever the batches, or the batch
    shapes, are twice as many as at the last check, and on every batch until one showed something.

    Attributes:
        plans: what is executed, in the order in which they were needed: a plan, and its step.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        make: Callable[[Params, Batch], tuple[Plan, Callable[[Params, Batch], Any]]],
        params: Params,
        batch: Batch,
    ) -> None:
        """Plan for a first batch."""
        self._loss_fn, self._make = loss_fn, make
        self.plans = [make(params, batch)]
        self._calls, self._shapes, self._checked = 0, {example_shapes(batch)}, self.plan.guard is not None
        self._at_check = (1, 1)

    @property
    def plan(self) -> Plan:
        """The first plan."""
        return self.plans[0][0]

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Return the step's value on a batch."""
        if self.plan.provisional:
            self.plans = [self._make(params, batch)]
            self._checked = self.plan.guard is not None
        self._calls += 1
        self._shapes.add(example_shapes(batch))
        calls, shapes = self._at_check
        due = not self._checked or self._calls >= 2 * calls or len(self._shapes) >= 2 * shapes
        for plan, step in self.plans:
            try:
                value = step(params, batch)
                if plan.batched is not None and self._calls > 1 and due:
                    self._checked |= self._recheck(plan, params, batch)
                    self._at_check = (self._calls, len(self._shapes))
                return value
            except AnotherPath:
                continue
        self.plans.append(self._make(params, batch))
        return self.plans[-1][1](params, batch)

    def _recheck(self, plan: Plan, params: Params, batch: Batch) -> bool:
        assert plan.batched is not None
        error, where = guard(plan.batched, self._loss_fn, params, batch)
        if error is not None and not error <= guard_limit(params):
            raise EngineError(
                f"the plan of the first batch is wrong for this one: Σ c·row = ∇ Σ c·ℓ fails at {where!r}, relative "
                f"error {error:.2g}. The model takes another path that does not show; rows since the last check (it is "
                "repeated whenever batches or shapes have doubled) may be wrong. Use engine='vmap' or 'loop'"
            )
        return error is not None


def example_shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shape of one example in every tensor of a batch."""
    return tuple(tuple(leaf.shape[1:]) for leaf in split_leaves(batch)[0])
