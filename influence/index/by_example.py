"""The examples of an index as rows: what is stored, or, where every token has a row, the sum of an example's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.index import scan
from influence.index.columns import Chosen, Piece, choose
from influence.index.rows import Index

AT_ONCE = 1 << 24
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
        """What rows are decoded to."""
        return torch.float64 if self.index.dtype == "float64" else torch.float32

    def pieces(self, rows_at_once: int) -> Iterator[Piece]:
        """Yield the rows in order: views of what is stored where it can be, so that a pass streams.

        Args:
            rows_at_once: most rows of a piece.
        """
        if not self.index.per_token:
            for piece in self.index.pieces(rows_at_once):
                left = self.count - piece.begin
                if left <= 0:
                    return
                scale = None if piece.scale is None else piece.scale[:left]
                yield Piece(piece.begin, piece.values[:left], scale)
            return
        longest = max(1, int(self.index.offsets[: self.count + 1].diff().max()))
        step = min(rows_at_once, max(1, AT_ONCE // (longest * max(self.index.dim, 1))))
        for begin in range(0, self.count, step):
            yield Piece(begin, self._sums(torch.arange(begin, min(begin + step, self.count))), None)

    def take(self, numbers: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Return the rows of some examples, decoded.

        Args:
            numbers: the examples.

        Returns:
            Their rows, in at least float32.
        """
        if not self.index.per_token:
            return self.index.take(numbers)
        step = max(1, AT_ONCE // (int(self.index.offsets.diff().max()) * max(self.index.dim, 1) + 1))
        return torch.cat([self._sums(some) for some in numbers.split(step)])

    def tokens_of(self, numbers: Int[Tensor, " m"]) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """Return the numbers of the token rows of some examples, and which of these examples each is of."""
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
