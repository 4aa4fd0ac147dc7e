"""Folds: one pass over batches, several sinks. A sink is four pure functions of its state.

`update` folds a batch's value in, `merge` joins two states (ranks, resumed runs), `finalize` turns a state into a
result. Any split of the batches and any bracketing of the merges give the same result.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.batches import batch_size
from influence.func.transform import flat, vectors
from influence.types import Batch, Rows


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


class Total(NamedTuple):
    """A sum and how many examples are in it."""

    sums: Rows
    number: int


def fold(step: Callable[[Batch], Any], batches: Iterable[Batch], sinks: Mapping[str, Sink]) -> dict[str, Any]:
    """Run a step over batches once, and fold its values into every sink.

    Args:
        step: `batch -> value`, as `lambda batch: rows_of(params, batch)`.
        batches: the batches; their `index`, if they carry one, says which rows of the dataset they hold, otherwise
            rows are counted from 0.
        sinks: sinks by name.

    Returns:
        Each sink's result.

    Example:
        >>> import torch
        >>> from influence.func.fold import fold, mean, total
        >>> batches = [torch.ones(2, 3), torch.zeros(1, 3)]
        >>> out = fold(lambda batch: {"x": batch}, batches, {"mean": mean(), "sum": total()})
        >>> out["sum"]["x"], out["mean"]["x"]
        (tensor([2., 2., 2.]), tensor([0.6667, 0.6667, 0.6667]))
    """
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


def wide(x: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _add(a: Rows, b: Rows) -> Rows:
    if not a or not b:
        return a or b
    return {name: value + b[name] for name, value in a.items()}


def _update_total(state: Total, index: Int[Tensor, " n"], rows: Rows) -> Total:
    return Total(_add(state.sums, {name: wide(row).sum(0) for name, row in rows.items()}), state.number + len(index))


def _merge_total(a: Total, b: Total) -> Total:
    return Total(_add(a.sums, b.sums), a.number + b.number)


def total() -> Sink:
    """Return a sink that sums rows: `{block: [...]}`, in at least float32."""
    return Sink(lambda: Total({}, 0), _update_total, _merge_total, lambda state: state.sums)


def mean() -> Sink:
    """Return a sink that averages rows: `{block: [...]}`, in at least float32."""

    def finalize(state: Total) -> Rows:
        return {name: value / state.number for name, value in state.sums.items()}

    return Sink(lambda: Total({}, 0), _update_total, _merge_total, finalize)


def gram() -> Sink:
    """Return a sink for each block's mean Gram matrix `Σ_n g_n g_n^T / N` of flattened rows, in at least float32."""

    def update(state: Total, index: Int[Tensor, " n"], rows: Rows) -> Total:
        products = {name: _outer(wide(vectors(row))) for name, row in rows.items()}
        return Total(_add(state.sums, products), state.number + len(index))

    def finalize(state: Total) -> Rows:
        return {name: value / state.number for name, value in state.sums.items()}

    return Sink(lambda: Total({}, 0), update, _merge_total, finalize)


def _outer(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    return rows.mT @ rows


class Pieces(NamedTuple):
    """Results of batches, with the rows of the dataset they belong to."""

    indices: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def score(queries: Rows) -> Sink:
    """Return a sink for inner products with query rows: `[N, q]`, in the order of `index`; no rows are kept.

    Args:
        queries: query rows of the same blocks, `[q, ...]` each.

    Returns:
        The sink.
    """
    wanted = flat(queries)

    def update(state: Pieces, index: Int[Tensor, " n"], rows: Rows) -> Pieces:
        if set(rows) != set(queries):
            raise ValueError(f"queries have blocks {sorted(queries)[:3]}…; the rows have {sorted(rows)[:3]}…")
        scores = flat({name: rows[name] for name in queries}) @ wanted.to(next(iter(rows.values())).device).mT
        return Pieces((*state.indices, index), (*state.values, scores))

    def merge(a: Pieces, b: Pieces) -> Pieces:
        return Pieces(a.indices + b.indices, a.values + b.values)

    def finalize(state: Pieces) -> Tensor:
        if not state.values:
            return wanted.new_zeros(0, wanted.shape[0])
        return torch.cat(state.values)[torch.cat(state.indices).argsort(stable=True)]

    return Sink(lambda: Pieces((), ()), update, merge, finalize)
