"""One shard of an index: memory-mapped and verified when it is first read, or in memory."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from influence import store
from influence.index.root import Shard
from influence.index.run import ROOT
from influence.store import BadFileError


@runtime_checkable
class Part(Protocol):
    """A shard, on disk or in memory."""

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        ...

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it."""
        ...


class Held(NamedTuple):
    """A shard in memory."""

    tensors: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self.tensors["rows"].shape[0]

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it."""
        return self.tensors.get(name)


class Mapped:
    """A shard on disk: mapped when it is first read; each dataset verified when it is."""

    def __init__(self, path: Path, shard: Shard, verify: bool) -> None:
        """Hold what the root knows of it."""
        self.path, self.shard, self.verify = path, shard, verify
        self.rows, self._read = shard.rows, dict[str, Tensor]()

    @cached_property
    def _buffer(self) -> Any:
        return store.map_file(self.path)

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it.

        Raises:
            BadFileError: if its bytes are not those that were written.
        """
        if name not in self.shard.places:
            return None
        if name not in self._read:
            if self.verify:
                self.check(name)
            self._read[name] = store.mapped(self._buffer, self.shard.places[name])
        return self._read[name]

    def check(self, name: str) -> None:
        """Verify one dataset's checksum.

        Raises:
            BadFileError: naming the file and the dataset.
        """
        place = self.shard.places[name]
        if place.bytes and store.checksum(self._buffer, place) != place.sha256:
            raise BadFileError(
                f"{self.path} is damaged: the checksum of its dataset {name!r} differs from what was written. Delete "
                f"the file and {ROOT}, and run the same command again, which makes this shard anew"
            )


def check_size(path: Path, shard: Shard) -> None:
    """Refuse a shard that is gone or of another size.

    Raises:
        FileNotFoundError: if it is gone.
        BadFileError: if it has another size.
    """
    again = f"Restore it, or delete {ROOT} and run the same command again, which makes what is missing"
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing ({shard.rows:,} rows). {again}")
    if path.resolve().parent != path.parent.resolve():
        raise BadFileError(f"shard {path} is a link out of its directory, which is not followed: put the file there")
    size = path.stat().st_size
    if size != shard.bytes:
        how = "cut off" if size < shard.bytes else "too long"
        raise BadFileError(f"shard {path} is {how}: it has {size:,} bytes, and {shard.bytes:,} were written. {again}")
