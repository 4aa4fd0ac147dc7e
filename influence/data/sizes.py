"""Files of text, looked through before a reader meets them: a row can be so large, or so deep, that it kills a process.

Readers of JSON take some ten times a row's size in memory, and go down a step of the stack for each bracket; a
tokenizer takes some two hundred times a text's size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

LARGEST = 1 << 24
"""Bytes of the largest document, unless another number is asked for."""
DEEPEST = 100
"""Brackets inside one another."""
WHOLE = 128
"""A JSON list is read whole: it may be so many times as large as a document."""
AT_ONCE = 1 << 23
"""Bytes that are looked through at once."""

QUOTE, OPEN, CLOSE, LINE = 1, 2, 3, 4
KINDS = numpy.zeros(256, dtype=numpy.uint8)
for _bytes, _kind in ((b'"', QUOTE), (b"[{", OPEN), (b"]}", CLOSE), (b"\n", LINE)):
    KINDS[list(_bytes)] = _kind


def check_files(paths: Iterable[str | Path], most: int = LARGEST) -> None:
    """Refuse files with a row that is too large for a reader, or too deep; of other formats than text, none.

    Args:
        paths: the files.
        most: bytes of a row.

    Raises:
        ValueError: naming the file, the row and the limit.
    """
    for path in map(Path, paths):
        if path.suffix.lower() in (".json", ".jsonl"):
            _check_json(path, most)
        elif path.suffix.lower() in (".csv", ".txt"):
            _check_lines(path, most)


def _check_lines(path: Path, most: int) -> None:
    begin, row = 0, 0
    for at, chunk in _chunks(path):
        ends = at + numpy.flatnonzero(numpy.frombuffer(chunk, dtype=numpy.uint8) == ord("\n"))
        begin, row = _longest(path, begin, row, ends, at + len(chunk), most)


def _check_json(path: Path, most: int) -> None:
    begin, row, depth, base = 0, 0, 0, 0
    quotes = 0  # since the last line began
    for at, chunk in _chunks(path):
        if at == 0 and chunk.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            base = 1
            if path.stat().st_size > WHOLE * most:
                raise ValueError(
                    f"{path} is one list of {path.stat().st_size:,} bytes, which is read whole, and {WHOLE} times "
                    f"max_document_bytes={most} is the limit: write a line for each row (.jsonl), or raise it"
                )
        plain = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in chunk else chunk
        kinds = KINDS[numpy.frombuffer(plain, dtype=numpy.uint8)]
        places = numpy.flatnonzero(kinds)
        kinds = kinds[places]
        seen = quotes + numpy.cumsum(kinds == QUOTE)
        before = numpy.maximum.accumulate(numpy.where(kinds == LINE, seen, 0))  # a line ends a text
        within = ((seen - before) & 1).astype(bool)
        steps = numpy.where(within, 0, (kinds == OPEN).astype(numpy.int64) - (kinds == CLOSE))
        depths = depth + numpy.cumsum(steps)
        depths -= numpy.minimum(numpy.minimum.accumulate(depths), 0)  # a bracket that nothing opened closes nothing
        deep = numpy.flatnonzero(depths > DEEPEST)
        ends = places[((steps < 0) | ((kinds == LINE) & ~within)) & (depths <= base)] + at
        if len(deep):
            place = at + int(places[deep[0]])
            found = row + int((ends < place).sum())
            raise ValueError(
                f"{path} has more than {DEEPEST} brackets inside one another, at byte {place:,} (about row {found:,}), "
                "which can end the process that reads them: correct the row, or leave it out"
            )
        begin, row = _longest(path, begin, row, ends, at + len(chunk), most)
        if len(places):
            quotes, depth = int(seen[-1] - before[-1]), int(depths[-1])


def _longest(path: Path, begin: int, row: int, ends: Any, stop: int, most: int) -> tuple[int, int]:
    """Return where the row that is not finished begins, and its number, having measured those that are."""
    sizes = numpy.diff(numpy.concatenate([[begin], ends, [stop]]))
    large = numpy.flatnonzero(sizes > most)
    if len(large):
        raise ValueError(
            f"{path} has a row of {int(sizes[large[0]]):,} bytes or more, about row {row + int(large[0]):,}, and "
            f"max_document_bytes={most} is the limit: a reader takes ten times as much memory, a tokenizer two hundred "
            "times. Cut the document, or raise it"
        )
    return (int(ends[-1]) if len(ends) else begin), row + len(ends)


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield a file in pieces, with where each begins; none ends between a backslash and what it escapes."""
    at = 0
    with open(path, "rb") as file:
        while chunk := file.read(AT_ONCE):
            if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
                chunk += file.read(1)
            yield at, chunk
            at += len(chunk)
