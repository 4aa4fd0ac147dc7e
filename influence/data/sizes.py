"""Files of text, looked through before a reader meets them: a row can be so large, or so deep, that it kills a process.

Readers of JSON take some ten times a row's size in memory, and go down a step of the stack for each bracket; a
tokenizer takes some two hundred times a text's size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from influence.store import BadFileError

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
        BadFileError: naming the file and the line of a row that is too deep.
        ValueError: naming the file, the place and the limit of one that is too large.
    """
    for path in map(Path, paths):
        if path.suffix.lower() in (".json", ".jsonl"):
            _check_json(path, most)
        elif path.suffix.lower() in (".csv", ".txt"):
            _check_lines(path, most)


def _check_lines(path: Path, most: int) -> None:
    begin = 0
    for at, chunk in _chunks(path):
        ends = at + numpy.flatnonzero(numpy.frombuffer(chunk, dtype=numpy.uint8) == ord("\n"))
        begin = _measured(path, begin, ends, at + len(chunk), most)


def _check_json(path: Path, most: int) -> None:
    begin, line, depth, base = 0, 1, 0, 0
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
        steps = (kinds == OPEN).astype(numpy.int64) - (kinds == CLOSE)
        steps[((seen - before) & 1).astype(bool)] = 0  # within a text
        depths = depth + numpy.cumsum(steps)
        depths -= numpy.minimum(numpy.minimum.accumulate(depths), 0)  # a bracket that nothing opened closes nothing
        deep = numpy.flatnonzero(depths > DEEPEST)
        if len(deep):
            number = line + int((kinds[: deep[0]] == LINE).sum())
            raise BadFileError(
                f"{path}, line {number}, is nested too deeply: it has more than {DEEPEST} brackets inside one another, "
                "which can end the process that reads them: mend it, write it again, or leave it out"
            )
        ends = at + places[((steps < 0) | (kinds == LINE)) & (depths <= base)]
        begin = _measured(path, begin, ends, at + len(chunk), most)
        line += int((kinds == LINE).sum())
        if len(places):
            quotes, depth = int(seen[-1] - before[-1]), int(depths[-1])


def _measured(path: Path, begin: int, ends: Any, stop: int, most: int) -> int:
    """Return where the row begins that is not finished, those that are having been measured."""
    begins = numpy.concatenate([[begin], ends])
    sizes = numpy.diff(numpy.concatenate([begins, [stop]]))
    large = numpy.flatnonzero(sizes > most)
    if len(large):
        raise ValueError(
            f"{path} has a row of {int(sizes[large[0]]):,} bytes or more, at byte {int(begins[large[0]]):,}, and "
            f"max_document_bytes={most} is the limit: a reader takes ten times as much memory, a tokenizer two hundred "
            "times. Cut the document, or raise it"
        )
    return int(begins[-1])


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield a file in pieces, with where each begins; none ends between a backslash and what it escapes."""
    at = 0
    with open(path, "rb") as file:
        while chunk := file.read(AT_ONCE):
            if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
                chunk += file.read(1)
            yield at, chunk
            at += len(chunk)
