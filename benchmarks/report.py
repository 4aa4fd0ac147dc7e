"""What a suite says: aligned tables for people, JSON beside them, and targets that were met or not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One target.

    Attributes:
        name: What is bounded.
        value: What was measured; None where it could not be.
        bound: The bound in words.
        met: Whether the value keeps to it.
    """

    name: str
    value: float | None
    bound: str
    met: bool


def at_most(name: str, value: float | None, bound: float) -> Check:
    """A target from above; what was not measured misses it."""
    return Check(name, value, f"≤ {bound:g}", value is not None and value <= bound)


def at_least(name: str, value: float | None, bound: float) -> Check:
    """A target from below; what was not measured misses it."""
    return Check(name, value, f"≥ {bound:g}", value is not None and value >= bound)


def verdict(checks: Sequence[Check]) -> str:
    """One line per target."""
    lines = []
    for check in checks:
        value = "not measured" if check.value is None else f"{check.value:.5g}"
        lines.append(f"{'ok    ' if check.met else 'MISSED'}  {check.name}: {value} ({check.bound})")
    return "\n".join(lines)


def skipped(rows: Mapping[str, str]) -> str:
    """One line per row that was left out, since the peer beside it is not installed."""
    return "\n".join(f"skipped  {row}: {peer} is not installed (make bench-peers)" for row, peer in rows.items())


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned right, but for the first and the last."""
    every = [header, *lines]
    widths = [max(len(line[column]) for line in every) for column in range(len(header) - 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]]).rstrip()
        for line in every
    )


def write(report: dict, path: Path) -> None:
    """Write everything measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
