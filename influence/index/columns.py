"""Columns: where each block lies in a stored row."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from influence.func.folding import flat
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
