"""Data that cannot be read: which file it is, in which line, and what to do about it."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from influence.store import BadFileError

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
