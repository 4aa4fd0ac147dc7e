"""Files of text, looked through before a reader meets them: a row can be so large, or so deep, that it kills a process.

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
"""Characters of the longest text of settings that is read: YAML is read slowly."""
VALUES = 100_000
"""Values that a file of settings may have, each counted as often as it stands there: aliases repeat theirs."""


def text_of(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        BadFileError: if it is no UTF-8, naming the line.
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
    """Return what a JSON file holds.

    Raises:
        BadFileError: naming the file and the line.
    """
    return parsed(text_of(path), str(path))


def parsed(text: str, name: str) -> Any:
    """Return what a JSON text says; `name` is for messages.

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
        raise BadFileError(f"{name} is no JSON that can be read: {_why(error)}. Write it again") from error


def yaml_of(text: str, name: str, kind: type[ValueError] = BadFileError, what: str = "YAML") -> Any:
    """Return what a text in YAML, or in JSON, says; `name` is for messages, and `kind` is the error.

    Raises:
        ValueError: if it is none, or says more than settings do; naming it.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    if len(text) > LARGEST:
        raise ValueError(f"{name} has {len(text):,} characters, and settings have at most {LARGEST:,}")
    try:
        read = yaml.safe_load(text)
        number = _count(read, {})
    except Exception as error:  # a constructor may raise anything: of a date of the 13th month, ValueError
        raise kind(f"{name} is no {what}: {_why(error)}") from error
    if number > VALUES:
        raise kind(f"{name} has {number:,} values, aliases counted, and settings have fewer than {VALUES:,}")
    return read


def shortly(value: Any) -> str:
    """Return a value as Python writes it, cut where it is long or deep.

    Example:
        >>> shortly([[[[[[[[]]]]]]], *range(99)])
        '[[[[[[[...]]]]]], 0, 1, 2, 3, 4, ...]'
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value)


def _count(value: Any, known: dict[int, int]) -> int:
    """Return how many values there are in a value; more than are allowed, where it holds itself."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = VALUES  # while it is counted: what holds itself has no end
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300].rstrip(".")


WHOLE = 1 << 28
"""Bytes up to which a JSON document is read again, to find the line in which it breaks off."""


def unreadable(
    files: Sequence[str], kind: str, error: Exception, again: Callable[[str], Iterable[Any]]
) -> BadFileError:
    """Return the error that says which of some files cannot be read, and in which line.

    Args:
        files: the files that were to be read.
        kind: what `datasets` calls their reader.
        error: what it said.
        again: one file's rows, read anew.
    """
    for file in files if len(files) > 1 else ():
        try:
            for _ in again(file):
                pass
        except Exception as found:  # a reader may raise anything; which file makes it, is asked for
            return _blamed(file, kind, found)
    if len(files) == 1:
        return _blamed(files[0], kind, error)
    return BadFileError(f"{', '.join(files[:3])} … cannot be read together as {kind}: {said(error)}")


def said(error: BaseException) -> str:
    """Return what an error says, or the one which it came from, in a line."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets."):
        error = error.__cause__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__} {text}".strip()


def _blamed(file: str, kind: str, error: Exception) -> BadFileError:
    line, what = _place(Path(file), kind)
    where = file if line is None else f"{file}, line {line},"
    return BadFileError(
        f"{where} cannot be read as {kind}: {what or said(error)}. It is damaged or cut off, or not what its name "
        "says: mend it, write it again, or leave it out"
    )


def _place(path: Path, kind: str) -> tuple[int | None, str]:
    """Return the line at which a file of text breaks off, and what is wrong there, where that can be told."""
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
    """Return what keeps a line from being a row in JSON; nothing, if nothing does."""
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
    """Return what is wrong with a JSON text, without its place in the whole."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return said(error)  # brackets too many, a number too long


LARGEST_ROW = 1 << 24
"""Bytes of the largest document, unless another number is asked for."""
DEEPEST = 100
"""Brackets inside one another."""
LISTS = 128
"""A JSON list is read whole: it may be so many times as large as a document."""
AT_ONCE = 1 << 23
"""Bytes that are looked through at once."""

QUOTE, OPEN, CLOSE, LINE = 1, 2, 3, 4
KINDS = numpy.zeros(256, dtype=numpy.uint8)
for _bytes, _kind in ((b'"', QUOTE), (b"[{", OPEN), (b"]}", CLOSE), (b"\n", LINE)):
    KINDS[list(_bytes)] = _kind


def check_files(paths: Iterable[str | Path], most: int = LARGEST_ROW) -> None:
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
