r"""Products of queries with every stored row, streamed: the rows of an index pass by once, and are never copied whole.

$$s_{qn} = \sum_{b \in \text{blocks}} \langle g_q^b, \text{scale}_n^b\, \text{stored}_n^b \rangle$$

A piece of float32 or float64 rows is multiplied where it lies in the memory map. Half-precision and int8 rows go
through one small buffer that stays in the processor's cache, and are multiplied in at least float32.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func import top
from influence.func.similarity import Nearest
from influence.index.columns import Chosen, Piece

WIDE = (torch.float32, torch.float64)
BUFFER = 1 << 20
"""Entries decoded at a time: 4 MB of float32, or half of it where products, not Python, are what takes time."""
FEW = 8
"""Queries from which on they are."""
MANY = 16
"""Queries from which on a product is faster with their scores side by side in memory."""
GATHERED, WIDEST = 1 << 21, 1 << 18
"""Scores looked at at a time, in all and of one query."""


class Scored(NamedTuple):
    """The scores of consecutive rows."""

    begin: int
    scores: Float[Tensor, "q r"]


def rows_at_once(dim: int, queries: int = 1) -> int:
    """Return how many rows of a width are decoded at a time: few enough to stay in the cache."""
    return min(max((BUFFER if queries < FEW else BUFFER // 2) // dim, 16), 8192)


def rows_a_piece(queries: int = 1) -> int:
    """Return how many rows a piece should have: as many as have their scores looked at together."""
    return max(1, min(GATHERED // max(queries, 1), WIDEST))


def scan(
    pieces: Iterable[Piece], queries: Float[Tensor, "q d"], columns: Chosen, k: int, reverse: bool = False
) -> Nearest:
    """Return the `k` rows with the largest scores, exactly: best first, equal ones by row.

    Costs `2 N d q` FLOPs and one pass over the stored bytes, whatever `k`.

    Args:
        pieces: all rows, in order.
        queries: the chosen columns of each query.
        columns: which columns of the stored rows they meet.
        k: how many; at most as many as there are rows.
        reverse: the smallest scores instead, smallest first.

    Returns:
        Values and rows.

    Raises:
        ValueError: if there are fewer rows, or a score is not finite.

    Example:
        >>> import torch
        >>> from influence.index.columns import Piece, choose
        >>> stored = Piece(0, torch.tensor([[1, 2], [3, 4]]).half(), torch.ones(2, 1))
        >>> scan([stored], torch.tensor([[1.0, 0.0]]), choose({"w": (2,)}), k=1)
        Nearest(values=tensor([[3.]]), indices=tensor([[1]]))
    """
    wanted = -queries if reverse else queries
    best = top.start(wanted, k)
    for begin, found in products(pieces, wanted, columns):
        best = top.update(best, found, begin)
    if (best.indices < 0).any():
        raise ValueError(f"k={k} rows were asked for, and fewer have a finite score")
    return Nearest(-best.values if reverse else best.values, best.indices)


def ranked(scores: Float[Tensor, "q n"], k: int | None, reverse: bool) -> Nearest:
    """Return the first `k` of all scores in order, equal ones by row; `None` for all.

    Raises:
        ValueError: if a score is not finite.
    """
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).any(0).nonzero()[0])
        raise ValueError(f"the score of row {row} is not finite: the stored row or the query overflows")
    found = scores.cpu().sort(dim=1, descending=not reverse, stable=True)
    return Nearest(found.values[:, :k], found.indices[:, :k])


def scores(pieces: Iterable[Piece], queries: Float[Tensor, "q d"], columns: Chosen) -> Float[Tensor, "q n"]:
    """Return the score of every row.

    Args:
        pieces: all rows, in order.
        queries: the chosen columns of each query.
        columns: which columns of the stored rows they meet.

    Returns:
        The scores.
    """
    found = [found.scores.clone() for found in products(pieces, queries, columns)]
    return torch.cat(found, 1) if found else queries.new_zeros(queries.shape[0], 0)


def block_scores(
    pieces: Iterable[Piece], queries: Float[Tensor, "q d"], columns: Chosen
) -> dict[str, Float[Tensor, "q n"]]:
    """Return each block's part of the score of every row; the parts sum to `scores`.

    Args:
        pieces: all rows, in order.
        queries: the chosen columns of each query.
        columns: which columns of the stored rows they meet.

    Returns:
        `{block: [q, n]}`.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in columns.names}
    for rows, scale in all_decoded(pieces, columns, queries.dtype, queries.device):
        for name, where in columns.inside.items():
            part = queries[:, where] @ rows[:, where].mT
            found[name].append(part if scale is None else part * scale.mT)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def summed(
    pieces: Iterable[Piece],
    queries: Float[Tensor, "q d"],
    columns: Chosen,
    groups: Int[Tensor, " n"],
    count: int,
) -> Float[Tensor, "q count"]:
    """Return scores summed over groups of rows: tokens by their document.

    Args:
        pieces: all rows, in order.
        queries: the chosen columns of each query.
        columns: which columns of the stored rows they meet.
        groups: the group of each row.
        count: how many groups there are.

    Returns:
        The sums; a group without rows has 0.
    """
    sums = queries.new_zeros(queries.shape[0], count)
    for begin, found in products(pieces, queries, columns):
        sums.index_add_(1, groups[begin : begin + found.shape[1]].to(sums.device), found)
    return sums


def squared_norms(pieces: Iterable[Piece], columns: Chosen, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return `‖row‖²` of every row.

    Args:
        pieces: all rows, in order.
        columns: which columns count.
        dtype: to compute in.

    Returns:
        The squared norms.
    """
    found = []
    for rows, scale in all_decoded(pieces, columns, dtype, torch.device("cpu")):
        squares = rows.square().sum(1)
        found.append(squares if scale is None else squares * scale[:, 0].square())
    return torch.cat(found) if found else torch.zeros(0, dtype=dtype)


def products(pieces: Iterable[Piece], queries: Float[Tensor, "q d"], columns: Chosen) -> Iterator[Scored]:
    """Yield the scores of all rows: one matrix product per piece, gathered until looking at them is worth while.

    What is yielded is overwritten by the next.

    Args:
        pieces: all rows, in order.
        queries: the chosen columns of each query; rows are decoded in their dtype and on their device.
        columns: which columns of the stored rows they meet.

    Yields:
        The scores.
    """
    q = queries.shape[0]
    buffer = buffer_for(columns, queries.dtype, queries.device, q)
    gathered, begin, filled = queries.new_empty(q, 0), 0, 0
    for piece in pieces:
        r = piece.values.shape[0]
        if filled + r > gathered.shape[1]:
            if filled:
                yield Scored(begin, gathered[:, :filled])
                begin, filled = begin + filled, 0
            if r > gathered.shape[1]:
                width = max(r, rows_a_piece(q))
                gathered = queries.new_empty(q, width) if q < MANY else queries.new_empty(width, q).mT
        part, scale = gathered[:, filled : filled + r], scale_of_rows(piece)
        for rows, out in zip(decoded(piece, columns, buffer), part.split(len(buffer), 1), strict=True):
            torch.mm(queries, rows.mT, out=out)
        if scale is not None:
            part.mul_(scale.to(part.device, part.dtype).mT)
        filled += r
    if filled:
        yield Scored(begin, gathered[:, :filled])


def all_decoded(
    pieces: Iterable[Piece], columns: Chosen, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Float[Tensor, "r d"], Tensor | None]]:
    """Yield the chosen columns of all rows, some at a time, and what remains to be multiplied: one scale per row.

    What is yielded is overwritten by the next.

    Args:
        pieces: all rows, in order.
        columns: the columns.
        dtype: float32 or float64.
        device: where to.

    Yields:
        Rows, and their scales `[r, 1]` if there are any left.
    """
    buffer = buffer_for(columns, dtype, device)
    for piece in pieces:
        scale, at = scale_of_rows(piece), 0
        for rows in decoded(piece, columns, buffer):
            r = rows.shape[0]
            yield rows, None if scale is None else scale[at : at + r].to(device, dtype)
            at += r


def decoded(piece: Piece, columns: Chosen, buffer: Float[Tensor, "r d"]) -> Iterator[Float[Tensor, "r d"]]:
    """Yield the chosen columns of a piece, as many rows at a time as a buffer has; `scale_of_rows` is left to multiply.

    Rows that are stored in the buffer's dtype are views; others are overwritten by the next.
    """
    values, scale = piece.values, piece.scale
    values = values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
    size, spans = len(buffer), columns.spans
    as_it_is = values.dtype == buffer.dtype and scale is None and values.device == buffer.device
    if as_it_is and len(spans) == 1:
        yield from values[:, spans[0]].split(size)
        return
    several = None if scale is None or scale.shape[1] == 1 else scale
    for number, stored in enumerate(values.split(size)):
        rows = buffer[: len(stored)] if len(stored) < size else buffer
        if columns.dim == values.shape[1]:
            rows.copy_(stored)
        else:
            at = 0
            for span in spans:
                rows[:, at : at + span.stop - span.start] = stored[:, span]
                at += span.stop - span.start
        if several is not None:
            here = several[number * size : number * size + len(stored)].to(buffer.device, buffer.dtype)
            for where, block in zip(columns.inside.values(), columns.numbers, strict=True):
                rows[:, where] *= here[:, block : block + 1]
        yield rows


def scale_of_rows(piece: Piece) -> Tensor | None:
    """Return the scale `[r, 1]` that `decoded` leaves to be multiplied."""
    return None if piece.scale is None or piece.scale.shape[1] > 1 else piece.scale


def buffer_for(columns: Chosen, dtype: torch.dtype, device: torch.device, queries: int = 1) -> Float[Tensor, "r d"]:
    """Return room for rows to be decoded in, few enough to stay in the cache."""
    return torch.empty(rows_at_once(columns.dim, queries), columns.dim, dtype=dtype, device=device)
