"""The chosen blocks: which of an index a search looks at, and which columns of stored rows they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.transform.folding import vectors
from influence.types import Rows


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
