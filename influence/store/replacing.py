"""Files which are there whole or not at all."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_RUN = "0" * 16
"""Stands for the run's id in the temporary name of a file that belongs to no run."""
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<run>[0-9a-f]{16})\.[0-9a-f]{16}\.partial")

OURS = (b"influence ", b'{\n "format": "influence run"')
"""How files of runs begin: those of tensors, those that grow, locks and manifests."""


@contextmanager
def replacing(path: Path, needed: int = 0, run: str = "") -> Iterator[Path]:
    """Give a temporary file beside a file, and rename it to the file's when everything went well.

    Args:
        path: the file; an existing one is replaced. A symbolic link in its place is replaced, not followed.
        needed: bytes that will be written, for the message.
        run: the id of the run that the file belongs to. The temporary name carries it, so that whoever resumes the run
            can remove what a killed writer left.

    Yields:
        The temporary file, empty and created exclusively.

    Raises:
        OSError: if the disk is full, naming the file, the bytes it needs and those that are free.
    """
    name = path.parent / f".{path.name}.{(run or NO_RUN)[:16]}.{secrets.token_hex(8)}.partial"
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield name
        sync(name)
        os.replace(name, path)
        sync(path.parent)
    except BaseException as error:
        name.unlink(missing_ok=True)
        if not is_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        size = f"about {needed:,} bytes are needed" if needed else "it does not fit"
        raise OSError(
            errno.ENOSPC,
            f"no space left for {path}: {size} and {free:,} are free there. Nothing of it was kept, and what was "
            "finished before is whole: free some space and run the same again, which resumes",
        ) from error


def write_text(path: Path, text: str, run: str = "") -> None:
    """Write a text file, atomically."""
    with replacing(path, len(text), run) as name:
        name.write_text(text, encoding="utf-8")


@contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """Write a file that the user named, and that belongs to no run; its folder is made.

    As `replacing`, whose temporary file nobody who resumes a run would remove. So whoever writes the same file next
    removes what a killed writer left; one that still writes holds a lock on its own.

    Raises:
        FileExistsError: if a file of a run is there, or what is no file, such as a device.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_kept(path)
    for left in temporaries(path.parent, [NO_RUN]):
        if left.name.startswith(f".{path.name}.{NO_RUN}."):
            _remove_abandoned(left)
    with replacing(path) as name, open(name, "rb") as held:
        _try_lock(held.fileno())
        yield name


def _refuse_kept(path: Path) -> None:
    """Refuse to replace what no user can mean to."""
    if not path.exists():
        return
    if not path.is_file():
        raise FileExistsError(f"{path} is no file, and would be replaced by one: write to another place")
    with open(path, "rb") as file:
        if file.read(32).startswith(OURS):
            raise FileExistsError(f"{path} is of a run of influence, which would be damaged: write to another place")


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file, unless its writer lives, or the file system cannot say."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as held:
        if _try_lock(held.fileno()):
            path.unlink()


def _try_lock(handle: int) -> bool:
    """Take a file's lock and say whether that went; without locks on its file system it did not."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def temporaries(directory: Path, runs: Iterable[str]) -> list[Path]:
    """Return the temporary files that writers of some runs left in a directory."""
    mine = {run[:16] for run in runs}
    found = ((path, TEMPORARY.fullmatch(path.name)) for path in sorted(directory.glob(".*.partial")))
    return [path for path, match in found if match and match["run"] in mine and not path.is_symlink()]


def is_full(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full; HDF5 says so in its message alone."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    marks = (f"errno = {errno.ENOSPC}", f"errno = {errno.EDQUOT}", "No space left on device")
    return isinstance(error, OSError | RuntimeError) and any(mark in str(error) for mark in marks)


def sync(path: Path) -> None:
    """Have a file or a directory on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
