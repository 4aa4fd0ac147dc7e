"""One writer at a time: a lock that the kernel takes back when its process ends, however it ends."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

LOCK = ".lock"

HELD: set[Path] = set()
"""Locks of this process: the kernel would let it take one twice."""


class Lock:
    """The writer's lock on a run directory; a context manager.

    It is a record lock (`fcntl`): it belongs to the process, forked children do not have it, and it is gone when the
    process is.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: if another writer has it, with its process id.
        """
        self.path = (directory / LOCK).resolve()
        if self.path in HELD:
            raise _refusal(directory, f"this very process ({os.getpid()}), which started the run and has not closed it")
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
            os.close(self._handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, f"the file system of {directory} has no locks: {error.strerror}") from error
            raise _refusal(directory, owner or "another process") from error
        HELD.add(self.path)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Give the lock back; again is nothing."""
        if self.path in HELD:
            HELD.discard(self.path)
            os.ftruncate(self._handle, 0)
            os.close(self._handle)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _refusal(directory: Path, owner: str) -> BlockingIOError:
    return BlockingIOError(
        errno.EAGAIN,
        f"{directory} is being written by {owner}: wait until it is done, end it, or write to another directory",
    )
