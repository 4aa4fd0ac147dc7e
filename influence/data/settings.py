"""YAML of settings, read as plain values of a bounded size: a few lines of YAML can stand for a billion items."""

from typing import Any

LARGEST = 1 << 20
"""Characters of the longest text that is read."""
MOST = 100_000
"""Items of the largest value, each alias written out."""


def read_yaml(text: str, name: str, kind: str = "YAML") -> Any:
    """Return what a YAML (or JSON) text holds: plain values, no objects.

    Args:
        text: the text.
        name: what messages call it.
        kind: what messages say that it should be.

    Returns:
        The value.

    Raises:
        ValueError: if it is no YAML, or too large.

    Example:
        >>> read_yaml("{a: [1, b]}", "the settings")
        {'a': [1, 'b']}
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    if len(text) > LARGEST:
        raise ValueError(f"{name} has {len(text):,} characters; settings have at most {LARGEST:,}")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date or a number that is none, or too deep
        raise ValueError(f"{name} is no {kind}: {' '.join(str(error).split())}") from error
    if _size(found, MOST) > MOST:
        raise ValueError(f"{name} stands for more than {MOST:,} items: write less, or without aliases")
    return found


def _size(value: Any, most: int) -> int:
    """Return how many items a value has with all that is in it; more than `most` are not counted."""
    count, waiting = 0, [value]
    while waiting and count <= most:
        item = waiting.pop()
        count += 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
    return count
