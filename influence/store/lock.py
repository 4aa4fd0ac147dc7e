"""One writer at a time: a lock that the kernel takes back when its process ends, however it ends."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from types import TracebackType

LOCK = ".lock"
MARK = b"influence lock"
"""How the text of a lock begins; an empty file is the lock of a writer that was killed as it made it."""

HELD: set[Path] = set()
"""Locks of this process: the kernel would let it take one twice."""


class Lock:
    """The writer's lock on a run directory; a context manager.

    It is a record lock (`fcntl`): it belongs to the process, forked children do not have it, and it is gone when the
    process is.
    """

    def __init__(self, directory: Path, wait: bool = False) -> None:
        """Take the lock, or with `wait` do so once no other process has it.

        Raises:
            BlockingIOError: if another writer has it, with its process id.
            FileExistsError: if `.lock` is not a lock of ours.
        """
        self.path = directory.resolve() / LOCK
        if self.path in HELD:
            raise _refusal(directory, f"this very process ({os.getpid()}), which started the run and has not closed it")
        if not is_lock(self.path):
            raise FileExistsError(
                f"{self.path} is no lock of a run: move it away, or write to another directory; nothing was changed"
            )
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            owner = os.pread(self._handle, 200, 0).decode(errors="replace").removeprefix(MARK.decode()).strip(" :\n")
            os.close(self._handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, f"the file system of {directory} has no locks: {error.strerror}") from error
            raise _refusal(directory, owner or "another process") from error
        HELD.add(self.path)
        self._say(f"{MARK.decode()}: process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        """Give the lock back; again is nothing."""
        if self.path in HELD:
            HELD.discard(self.path)
            self._say(f"{MARK.decode()}\n")
            os.close(self._handle)

    def _say(self, text: str) -> None:
        """Write who has the lock; longer text that was there is cut off behind it."""
        os.pwrite(self._handle, text.encode(), 0)
        os.ftruncate(self._handle, len(text.encode()))

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_lock(path: Path) -> bool:
    """Whether a path is free for a lock, or holds one of ours: a plain file that says so, or is empty."""
    if path in HELD:
        return True  # to open and close it would give the lock back
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(MARK)) in (MARK, b"")
    except FileNotFoundError:
        return True


def _refusal(directory: Path, owner: str) -> BlockingIOError:
    return BlockingIOError(
        errno.EAGAIN,
        f"{directory} is being written by {owner}: wait until it is done, end it, or write to another directory",
    )
