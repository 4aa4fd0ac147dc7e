"""Scratch: the rows of an epoch while it lasts, on disk, each example's at its place in the dataset.

Training sees a dataset in any order, and the index keeps the dataset's. Every process maps the same file and writes
other rows; a row that is written again after a resume replaces what was there.
"""

import mmap
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Scratch:
    """Rows `[examples, columns]` in a memory-mapped file, sparse until written.

    Attributes:
        path: the file.
        rows: the rows, a view of the file.
    """

    rows: Float[Tensor, "examples columns"]

    def __init__(self, path: Path, examples: int, columns: int, dtype: torch.dtype) -> None:
        """Map the file; make it, or keep what it holds if it has the right size."""
        self.path = path
        size = max(examples * columns * dtype.itemsize, 1)
        with path.open("ab") as file:
            file.truncate(size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        whole = torch.frombuffer(self._map, dtype=dtype, count=examples * columns) if examples * columns else None
        self.rows = torch.zeros(examples, columns, dtype=dtype) if whole is None else whole.view(examples, columns)

    def put(self, index: Int[Tensor, " n"], rows: Float[Tensor, "n columns"]) -> None:
        """Write the rows of some examples."""
        self.rows[index.cpu()] = rows.to("cpu", self.rows.dtype)

    def flush(self) -> None:
        """Hand the rows to the disk."""
        self._map.flush()

    def remove(self) -> None:
        """Delete the file; the rows go with it."""
        self.path.unlink(missing_ok=True)
