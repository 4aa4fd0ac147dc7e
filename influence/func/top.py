"""The running top k of scores that come in pieces: exact, in any split, with ties broken by row."""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CELL = 256
"""Scores of which the largest alone is looked at, unless it would enter."""
GROWTH = 8
"""By how much more is looked at at a time while the top fills."""


class Top(NamedTuple):
    """The `k` largest scores of each query so far, largest first; equal ones by row.

    Attributes:
        values: the scores; `-inf` where fewer than `k` rows were seen.
        indices: their rows; -1 there.
    """

    values: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]


def start(like: Float[Tensor, "q ..."], k: int) -> Top:
    """Return the top of nothing, on the device and in the dtype of scores."""
    q = like.shape[0]
    return Top(like.new_full((q, k), -torch.inf), torch.full((q, k), -1, dtype=torch.int64, device=like.device))


def update(top: Top, scores: Float[Tensor, "q r"], begin: int) -> Top:
    """Take in the scores of rows `begin, begin + 1, …`, which come after all rows seen before.

    Costs one reduction over the scores, and a look into the few cells whose largest score would enter.

    Args:
        top: the state.
        scores: the scores.
        begin: the row of the first.

    Returns:
        The new state.

    Raises:
        ValueError: if a score that would enter is not finite.

    Example:
        >>> import torch
        >>> update(start(torch.zeros(1), 2), torch.tensor([[1.0, 3.0, 3.0]]), begin=10).indices
        tensor([[11, 12]])
    """
    size = scores.shape[1]
    whole = size // CELL * CELL
    edges = [0, whole, size]
    if bool((top.indices[:, -1:] < 0).any()):  # a few first, so that the rest is looked at by cells
        some = -(-top.values.shape[1] // CELL) * CELL
        edges[1:1] = [edge for i in range(21) if (edge := some * GROWTH**i) < whole]
    for left, right in pairwise(edges):
        if left < right:
            top = _update(top, scores[:, left:right], begin + left)
    return top


def _update(top: Top, scores: Float[Tensor, "q r"], begin: int) -> Top:
    """Take in scores that fill their cells, or one cell."""
    k, least = top.values.shape[1], top.values[:, -1:]
    cell_size = min(CELL, scores.shape[1])
    cells = scores.unflatten(1, (-1, cell_size))
    # a reduction whose result lies across its input is slow: it follows the layout of the scores
    side_by_side = scores.stride(0) == 1
    largest = scores.mT.unflatten(0, (-1, cell_size)).amax(1).mT if side_by_side else cells.amax(2)
    query, cell = (~(largest <= least)).nonzero().unbind(1)  # NaN is among them
    if not len(query):
        return top
    if not torch.isfinite(largest[query, cell]).all():
        row = begin + int((~torch.isfinite(scores)).any(0).nonzero()[0])
        raise ValueError(f"the score of row {row} is not finite: the stored row or the query overflows")
    hot, number = query.unique_consecutive(return_inverse=True)
    if bool(torch.isinf(least).any()):
        return _among_all(top, scores, begin)
    inside = cells[query, cell]
    at, column = (inside > least[query]).nonzero().unbind(1)
    number, rows = number[at], cell[at] * cells.shape[2] + column + begin
    counts = number.bincount(minlength=len(hot))
    most = int(counts.max())
    if most > 4 * k + CELL:
        return _among_all(top, scores, begin)
    place = torch.arange(len(number), device=number.device) - (counts.cumsum(0) - counts)[number]
    values = scores.new_full((len(hot), most), -torch.inf)
    indices = torch.full(values.shape, -1, dtype=torch.int64, device=values.device)
    values[number, place], indices[number, place] = inside[at, column], rows
    new = _joined(Top(top.values[hot], top.indices[hot]), Top(values, indices))
    return Top(top.values.index_copy(0, hot, new.values), top.indices.index_copy(0, hot, new.indices))


def _among_all(top: Top, scores: Float[Tensor, "q r"], begin: int) -> Top:
    """Take in scores of which many would enter, as at the beginning."""
    found = first_largest(scores.contiguous(), top.values.shape[1])
    return _joined(top, found._replace(indices=found.indices + begin))


def merge(a: Top, b: Top) -> Top:
    """Return the top of two disjoint sets of rows, in whatever order they were seen.

    Args:
        a: one.
        b: the other, for the same queries and `k`.

    Returns:
        Their top; associative and commutative.
    """
    both = Top(torch.cat([a.values, b.values], 1), torch.cat([a.indices, b.indices], 1))
    by_row = both.indices.argsort(dim=1, stable=True)
    return _joined(Top(both.values[:, :0], both.indices[:, :0]), _take(both, by_row), a.values.shape[1])


def first_largest(scores: Float[Tensor, "q r"], k: int) -> Top:
    """Return the `k` largest scores in the order of their rows; of equal ones at the edge, the first rows."""
    if k >= scores.shape[1]:
        return Top(scores, torch.arange(scores.shape[1], device=scores.device).expand(scores.shape))
    found = Top(*scores.topk(k, dim=1, sorted=False))
    edge = found.values.amin(1, keepdim=True)
    above, ties = scores > edge, scores == edge
    missing = k - above.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) == missing).all()):
        return _take(found, found.indices.argsort(1))
    kept = above | (ties & (ties.cumsum(1) <= missing))
    indices = kept.nonzero()[:, 1].reshape(len(scores), k)
    return Top(scores.gather(1, indices), indices)


def _joined(first: Top, then: Top, k: int | None = None) -> Top:
    """Return the top of two tops whose columns are in the order in which equal values shall stand."""
    both = Top(torch.cat([first.values, then.values], 1), torch.cat([first.indices, then.indices], 1))
    order = both.values.argsort(dim=1, descending=True, stable=True)
    return _take(both, order[:, : first.values.shape[1] if k is None else k])


def _take(top: Top, order: Int[Tensor, "q j"]) -> Top:
    return Top(top.values.gather(1, order), top.indices.gather(1, order))
