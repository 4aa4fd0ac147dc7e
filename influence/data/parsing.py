"""Files of text that people and other programs write: one message where they are not what they should be."""

import json
import reprlib
from pathlib import Path
from typing import Any

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
