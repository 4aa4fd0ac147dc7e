"""Cells of CSV files: a text that a spreadsheet would take for a formula is written as a text, and read back as it was.

A cell that begins with `=`, `+`, `-`, `@`, a tab or a carriage return is run as a formula by spreadsheets, which may
send what the sheet holds elsewhere. An apostrophe before it says that it is text. Numbers stay numbers.
"""

import re
from collections.abc import Iterable

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How a text begins that is written with one apostrophe more; those of its own are counted, so that none is lost."""


def as_cell(value: object) -> object:
    r"""Return a value as a cell of a CSV file holds it: a text that begins as a formula has an apostrophe before it.

    Example:
        >>> as_cell("=1+1"), as_cell("'=1"), as_cell("1 = 1"), as_cell(-0.5)
        ("'=1+1", "''=1", '1 = 1', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """Return the text that a cell stands for: the inverse of `as_cell`.

    Example:
        >>> from_cell("'=1+1"), from_cell("'twas")
        ('=1+1', "'twas")
    """
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def as_row(values: Iterable[object]) -> list[object]:
    """Return a row of cells."""
    return [as_cell(value) for value in values]
