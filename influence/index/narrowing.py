"""Reads an index of projected rows at a smaller dim."""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence.func.transform.nested import corner, nests
from influence.func.transform.project import NESTING
from influence.index.columns import Columns, Encoded, decode
from influence.index.rows import Index, ShardRows

NARROWED_AT_ONCE = 1 << 24
"""Stored entries that are narrowed at once."""


def narrowed(index: Index, dim: int) -> Index:
    """Return an index whose rows are those of `project(dim)` with the stored seed and kind.

    A shard's rows are narrowed when they are read, in float32 (float64 if they are stored so).

    Args:
        index: an index of rows projected per block, to a larger dim, and nothing after that.
        dim: the smaller dim.

    Returns:
        The index.

    Raises:
        ValueError: if its projection does not nest, or `dim` is not smaller.
    """
    stored = index.fingerprint
    sketch, shapes = stored.sketch, stored.recorded.get("unprojected")
    if sketch is None or not nests(sketch.settings):
        raise ValueError(
            f"this index cannot be read at dim {dim}: only {' and '.join(NESTING)} projections per block nest, and its "
            f"rows were collected under {stored.recorded.get('transform')}"
        )
    if shapes is None:
        raise ValueError("this index does not say what its blocks were before they were projected: build it again")
    p, kind, seed = (sketch.settings[key] for key in ("dim", "kind", "seed"))
    if not 1 <= dim < p:
        raise ValueError(f"this index is stored at dim {p}, and is read at a smaller one from 1 on; got {dim}")
    if stored.steps[-1] is not sketch:
        raise ValueError(
            f"something followed the projection of {stored.recorded.get('transform')}: it cannot be undone"
        )
    columns = Columns({name: tuple(min(size, dim) for size in shape) for name, shape in index.blocks.items()})
    corners = tuple((name, tuple(shapes[name]), p, dim, seed, kind) for name in index.blocks)
    parts = [NarrowedShard(part, index.columns, corners) for part in index.parts]
    fingerprint = stored.at_dim(dim, columns.shapes)
    dtype = "float64" if index.dtype == "float64" else "float32"
    return Index(index.about._replace(columns=columns, fingerprint=fingerprint, dtype=dtype), parts, index.path)


@dataclass(frozen=True)
class NarrowedShard:
    """A shard at a smaller dim."""

    part: ShardRows
    columns: Columns
    corners: tuple[tuple[str, tuple[int, ...], int, int, int, str], ...]

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self.part.rows

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it; the rows narrowed."""
        if name != "rows":
            return None if name == "scale" else self.part.get(name)
        values, scale = self.part.get("rows"), self.part.get("scale")
        assert values is not None
        size = max(1, NARROWED_AT_ONCE // max(self.columns.dim, 1))
        found = []
        for begin in range(0, max(self.rows, 1), size):
            chosen = slice(begin, begin + size)
            wide = decode(Encoded(values[chosen], None if scale is None else scale[chosen]), self.columns)
            rows = self.columns.split(wide)
            narrow = [corner(rows[each[0]], *each).flatten(1) for each in self.corners]
            found.append(torch.cat(narrow, 1))
        return torch.cat(found)
