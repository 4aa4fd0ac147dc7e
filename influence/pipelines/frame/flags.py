"""The flags of a command: their names, a file's settings as flags, and messages in terms of flags."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_type_hints

from influence.pipelines.frame.config_file import FieldError, settings_of

CALL = re.compile(r"[A-Za-z_][\w.]*\((?=[^)])")
"""Where a call with arguments begins, as a transform prints itself: what is inside are no flags."""
ARGUMENT = re.compile(
    r"(?<![\w.'\"/-])([a-z]+(?:_[a-z]+)*)"  # a name, which is no attribute, no file and no text in quotes
    r"(=True\b|='[^']*'|=(?=-?\w)|(?:\(\)|=)?(?![\w/]|\.\w))"
)
"""A word that may be an argument; behind it a value as Python writes it: `=True`, `='x'`, `=`, `()` or nothing."""


def names_of(kind: Any) -> dict[str, str]:
    """Return the flag of every argument that is one in a configuration; the first, where several have its name."""
    return dict(reversed(list(_fields(kind))))


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field and its flag; RUN is no flag."""
    plain = get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        if dataclasses.is_dataclass(plain[name]):
            yield from _fields(plain[name], prefix if _annotated(kind, name) else f"{prefix}{name}.")
        elif not _annotated(kind, name):
            yield name, _flag(prefix, name)


def _annotated(kind: Any, name: str) -> bool:
    """Whether a group's flags have no prefix; of a single field, whether it is RUN, which has a place and no flag."""
    return hasattr(get_type_hints(kind, include_extras=True)[name], "__metadata__")


def _flag(prefix: str, name: str) -> str:
    return "--" + f"{prefix}{name}".replace("_", "-")


def as_flags(kind: Any, settings: Any, where: str = "", prefix: str = "") -> list[str]:
    """Return what one would type for the settings of a file; RUN comes first.

    Args:
        kind: the command's configuration.
        settings: its fields, nested by group as in `config.yaml`.
        where: the group, for messages.
        prefix: the group, as flags have it.

    Returns:
        The words.

    Raises:
        FieldError: naming a field that is unknown, holds something else, or cannot be typed.

    Example:
        >>> from influence.pipelines.inspect import InspectConfig
        >>> as_flags(InspectConfig, {"verify": True, "run": "runs/corpus"})
        ['runs/corpus', '--verify']
    """
    typed: list[str] = []
    for name, hint, value in settings_of(kind, settings, where):
        if dataclasses.is_dataclass(hint):
            inside = prefix if _annotated(kind, name) else f"{prefix}{name}."
            typed += as_flags(hint, value, f"{where}{name}.", inside)
        elif _annotated(kind, name):
            typed.insert(0, value)
        elif hint is bool:
            typed.append(_flag(prefix, name if value else f"no_{name}"))
        elif isinstance(value, tuple):
            texts = [str(one) for one in value]
            if any(isinstance(one, str) and one.startswith("-") for one in value):
                raise FieldError(f"field {where}{name} has a text that begins with a dash, like a flag: it has {texts}")
            typed += [_flag(prefix, name), *texts]
        elif value == "None" and type(None) in get_args(hint):
            raise FieldError(f"field {where}{name} is the text 'None', which says no text: write null, or another")
        else:
            typed.append(f"{_flag(prefix, name)}={value}")
    return typed


def in_flags(text: str, names: Mapping[str, str]) -> str:
    """Return a message with flags for the arguments that it names.

    Args:
        text: a message, in Python's words.
        names: the flag of each argument that is one.

    Returns:
        The message.

    Example:
        >>> names = {"prompt_column": "--prompt-column", "split": "--split"}
        >>> in_flags("no column: pass prompt_column, or split='b' under project(dim=4)", names)
        'no column: pass --prompt-column, or --split b under project(dim=4)'
    """
    return _outside_calls(text, lambda part: ARGUMENT.sub(lambda found: _as_flag(found, names), part))


def _as_flag(found: re.Match[str], names: Mapping[str, str]) -> str:
    """Return an argument as its flag, with its value; a word that only may be one stays, unless it is asked for."""
    name, value = found[1], found[2]
    flag = names.get(name)
    if value == "=True":
        return flag or _flag("", name)
    if flag is None:
        return found[0]
    if value.startswith("='"):
        return f"{flag} {value[2:-1]}"
    before, after = found.string[: found.start()], found.string[found.end() :]
    if value == "=" and re.match(r"-?\w", after):
        return f"{flag} "
    subject = not before and after.startswith(" must be ")
    return flag if "_" in name or subject or before.endswith(("pass ", "Pass ")) else found[0]


def _outside_calls(text: str, change: Callable[[str], str]) -> str:
    """Change a text, but not the calls in it."""
    found = CALL.search(text)
    if found is None:
        return change(text)
    end, depth = found.end(), 1
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return change(text[: found.start()]) + text[found.start() : end] + _outside_calls(text[end:], change)
