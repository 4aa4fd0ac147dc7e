"""Taking a run directory: begun, resumed after anything, grown by appending, never overwritten unless told."""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from influence import store
from influence.func.fingerprint import fingerprint as hash_of
from influence.index.agreement import differences, shown
from influence.index.fingerprints import Fingerprint
from influence.index.lock import LOCK, Lock
from influence.index.run import (
    NEIGHBOURS,
    OURS,
    PARTIALS,
    ROOT,
    RUN,
    SCHEMA,
    SHARDS,
    TEMPORARY,
    Run,
    done,
    read_run,
    rooted,
    what_is_there,
    write_run,
)


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
        overwrite: delete what is there first: files of ours, no others.
        resume: go on with an unfinished run of the same plan and fingerprint.
        append: add shards to a finished index.
        results: other files and folders of the run's, which overwriting deletes too.

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
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, and a run is a directory: write to another place")
    directory.mkdir(parents=True, exist_ok=True)
    _check_ours(directory)
    lock = Lock(directory)
    try:
        for left in directory.glob(TEMPORARY):
            left.unlink()
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "command": list(command),
            "config": dict(config),
            "plan": json.loads(json.dumps(plan)),
            "fingerprint": fingerprint.json(),
        }
        if overwrite:
            _wipe(directory, results)
        if not (directory / RUN).exists():
            if append:
                raise FileNotFoundError(f"there is no index in {directory} to append to: leave append out")
            about["stamp"] = f"{hash_of([kind, about['fingerprint']])[:32]}-{secrets.token_hex(8)}"
            write_run(directory, about)
            return Run(directory, about, 0, _count(about), lock)
        there = read_run(directory)
        _check_same(directory, there, about, fingerprint, append)
        present = rooted(directory)
        if append:
            return _append(directory, there, about, present, lock)
        if present is not None:
            raise FileExistsError(
                f"{what_is_there(directory)}. It is finished: pass overwrite=True to replace it, "
                "append=True to add examples, or write to another directory"
            )
        if not resume and "shards" in there["plan"]:
            raise FileExistsError(
                f"{what_is_there(directory)}. Pass resume=True to go on with it, overwrite=True to "
                "replace it, or write to another directory"
            )
        last = _check_plan(directory, there, about)
        return Run(directory, there, 0, last, lock)
    except BaseException:
        lock.release()
        raise


def _append(directory: Path, there: dict[str, Any], about: dict[str, Any], present: int | None, lock: Lock) -> Run:
    """Grow a finished run's plan, or go on with an append that was cut off."""
    from influence.index.root import finish

    old, new = there["plan"].get("shards", []), about["plan"].get("shards")
    for change, (first, last) in zip(there.get("appended", ()), _segments(there)[1:], strict=True):
        if old[first:last] == new and (present is None or present < last):
            mine, theirs = (each["recorded"].get("data") for each in (about["fingerprint"], change))
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
        mine, theirs = about["plan"].get(key), there["plan"].get(key)
        if mine != theirs:
            raise ValueError(
                f"{directory} has {key} = {_short(theirs)}; appended rows must have it too, got {_short(mine)}"
            )
    for path in directory.glob(SHARDS):
        if int(path.stem.split("-")[1]) >= present:
            path.unlink()
    if new is not None:
        last = max((end for _, end in old), default=0)
        if any(begin < last for begin, _ in new):
            raise ValueError(
                f"{directory} holds rows of the dataset up to {last - 1}: appended shards begin at {last} or later, "
                f"got {_short(new)}"
            )
    plan = {**there["plan"], "shards": old + new} if new is not None else {**there["plan"], "open": True}
    change = {key: about[key] for key in ("command", "config")} | {
        "recorded": about["fingerprint"]["recorded"],
        "first": present,
    }
    grown = {**there, "plan": plan, "appended": [*there.get("appended", ()), change]}
    write_run(directory, grown)
    return Run(directory, grown, present, None if new is None else len(old) + len(new), lock)


def _count(about: Mapping[str, Any]) -> int | None:
    shards = about["plan"].get("shards")
    return None if shards is None else len(shards)


def _segments(about: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the first shard, and the one behind the last, of a run and of every append to it."""
    firsts = [0, *(change["first"] for change in about.get("appended", ()))]
    return list(pairwise([*firsts, _count(about) or 0]))


def _check_same(
    directory: Path, there: dict[str, Any], about: dict[str, Any], fingerprint: Fingerprint, append: bool
) -> None:
    """Refuse a run of another kind or fingerprint; data that are appended may be others."""
    if there["kind"] != about["kind"]:
        raise FileExistsError(
            f"{what_is_there(directory)}. This run is of kind {about['kind']!r}: pass overwrite=True to replace it, or "
            "write to another directory"
        )
    free = ("data",) if append else ()
    now = Fingerprint.from_json(about["fingerprint"], fingerprint.live)
    for name, mine, theirs in differences(now, Fingerprint.from_json(there["fingerprint"]), free):
        verb = "appended rows must be of its kind" if append else "this run cannot go on with it"
        raise ValueError(
            f"{what_is_there(directory)}. Its {name} is {_short(theirs, mine)}, and this run's is "
            f"{_short(mine, theirs)}: {verb}; pass overwrite=True to replace it, or write to another directory"
        )


def _check_plan(directory: Path, there: dict[str, Any], about: dict[str, Any]) -> int:
    """Refuse another plan; return how many shards it has, those of appends apart."""
    if "shards" not in about["plan"]:
        raise FileExistsError(
            f"{what_is_there(directory)}; its shards came as their batches came, so it cannot be resumed: pass "
            "overwrite=True to begin again, or write to another directory"
        )
    last = _segments(there)[0][1]
    planned = {**there["plan"], "shards": there["plan"].get("shards", [])[:last]}
    for name, mine, theirs in _differing(about["plan"], planned):
        raise ValueError(
            f"{what_is_there(directory)}. Its plan has {name} = {_short(theirs)}, and this run's has "
            f"{_short(mine)}: resume with the same plan, pass overwrite=True, or write to another directory"
        )
    return last


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two nestings differ, and both values."""
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differing(mine, theirs, f"{where}{key}.")
        elif mine != theirs:
            yield f"{where}{key}", mine, theirs


def _check_ours(directory: Path) -> None:
    """Refuse a directory that holds something else."""
    ours = {path for pattern in OURS for path in directory.glob(pattern)}
    foreign = sorted(path.name for path in directory.iterdir() if path not in ours)
    begun = ours - {directory / LOCK, *directory.glob(TEMPORARY)}
    if (directory / RUN).exists() or not (foreign or begun):
        return
    names = foreign or sorted(path.name for path in begun)
    raise FileExistsError(
        f"{directory} holds {', '.join(names[:3])}{'…' if len(names) > 3 else ''} and no run: write to "
        "another directory"
    )


def _wipe(directory: Path, results: Sequence[str] = ()) -> None:
    """Delete a run: the root and the results first, so that it never looks finished, and run.json last."""
    for name in (ROOT, NEIGHBOURS, *results):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        else:
            (directory / name).unlink(missing_ok=True)
    for pattern in (SHARDS, PARTIALS, RUN):
        for path in directory.glob(pattern):
            path.unlink()
    store.sync(directory)


def _short(value: Any, other: Any = None) -> str:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return shown(value, other)
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:120]} … {text[-60:]}"
