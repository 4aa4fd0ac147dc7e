"""Plans of a training run: one for each path that its batches take, bound to the transform of the step."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from influence.func.axes import AnotherPath
from influence.func.plan import Plan, make_plan
from influence.func.transform import Transform
from influence.train.live import rebound
from influence.train.numbering import INDEX
from influence.types import LossFn, Params

Path: TypeAlias = tuple[Any, ...]
"""What decides which path a batch takes through a model, as far as it shows."""


class Plans:
    """Plans by path.

    Attributes:
        transform: what they are bound to: that of the present step.
    """

    def __init__(self, loss_fn: LossFn, transform: Transform, engine: str) -> None:
        """Begin without a plan."""
        self._loss_fn, self._first, self._engine = loss_fn, transform, engine
        self.transform = transform
        self._made: dict[Path, Plan] = {}
        self._bound: dict[Path, Plan] = {}

    def bind(self, transform: Transform) -> None:
        """Take another transform from here on."""
        self.transform, self._bound = transform, {}

    def of(self, params: Params, batch: dict[str, Any]) -> Plan:
        """Return the plan of a batch's path; made on the first such batch."""
        path = path_of(batch)
        if path not in self._made:
            device = next(iter(params.values())).device
            placed = {key: x.to(device) for key, x in batch.items()}
            self._made[path] = make_plan(self._loss_fn, params, placed, self._first, self._engine)
        if path not in self._bound:
            self._bound[path] = rebound(self._made[path], self.transform)
        return self._bound[path]

    def run(self, params: Params, batch: dict[str, Any], step: Callable[[Plan], Any]) -> tuple[Any, Plan]:
        """Run a step under a batch's plan; where it takes another path after all, plan once more.

        Returns:
            What the step returns, and the plan.
        """
        plan = self.of(params, batch)
        try:
            return step(plan), plan
        except AnotherPath:
            path = path_of(batch)
            del self._made[path], self._bound[path]
            plan = self.of(params, batch)
            return step(plan), plan


def path_of(batch: Mapping[str, Any]) -> Path:
    """Return which path a batch takes: transformers leaves a mask out that masks nothing."""
    mask = batch.get("attention_mask")
    return (*sorted(set(batch) - {INDEX}), mask is not None and bool(mask.all()))
