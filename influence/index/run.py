"""A run directory: what is in it, and who writes it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from influence import store
from influence.index.lock import LOCK, Lock

SCHEMA = 2
RUN, ROOT = "run.json", "index.h5"
SHARDS, PARTIALS, TEMPORARY = "shard-*.h5", "partial-*.h5", ".*.partial"
NEIGHBOURS = "faiss"
"""Directory of the FAISS indexes that were made of a run; they are made again when they are gone."""
OURS = (RUN, ROOT, SHARDS, PARTIALS, LOCK, TEMPORARY, NEIGHBOURS)
"""What a run directory holds of ours."""


@dataclass(frozen=True)
class Run:
    """A run that this process writes; a context manager that gives the lock back.

    Attributes:
        directory: where.
        about: what run.json says.
        first: number of the first shard that is this run's to write: 0, or behind those of the index it appends to.
        last: the number behind its last one; `None` where they come as they come.
        lock: the writer's lock.
    """

    directory: Path
    about: Mapping[str, Any]
    first: int
    last: int | None
    lock: Lock

    @property
    def shards(self) -> list[tuple[int, int]] | None:
        """Begin and end of every shard, those of earlier appends among them; `None` where they come as they come."""
        planned = self.about["plan"].get("shards")
        return None if planned is None else [(int(begin), int(end)) for begin, end in planned]

    @property
    def todo(self) -> list[int]:
        """Numbers of the planned shards that are not there yet."""
        finished = done(self.directory)
        return [number for number in range(self.first, self.last or self.first) if number not in finished]

    def close(self) -> None:
        """Give the lock back."""
        self.lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def done(directory: str | Path) -> set[int]:
    """Return the numbers of the shards of a run that are there and whole: of this run, and not cut off.

    Args:
        directory: the run.

    Returns:
        The numbers.
    """
    from influence.index.shards import KIND
    from influence.index.shards import SCHEMA as SHARD_SCHEMA

    mine = stamp(directory)
    finished = set()
    for path in Path(directory).glob(SHARDS):
        try:
            facts = store.read_facts(path, kind=KIND, schema=SHARD_SCHEMA)
        except (ValueError, OSError, KeyError):
            continue
        if facts["run"] == mine and path.name == f"shard-{facts['number']:05d}.h5":
            finished.add(int(facts["number"]))
    return finished


def stamp(directory: str | Path) -> str:
    """Return what the shards of a run are marked with; nothing where no run was started."""
    path = Path(directory) / RUN
    return str(read_run(directory)["stamp"]) if path.exists() else ""


def read_run(directory: str | Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        ValueError: if it is damaged, or of another schema.
    """
    path = Path(directory) / RUN
    try:
        about = json.loads(path.read_text())
        schema = about["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or start again with overwrite=True") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}: use the version that wrote it")
    return about


def write_run(directory: Path, about: Mapping[str, Any]) -> None:
    """Write run.json, atomically."""
    text = json.dumps(about, indent=1) + "\n"
    with store.replacing(directory / RUN, len(text)) as name:
        name.write_text(text)


def rooted(directory: Path) -> int | None:
    """Return how many shards the root presents; `None` where there is no root, so the run was never finished."""
    from influence.index.root import read_root

    return len(read_root(directory).shards) if (directory / ROOT).exists() else None


def way_on(directory: Path) -> str:
    """Say what to do about a run that is not finished."""
    if read_run(directory)["plan"].get("shards") is None:
        return "its shards came as their batches came, so it cannot be resumed: begin again with overwrite=True"
    return "run the same command again to resume it"


def what_is_there(directory: str | Path) -> str:
    """Say in a line what a run directory holds."""
    directory = Path(directory)
    about = read_run(directory)
    planned = about["plan"].get("shards")
    size = sum(path.stat().st_size for path in directory.glob(SHARDS))
    shards = f"{len(list(directory.glob(SHARDS)))}" + ("" if planned is None else f" of {len(planned)}")
    made = shlex.join(about["command"]) or "a call from Python"
    state = "finished" if (directory / ROOT).exists() else "unfinished"
    return (
        f"{directory} holds a run of kind {about['kind']!r} ({state}; {shards} shards, {size:,} bytes), made by: {made}"
    )
