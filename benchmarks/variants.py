"""What every suite does with its variants: prepare, verify, time in one interleaved run, measure memory, summarise.

A variant is a function of the suite's shared state (its *bench*) that returns a `Prepared`. One that fails, in its
import, its preparation or its numbers, becomes a FAILED row and leaves the others alone.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks import measure, report
from benchmarks.report import Check

TOLERANCE = 1e-4


class Prepared(NamedTuple):
    """A variant that is ready to run.

    Attributes:
        step: Does one batch.
        error: How far a step's result is from the oracle's, relative; None where there is nothing to compare.
        scale: A whole batch costs this many steps.
        note: For the table.
    """

    step: measure.Step
    error: Callable[[Any], float] | None = None
    scale: float = 1.0
    note: str = ""


Variants = Mapping[str, Callable[[Any], Prepared]]


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        name: The variant.
        note: For the table.
        scale: Steps per batch.
        error: From the oracle, relative.
        failed: Why there is nothing else.
        extra: What the suite itself measured.
        times: Raw.
        memory: In a process of its own.
    """

    name: str
    note: str = ""
    scale: float = 1.0
    error: float | None = None
    failed: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    times: measure.Times = field(default_factory=lambda: measure.Times([], []))
    memory: measure.Memory | None = None


def run(
    label: str,
    bench: object,
    variants: Variants,
    names: Sequence[str],
    rounds: int,
    watch: Callable[[Row, measure.Step], None] | None = None,
) -> dict[str, Row]:
    """Prepare, verify and time variants.

    Args:
        label: What the progress lines call the run.
        bench: What the variants share.
        variants: All of them.
        names: Those to run.
        rounds: How often each is timed.
        watch: Runs a step once more to measure what is the suite's own.
    """
    rows, steps = {}, {}
    for name in names:
        rows[name] = row = Row(name)
        say(f"{label}: {name}")
        try:
            prepared = variants[name](bench)
            row.note, row.scale = prepared.note, prepared.scale
            with warnings.catch_warnings():
                # A compiled variant that runs eagerly after all is no compiled variant.
                warnings.filterwarnings("error", message="not compiled|the compiled step differs")
                result = prepared.step()
            if prepared.error is not None:
                row.error = prepared.error(result)
                if not row.error <= TOLERANCE:
                    raise ValueError(f"wrong numbers: {row.error:.1e} from the oracle")
            del result
            prepared.step()  # a second call repeats the plan's check: no part of what a step costs
            if watch is not None:
                watch(row, prepared.step)
            steps[name] = prepared.step
        except Exception as problem:
            row.failed = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            traceback.print_exc()
    timed = measure.interleave(steps, rounds, on_round=lambda done: say(f"{label}: round {done}/{rounds}"))
    for name, times in timed.items():
        rows[name].times = times
    return rows


def measure_memory(row: Row, label: str, arguments: Sequence[str]) -> None:
    """Fill in the memory of a variant that ran, from `python -m benchmarks memory *arguments`."""
    if row.failed:
        return
    say(f"{label}: memory of {row.name}")
    try:
        row.memory = measure.memory_of("benchmarks", ["memory", *arguments, "--variant", row.name])
    except RuntimeError as problem:
        row.failed = "its memory could not be measured"
        say(str(problem))


def summarise(rows: Mapping[str, Row], clock: str, under: Sequence[str]) -> list[dict]:
    """Every row as JSON, with its ratio to each of the variants in `under` and the raw times it comes from."""
    seconds = times_of(rows, clock)
    base = rows["floor"].memory if "floor" in rows else None
    entries = []
    for name, row in rows.items():
        entry = {"name": name, "note": row.note, "failed": row.failed, "error": row.error, "scale": row.scale}
        entry |= row.extra
        if name in seconds:
            entry["seconds"] = row.scale * measure.ratio(seconds[name], [1.0] * len(seconds[name])).median
            for other in under:
                if other in seconds:
                    entry[f"over_{other}"] = measure.ratio(seconds[name], seconds[other], row.scale)._asdict()
            entry["raw"] = row.times._asdict()
        if row.memory:
            entry["memory"] = row.memory._asdict()
            if base:
                entry["memory"]["above_floor"] = row.memory.step / base.step - 1
        entries.append(entry)
    return entries


def times_of(rows: Mapping[str, Row], clock: str) -> dict[str, list[float]]:
    """The times of every variant that ran, by the clock that counts."""
    return {name: getattr(row.times, clock) for name, row in rows.items() if row.times.wall}


def reader(entries: Sequence[dict]) -> Callable[..., float | None]:
    """`read(variant, *path)`: a number of a summary, None where it is missing."""
    found = {entry["name"]: entry for entry in entries}

    def read(name: str, *path: str) -> float | None:
        value = found.get(name, {})
        for key in path:
            value = value.get(key) if value else None
        return value

    return read


def failures(entries: Sequence[dict]) -> list[Check]:
    """A missed target for each variant that failed."""
    return [Check(f"{entry['name']} ran", None, entry["failed"], False) for entry in entries if entry["failed"]]


def table(entries: Sequence[dict], own: str, cell: Callable[[dict], str]) -> str:
    """Rows for people; `own` is the heading of the suite's own column, and `cell` fills it."""
    columns = ("variant", "ms", "× floor", "quartiles", own, "peak MiB", "above floor", "held MiB", "error", "")
    lines = []
    for entry in entries:
        if entry["failed"]:
            lines.append((entry["name"], "FAILED", *[""] * (len(columns) - 3), entry["failed"]))
            continue
        over, memory = entry.get("over_floor"), entry.get("memory")
        lines.append(
            (
                entry["name"],
                f"{1e3 * entry['seconds']:.0f}",
                f"{over['median']:.3f}" if over else "",
                f"{over['low']:.3f}–{over['high']:.3f}" if over else "",
                cell(entry),
                f"{memory['step'] / 2**20:.0f}" if memory else "",
                f"{memory['above_floor']:+.1%}" if memory and "above_floor" in memory else "",
                f"{memory['held'] / 2**20:.0f}" if memory else "",
                f"{entry['error']:.0e}" if entry["error"] is not None else "",
                entry["note"],
            )
        )
    return report.table(columns, lines)


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
