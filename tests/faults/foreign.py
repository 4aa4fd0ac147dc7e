"""Folders of the user's: whatever their files are called, a command refuses and leaves every byte as it was."""

import os
from pathlib import Path

from tests.faults.commands import Case
from tests.faults.results import Result, Task
from tests.faults.world import World, differing, remove, tree

NAMES = (
    "run.json config.yaml config.partial index.h5 shard-00000.h5 shard-00007.h5 partial-00000.h5 factors.h5 kfac.h5 "
    "best.h5 run.h5 state.h5 segment-00000.h5 visits-0.h5 scratch-0.bin training.json .x.partial .run.json.0.partial "
    "about.json .lock "
    "eigenvalues/ faiss/ chains-0-2/ chains-0-4/ chains-final-v2/ epoch-0/ sum/ query/ corpus/ scores/ mix/ index/ "
    "checkpoint0-rows/ hessian/"
)
FILES = [name for name in NAMES.split() if not name.endswith("/")]
FOLDERS = [name.removesuffix("/") for name in NAMES.split() if name.endswith("/")]
BYTES = b"these are the user's own bytes\n"


def folder_of(what: str, at: Path) -> None:
    """Make one of the user's folders.

    Args:
        what: `files` and `folders` have every name that the library uses, `links` has them as links to things outside,
            any other is a name that lies there alone.
        at: the folder.
    """
    outside = at.parent / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(BYTES)
    (outside / "folder" / "shard-00000.h5").write_bytes(BYTES)
    at.mkdir()
    link = what.startswith("link ")
    names = {"files": FILES, "folders": FOLDERS, "links": (*FILES, *FOLDERS)}.get(what, (what.removeprefix("link "),))
    for name in names:
        if what == "links" or link:
            (at / name).symlink_to(outside / ("folder" if name in FOLDERS else "file"))
        elif name in FOLDERS:
            (at / name).mkdir()
            for inner in ("notes.txt", "shard-00000.h5", "state.h5", "factors.h5"):
                (at / name / inner).write_bytes(BYTES)
        else:
            (at / name).write_bytes(BYTES)


def variants() -> list[str]:
    """Return the names of all of the user's folders."""
    return ["files", "folders", "links", *FILES, *FOLDERS, "link .lock", "link config.yaml", "link chains-0-2"]


def tasks(case: Case, chosen: list[str]) -> list[Task]:
    """Return a command's tasks: each folder, without and with `--overwrite`."""
    if not case.over or not case.directory:
        return []
    return [Task("foreign", case.name, what + flag) for what in chosen for flag in ("", "+")]


def run(world: World, task: Task) -> Result:
    """Run a command in one of the user's folders."""
    case, what = world.cases()[task.case], task.what.removesuffix("+")
    more = ["--overwrite"] if task.what.endswith("+") else []
    folder = world.fresh()
    try:
        folder_of(what, folder / "run")
        before = _all(folder)
        ended = world.do(case.call(*more), folder)
        after = _all(folder)
    finally:
        remove(folder)
    gone = [name for name in differing(after, before) if name in before]
    if gone:
        return Result(task, case.protocol, "changed", f"{gone[:6]}; {ended.brief()}")
    if ended.fault:
        return Result(task, case.protocol, ended.fault, ended.brief())
    if not ended.refused or after != before:
        return Result(task, case.protocol, "mixed", f"it wrote beside the user's: {ended.brief()}")
    named = "run" in ended.complained
    return Result(task, case.protocol, "refused" if named else "unclear", ended.brief())


def _all(folder: Path) -> dict[str, str]:
    """Return what lies there, locks too, with the times at which files were changed."""
    found = tree(folder)
    for path in folder.rglob(".lock"):
        name = str(path.relative_to(folder))
        found[name] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else "folder"
        )
    return found
