"""Errors of the library, whose words are Python's, in the words of the command line."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

CALL = re.compile(r"[A-Za-z_][\w.]*\((?=[^)])")
"""Where a call with arguments begins, as a transform prints itself: what is inside are no flags."""


def names_of(kind: Any) -> dict[str, str]:
    """Return the flag of every argument that is one in a configuration; the first, where several have its name."""
    return {name: flag for name, flag in reversed(list(_fields(kind))) if name != "run"}  # which has its place alone


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    plain, whole = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = plain[field.name]
        if dataclasses.is_dataclass(hint):
            bare = whole[field.name] is not hint  # annotated to have no prefix
            yield from _fields(hint, prefix if bare else f"{prefix}{field.name}.")
        else:
            yield field.name, "--" + f"{prefix}{field.name}".replace("_", "-")


def as_flags(text: str, names: Mapping[str, str]) -> str:
    """Return a message with flags for the arguments that it names.

    Args:
        text: a message.
        names: the flag of each argument that is one.

    Returns:
        The message.

    Example:
        >>> names = {"prompt_column": "--prompt-column", "split": "--split"}
        >>> as_flags("no column: pass prompt_column, or split='b' under project(dim=4)", names)
        'no column: pass --prompt-column, or --split b under project(dim=4)'
    """

    def flag(name: str) -> str:
        return names.get(name, "--" + name.replace("_", "-"))

    words = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    long = "|".join(sorted((re.escape(name) for name in names if "_" in name), key=len, reverse=True)) or "(?!)"
    rules = [
        (r"(?<![\w.'\"/-])([a-z]+(?:_[a-z]+)*)=True\b", lambda m: flag(m[1])),
        (rf"(?<![\w.'\"/-])({words})='([^']*)'", lambda m: f"{flag(m[1])} {m[2]}"),
        (rf"(?<![\w.'\"/-])({words})=(?=-?\w)", lambda m: f"{flag(m[1])} "),
        (rf"(?<![\w.'\"/-])({long})(?:\(\)|=)?(?![\w/]|\.\w)", lambda m: flag(m[1])),
        (rf"^({words})(?= must be )", lambda m: flag(m[1])),
        (rf"(?<=[Pp]ass )({words})=?(?![\w/])", lambda m: flag(m[1])),
    ]

    def change(part: str) -> str:
        for pattern, said in rules:
            part = re.sub(pattern, said, part)
        return part

    return _outside_calls(text, change)


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
