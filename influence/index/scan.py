r"""Products of queries with every stored row, streamed: the rows of an index pass by once, and are never copied whole.

$$s_{qn} = \sum_{b \in \text{blocks}} \langle g_q^b, \text{scale}_n^b\, \text{stored}_n^b \rangle$$

A piece of float32 or float64 rows is multiplied where it lies in the memory map. Half-precision and int8 rows go
through one small buffer that stays in the processor's cache, and are multiplied in at least float32.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from influence.func import top
from influence.func.similarity import Nearest
from influence.index.chosen import Chosen

WIDE = (torch.float32, torch.float64)
BUFFER = 1 << 20
"""Entries decoded at a time: 4 MB of float32, or half of it where products, not Python, are what takes time."""
FEW = 8
"""Queries from which on they are."""
GATHERED, WIDEST = 1 << 20, 1 << 16
"""Scores looked at at a time, in all and of one query."""


@runtime_checkable
class Piece(Protocol):
    """Consecutive rows as they are stored."""

    @property
    def begin(self) -> int:
        """The first row."""
        ...

    @property
    def values(self) -> Tensor:
        """What is stored, `[r, D]`."""
        ...

    @property
    def scale(self) -> Tensor | None:
        """What it is multiplied with: `[r, 1]`, `[r, blocks]`, or nothing."""
        ...


class Scored(NamedTuple):
    """The scores of consecutive rows."""

    begin: int
    scores: Float[Tensor, "q r"]


def rows_at_once(dim: int, queries: int = 1) -> int:
    """Return how many rows of a width a piece should have: few enough to stay in the cache once decoded."""
    return min(max((BUFFER if queries < FEW else BUFFER // 2) // dim, 16), 8192)


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
        >>> from types import SimpleNamespace
        >>> from influence.index.chosen import choose
        >>> stored = SimpleNamespace(begin=0, values=torch.tensor([[1, 2], [3, 4]]).half(), scale=torch.ones(2, 1))
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
    for rows, scale in decoded(pieces, columns, queries.dtype, queries.device):
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
    for rows, scale in decoded(pieces, columns, dtype, torch.device("cpu")):
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
    gathered, begin, filled = queries.new_empty(q, 0), 0, 0
    for rows, scale in decoded(pieces, columns, queries.dtype, queries.device):
        r = rows.shape[0]
        if filled + r > gathered.shape[1]:
            if filled:
                yield Scored(begin, gathered[:, :filled])
                begin, filled = begin + filled, 0
            if r > gathered.shape[1]:
                gathered = queries.new_empty(q, max(r, min(GATHERED // max(q, 1), WIDEST)))
        part, product = gathered[:, filled : filled + r], queries @ rows.mT  # a product into part itself is slower
        if scale is None:
            part.copy_(product)
        else:
            torch.mul(product, scale.mT, out=part)
        filled += r
    if filled:
        yield Scored(begin, gathered[:, :filled])


def decoded(
    pieces: Iterable[Piece], columns: Chosen, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Shaped[Tensor, "r d"], Tensor | None]]:
    """Yield the chosen columns of every piece, and what remains to be multiplied: one scale per row, or nothing.

    What is yielded is overwritten by the next.

    Args:
        pieces: all rows, in order.
        columns: the columns.
        dtype: float32 or float64.
        device: where to.

    Yields:
        Rows and scales `[r, 1]`.
    """
    buffer = torch.empty(0, columns.dim, dtype=dtype, device=device)
    for piece in pieces:
        values, scale = piece.values, piece.scale
        values = values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
        r = values.shape[0]
        if values.dtype == dtype and scale is None and len(columns.spans) == 1 and values.device == device:
            yield values[:, columns.spans[0]], None
            continue
        if buffer.shape[0] < r:
            buffer = torch.empty(r, columns.dim, dtype=dtype, device=device)
        rows, at = buffer[:r], 0
        if columns.dim == values.shape[1]:
            rows.copy_(values)
        for span in columns.spans if columns.dim < values.shape[1] else ():
            rows[:, at : at + span.stop - span.start] = values[:, span]
            at += span.stop - span.start
        scale = None if scale is None else scale.to(device, dtype)
        if scale is not None and scale.shape[1] > 1:
            for where, number in zip(columns.inside.values(), columns.numbers, strict=True):
                rows[:, where] *= scale[:, number : number + 1]
            scale = None
        yield rows, scale
