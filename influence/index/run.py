"""A run directory and its writer: begins, resumes after anything, appends, and overwrites only when told."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from influence.func.fingerprint import differences
from influence.func.fingerprint import fingerprint as hash_of
from influence.index.provenance import Fingerprint, all_differences, shown
from influence.index.root import finish, read_root
from influence.index.shards import FILES, PARTIALS, ROOT, SHARDS, done, number_of, planned_shards, shard_paths
from influence.store import Lock
from influence.store.folder import RUN, Manifest, manifest_of, owned, read_manifest, take, tidy, write_manifest
from influence.visible import visible


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


def rooted(directory: Path, manifest: Manifest) -> int | None:
    """Return how many shards the root presents; `None` where there is no root, so the run was never finished."""
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


def start(
    directory: str | Path,
    kind: str,
    config: Mapping[str, Any],
    command: Sequence[str],
    plan: Mapping[str, Any],
    fingerprint: Fingerprint,
    overwrite: bool = False,
    resume: bool = True,
    append: bool = False,
    results: Sequence[str] = (),
    scratch: Sequence[str] = (),
) -> Run:
    """Take the lock on a run directory, and begin, resume or append.

    Args:
        directory: the run; made if it is not there.
        kind: what it will hold: `"index"`, `"scores"`, ….
        config: the configuration, as JSON has it.
        command: what to type to run it again.
        plan: `{"shards": [[begin, end], …], "dtype": …, …}`; without `"shards"` they come as they come, and cannot be
            resumed. When appending, the new ones alone.
        fingerprint: what the rows will be.
        overwrite: delete the run that is there first: the files that its manifest names, no others.
        resume: go on with an unfinished run of the same plan and fingerprint.
        append: add shards to a finished index.
        results: names of what else the run may hold, as `Manifest.files` has them; those by which it is finished first.
        scratch: names of what else it holds until it is finished.

    Returns:
        The run.

    Raises:
        FileExistsError: if something is there; saying what, and what to do.
        NotADirectoryError: if a file is there.
        FileNotFoundError: if there is nothing to append to.
        ValueError: if it has another kind, plan or fingerprint; naming the field and both values.
        BlockingIOError: if another writer is at it.
    """
    directory = Path(directory)
    if append and overwrite:
        raise ValueError("append=True adds to what is there, and overwrite=True deletes it: choose one")
    if append and not (directory / RUN).exists():
        raise FileNotFoundError(f"there is no index in {directory} to append to: leave append out")
    files, left = dict.fromkeys((*results, *FILES)), dict.fromkeys((PARTIALS, *scratch))
    wanted = manifest_of(kind, config, command, plan, fingerprint.json(), [*files], [*left])
    lock, there = take(directory, wanted, overwrite)
    try:
        if there is None:
            return Run(directory, wanted, 0, _count(wanted), lock)
        _check_same(directory, there, wanted, fingerprint, append)
        present = rooted(directory, there)
        if append:
            return _append(directory, there, wanted, present, lock)
        if present is not None:
            tidy(directory, there)
            raise FileExistsError(
                f"{what_is_there(directory)}. It is finished: pass overwrite=True to replace it, "
                "append=True to add examples, or write to another directory"
            )
        if not resume and "shards" in there.plan:
            raise FileExistsError(
                f"{what_is_there(directory)}. Pass resume=True to go on with it, overwrite=True to "
                "replace it, or write to another directory"
            )
        last = _check_plan(directory, there, wanted)
        return Run(directory, there, 0, last, lock)
    except BaseException:
        lock.release()
        raise


def _append(directory: Path, there: Manifest, wanted: Manifest, present: int | None, lock: Lock) -> Run:
    """Grow a finished run's plan, or go on with an append that was cut off."""
    old, new = planned_shards(there) or [], planned_shards(wanted)
    for change, (first, last) in zip(there.appended, _segments(there)[1:], strict=True):
        if old[first:last] == new and (present is None or present < last):
            mine, theirs = (each["recorded"].get("data") for each in (wanted.fingerprint, change))
            if mine != theirs:
                raise ValueError(
                    f"{directory}: an append was cut off whose data is {_short(theirs)}; append the same again to go "
                    f"on, got {_short(mine)}"
                )
            return Run(directory, there, first, last, lock)
    if present is None:
        raise FileExistsError(
            f"{what_is_there(directory)}. It is not finished, so there is nothing to append to yet: resume it first"
        )
    if len(old) > present and done(directory) >= set(range(len(old))):
        finish(directory)  # all that was missing of the last append was the root
        present = len(old)
    if len(old) > present:
        raise ValueError(
            f"{directory}: an append of shards {_short(old[present:])} was cut off; append the same again to go on, "
            f"got {_short(new)}"
        )
    for key in ("dtype", "per_token"):
        mine, theirs = wanted.plan.get(key), there.plan.get(key)
        if mine != theirs:
            raise ValueError(
                f"{directory} has {key} = {_short(theirs)}; appended rows must have it too, got {_short(mine)}"
            )
    for path in owned(directory, there, [SHARDS]):
        if number_of(path) >= present:
            path.unlink()
    if new is not None:
        last = max((end for _, end in old), default=0)
        if any(begin < last for begin, _ in new):
            raise ValueError(
                f"{directory} holds rows of the dataset up to {last - 1}: appended shards begin at {last} or later, "
                f"got {_short(new)}"
            )
    plan = {**there.plan, "shards": old + new} if new is not None else {**there.plan, "open": True}
    change = {
        "command": wanted.command,
        "config": wanted.config,
        "recorded": wanted.fingerprint["recorded"],
        "first": present,
    }
    change["id"] = hash_of([there.ids[-1], wanted.id, present])[:32]
    grown = there._replace(plan=plan, appended=[*there.appended, change])
    write_manifest(directory, grown)
    return Run(directory, grown, present, None if new is None else len(old) + len(new), lock)


def _count(manifest: Manifest) -> int | None:
    shards = planned_shards(manifest)
    return None if shards is None else len(shards)


def _segments(manifest: Manifest) -> list[tuple[int, int]]:
    """Return the first shard, and the one behind the last, of a run and of every append to it."""
    firsts = [0, *(int(change["first"]) for change in manifest.appended)]
    return list(pairwise([*firsts, _count(manifest) or 0]))


def _check_same(directory: Path, there: Manifest, wanted: Manifest, fingerprint: Fingerprint, append: bool) -> None:
    """Refuse a run of another kind or fingerprint; data that are appended may be others."""
    if there.kind != wanted.kind:
        raise FileExistsError(
            f"{what_is_there(directory)}. This run is of kind {wanted.kind!r}: pass overwrite=True to replace it, or "
            "write to another directory"
        )
    free = ("data",) if append else ()
    now = Fingerprint.from_json(wanted.fingerprint, fingerprint.live)
    for name, mine, theirs in all_differences(now, Fingerprint.from_json(there.fingerprint), free):
        verb = "appended rows must be of its kind" if append else "this run cannot go on with it"
        raise ValueError(
            f"{what_is_there(directory)}. Its {name} is {_short(theirs, mine)}, and this run's is "
            f"{_short(mine, theirs)}: {verb}; pass overwrite=True to replace it, or write to another directory"
        )


def _check_plan(directory: Path, there: Manifest, wanted: Manifest) -> int:
    """Refuse another plan; return how many shards it has, those of appends apart."""
    if "shards" not in wanted.plan:
        raise FileExistsError(
            f"{what_is_there(directory)}; its shards came as their batches came, so it cannot be resumed: pass "
            "overwrite=True to begin again, or write to another directory"
        )
    last = _segments(there)[0][1]
    planned = {**there.plan, "shards": (planned_shards(there) or [])[:last]}
    for name, mine, theirs in differences(wanted.plan, planned):
        raise ValueError(
            f"{what_is_there(directory)}. Its plan has {name} = {_short(theirs)}, and this run's has "
            f"{_short(mine)}: resume with the same plan, pass overwrite=True, or write to another directory"
        )
    return last


def _short(value: Any, other: Any = None) -> str:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return shown(value, other)
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:120]} … {text[-60:]}"
