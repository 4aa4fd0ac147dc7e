r"""Columns of a row: where each block lies, which of them are looked at, and how numbers are stored.

A stored row is read as `stored · scale`. float16 scales each row so that its largest entry is in `[2^14, 2^15)`, near
the top of its range: a row of magnitude 1e-12 is as exact as one of magnitude 1, and entries down to 2^-28 of the
largest keep 11 bits. bfloat16 has float32's range, so its scale is 1 and its bits are the row's own, unless the row's
largest entry is outside 2^±64. int8 has a step of `max|block| / 127` per row and block.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from influence.func.transform.folding import flat, vectors
from influence.store import BadFileError
from influence.store.schema import conform
from influence.types import Rows


@dataclass(frozen=True)
class Columns:
    """The blocks of a row, side by side.

    Attributes:
        shapes: each block's shape, in order.

    Example:
        >>> Columns({"a": (2, 3), "b": (4,)}).spans
        {'a': (0, 6), 'b': (6, 10)}
    """

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """The first column of each block, and the one behind its last."""
        spans, begin = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = (begin, begin + prod(shape))
            begin += prod(shape)
        return spans

    @property
    def dim(self) -> int:
        """Columns of a row."""
        return sum(map(prod, self.shapes.values()))

    def chosen(self, blocks: Iterable[str] | None) -> "Columns":
        """Return some of the blocks, in the order in which they are stored.

        Args:
            blocks: their names; `None` takes all.

        Returns:
            Their columns, counted as if there were no others.

        Raises:
            ValueError: if there is no such block.
        """
        if blocks is None:
            return self
        wanted = [blocks] if isinstance(blocks, str) else list(blocks)
        unknown = [name for name in wanted if name not in self.shapes]
        if unknown or not wanted:
            raise ValueError(
                f"no blocks {unknown[:5]} here; choose one or more of the {len(self.shapes)} that are stored: "
                f"{', '.join(list(self.shapes)[:5])}…"
            )
        return Columns({name: shape for name, shape in self.shapes.items() if name in set(wanted)})

    def joined(self, rows: Rows) -> Float[Tensor, "r d"]:
        """Return rows as vectors, in at least float32.

        Raises:
            ValueError: if the rows have other blocks or shapes.
        """
        got = {name: tuple(row.shape[1:]) for name, row in rows.items()}
        if got != dict(self.shapes):
            differing = sorted(set(got.items()) ^ set(self.shapes.items()), key=str)[:4]
            raise ValueError(f"these rows have other blocks than what is stored; they differ in {differing}")
        return flat({name: rows[name] for name in self.shapes})

    def split(self, matrix: Float[Tensor, "r d"]) -> Rows:
        """Return vectors as rows: views of the blocks."""
        return {
            name: matrix[:, begin:end].unflatten(1, self.shapes[name]) if self.shapes[name] else matrix[:, begin]
            for name, (begin, end) in self.spans.items()
        }

    def json(self) -> list[dict[str, object]]:
        """Return the layout as a file holds it: name, shape, first and last column of each block."""
        return [
            {"name": name, "shape": list(self.shapes[name]), "first": begin, "last": end - 1}
            for name, (begin, end) in self.spans.items()
        ]


def columns_of(rows: Rows) -> Columns:
    """Return the columns that some rows take."""
    return Columns({name: tuple(row.shape[1:]) for name, row in rows.items()})


class Described(NamedTuple):
    """A block as a file describes it."""

    name: str
    shape: tuple[int, ...]
    first: int
    last: int


def from_json(blocks: Any, where: str) -> Columns:
    """Return the columns that a file describes.

    Args:
        blocks: what it says.
        where: the file.

    Raises:
        BadFileError: if they are no blocks side by side.
    """
    held = conform(blocks, list[Described], where)
    columns = Columns({block.name: block.shape for block in held})
    if any(min(block.shape, default=0) < 0 for block in held) or columns.json() != [
        {**block._asdict(), "shape": list(block.shape)} for block in held
    ]:
        raise BadFileError(f"{where} is not what it says: its blocks do not lie side by side")
    return columns


@dataclass(frozen=True)
class Chosen:
    """Some blocks of stored rows.

    Attributes:
        shapes: the chosen blocks, in the order in which they are stored.
        numbers: the place of each among all blocks.
        inside: the columns of each among the chosen columns.
        spans: the chosen columns among all columns, as few slices as there can be.
    """

    shapes: Mapping[str, tuple[int, ...]]
    numbers: tuple[int, ...]
    inside: Mapping[str, slice]
    spans: tuple[slice, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen blocks."""
        return tuple(self.shapes)

    @property
    def dim(self) -> int:
        """How many columns are chosen."""
        return sum(span.stop - span.start for span in self.spans)

    def matrix(self, rows: Rows) -> Float[Tensor, "n d"]:
        """Return the chosen columns of rows, in at least float32.

        Raises:
            ValueError: if a block is missing or has another shape.
        """
        missing = [name for name in self.names if name not in rows]
        if missing:
            raise ValueError(
                f"the rows lack {len(missing)} of the {len(self.names)} blocks that are looked at "
                f"({', '.join(missing[:5])}); they have {', '.join(list(rows)[:5])}. Search some blocks by blocks=[…]"
            )
        for name, shape in self.shapes.items():
            if tuple(rows[name].shape[1:]) != shape:
                raise ValueError(
                    f"rows of block {name!r} have shape {list(rows[name].shape[1:])}; the index has {list(shape)}: "
                    "collect them under the index's transform"
                )
        out = torch.cat([vectors(rows[name]) for name in self.names], dim=1)
        return out if out.dtype == torch.float64 else out.float()

    def rows(self, matrix: Float[Tensor, "n d"]) -> Rows:
        """Return rows of which `matrix` is the chosen columns: views."""
        return {name: matrix[:, where].reshape(-1, *self.shapes[name]) for name, where in self.inside.items()}


def choose(shapes: Mapping[str, tuple[int, ...]], blocks: str | Sequence[str] | None = None) -> Chosen:
    """Choose blocks of an index.

    Args:
        shapes: the shape of every block, in the order of the columns.
        blocks: names or globs of blocks; `None` chooses all.

    Returns:
        The chosen columns.

    Raises:
        ValueError: if a name or glob matches nothing.

    Example:
        >>> choose({"a": (2, 2), "b": (3,), "c": (2,)}, ["c", "b"]).spans
        (slice(4, 9, None),)
    """
    wanted = set(shapes) if blocks is None else _matching(list(shapes), [blocks] if isinstance(blocks, str) else blocks)
    begin, at = 0, 0
    chosen: dict[str, tuple[int, ...]] = {}
    inside: dict[str, slice] = {}
    numbers, spans = [], list[slice]()
    for number, (name, shape) in enumerate(shapes.items()):
        size = prod(shape)
        if name in wanted:
            chosen[name], inside[name] = tuple(shape), slice(at, at + size)
            numbers.append(number)
            joins = bool(spans) and spans[-1].stop == begin
            spans[-1:] = [slice(spans[-1].start, begin + size)] if joins else [*spans[-1:], slice(begin, begin + size)]
            at += size
        begin += size
    return Chosen(chosen, tuple(numbers), inside, tuple(spans))


def _matching(names: list[str], blocks: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for glob in blocks:
        hits = {name for name in names if name == glob or fnmatchcase(name, glob)}
        if not hits:
            near = get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.2) or names[:3]
            raise ValueError(
                f"blocks: {glob!r} matches none of the index's {len(names)} blocks; near misses: {', '.join(near)}"
            )
        found |= hits
    if not found:
        raise ValueError("blocks=[] looks at nothing: leave it out to search all blocks")
    return found


DTYPES = ("float32", "float64", "float16", "bfloat16", "int8")
TOP = 15
"""Exponent that the largest entry of a float16 row is below."""

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Encoded(NamedTuple):
    """Rows as they are stored.

    Attributes:
        values: in the stored type.
        scale: what to multiply them with: one per row (half precision), one per row and block (int8), or nothing.
    """

    values: Shaped[Tensor, "r d"]
    scale: Float[Tensor, "r b"] | None


class Piece(NamedTuple):
    """Some rows as they are stored: views of the memory map.

    Attributes:
        begin: number of the first row.
        values: in the stored type.
        scale: what to multiply them with, one per row or one per row and block; `None` is one.
    """

    begin: int
    values: Shaped[Tensor, "r d"]
    scale: Float[Tensor, "r b"] | None


class Unstorable(ValueError):
    """A row cannot be stored: it is not finite, or too large for the type. `row` is its number."""

    def __init__(self, message: str, row: int) -> None:
        """Hold the row's number."""
        super().__init__(message)
        self.row = row


def check_dtype(dtype: str) -> str:
    """Refuse a type that rows are not stored in.

    Raises:
        ValueError: naming those that there are.
    """
    if dtype not in DTYPES:
        raise ValueError(f"rows are stored as one of {', '.join(DTYPES)}; got dtype={dtype!r}")
    return dtype


def encode(rows: Float[Tensor, "r d"], dtype: str, columns: Columns) -> Encoded:
    """Return rows as they are stored.

    Args:
        rows: rows in at least float32.
        dtype: the stored type.
        columns: their blocks.

    Returns:
        The stored values and their scale.

    Raises:
        Unstorable: if a row is not finite, or too large for any type but float64.

    Example:
        >>> import torch
        >>> stored = encode(torch.tensor([[3e-12, -1e-12]]), "float16", Columns({"w": (2,)}))
        >>> stored.values, decode(stored, Columns({"w": (2,)}))
        (tensor([[27024., -9008.]], dtype=torch.float16), tensor([[ 3.0003e-12, -1.0001e-12]]))
    """
    check_dtype(dtype)
    largest = largest_of(rows)
    _check(largest, dtype)
    if dtype not in HALF:
        return _steps(rows, columns) if dtype == "int8" else Encoded(rows.to(getattr(torch, dtype)), None)
    exponent = torch.frexp(largest).exponent
    if dtype == "float16":
        shift = torch.where(largest > 0, exponent - TOP, 0)
    else:
        shift = torch.where(exponent.abs() > 64, exponent, 0)
    scale = power_of_two(shift.clamp(-126, 126))[:, None]
    return Encoded((rows / scale).to(HALF[dtype]), scale)


def decode(stored: Encoded, columns: Columns, blocks: Columns | None = None) -> Float[Tensor, "r d"]:
    """Return rows as numbers: float64 if they are stored so, float32 otherwise.

    Args:
        stored: what is stored.
        columns: its blocks.
        blocks: those to return, in their stored order; `None` returns all.

    Returns:
        The rows.
    """
    values, scale = stored
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if blocks is None or blocks.shapes.keys() == columns.shapes.keys():
        out = values.to(dtype, copy=True)
        spans = list(columns.spans.values())
    else:
        pieces = [values[:, begin:end] for begin, end in (columns.spans[name] for name in blocks.shapes)]
        out = torch.cat(pieces, 1).to(dtype)
        spans = list(blocks.spans.values())
        if scale is not None and scale.shape[1] > 1:
            at = {name: number for number, name in enumerate(columns.shapes)}
            scale = scale[:, [at[name] for name in blocks.shapes]]
    if scale is None:
        return out
    if values.dtype != torch.int8:
        return out.mul_(scale)
    for number, (begin, end) in enumerate(spans):
        out[:, begin:end] *= scale[:, number : number + 1]
    return out


def largest_of(rows: Float[Tensor, "r d"]) -> Float[Tensor, " r"]:
    """Return each row's largest magnitude; NaN where the row holds one."""
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def power_of_two(exponent: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Return `2^exponent` in float32, exactly, for exponents in [-126, 127]."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _check(largest: Float[Tensor, " r"], dtype: str) -> None:
    bad = ~torch.isfinite(largest if dtype == "float64" else largest.float())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        large = bool(torch.isfinite(largest[first]))
        raise Unstorable(
            f"row {first} of these {len(bad)} cannot be stored as {dtype}: its largest entry is {largest[first]:g}. "
            + ("Store as float64" if large else "Look at that example's loss, or collect with nonfinite='zero'"),
            first,
        )


def _steps(rows: Float[Tensor, "r d"], columns: Columns) -> Encoded:
    """Quantise each block of each row to 255 steps around zero."""
    values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scale = torch.empty(rows.shape[0], len(columns.spans), device=rows.device)
    for number, (begin, end) in enumerate(columns.spans.values()):
        block = rows[:, begin:end]
        step = (largest_of(block) / 127).float()
        scale[:, number] = step
        divisor = torch.where(step > 0, step, 1)[:, None].to(block)
        values[:, begin:end] = (block / divisor).round().clamp(-127, 127).to(torch.int8)
    return Encoded(values, scale)
