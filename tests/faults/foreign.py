"""Folders of the user's: whatever their files are called, a command refuses and leaves every byte as it was."""

import os
import shutil
from pathlib import Path

from tests.faults.commands import Case
from tests.faults.results import Result, Task
from tests.faults.world import TRAINER, World, differing, remove, tree

NAMES = (
    "run.json config.yaml config.partial index.h5 shard-00000.h5 shard-00007.h5 partial-00000.h5 factors.h5 kfac.h5 "
    "best.h5 run.h5 state.h5 segment-00000.h5 order-0.jsonl rows-0-0.bin ended.log .x.partial .run.json.0.partial "
    "about.json eigenvalues-00000.h5 .lock "
    "eigenvalues/ faiss/ chains-0-2/ chains-0-4/ chains-final-v2/ epoch-0/ sum/ query/ corpus/ scores/ mix/ index/ "
    "checkpoint0-rows/ hessian/"
)
FILES = [name for name in NAMES.split() if not name.endswith("/")]
FOLDERS = [name.removesuffix("/") for name in NAMES.split() if name.endswith("/")]
BYTES = b"these are the user's own bytes\n"


def folder_of(what: str, at: Path) -> None:
    """Put the user's own into a folder, where nothing of their names is.

    Args:
        what: `files` and `folders` have every name that the library uses, `links` has them as links to things outside,
            any other is a name that lies there alone.
        at: the folder.
    """
    outside = at.parent / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(BYTES)
    (outside / "folder" / "shard-00000.h5").write_bytes(BYTES)
    at.mkdir(exist_ok=True)
    many = {"files": [*FILES, "notes.txt"], "folders": FOLDERS, "links": [*FILES, *FOLDERS]}
    for name in many.get(what, [what.removeprefix("link ")]):
        path = at / name
        if path.exists():
            continue
        if what.startswith("link"):
            path.symlink_to(outside / ("folder" if name in FOLDERS else "file"))
        elif name in FOLDERS:
            path.mkdir()
            for inner in ("notes.txt", "shard-00000.h5", "state.h5", "factors.h5"):
                (path / inner).write_bytes(BYTES)
        else:
            path.write_bytes(BYTES)


def variants() -> list[str]:
    """Return the names of all of the user's folders."""
    return ["files", "folders", "links", *FILES, *FOLDERS, "link .lock", "link config.yaml", "link chains-0-2"]


def tasks(case: Case, chosen: list[str]) -> list[Task]:
    """Return a command's tasks: each folder, without and with `--overwrite`; and a finished run with more in it."""
    if case.given or not case.directory:
        return []
    empty = [what + flag for what in chosen for flag in (("", "+") if case.over else ("",))]
    added = [f"{what} in a run" for what in ("files", "folders", "links") if what in chosen and case.over]
    return [Task("foreign", case.name, what) for what in empty + added]


def run(world: World, task: Task) -> Result:
    """Run a command in one of the user's folders."""
    if task.what.endswith(" in a run"):
        return _added(world, task)
    case, what = world.cases()[task.case], task.what.removesuffix("+")
    more = ["--overwrite"] if task.what.endswith("+") else []
    folder = world.fresh()
    try:
        folder_of(what, folder / case.writes)
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
    named = case.writes in ended.complained
    return Result(task, case.protocol, "refused" if named else "unclear", ended.brief())


def _added(world: World, task: Task) -> Result:
    """Overwrite a finished run to which the user added files: they stay, and are named."""
    case = world.cases()[task.case]
    folder = world.fresh()
    try:
        shutil.copytree(world.made(case.name), folder / "run")
        own = tree(folder)
        folder_of(task.what.removesuffix(" in a run"), folder / "run")
        before = _all(folder)
        ended = world.do(case.call("--overwrite"), folder)
        after = _all(folder)
    finally:
        remove(folder)
    mine = [name for name in before if name not in own and not name.endswith("run/.lock")]
    changed = [name for name in mine if before[name] != after.get(name)]
    if changed:
        return Result(task, case.protocol, "changed", f"{changed[:6]}; {ended.brief()}")
    if ended.fault:
        return Result(task, case.protocol, ended.fault, ended.brief())
    if other := differing({name: it for name, it in after.items() if name in own}, own) if ended.status == 0 else []:
        return Result(task, case.protocol, "lost", f"{other[:6]}; {ended.brief()}")
    tops = {name.split("/")[1] for name in mine if name.startswith("run/")}
    unnamed = sorted(name for name in tops if name not in ended.said)
    if unnamed and (ended.status == 0 or len(unnamed) == len(tops)):  # a refusal may name the first in its way
        return Result(task, case.protocol, "unclear", f"left, and not named: {unnamed[:6]}; {ended.brief()}")
    return Result(task, case.protocol, "refused" if ended.refused else "same", ended.brief())


def _all(folder: Path) -> dict[str, str]:
    """Return what lies there, locks too, but for what a Trainer writes."""
    found = {name: it for name, it in tree(folder).items() if Path(name).parts[0] != TRAINER}
    for path in folder.rglob(".lock"):
        name = str(path.relative_to(folder))
        found[name] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else "folder"
        )
    return found
