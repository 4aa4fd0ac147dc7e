"""Folds: one pass over batches, several sinks. A sink is four pure functions of its state.

`update` folds a batch's value in, `merge` joins two states (ranks, resumed runs), `finalize` turns a state into a
result. Any split of the batches and any bracketing of the merges give the same result.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Int
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.types import Batch


class Sink(NamedTuple):
    """A fold over values, batch by batch.

    Attributes:
        init: returns the empty state.
        update: `(state, index [n], value) -> state`.
        merge: `(state, state) -> state`, associative.
        finalize: `state -> result`.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Int[Tensor, " n"], Any], Any]
    merge: Callable[[Any, Any], Any]
    finalize: Callable[[Any], Any]


@overload
def fold(step: Callable[[Batch], Any], batches: Iterable[Batch], sinks: Mapping[str, Sink]) -> dict[str, Any]: ...
@overload
def fold(step: Callable[[Batch], Any], batches: Iterable[Batch], sinks: Sink) -> Any: ...
def fold(step: Callable[[Batch], Any], batches: Iterable[Batch], sinks: Mapping[str, Sink] | Sink) -> Any:
    """Run a step over batches once, and fold its values into every sink.

    Args:
        step: `batch -> value`, as `lambda batch: rows_of(params, batch)`.
        batches: the batches; their `index`, if they carry one, says which rows of the dataset they hold, otherwise
            rows are counted from 0.
        sinks: sinks by name, or one sink.

    Returns:
        Each sink's result by name, or the one sink's.

    Example:
        >>> import torch
        >>> from influence import fold, sinks
        >>> batches = [torch.ones(2, 3), torch.zeros(1, 3)]
        >>> out = fold(lambda batch: {"x": batch}, batches, {"mean": sinks.mean(), "sum": sinks.total()})
        >>> out["sum"]["x"], out["mean"]["x"]
        (tensor([2., 2., 2.]), tensor([0.6667, 0.6667, 0.6667]))
        >>> fold(lambda batch: {"x": batch}, batches, sinks.mean())["x"]
        tensor([0.6667, 0.6667, 0.6667])
    """
    if isinstance(sinks, Sink):
        return fold(step, batches, {"": sinks})[""]
    states = {name: sink.init() for name, sink in sinks.items()}
    seen = 0
    for batch in batches:
        n = batch_size(batch)
        index = batch.get("index") if isinstance(batch, Mapping) else None
        index = torch.arange(seen, seen + n) if index is None else index
        value = step(batch)
        states = {name: sink.update(states[name], index, value) for name, sink in sinks.items()}
        seen += n
    return {name: sink.finalize(states[name]) for name, sink in sinks.items()}
