"""Sinks: what a pass over data can fold its rows into. Sums are taken in at least float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.fold import Sink
from influence.func.loss.losses import widen
from influence.func.transform.folding import flat, same_dtype, vectors
from influence.types import Rows


class Total(NamedTuple):
    """A sum and how many examples are in it."""

    sums: Rows
    number: int


def _add(a: Rows, b: Rows) -> Rows:
    if not a or not b:
        return a or b
    return {name: value + b[name] for name, value in a.items()}


def _update_total(state: Total, index: Int[Tensor, " n"], rows: Rows) -> Total:
    return Total(_add(state.sums, {name: widen(row).sum(0) for name, row in rows.items()}), state.number + len(index))


def _merge_total(a: Total, b: Total) -> Total:
    return Total(_add(a.sums, b.sums), a.number + b.number)


def taking(sink: Sink, part: Callable[[Any], Any]) -> Sink:
    """Return a sink that folds a part of each value, so that sinks of other values share a pass.

    Args:
        sink: the sink.
        part: what it is to see of a step's value, as `lambda value: value.rows`.

    Returns:
        The sink.

    Example:
        >>> import torch
        >>> from influence import fold, sinks
        >>> step = lambda batch: ({"x": batch}, batch.sum(1))
        >>> fold(step, [torch.ones(2, 3)], {"sum": sinks.taking(sinks.total(), lambda value: value[0])})
        {'sum': {'x': tensor([2., 2., 2.])}}
    """
    return sink._replace(update=lambda state, index, value: sink.update(state, index, part(value)))


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
        products = {name: _outer(widen(vectors(row))) for name, row in rows.items()}
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
        mine, theirs = same_dtype(flat({name: rows[name] for name in queries}), wanted)
        scores = mine @ theirs.mT
        return Pieces((*state.indices, index), (*state.values, scores))

    def merge(a: Pieces, b: Pieces) -> Pieces:
        return Pieces(a.indices + b.indices, a.values + b.values)

    def finalize(state: Pieces) -> Tensor:
        if not state.values:
            return wanted.new_zeros(0, wanted.shape[0])
        return torch.cat(state.values)[torch.cat(state.indices).argsort(stable=True)]

    return Sink(lambda: Pieces((), ()), update, merge, finalize)
