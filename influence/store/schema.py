"""Checks what JSON holds against the types of a NamedTuple: one message for everything that a file may say wrongly."""

import contextlib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class BadFileError(ValueError):
    """A file is damaged, holds something else, or belongs to another run; the message names it and says what to do."""


def refuse_version(path: object, found: object, reads: int) -> None:
    """Refuse a file of another version of its format.

    Raises:
        BadFileError: naming the file and both versions, with what to do.
    """
    if found == reads:
        return
    older = isinstance(found, int) and found < reads
    way = "make it again by the command that made it" if older else "use the version that wrote it"
    raise BadFileError(
        f"{path} is of {'an older' if older else 'another'} version of influence: it has schema {found}, this version "
        f"reads {reads}: {way}"
    )


def conform(value: Any, kind: Any, where: str) -> Any:
    """Return a value that JSON holds as the type that it should be.

    Understood are `Any`, `None`, bool, int, float, str, `Literal`, unions, `list[T]`, `tuple[T, ...]`, `dict[str, T]`
    and named tuples, which JSON holds as a mapping of their fields or as a list of them in order.

    Args:
        value: what JSON holds.
        kind: the type.
        where: the file, for the message.

    Returns:
        The value; lists as the tuples and named tuples that they mean.

    Raises:
        BadFileError: naming the file, the field, what it should be and what it is.

    Example:
        >>> conform([1, 2], tuple[int, ...], "run.json")
        (1, 2)
        >>> conform({"a": "x"}, dict[str, int], "run.json")
        Traceback (most recent call last):
            ...
        influence.store.schema.BadFileError: run.json is not what it says: a must be an integer, and is 'x'
    """
    try:
        return _conform(value, kind, "")
    except Mismatch as error:
        raise BadFileError(f"{where} is not what it says: {error}") from error


class Mismatch(Exception):
    """A value is of another type."""


NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _conform(value: Any, kind: Any, at: str) -> Any:
    """Return a value as its type; `at` is the path of fields to it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in NAMES:
        if type(value) is kind:
            return value
        raise _mismatch(at, NAMES[kind], value)
    if origin is Literal:
        if value in inner and type(value) in map(type, inner):
            return value
        raise _mismatch(at, f"one of {', '.join(map(repr, inner))}", value)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, at)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _mismatch(at, "a mapping", value)
        return {key: _conform(item, inner[1], f"{at}.{key}") for key, item in value.items()}
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            raise _mismatch(at, "a list", value)
        fixed = origin is tuple and Ellipsis not in inner
        if fixed and len(value) != len(inner):
            raise _mismatch(at, f"a list of {len(inner)}", value)
        kinds = inner if fixed else inner[:1] * len(value)
        items = [_conform(item, one, f"{at}[{i}]") for i, (item, one) in enumerate(zip(value, kinds, strict=True))]
        return items if origin is list else tuple(items)
    return _named_tuple(value, kind, at)


def _one_of(value: Any, kinds: Sequence[Any], at: str) -> Any:
    """Return a value as the first of several types that it fits."""
    for kind in kinds[:-1]:
        with contextlib.suppress(Mismatch):  # an error kept here would hold the frames of all callers
            return _conform(value, kind, at)
    return _conform(value, kinds[-1], at)


def _named_tuple(value: Any, kind: Any, at: str) -> Any:
    """Return a mapping of fields, or a list of them, as a named tuple."""
    hints, optional = _hints(kind), kind._field_defaults
    if isinstance(value, list) and len(value) == len(hints):
        value = dict(zip(hints, value, strict=True))
    if not isinstance(value, dict):
        raise _mismatch(at, f"a mapping of {', '.join(hints)}", value)
    for name in hints:
        if name not in value and name not in optional:
            raise Mismatch(f"{_path(f'{at}.{name}')} is missing")
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise Mismatch(f"{_path(f'{at}.{unknown[0]}')} is unknown")
    return kind(**{name: _conform(item, hints[name], f"{at}.{name}") for name, item in value.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return {name: get_type_hints(kind)[name] for name in kind._fields}


def _mismatch(at: str, expected: str, value: Any) -> Mismatch:
    shown = repr(value)
    return Mismatch(f"{_path(at)} must be {expected}, and is {shown if len(shown) <= 60 else shown[:57] + '…'}")


def _path(at: str) -> str:
    return at.removeprefix(".") or "it"
