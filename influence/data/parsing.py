"""Text files and settings, parsed with one-line errors; rows too large or too deep are refused before a reader fails.

Readers of JSON take some ten times a row's size in memory, and go down a step of the stack for each bracket; a
tokenizer takes some two hundred times a text's size.
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from influence.store import BadFileError

LARGEST = 1 << 20
"""Most characters of a text of settings: YAML is slow to read."""
VALUES = 100_000
"""Most values in a file of settings, with aliases counted as often as they stand there."""


def text_of(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        BadFileError: if it is not UTF-8, naming the line.
    """
    whole = Path(path).read_bytes()
    try:
        return whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = whole.count(b"\n", 0, error.start) + 1
        raise BadFileError(
            f"{path}, line {line}, is no text: its byte {whole[error.start]:#04x} is no UTF-8. The file is damaged, or "
            "of another kind or encoding: write it again as UTF-8"
        ) from error


def json_of(path: str | Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        BadFileError: naming the file and the line.
    """
    return parsed(text_of(path), str(path))


def parsed(text: str, name: str) -> Any:
    """Return the value of a JSON text, called `name` in messages.

    Raises:
        BadFileError: naming the text and, of several, the line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}," if "\n" in text.strip() else ""
        raise BadFileError(
            f"{name}{where} is no JSON: {error.msg.removesuffix(' at')} at column {error.colno}. It is damaged or cut "
            "off: write it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{name} is no JSON that can be read: {_message(error)}. Write it again") from error


def yaml_of(text: str, name: str, kind: type[ValueError] = BadFileError, what: str = "YAML") -> Any:
    """Return the value of a YAML or JSON text, called `name` in messages; `kind` is the error to raise.

    Raises:
        ValueError: if it is no YAML or too large, naming it.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    if len(text) > LARGEST:
        raise ValueError(f"{name} has {len(text):,} characters, and settings have at most {LARGEST:,}")
    try:
        read = yaml.safe_load(text)
        number = _count(read, {})
    except Exception as error:  # a constructor may raise anything: of a date of the 13th month, ValueError
        raise kind(f"{name} is no {what}: {_message(error)}") from error
    if number > VALUES:
        raise kind(f"{name} has {number:,} values, aliases counted, and settings have fewer than {VALUES:,}")
    return read


def shortly(value: Any) -> str:
    """Return the `repr` of a value, cut if it is long or deep.

    Example:
        >>> shortly([[[[[[[[]]]]]]], *range(99)])
        '[[[[[[[...]]]]]], 0, 1, 2, 3, 4, ...]'
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value)


def _count(value: Any, known: dict[int, int]) -> int:
    """Return how many values a value holds; of one that holds itself, more than are allowed."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = VALUES  # while it is counted: what holds itself has no end
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]


def _message(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300].rstrip(".")


WHOLE = 1 << 28
"""Most bytes of a JSON document that is read again to find the broken line."""


def unreadable(
    files: Sequence[str], kind: str, error: Exception, again: Callable[[str], Iterable[Any]]
) -> BadFileError:
    """Return the error that names the broken one of some files, and the line, found by reading each `again`.

    `kind` is `datasets`' name of the reader, and `error` what it raised.
    """
    for file in files if len(files) > 1 else ():
        try:
            for _ in again(file):
                pass
        except Exception as found:  # a reader may raise anything; which file makes it, is asked for
            return _bad_file(file, kind, found)
    if len(files) == 1:
        return _bad_file(files[0], kind, error)
    return BadFileError(f"{', '.join(files[:3])} … cannot be read together as {kind}: {reason(error)}")


def reason(error: BaseException) -> str:
    """Return the message of an error, or of its cause if it comes from `datasets`, in one line."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets."):
        error = error.__cause__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__} {text}".strip()


def _bad_file(file: str, kind: str, error: Exception) -> BadFileError:
    line, what = _place(Path(file), kind)
    where = file if line is None else f"{file}, line {line},"
    return BadFileError(
        f"{where} cannot be read as {kind}: {what or reason(error)}. It is damaged or cut off, or not what its name "
        "says: mend it, write it again, or leave it out"
    )


def _place(path: Path, kind: str) -> tuple[int | None, str]:
    """Return the line at which a text file is broken and what is wrong there, or `(None, "")`."""
    number, first = 0, True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file if kind in ("json", "csv", "text") else (), 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if kind == "json" and text.strip():
                    if broken := _broken(text):
                        return _document(path, number, broken) if first else (number, broken)
                    first = False
    except UnicodeDecodeError as error:
        return number, f"its byte {error.start + 1} is {error.object[error.start]:#04x}, which is no UTF-8"
    return None, ""


def _broken(line: str) -> str:
    """Return why a line is no JSON object; empty if it is one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _of_json(error)
    return "" if isinstance(row, dict) else f"expected an object, one row; it is a {type(row).__name__}"


def _document(path: Path, number: int, broken: str) -> tuple[int | None, str]:
    """Return the line in which a JSON document breaks off, of which its first line is no row by itself."""
    if path.stat().st_size > WHOLE:
        return None, ""
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # it is one row in each line
            return number, broken
        return error.lineno, _of_json(error)
    except (ValueError, RecursionError) as error:
        return None, _of_json(error)
    for k, row in enumerate(found if isinstance(found, list) else [found]):
        if not isinstance(row, dict):
            return None, f"expected objects, one a row; row {k} is a {type(row).__name__}"
    return None, ""


def _of_json(error: Exception) -> str:
    """Return what is wrong with a JSON text, without the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return reason(error)  # brackets too many, a number too long


LARGEST_ROW = 1 << 24
"""Default of the most bytes of a document."""
DEEPEST = 100
"""Most brackets inside one another."""
LISTS = 128
"""A JSON list is read whole: it may be this many times as large as a document."""
AT_ONCE = 1 << 23
"""Bytes that are checked at a time."""

QUOTE, OPEN, CLOSE, LINE = 1, 2, 3, 4
KINDS = numpy.zeros(256, dtype=numpy.uint8)
for _bytes, _kind in ((b'"', QUOTE), (b"[{", OPEN), (b"]}", CLOSE), (b"\n", LINE)):
    KINDS[list(_bytes)] = _kind


def check_files(paths: Iterable[str | Path], most: int = LARGEST_ROW) -> None:
    """Refuse JSON, CSV and text files with a row of more than `most` bytes, or nested too deeply.

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
        begin = _check_sizes(path, begin, ends, at + len(chunk), most)


def _check_json(path: Path, most: int) -> None:
    begin, line, depth, base = 0, 1, 0, 0
    quotes = 0  # since the last line began
    for at, chunk in _chunks(path):
        if at == 0 and chunk.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            base = 1
            if path.stat().st_size > LISTS * most:
                raise ValueError(
                    f"{path} is one list of {path.stat().st_size:,} bytes, which is read whole, and {LISTS} times "
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
        begin = _check_sizes(path, begin, ends, at + len(chunk), most)
        line += int((kinds == LINE).sum())
        if len(places):
            quotes, depth = int(seen[-1] - before[-1]), int(depths[-1])


def _check_sizes(path: Path, begin: int, ends: Any, stop: int, most: int) -> int:
    """Refuse finished rows that are too large, and return where the unfinished one begins."""
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
    """Yield a file in pieces with their places; none ends between a backslash and the character it escapes."""
    at = 0
    with open(path, "rb") as file:
        while chunk := file.read(AT_ONCE):
            if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
                chunk += file.read(1)
            yield at, chunk
            at += len(chunk)
