"""Configurations in YAML and JSON: writing, reading, and a check of every field."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from influence.data.parsing import shortly, text_of, yaml_of
from influence.store import BadFileError, write_text
from influence.terminal import did_you_mean
from influence.visible import visible

C = TypeVar("C")


class FieldError(ValueError):
    """An error in a file of settings. It names fields as files do, not as flags."""


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON can write it."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return list(value) if isinstance(value, tuple) else value


def from_mapping(kind: type[C], mapping: Any, where: str = "") -> C:
    """Return a configuration from what JSON or YAML hold.

    Args:
        kind: a dataclass of this package.
        mapping: its fields; those left out have their defaults.
        where: the group, for messages.

    Returns:
        The configuration.

    Raises:
        FieldError: naming the unknown field, the missing one, or the one that holds something else.
    """
    values = {}
    for name, hint, value in settings_of(kind, mapping, where):
        values[name] = from_mapping(hint, value, f"{where}{name}.") if dataclasses.is_dataclass(hint) else value  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in values or not required:
            continue
        if not dataclasses.is_dataclass(hints[field.name]):
            raise FieldError(f"field {where}{field.name} is missing, and it has no default")
        values[field.name] = from_mapping(hints[field.name], {}, f"{where}{field.name}.")
    return kind(**values)


def settings_of(kind: Any, mapping: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each field that JSON or YAML hold, with its type and its value; a group's value is not looked into.

    Args:
        kind: a dataclass of this package.
        mapping: its fields.
        where: the group, for messages.

    Yields:
        Names, types and values.

    Raises:
        FieldError: naming the unknown field, or the one that holds something else.
    """
    if not isinstance(mapping, Mapping):
        raise FieldError(f"{where or kind.__name__} must be a mapping of its fields; got {shortly(mapping)}")
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in mapping if name not in fields]
    if unknown:
        name = unknown[0] if isinstance(unknown[0], str) and len(unknown[0]) < 100 else shortly(unknown[0])
        near = did_you_mean(name, fields)
        raise FieldError(
            f"unknown field {where}{name}{near}; {kind.__name__} has {', '.join(fields)}: correct or remove it"
        )
    for name in fields:
        if name in mapping:
            group = dataclasses.is_dataclass(hints[name])
            yield name, hints[name], mapping[name] if group else _checked(mapping[name], hints[name], f"{where}{name}")


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Return a value that is of its type, a list as the tuple it means."""
    value = tuple(value) if isinstance(value, list) else value
    if get_origin(hint) is tuple and get_args(hint)[0] is float and isinstance(value, tuple):
        value = tuple(map(_number, value))
    elif float in (hint, *get_args(hint)):
        value = _number(value)
    if not _is(value, hint):
        raise FieldError(f"field {name} must be {_in_words(hint)}; got {shortly(value)}")
    return value


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; true is no number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    return type(value) is hint


def _number(value: Any) -> Any:
    """Return what can only mean a float as one: YAML reads 1e-3, without a point, as a string."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def _in_words(hint: Any) -> str:
    """Return a type as a user would say it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_in_words(get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return str(getattr(hint, "__name__", hint))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file of a configuration.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    read = yaml_of(text_of(path), str(path))
    if not isinstance(read, Mapping):
        raise BadFileError(f"{path} must hold a mapping of fields; it holds a {type(read).__name__}")
    return dict(read)


def write_config(path: str | Path, config: Any, command: str, run: str = "") -> None:
    """Write a configuration as YAML, which replays the run: `influence COMMAND ANOTHER_RUN --config PATH`."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    path = Path(path)
    place = visible(shlex.quote(str(path)), lines=False)  # a newline would end the comment
    head = f"# influence {command} ANOTHER_RUN --config {place}\n"
    write_text(path, head + yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True), run)
