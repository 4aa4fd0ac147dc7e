"""Plans of a training run: one for each path that its batches take, bound to the transform of the step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset, IterableDataset

from influence.func.engine.plan import Plan, make_plan
from influence.func.engine.trace import AnotherPath
from influence.func.transform.chain import Transform
from influence.train.live import rebound
from influence.types import LossFn, Params

INDEX = "index"


class Numbered(Dataset[dict[str, Any]]):
    """A dataset whose items carry their number."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.inner)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return an item with its number."""
        item = self.inner[i]
        if not isinstance(item, Mapping):
            raise ValueError(f"a training set's items must be dictionaries to carry their number; got {type(item)}")
        return {**item, INDEX: int(i)}


class HandThrough:
    """A collator that hands the items' numbers through another, which may know nothing of them."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, items: Sequence[Any]) -> Any:
        """Collate; the numbers go along as `index`."""
        if not all(isinstance(item, Mapping) and INDEX in item for item in items):
            return self.inner(items)
        batch = self.inner([{key: value for key, value in item.items() if key != INDEX} for item in items])
        batch[INDEX] = torch.tensor([int(item[INDEX]) for item in items])
        return batch


def numbered(trainer: Any) -> None:
    """Number a Trainer's training set, and let its collator hand the numbers through.

    Raises:
        ValueError: if it has no training set, or one without an order.
    """
    data = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        what = "none" if data is None else f"a {type(data).__name__}"
        raise ValueError(
            f"rows are kept in the order of the training set, and this Trainer has {what}: pass a dataset with a length"
        )
    columns = getattr(data, "column_names", None)
    made_late = getattr(data, "format", {}).get("type") == "custom"  # set_transform makes items of the columns it knows
    if columns is not None and hasattr(data, "add_column") and not made_late:
        if INDEX in columns:
            raise ValueError(f"the training set has a column {INDEX!r} of its own: rename it, rows are numbered by it")
        trainer.train_dataset = data.add_column(INDEX, list(range(len(data))))
    else:
        trainer.train_dataset = Numbered(data)
    trainer.data_collator = HandThrough(trainer.data_collator)
    trainer._set_signature_columns_if_needed()
    if INDEX not in trainer._signature_columns:
        trainer._signature_columns.append(INDEX)


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
