"""A side: a small linear map of one axis of a block, kept in the cheapest form that represents it."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """The map `x[start:stop] -> matrix @ x`, padded with zeros, of one axis of a parameter's gradient.

    `matrix` is `None` (identity), a vector (a diagonal) or a matrix `[p, stop - start]`. The padding places an
    identity or diagonal side inside a larger axis (a bias is the last column of its block); a matrix has none.

    Attributes:
        source: length of the axis that comes in.
        start: first entry that is read.
        stop: one past the last entry that is read.
        matrix: what is applied to the entries read.
        before: zeros in front of the result.
        after: zeros behind the result.
    """

    source: int
    start: int
    stop: int
    matrix: Tensor | None = None
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """Length of the axis that comes out."""
        if self.matrix is not None and self.matrix.ndim == 2:
            return self.matrix.shape[0]
        return self.before + self.stop - self.start + self.after

    @property
    def dense(self) -> bool:
        """Whether the side is a matrix product."""
        return self.matrix is not None and self.matrix.ndim == 2

    @property
    def selects(self) -> bool:
        """Whether the side only selects and places entries, unscaled."""
        return self.matrix is None

    @property
    def trivial(self) -> bool:
        """Whether the side is the identity."""
        return self.matrix is None and self.stop - self.start == self.source and not (self.before or self.after)

    def apply(self, x: Tensor) -> Tensor:
        """Apply the side to the last axis of `x [..., source]`."""
        if x.shape[-1] != self.stop - self.start:
            x = x[..., self.start : self.stop]
        if self.matrix is not None:
            x = multiply(x, self.matrix.mT) if self.dense else x * self.matrix
        return torch.nn.functional.pad(x, (self.before, self.after)) if self.before or self.after else x

    def then_matrix(self, matrix: Float[Tensor, "p b"]) -> "Side":
        """Return this side followed by a matrix."""
        inner = matrix[:, self.before : matrix.shape[1] - self.after]
        if self.matrix is not None:
            inner = inner.to(self.matrix) @ self.matrix if self.dense else inner.to(self.matrix) * self.matrix
        return Side(self.source, self.start, self.stop, inner)

    def then_diagonal(self, diagonal: Float[Tensor, " b"]) -> "Side":
        """Return this side followed by an elementwise scale."""
        inner = diagonal[self.before : diagonal.shape[0] - self.after]
        if self.dense:
            assert self.matrix is not None
            return replace(self, matrix=diagonal.to(self.matrix)[:, None] * self.matrix)
        return replace(self, matrix=inner if self.matrix is None else inner.to(self.matrix) * self.matrix)

    def then_slice(self, start: int, stop: int) -> "Side | None":
        """Return this side followed by `[start:stop]`, or `None` where nothing but padding is left."""
        if self.dense:
            assert self.matrix is not None
            return replace(self, matrix=self.matrix[start:stop])
        length = self.stop - self.start
        low, high = max(start - self.before, 0), min(stop - self.before, length)
        if low >= high:
            return None
        matrix = None if self.matrix is None else self.matrix[low:high]
        return Side(
            self.source,
            self.start + low,
            self.start + high,
            matrix,
            before=self.before + low - start,
            after=stop - self.before - high,
        )

    def padded(self, before: int, after: int) -> "Side":
        """Return this side placed inside a larger axis."""
        if not self.dense:
            return replace(self, before=self.before + before, after=self.after + after)
        assert self.matrix is not None
        return replace(self, matrix=torch.nn.functional.pad(self.matrix, (0, 0, before, after)))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Side":
        """Return the side with its matrix on a device, in a dtype; its transpose is contiguous, for `apply`."""
        if self.matrix is None:
            return self
        moved = self.matrix.to(device, dtype)
        return replace(self, matrix=moved.mT.contiguous().mT if self.dense else moved.contiguous())


def identity(size: int) -> Side:
    """Return the side that changes nothing."""
    return Side(size, 0, size)


def multiply(x: Float[Tensor, "*batch b"], matrix: Float[Tensor, "b p"]) -> Float[Tensor, "*batch p"]:
    """Return `x @ matrix` as one product of two contiguous matrices: thin products are up to twice as fast so."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])
