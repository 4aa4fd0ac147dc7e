"""Run directories: one protocol for all of them.

A run directory holds a manifest, `run.json`, which is written before everything else and says what the run is, its id,
and the names of the files that it may hold. Every file of a run carries the id, which is a hash of what the run is: two
runs of the same work have the same, any others do not, so files cannot be mixed. A directory that is not empty and
holds no manifest of ours is never written to, and only what a manifest names is ever removed.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from influence.func.fingerprint import fingerprint as hash_of
from influence.store.growing import beginning
from influence.store.hdf5 import any_head, parsed
from influence.store.lock import LOCK, Lock, is_lock
from influence.store.replacing import TEMPORARY, sync, temporaries, write_text
from influence.store.schema import BadFileError, conform, refuse_version

RUN = "run.json"
FORMAT: Literal["influence run"] = "influence run"
SCHEMA = 1
SUM = "sha256"
"""The field with the checksum of all others."""


class Manifest(NamedTuple):
    """What run.json says.

    Attributes:
        format: that it is a run of ours.
        schema: version of the layout.
        id: the run's id: every file of it carries it.
        kind: what the run holds.
        command: what to type to make it again.
        config: the configuration.
        plan: what is done, and what decides the result.
        fingerprint: what the rows are.
        files: names of what the run may hold. `#` stands for a number, and such a file is the run's if it carries the
            id; a name that ends in `/` is a folder of runs.
        scratch: names of the same kind, of what is removed when the run is finished.
        appended: command, configuration, records and id of every append.
    """

    format: Literal["influence run"]
    schema: int
    id: str
    kind: str
    command: list[str]
    config: dict[str, Any]
    plan: dict[str, Any]
    fingerprint: dict[str, Any]
    files: list[str]
    scratch: list[str]
    appended: list[dict[str, Any]]

    @property
    def ids(self) -> list[str]:
        """The ids that files of the run may carry: its own, and those of what was appended."""
        return [self.id, *(str(change["id"]) for change in self.appended)]


def manifest_of(
    kind: str,
    config: Mapping[str, Any],
    command: Sequence[str],
    plan: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    files: Sequence[str],
    scratch: Sequence[str] = (),
) -> Manifest:
    """Return the manifest of a run; its id is a hash of the kind, the plan and the fingerprint."""
    made, planned, rows = (json.loads(json.dumps(each)) for each in (config, plan, fingerprint))
    known = hash_of([kind, planned, rows])[:32]
    return Manifest(FORMAT, SCHEMA, known, kind, [*command], made, planned, rows, [*files], [*scratch], [])


def read_manifest(directory: str | Path) -> Manifest:
    """Read a directory's manifest.

    Raises:
        FileNotFoundError: if there is none.
        BadFileError: if it is damaged, no manifest of ours, or of another schema.
    """
    path = Path(directory) / RUN
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {directory}: it has no {RUN}")
    text = path.read_bytes()
    try:
        held = parsed(text, path)
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path} is damaged: it is no text ({error})") from error
    if not text.endswith(b"}\n"):
        raise BadFileError(f"{path} is damaged: its end is cut off or changed")
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise BadFileError(f"{path} is no manifest of a run of influence")
    refuse_version(path, held.get("schema"), SCHEMA)
    said = held.pop(SUM, None)
    manifest = conform(held, Manifest, str(path))
    try:
        digest = hash_of(held)
    except RecursionError as error:
        raise BadFileError(f"{path} is damaged: it is nested too deeply") from error
    if digest != said:
        raise BadFileError(
            f"{path} is damaged, or was edited: its checksum differs. Restore it; settings are changed on the command "
            "line or in a copy of config.yaml"
        )
    if not all(isinstance(change.get("id"), str) for change in manifest.appended):
        raise BadFileError(f"{path} is not what it says: an entry of appended has no id")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a directory's manifest, atomically."""
    held = manifest._asdict()
    text = json.dumps({**held, SUM: hash_of(held)}, indent=1) + "\n"
    write_text(directory / RUN, text, manifest.id)


def take(directory: str | Path, wanted: Manifest, overwrite: bool = False) -> tuple[Lock, Manifest | None]:
    """Take the lock on a run's directory, which is made if it is not there, and remove what dead writers left in it.

    Args:
        directory: the run.
        wanted: what shall be there.
        overwrite: remove the run that is there: the files that its manifest names, no others.

    Returns:
        The lock, and the manifest that is there; `None` where there is none, so that `wanted` was written.

    Raises:
        NotADirectoryError: if a file is there.
        FileExistsError: if something else is there.
        BlockingIOError: if another writer is at it.
        BadFileError: if the manifest is damaged.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, and a run is a directory: write to another place")
    refuse_foreign(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory)
    try:
        refuse_foreign(directory)  # another may have begun since
        there = read_manifest(directory) if (directory / RUN).exists() else None
        for path in temporaries(directory, [*wanted.ids, *(there.ids if there else ())]):
            path.unlink()
        if there is not None and not overwrite:
            return lock, there
        if there is not None:
            _replace(directory, there, wanted)
        write_manifest(directory, wanted)
        return lock, None
    except BaseException:
        lock.release()
        raise


def refuse_foreign(directory: str | Path) -> None:
    """Refuse a directory that holds something and no run of ours, whatever it is called.

    Raises:
        FileExistsError: naming what is there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return
    if (directory / RUN).exists() or (directory / RUN).is_symlink():
        _refuse_other_manifest(directory / RUN)
        return
    foreign = sorted(path.name for path in directory.iterdir() if not _left_by_a_start(path))
    if foreign:
        raise FileExistsError(
            f"{directory} holds {', '.join(foreign[:3])}{'…' if len(foreign) > 3 else ''} and no run: write to "
            "another directory"
        )


def clear(directory: Path, there: Manifest, names: Sequence[str] | None = None) -> None:
    """Remove files of a run in the manifest's order, which begins with the result; manifest and lock stay.

    Args:
        directory: the run.
        there: its manifest.
        names: some of the manifest's names; default all.

    Raises:
        FileExistsError: if a folder of the run holds something else; nothing was removed.
    """
    mine = owned(directory, there, names)
    for folder in [path for path in mine if path.is_dir()]:
        _refuse_nested(folder, directory)
    for path in mine:
        if path.is_dir():
            _remove_nested(path)
        else:
            path.unlink()
    sync(directory)


def discard(folder: Path) -> None:
    """Remove a folder that is a run of ours, or holds nothing but such.

    Raises:
        FileExistsError: if it holds something else; nothing was removed.
    """
    _refuse_nested(folder, folder)
    _remove_nested(folder)


def tidy(directory: Path, there: Manifest) -> None:
    """Remove what a finished run needs no more: its scratch, and the temporary files of killed writers."""
    clear(directory, there, there.scratch)
    for path in temporaries(directory, there.ids):
        path.unlink()


def run_id(directory: str | Path) -> str | None:
    """Return the id that files of a directory should carry; `None` where it is no run."""
    return read_manifest(directory).id if (Path(directory) / RUN).exists() else None


def owned(directory: Path, there: Manifest, names: Sequence[str] | None = None) -> list[Path]:
    """Return what of a directory is a run's: named by its manifest, and with its id where a name has a number.

    Args:
        directory: the run.
        there: its manifest.
        names: some of the manifest's names; default all.
    """
    names = [*there.files, *there.scratch] if names is None else names
    held = sorted(directory.iterdir())
    return [path for name in names for path in held if _is_named(path, name) and _is_of(path, name, there)]


def _replace(directory: Path, there: Manifest, wanted: Manifest) -> None:
    """Make room for another run, and name what is not of the one that was there.

    Raises:
        FileExistsError: if something that is not the run's stands where the new one will write; nothing was removed.
    """
    mine = {*owned(directory, there), directory / RUN, directory / LOCK}
    others = [path for path in sorted(directory.iterdir()) if path not in mine]
    in_the_way = [path for path in others if any(_is_named(path, name) for name in (*wanted.files, *wanted.scratch))]
    if in_the_way:
        raise FileExistsError(
            f"{in_the_way[0]} is not of the run in {directory}, or damaged, and stands where this run writes: move it "
            "away, or write to another directory; nothing was removed"
        )
    clear(directory, there)
    if others:
        listed = ", ".join(path.name for path in others[:5]) + ("…" if len(others) > 5 else "")
        warnings.warn(f"left in {directory}, since the run did not write it: {listed}", stacklevel=4)


def _refuse_other_manifest(path: Path) -> None:
    try:
        held = None if path.is_symlink() else json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        held = {"format": FORMAT} if FORMAT.encode() in path.read_bytes() else None  # ours, and damaged: read says so
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise FileExistsError(
            f"{path.parent} holds {path.name}, which is no manifest of a run of influence: write to another directory"
        )


def _left_by_a_start(path: Path) -> bool:
    """Whether a start that was killed leaves such a file: a lock, or the temporary file of a manifest."""
    if path.name == LOCK:
        return is_lock(path.parent.resolve() / LOCK)
    match = TEMPORARY.fullmatch(path.name)
    return match is not None and match["name"] == RUN and path.is_file() and not path.is_symlink()


def _is_named(path: Path, name: str) -> bool:
    """Whether a path's name is one of a manifest's."""
    return re.fullmatch(re.escape(name.rstrip("/")).replace(r"\#", r"\d+"), path.name) is not None


def _is_of(path: Path, name: str, there: Manifest) -> bool:
    """Whether what has a name of a manifest's is the run's own."""
    if path.is_symlink():
        return False
    if name.endswith("/"):
        return path.is_dir()
    if not path.is_file():
        return False
    if "#" not in name:
        return True
    return _run_of(path) in there.ids


def _run_of(path: Path) -> str | None:
    """Return the id of the run that a file says it belongs to."""
    for said in (lambda: any_head(path).run, lambda: beginning(path)[0].run):
        try:
            return said()
        except BadFileError:
            continue
    return None


def _foreign(folder: Path) -> Iterator[Path]:
    """Yield what in a folder of a run is of no run."""
    if (folder / RUN).exists():
        there = read_manifest(folder)
        mine = {*owned(folder, there), folder / RUN, folder / LOCK, *temporaries(folder, there.ids)}
        yield from (path for path in sorted(folder.iterdir()) if path not in mine)
        folders = [path for path in mine if path.is_dir()]
    else:
        yield from (path for path in sorted(folder.iterdir()) if path.is_symlink() or not _may_be_run(path))
        inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
        folders = [path for path in inside if not TEMPORARY.fullmatch(path.name)]
    for inner in folders:
        yield from _foreign(inner)


def _refuse_nested(folder: Path, run: Path) -> None:
    """Refuse to remove a folder in which something is of no run."""
    foreign = next(_foreign(folder), None)
    if foreign is not None:
        raise FileExistsError(
            f"{foreign} is not of the run in {run}, or damaged: move it away, or write to another directory; nothing "
            "was removed"
        )


def _may_be_run(path: Path) -> bool:
    return path.is_dir() or _left_by_a_start(path)


def _remove_nested(folder: Path) -> None:
    """Remove a run's folder of runs, of which `_foreign` finds nothing."""
    if (folder / RUN).exists():
        there = read_manifest(folder)
        clear(folder, there)
        for path in temporaries(folder, there.ids):
            path.unlink()
        (folder / RUN).unlink()
    for inner in sorted(folder.iterdir()):
        if inner.is_dir():
            _remove_nested(inner)
        else:
            inner.unlink()
    folder.rmdir()
