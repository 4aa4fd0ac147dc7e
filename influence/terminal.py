"""What people read in a terminal: tables, numbers with a unit, and the name that they may have meant."""

import difflib
from collections.abc import Iterable, Sequence

from influence.visible import visible


def table(head: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Return a table for a terminal: numbers to the right, words to the left.

    Args:
        head: the columns' names.
        rows: their values.
        indent: before each line.

    Returns:
        The table.

    Example:
        >>> print(table(["score", "text"], [[0.5, "a"], [-12.25, "bb"]]))
         score  text
           0.5  a
        -12.25  bb
    """
    cells = [[*map(str, head)], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    right = [bool(rows) and all(isinstance(row[k], int | float) for row in rows) for k in range(len(head))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        lines.append((indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(visible(value).split()) if isinstance(value, str) else visible(str(value), lines=False)


def size(count: int | float) -> str:
    """Return a number of bytes as one reads it.

    Example:
        >>> size(3_500_000)
        '3.5 MB'
    """
    return human(count, "B")


def human(number: int | float, unit: str = "") -> str:
    """Return a number with a decimal prefix.

    Example:
        >>> human(3584), human(12), human(2e9, "B")
        ('3.58k', '12', '2 GB')
    """
    prefixes = ("", "k", "M", "G", "T")
    for prefix in prefixes:
        if abs(number) < 1000 or prefix == prefixes[-1]:
            break
        number /= 1000
    return f"{number:.3g}{' ' * bool(unit)}{prefix}{unit}"


def duration(seconds: int | float) -> str:
    """Return a time as one reads it.

    Example:
        >>> duration(0.31), duration(75), duration(7300)
        ('0.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of some names, to put behind a message; nothing, where none is near.

    Example:
        >>> did_you_mean("bild", ["build", "query"]), did_you_mean("x", ["build", "query"])
        ('; did you mean build?', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
