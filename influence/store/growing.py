"""Files that grow: what is put at their end stays as it is, and what was not put there whole can be cut off.

Such a file begins with a block of plain text that says what it is, made at once with the file:

    influence log 1
    <sha256 of the next line> <its bytes>
    {"kind": …, "run": …, "about": …}

Behind it comes what its writer puts there. Checksums of that are its writer's business, since only they know its parts.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from influence.store.hdf5 import parsed
from influence.store.replacing import is_full, replacing
from influence.store.schema import BadFileError, conform

MAGIC = b"influence log 1\n"
FIRST = len(MAGIC) + 64 + 1 + 20 + 1
"""Bytes of the first two lines: the number of bytes is padded."""


class Beginning(NamedTuple):
    """How a growing file begins.

    Attributes:
        kind: what it holds.
        run: the id of the run that it belongs to.
        about: its facts.
    """

    kind: str
    run: str
    about: dict[str, Any]


class Growing:
    """A growing file, open to be read or to grow; a symbolic link is never followed.

    Attributes:
        path: the file.
        about: its facts.
        begin: the first byte behind its beginning.
        size: its bytes.
    """

    def __init__(self, path: Path, *, kind: str, run: str, grow: bool = False) -> None:
        """Open a file that is there.

        Raises:
            FileNotFoundError: if there is none.
            BadFileError: if it is none of ours, of another kind or run, or its beginning is damaged.
        """
        self.path, self._fresh = path, False
        self.handle = opened(path, os.O_RDWR | os.O_APPEND if grow else os.O_RDONLY)
        try:
            self.size = os.fstat(self.handle).st_size
            found, self.begin = beginning(path, self.handle)
            if found.kind != kind:
                raise BadFileError(f"{path} holds {found.kind!r}; expected {kind!r}")
            if found.run != run:
                raise BadFileError(
                    f"{path} belongs to another run (its id is {found.run[:16]}, this run's is {run[:16]}): it was put "
                    "here from elsewhere. Put this run's own there again, or write to another directory"
                )
            self.about = found.about
        except BaseException:
            self.close()
            raise

    def append(self, data: Any) -> None:
        """Put bytes at the end: all of them, or none where the disk is full.

        Raises:
            OSError: if the disk is full, naming the file, the bytes it needs and those that are free.
        """
        left = memoryview(data)
        needed = left.nbytes
        try:
            while left:
                left = left[os.write(self.handle, left) :]
        except OSError as error:
            os.ftruncate(self.handle, self.size)
            if not is_full(error):
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"no space left for {self.path}: {needed:,} more bytes are needed and {free:,} are free there. What "
                "was there is whole: free some space and go on from the last checkpoint",
            ) from error
        self.size += needed
        self._fresh = True

    def read(self, begin: int, size: int) -> bytes:
        """Return bytes of the file, fewer where it ends."""
        found = bytearray()
        while len(found) < size and (piece := os.pread(self.handle, size - len(found), begin + len(found))):
            found += piece  # the kernel gives 2 GiB at once, and no more
        return bytes(found)

    def cut(self, size: int) -> None:
        """Cut off what is behind some bytes, for good."""
        if size < self.size:
            os.ftruncate(self.handle, size)
            os.fsync(self.handle)
            self.size = size

    def sync(self) -> None:
        """Have everything on the disk."""
        if self._fresh:
            os.fsync(self.handle)
        self._fresh = False

    def close(self) -> None:
        """Close the file; again is nothing."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def make(path: Path, *, kind: str, run: str, about: Mapping[str, Any], data: Any = b"", needed: int = 0) -> None:
    """Make a growing file, or another in the place of one of the run: at once with its beginning, and on the disk.

    Args:
        path: the file.
        kind: what it will hold.
        run: the id of the run that it belongs to.
        about: its facts.
        data: pieces of what comes behind the beginning at once: bytes, or an iterable of them.
        needed: their bytes, for the message when the disk is full.

    Raises:
        BadFileError: if something else is there.
    """
    if path.exists() or path.is_symlink():
        Growing(path, kind=kind, run=run).close()
    text = json.dumps({"kind": kind, "run": run, "about": about}).encode()
    line = f"{hashlib.sha256(text).hexdigest()} {len(text) + 1:020}\n".encode()
    with replacing(path, needed, run) as name, open(name, "wb") as file:
        file.write(MAGIC + line + text + b"\n")
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)


def beginning(path: Path, handle: int | None = None) -> tuple[Beginning, int]:
    """Read how a growing file begins, and where that ends.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: if it is none of ours, or its beginning is damaged.
    """
    if handle is None:
        handle = opened(path, os.O_RDONLY)
        try:
            return beginning(path, handle)
        finally:
            os.close(handle)
    first = os.pread(handle, FIRST, 0)
    if not first.startswith(MAGIC):
        raise BadFileError(f"{path} is no file of influence, or its beginning is damaged")
    digest, _, length = first[len(MAGIC) :].decode(errors="replace").partition(" ")
    if len(first) < FIRST or not length.strip().isdecimal() or int(length) > os.fstat(handle).st_size - FIRST:
        raise BadFileError(f"{path} is damaged: its first lines are cut off or changed")
    text = os.pread(handle, int(length), FIRST)
    if hashlib.sha256(text[:-1]).hexdigest() != digest or text[-1:] != b"\n":
        raise BadFileError(f"{path} is damaged: the checksum of its facts differs")
    return conform(parsed(text, path), Beginning, str(path)), FIRST + int(length)


def opened(path: Path, flags: int) -> int:
    """Open a plain file, and nothing that a symbolic link leads to.

    Raises:
        FileNotFoundError: if there is none.
        BadFileError: if it is something else.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise BadFileError(f"{path} is no plain file: move it away, or write to another directory") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFileError(f"{path} is no plain file: move it away, or write to another directory")
    return handle
