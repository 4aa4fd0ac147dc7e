"""The result of a command, its progress bar, and cells of CSV files that no spreadsheet runs as formulas."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

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


@contextlib.contextmanager
def progress(
    what: str, total: int, shown: bool | None = None, rank: int = 0, unit: str = "tok"
) -> Iterator[Callable[[int], None]]:
    """Show a bar while work goes on.

    Args:
        what: the work.
        total: tokens of all of it.
        shown: always, never, or (`None`) where there is a terminal.
        rank: only the first one shows anything.
        unit: what is counted.

    Yields:
        A function to call with the number of tokens just seen.
    """
    from tqdm import tqdm

    hidden = True if rank or shown is False else (None if shown is None else False)
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=hidden, dynamic_ncols=True) as bar:
        yield lambda tokens: bar.update(tokens) and None


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
