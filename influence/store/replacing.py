"""Files which are there whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """Give a temporary name beside a file, and rename it to the file's when everything went well.

    Args:
        path: the file; an existing one is replaced.
        needed: bytes that will be written, for the message.

    Yields:
        The temporary name; who gets it makes the file.

    Raises:
        OSError: if the disk is full, naming the file, the bytes it needs and those that are free.
    """
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
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
