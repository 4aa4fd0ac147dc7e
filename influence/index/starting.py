"""Taking a run directory: begun, resumed after anything, grown by appending, never overwritten unless told."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from influence.func.fingerprint import differences
from influence.func.fingerprint import fingerprint as hash_of
from influence.index.provenance import Fingerprint, all_differences, shown
from influence.index.run import (
    FILES,
    PARTIALS,
    SHARDS,
    Run,
    done,
    number_of,
    planned_shards,
    rooted,
    what_is_there,
)
from influence.store import Lock
from influence.store.folder import RUN, Manifest, manifest_of, owned, take, tidy, write_manifest


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
    from influence.index.root import finish

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
