"""A run directory: what is in it, and who writes it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from influence import store
from influence.store import BadFileError, Lock
from influence.store.folder import RUN, Manifest, read_manifest
from influence.store.schema import conform
from influence.visible import visible

ROOT = "index.h5"
SHARDS, PARTIALS = "shard-#.h5", "partial-#.h5"
NEIGHBOURS = "faiss"
"""Directory of the FAISS indexes that were made of a run; they are made again when they are gone."""
FILES = (ROOT, f"{NEIGHBOURS}/", SHARDS)
"""What a run of rows may hold; the root, by which it is finished, first."""


@dataclass(frozen=True)
class Run:
    """A run that this process writes; a context manager that gives the lock back.

    Attributes:
        directory: where.
        manifest: what run.json says.
        first: number of the first shard that is this run's to write: 0, or behind those of the index it appends to.
        last: the number behind its last one; `None` where they come as they come.
        lock: the writer's lock.
    """

    directory: Path
    manifest: Manifest
    first: int
    last: int | None
    lock: Lock

    @property
    def shards(self) -> list[tuple[int, int]] | None:
        """Begin and end of every shard, those of earlier appends among them; `None` where they come as they come."""
        planned = planned_shards(self.manifest)
        return None if planned is None else [(begin, end) for begin, end in planned]

    @property
    def todo(self) -> list[int]:
        """Numbers of the planned shards that are not there yet."""
        finished = done(self.directory, self.first)
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


def done(directory: str | Path, first: int = 0, every_byte: bool = True) -> set[int]:
    """Return the numbers of the shards of a run that are there and whole.

    Args:
        directory: the run.
        first: the first that is looked at: those before it are an index's, to which others are appended.
        every_byte: read every byte of them; otherwise what they say of themselves, which shows what was cut off.

    Returns:
        The numbers.

    Raises:
        BadFileError: if a shard is another run's.
    """
    from influence.index.shards import KIND, SCHEMA

    manifest = read_manifest(directory) if (Path(directory) / RUN).exists() else None
    finished = set()
    for path in [path for path in shard_paths(directory) if number_of(path) >= first]:
        number = number_of(path)
        try:
            store.any_head(path)
        except BadFileError:
            continue  # cut off or damaged: it is made again
        run = "" if manifest is None else owner(manifest, number)
        head = store.read_head(path, kind=KIND, schema=SCHEMA, run=run)
        try:
            if every_byte:
                store.check_whole(path, kind=KIND, schema=SCHEMA, run=run)
        except BadFileError:
            continue
        if head.about["number"] == number:
            finished.add(number)
    return finished


def shard_paths(directory: str | Path) -> list[Path]:
    """Return the files of a directory that are named as shards are."""
    return sorted(path for path in Path(directory).glob("shard-*.h5") if path.stem.partition("-")[2].isdecimal())


def number_of(path: Path) -> int:
    """Return a shard's number, as its name says it."""
    return int(path.stem.partition("-")[2])


def owner(manifest: Manifest, number: int) -> str:
    """Return the id that a shard carries: the run's, or that of the append which it came with."""
    ids = [str(change["id"]) for change in manifest.appended if int(change["first"]) <= number]
    return ids[-1] if ids else manifest.id


def stamp(directory: str | Path, number: int) -> str:
    """Return the id that a shard of a directory carries; nothing where no run was started."""
    return owner(read_manifest(directory), number) if (Path(directory) / RUN).exists() else ""


def planned_shards(manifest: Manifest) -> list[list[int]] | None:
    """Return begin and end of every planned shard; `None` where they come as they come."""
    shards = manifest.plan.get("shards")
    where = f"{RUN}: the plan's shards"
    return None if shards is None else [[*ends] for ends in conform(shards, list[tuple[int, int]], where)]


def rooted(directory: Path, manifest: Manifest) -> int | None:
    """Return how many shards the root presents; `None` where there is no root, so the run was never finished."""
    from influence.index.root import read_root

    return len(read_root(directory, manifest.id).shards) if (directory / ROOT).exists() else None


def way_on(directory: Path) -> str:
    """Say what to do about a run that is not finished."""
    if read_manifest(directory).kind == "training":
        return "it is the directory of a training, whose indexes are in it: open epoch-0, …, or what sum_epochs makes"
    if planned_shards(read_manifest(directory)) is None:
        return "its shards came as their batches came, so it cannot be resumed: begin again with overwrite=True"
    return "run the same command again to resume it"


def what_is_there(directory: str | Path) -> str:
    """Say in a line what a run directory holds."""
    directory = Path(directory)
    about = read_manifest(directory)
    planned = planned_shards(about)
    paths = shard_paths(directory)
    size = sum(path.stat().st_size for path in paths)
    shards = f"{len(paths)}" + ("" if planned is None else f" of {len(planned)}")
    state = "finished" if (directory / ROOT).exists() else "unfinished"
    return (
        f"{directory} holds a run of kind {about.kind!r} ({state}; {shards} shards, {size:,} bytes), made by: "
        f"{made_by(about.command)}"
    )


def made_by(command: Sequence[str]) -> str:
    """Return a command as one may type it again."""
    return visible(shlex.join(command), lines=False) or "a call from Python"
