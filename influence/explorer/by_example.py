"""The rows of an index by example: as stored or, where every token has a row, the sum of an example's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.index import scan
from influence.index.columns import Chosen, Piece, choose
from influence.index.rows import Index

SUMMED_AT_ONCE = 1 << 24
"""Entries of token rows that are summed at a time."""


@dataclass(frozen=True)
class Examples:
    """The first examples of an index, one row each.

    Attributes:
        index: the index.
        count: how many of its examples.
    """

    index: Index
    count: int

    @property
    def columns(self) -> Chosen:
        """All blocks."""
        return choose(self.index.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The type that rows are decoded to."""
        return torch.float64 if self.index.dtype == "float64" else torch.float32

    def pieces(self, rows_at_once: int) -> Iterator[Piece]:
        """Yield the rows in order, at most `rows_at_once` in a piece: views of stored rows where nothing is summed."""
        if not self.index.per_token:
            for piece in self.index.pieces(rows_at_once):
                left = self.count - piece.begin
                if left <= 0:
                    return
                scale = None if piece.scale is None else piece.scale[:left]
                yield Piece(piece.begin, piece.values[:left], scale)
            return
        longest = max(1, int(self.index.offsets[: self.count + 1].diff().max()))
        step = min(rows_at_once, max(1, SUMMED_AT_ONCE // (longest * max(self.index.dim, 1))))
        for begin in range(0, self.count, step):
            yield Piece(begin, self._sums(torch.arange(begin, min(begin + step, self.count))), None)

    def take(self, numbers: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Return the rows of some examples, decoded, in at least float32."""
        if not self.index.per_token:
            return self.index.take(numbers)
        step = max(1, SUMMED_AT_ONCE // (int(self.index.offsets.diff().max()) * max(self.index.dim, 1) + 1))
        return torch.cat([self._sums(some) for some in numbers.split(step)])

    def tokens_of(self, numbers: Int[Tensor, " m"]) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """Return the token rows of some examples, and for each row the place of its example in `numbers`."""
        begins, ends = self.index.offsets[numbers], self.index.offsets[numbers + 1]
        counts = ends - begins
        whose = torch.arange(len(numbers)).repeat_interleave(counts)
        inside = torch.arange(len(whose)) - (counts.cumsum(0) - counts)[whose]
        return begins[whose] + inside, whose

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Return `‖row‖²` of every example."""
        return scan.squared_norms(self.pieces(scan.rows_a_piece()), self.columns, self.dtype)

    def _sums(self, numbers: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        rows, whose = self.tokens_of(numbers)
        sums = torch.zeros(len(numbers), self.index.dim, dtype=self.dtype)
        return sums.index_add_(0, whose, self.index.take(rows))


def summed_tokens(rows: Float[Tensor, "t d"], offsets: Int[Tensor, " n1"]) -> Float[Tensor, "n d"]:
    """Return the sum of each example's token rows; example `n` has the rows from `offsets[n]` to `offsets[n + 1]`."""
    whose = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return rows.new_zeros(len(offsets) - 1, rows.shape[1]).index_add_(0, whose, rows)
