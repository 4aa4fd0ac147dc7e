"""What a pipeline hands back: where it wrote, facts for machines, text for people."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from influence.visible import visible

Say: TypeAlias = Callable[[str], None]
"""Where a pipeline's lines go: `print`, or nowhere."""


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        run: the run directory, or the file.
        facts: what JSON can write.
        text: the same to read.
    """

    run: str
    facts: Mapping[str, Any]
    text: str


def quiet(line: str) -> None:
    """Say nothing."""


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
