"""Folding binds a transform to a layout; what separates is kept as the sides of `L G R^T` of each block.

A `Side` is the map of one axis. A `Folded` holds, for each block, the separable part of a chain (it folds into the
probe and never sees a full gradient), then linear maps of the block's own gradient (`linear`), then maps of whole rows
(`finish`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from influence.func.transform.layout import Layout, block_name
from influence.types import Rows

LinearMap: TypeAlias = Callable[[Tensor], Tensor]

RowMap: TypeAlias = Callable[[Rows], Rows]


@runtime_checkable
class Movable(Protocol):
    """A linear map which holds tensors."""

    def to(self, device: torch.device, dtype: torch.dtype) -> LinearMap:
        """Return the map where rows are."""
        ...


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


class Part(NamedTuple):
    """What one source (a parameter, or a stored row) contributes to a block: `left G right^T`.

    Attributes:
        source: name of the parameter.
        left: map of the output axis.
        right: map of the input axis; for a vector in a matrix block, of an axis of length one; `None` in a vector
            block.
    """

    source: str
    left: Side
    right: Side | None


@dataclass(frozen=True)
class Block:
    """One block of a folded transform.

    Attributes:
        name: the block's name.
        parts: the sources which are summed into it.
        linear: linear maps of the block's gradient `[n, *shape]`, applied one after the other.
        shape: shape of a row of this block, after `linear`.
        into: name of the row it is added to; several blocks may share one (`target="global"`).
        original: shape before any step changed it (`[o, i]` or `[d]`).
    """

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    into: str
    original: tuple[int, ...]
    linear: tuple[LinearMap, ...] = ()

    @property
    def separable_shape(self) -> tuple[int, ...]:
        """Shape after the sides, before `linear`."""
        first = self.parts[0]
        return (first.left.size,) if first.right is None else (first.left.size, first.right.size)

    def finish_linear(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Apply the linear maps to rows `[n, *separable_shape]`."""
        for step in self.linear:
            rows = step(rows)
        return rows


@dataclass(frozen=True)
class Folded:
    """A transform bound to a layout.

    Attributes:
        layout: the parameters' layout.
        blocks: every block, in order.
        raw: whether the blocks still are plain parameters, keyed by their names and in their own shape.
        finish: maps of whole rows, after everything linear.
        made: the steps so far, each a `Step`.
        warnings: what `explain` should say.
    """

    layout: Layout
    blocks: tuple[Block, ...]
    raw: bool = True
    finish: tuple[RowMap, ...] = ()
    made: tuple[Any, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def untouched(self) -> bool:
        """Whether blocks are parameters, or slices of them, as they are: nothing was applied to them."""
        sides = (side for block in self.blocks for part in block.parts for side in (part.left, part.right))
        return (
            not self.finish
            and not any(block.linear for block in self.blocks)
            and all(s is None or s.selects for s in sides)
        )

    @property
    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each row before `finish`."""
        return {block.into: block.shape for block in self.blocks}

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each row after everything."""
        empty = {name: torch.empty(1, *shape, device="meta") for name, shape in self.linear_shapes.items()}
        return {name: tuple(row.shape[1:]) for name, row in self.finish_rows(empty).items()}

    def linear_rows(self, grads: Mapping[str, Tensor]) -> Rows:
        """Apply the linear part to parameter gradients `{source: [n, *shape]}`, unfolded: the definition."""
        rows: Rows = {}
        oriented = {name: self.layout[name].orient(grad) for name, grad in grads.items()}
        for block in self.blocks:
            total = None
            for part in block.parts:
                piece = apply_part(part, oriented[part.source])
                total = piece if total is None else total + piece
            assert total is not None
            total = block.finish_linear(total)
            rows[block.into] = rows[block.into] + total if block.into in rows else total
        return rows

    def finish_rows(self, rows: Rows) -> Rows:
        """Apply what follows the linear part; raw rows go back to their parameters' shapes."""
        for step in self.finish:
            rows = step(rows)
        if self.raw:
            rows = {name: self.layout[name].restore(row) for name, row in rows.items()}
        return rows

    def rows(self, grads: Mapping[str, Tensor]) -> Rows:
        """Apply everything to parameter gradients `{source: [n, *shape]}`."""
        return self.finish_rows(self.linear_rows(grads))


def apply_part(part: Part, grad: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
    """Return `left G right^T` for an oriented gradient `[n, o, i]` or `[n, d]`."""
    if part.right is None:
        return part.left.apply(grad)
    matrix = grad[..., None] if grad.ndim == 2 else grad
    mine = matrix[..., part.left.start : part.left.stop, :]  # or every expert's share costs as much as the whole
    return part.left.apply(part.right.apply(mine).mT).mT


def start(layout: Layout) -> Folded:
    """Return the identity: every parameter a block of its own, under its own name."""
    blocks = []
    for name, param in layout.params.items():
        shape = param.oriented
        sides = (identity(shape[0]), identity(shape[1]) if len(shape) == 2 else None)
        blocks.append(Block(name, (Part(name, *sides),), shape, name, shape))
    return Folded(layout, tuple(blocks))


def into_blocks(folded: Folded, bias: bool) -> Folded:
    """Return the folded transform whose blocks are oriented matrices and vectors, named without `.weight`.

    Of a parameter that holds several experts every expert is a block, `name.expert_3`: a slice of the outputs.

    Args:
        folded: plain parameters.
        bias: whether a matrix's bias becomes its last column.

    Returns:
        The blocks.

    Raises:
        ValueError: if something was applied to the parameters: a scale of a matrix's inputs is none of its bias.
    """
    if not folded.raw or not folded.untouched:
        raise ValueError("blocks are made from untouched parameters: put as_blocks() first")
    merged = {p.bias for p in folded.layout.params.values() if bias and p.is_matrix and p.bias}
    blocks = []
    for block in folded.blocks:
        if block.name in merged:
            continue
        name, param = block_name(block.name), folded.layout[block.name]
        parts, shape = block.parts, block.shape
        if bias and param.bias and param.is_matrix:
            (part,) = parts
            assert part.right is not None
            column = Part(param.bias, identity(shape[0]), identity(1).padded(shape[1], 0))
            parts = (Part(part.source, part.left, part.right.padded(0, 1)), column)
            shape = (shape[0], shape[1] + 1)
        size, whole = param.one[0], Block(name, parts, shape, name, shape)
        experts = [(f"expert_{e}", e * size, (e + 1) * size) for e in range(param.experts)]
        blocks.extend(sliced(whole, "out", experts) if experts else [whole])
    return replace(folded, blocks=tuple(blocks), raw=False)


def sliced(block: Block, axis: str, places: Iterable[tuple[str, int, int]]) -> list[Block]:
    """Return slices of an untouched block along its `"out"` or `"in"` axis, one for each `(suffix, start, stop)`."""
    blocks = []
    for suffix, start, stop in places:
        parts = tuple(cut for part in block.parts if (cut := _slice(part, axis, start, stop)) is not None)
        name = f"{block.name}.{suffix}"
        piece = replace(block, name=name, parts=parts, into=name)
        blocks.append(replace(piece, shape=piece.separable_shape, original=piece.separable_shape))
    return blocks


def _slice(part: Part, axis: str, start: int, stop: int) -> Part | None:
    side = part.left if axis == "out" else part.right
    assert side is not None
    cut = side.then_slice(start, stop)
    if cut is None:
        return None
    return part._replace(left=cut) if axis == "out" else part._replace(right=cut)


def placed(folded: Folded) -> Folded:
    """Return a folded transform with every side and map on its parameter's device and in its dtype."""

    def move(part: Part) -> Part:
        where = folded.layout[part.source]
        right = None if part.right is None else part.right.to(where.device, where.dtype)
        return Part(part.source, part.left.to(where.device, where.dtype), right)

    def moved(block: Block) -> Block:
        where = folded.layout[block.parts[0].source]
        linear = tuple(m.to(where.device, where.dtype) if isinstance(m, Movable) else m for m in block.linear)
        return replace(block, parts=tuple(map(move, block.parts)), linear=linear)

    return replace(folded, blocks=tuple(map(moved, folded.blocks)))


def with_sides(folded: Folded, sides: Callable[[Block, Part], tuple[Tensor | None, Tensor | None]]) -> Folded:
    """Extend every block by a separable map `L G R^T`, given per block and part as matrices or diagonals.

    Where something that does not separate came before, the map is applied to the rows instead: same numbers.
    """
    if folded.finish:
        return with_rows(folded, _side_rows(folded, sides))
    return replace(folded, blocks=tuple(_block_with_sides(block, sides) for block in folded.blocks))


def block_with_sides(block: Block, left: Tensor | None, right: Tensor | None) -> Block:
    """Extend one block by a separable map `L G R^T`."""
    return _block_with_sides(block, lambda block, part: (left, right))


def _block_with_sides(block: Block, sides: Callable[[Block, Part], tuple[Tensor | None, Tensor | None]]) -> Block:
    if not block.linear:
        parts = tuple(_extend_part(part, *sides(block, part)) for part in block.parts)
        extended = replace(block, parts=parts)
        return replace(extended, shape=extended.separable_shape)
    left, right = sides(block, block.parts[0])
    shape = tuple(
        size if side is None or side.ndim == 1 else side.shape[0]
        for size, side in zip(block.shape, (left, right), strict=False)
    )
    return replace(block, shape=shape, linear=(*block.linear, SideMap(left, right)))


def _extend_part(part: Part, left: Tensor | None, right: Tensor | None) -> Part:
    def extend(side: Side, by: Tensor | None) -> Side:
        if by is None:
            return side
        return side.then_diagonal(by) if by.ndim == 1 else side.then_matrix(by)

    return Part(part.source, extend(part.left, left), None if part.right is None else extend(part.right, right))


@dataclass(frozen=True)
class SideMap:
    """A separable map applied to rows `[n, o, i]` or `[n, d]` at hand."""

    left: Tensor | None
    right: Tensor | None

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Apply it."""
        if rows.ndim == 2:
            return _apply_last(rows, self.left)
        return _apply_last(_apply_last(rows, self.right).mT, self.left).mT


def _apply_last(rows: Tensor, side: Tensor | None) -> Tensor:
    if side is None:
        return rows
    side = side.to(rows)
    return rows * side if side.ndim == 1 else rows @ side.mT


def _side_rows(folded: Folded, sides: Callable[[Block, Part], tuple[Tensor | None, Tensor | None]]) -> RowMap:
    maps = {block.into: SideMap(*sides(block, block.parts[0])) for block in folded.blocks}
    return lambda rows: {name: maps[name](row) for name, row in rows.items()}


def with_rows(folded: Folded, row_map: RowMap) -> Folded:
    """Extend by a map of whole rows."""
    return replace(folded, finish=(*folded.finish, row_map))


def same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors in the wider of their dtypes, the second on the first's device."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(a.device, dtype)


def vectors(row: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n d"]:
    """Return rows of any shape as vectors."""
    return row.unsqueeze(1).flatten(1)


def flat(rows: Rows) -> Float[Tensor, "n d"]:
    """Return all blocks of rows side by side, `[n, d]`, in at least float32."""
    parts = [vectors(row) for row in rows.values()]
    out = torch.cat(parts, dim=1)
    return out if out.dtype == torch.float64 else out.float()
