"""Checksums that every core helps with: the sha256 of the sha256s of every 4 MiB, one after the other."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNK = 1 << 22
"""Bytes that are hashed apart."""
THREADS = min(os.cpu_count() or 1, 8)


def sha256(buffers: Iterable[Any]) -> str:
    """Return the checksum of the bytes of buffers, one after the other; it does not depend on where they are cut.

    Args:
        buffers: what has bytes: contiguous arrays, views of memory maps.

    Returns:
        In hexadecimal.

    Example:
        >>> from influence.store.checksums import sha256
        >>> sha256([b"some", b"where"]) == sha256([b"somewhere"])
        True
    """
    chunks = list(chunked(buffers))
    if len(chunks) < 2:  # no thread is worth it
        return hashlib.sha256(b"".join(map(digest, chunks))).hexdigest()
    with ThreadPoolExecutor(min(THREADS, len(chunks))) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, chunks))).hexdigest()


def chunked(buffers: Iterable[Any]) -> Iterator[list[memoryview]]:
    """Yield the pieces of every `CHUNK` bytes; the last chunk has what is left."""
    chunk: list[memoryview] = []
    room = CHUNK
    for buffer in buffers:
        view = memoryview(buffer)
        left = view.cast("B") if view.nbytes else view  # an empty one cannot be cast
        while left:
            chunk.append(left[:room])
            left, room = left[room:], room - len(chunk[-1])
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def digest(pieces: Iterable[memoryview]) -> bytes:
    """Return the sha256 of pieces, one after the other."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.digest()
