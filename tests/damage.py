"""Damage to JSON: a value with any one of its parts of another type, or gone."""

from collections.abc import Iterator
from typing import Any

OTHERS = (None, -1, 1.5, "x", [], {}, [None], float("nan"))


def changes(value: Any) -> Iterator[Any]:
    """Yield the value with one of its parts of another type or gone, for every part and every type."""
    yield from OTHERS
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for other in changes(value[key]):
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]
        if isinstance(value, dict):
            yield {name: part for name, part in value.items() if name != key}
