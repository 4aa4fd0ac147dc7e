"""Scratch: the rows of an epoch while it lasts, a file for each process, in the order in which they came.

Training sees a dataset in any order and an index keeps the dataset's, so rows wait here until the epoch ends. A file is
`influence log 1`'s beginning and then the rows as the index will store them, each as many bytes as the other; the order
log says whose they are, and has a checksum of each.
"""

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.index import Columns
from influence.index.columns import Encoded, encode
from influence.store import BadFileError
from influence.store.growing import Growing, beginning, make
from influence.store.hdf5 import DTYPES, little_endian, octets
from influence.store.schema import conform

KIND = "rows"


class Stored(NamedTuple):
    """How a row lies in a file: its numbers, then its scales.

    Attributes:
        dtype: the stored type.
        columns: the blocks of a row.
    """

    dtype: str
    columns: Columns

    @property
    def numbers(self) -> int:
        """Bytes of a row's numbers."""
        return self.columns.dim * DTYPES[self.dtype].itemsize

    @property
    def scales(self) -> int:
        """How many scales a row has."""
        return {"float16": 1, "bfloat16": 1, "int8": len(self.columns.shapes)}.get(self.dtype, 0)

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return self.numbers + 4 * self.scales

    def packed(self, rows: Float[Tensor, "n columns"]) -> Any:
        """Return rows as bytes `[n, bytes]`.

        Raises:
            Unstorable: if one cannot be stored in the type.
        """
        if rows.dtype == DTYPES[self.dtype]:  # finite, as they were collected
            return octets(little_endian(rows)).reshape(len(rows), -1)
        values, scale = encode(rows, self.dtype, self.columns)
        return self.joined(Encoded(values, scale))

    def joined(self, stored: Encoded) -> Any:
        """Return stored rows as bytes `[n, bytes]`."""
        parts = [part for part in stored if part is not None]
        return numpy.concatenate([octets(little_endian(part)).reshape(len(part), -1) for part in parts], 1)

    def encoded(self, data: Any) -> Encoded:
        """Return rows from their bytes."""
        values = torch.from_numpy(numpy.ascontiguousarray(data[:, : self.numbers])).view(DTYPES[self.dtype])
        if not self.scales:
            return Encoded(values, None)
        return Encoded(values, torch.from_numpy(numpy.ascontiguousarray(data[:, self.numbers :])).view(torch.float32))


class About(NamedTuple):
    """What a file of rows says of itself.

    Attributes:
        epoch: the epoch.
        rank: the process.
        bytes: of a row.
    """

    epoch: int
    rank: int
    bytes: int


class Scratch:
    """A process's rows of an epoch, open to be read or to grow.

    Attributes:
        path: the file.
    """

    def __init__(self, directory: Path, run: str, epoch: int, rank: int, stored: Stored, grow: bool = False) -> None:
        """Open the rows that are there; to grow, make the file where there is none.

        Raises:
            BadFileError: if they are another run's, epoch's or process's, or of another size.
        """
        self.path, self._stored = scratch_path(directory, epoch, rank), stored
        wanted = About(epoch, rank, stored.bytes)
        if grow and not self.path.exists() and not self.path.is_symlink():
            make(self.path, kind=KIND, run=run, about=wanted._asdict())
        self._file = Growing(self.path, kind=KIND, run=run, grow=grow)
        about = conform(self._file.about, About, str(self.path))
        if about != wanted:
            raise BadFileError(f"{self.path} holds rows of {about}; expected {wanted}")

    def __len__(self) -> int:
        """Return how many whole rows there are."""
        return (self._file.size - self._file.begin) // max(self._stored.bytes, 1)

    def append(self, data: Any) -> list[int]:
        """Put rows' bytes at the end; return their checksums."""
        self._file.append(octets(data))
        return checksums(data)

    def take(self, numbers: Int[Tensor, " m"], crc: Int[Tensor, " m"]) -> Any:
        """Return the bytes `[m, bytes]` of rows, each checked.

        Raises:
            BadFileError: if one is not there as it was written; naming it.
        """
        size = self._stored.bytes
        out = numpy.empty((len(numbers), size), "u1")
        rows: list[Any] = [*out]
        for row, number, wanted in zip(rows, numbers.tolist(), crc.tolist(), strict=True):
            got = os.preadv(self._file.handle, [row], self._file.begin + number * size) if size else 0
            if got != size or zlib.crc32(row) != wanted:
                raise BadFileError(
                    f"{self.path} is damaged: row {number} is not what was collected. Go on from a checkpoint before "
                    "its step, so that it is collected again"
                )
        return out

    def keep(self, count: int) -> None:
        """Cut off all but the first rows."""
        self._file.cut(self._file.begin + count * self._stored.bytes)

    def sync(self) -> None:
        """Have the rows on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scratch_path(directory: Path, epoch: int, rank: int) -> Path:
    """Return where a process's rows of an epoch are."""
    return directory / f"rows-{epoch}-{rank}.bin"


def make_scratch(
    directory: Path, run: str, epoch: int, rank: int, stored: Stored, data: Iterable[Any], count: int
) -> None:
    """Make a process's rows of an epoch at once, from pieces of bytes of so many rows."""
    make(
        scratch_path(directory, epoch, rank),
        kind=KIND,
        run=run,
        about=About(epoch, rank, stored.bytes)._asdict(),
        data=data,
        needed=count * stored.bytes,
    )


def remove_scratch(directory: Path, run: str, epoch: int, ranks: Sequence[int]) -> None:
    """Remove the rows of an epoch that are needed no more; what is not of the run stays."""
    for rank in ranks:
        path = scratch_path(directory, epoch, rank)
        try:
            found, _ = beginning(path)
        except (FileNotFoundError, BadFileError):
            continue
        if found.run == run and found.kind == KIND:
            path.unlink()


def checksums(data: Any) -> list[int]:
    """Return the checksum of each row's bytes."""
    return [zlib.crc32(row) for row in data]
