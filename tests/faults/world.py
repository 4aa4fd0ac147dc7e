"""What the faults happen to: a tiny world, every command that writes, and what can be read of what it wrote.

Every command runs in a fresh folder and writes to `run` in it, by that relative name: so two runs of the same work are
the same bytes, wherever the folder is, and nothing has to be normalised.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import influence
from tests.faults.commands import Case, commands, inputs
from tests.faults.forks import COUNT, Child, Ended, Kill, forked

DOCUMENTS = 25
IMPORTS = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.trainer",
    "datasets",
    "pyarrow.json",
    "pyarrow.parquet",
    "h5py",
    "faiss",
    "safetensors.torch",
    "tyro",
    "yaml",
    "beartype.door",
    "matplotlib.figure",
)
"""What children would import each for itself, beside all of the library."""
UNCOMPARED = (".lock",)
"""Files of a run directory that say who is at it, and nothing of the work."""


class Given(Protocol):
    """What is given finished runs."""

    @property
    def given(self) -> Mapping[str, str]: ...


TRAINER = "trainer"
"""Where a Trainer keeps its checkpoints."""


class World:
    """A model, a corpus, questions, and finished runs that commands read, made once."""

    def __init__(self, root: Path) -> None:
        """Make model and data in a directory; runs are made when they are first asked for.

        All is done by children, so that no thread is running here when others are forked.
        """
        from notebooks.make_corpus import make

        self.root = root.resolve()
        self.mutation: Callable[[], None] | None = None
        self._numbers = iter(range(1 << 30))
        ours = (module.name for module in pkgutil.walk_packages(influence.__path__, "influence."))
        for name in (*IMPORTS, *(name for name in ours if not name.endswith("__main__"))):
            importlib.import_module(name)
        making = forked(lambda: make(self.root, DOCUMENTS, steps=0, hidden=16, layers=1, double=True) and 0, self.root)
        if making.wait().status != 0:
            raise RuntimeError("the world could not be made")
        rows = (self.root / "corpus.jsonl").read_text().splitlines()
        (self.root / "more.jsonl").write_text("\n".join(rows[:9]) + "\n")
        (self.root / "gold.jsonl").write_text('{"gold": [2, 4]}\n')
        (self.root / "reverse.jsonl").write_text("\n".join(reversed(rows)) + "\n")

    def fresh(self) -> Path:
        """Return a new folder."""
        folder = self.root / "work" / f"{os.getpid()}-{next(self._numbers)}" / "at"
        folder.mkdir(parents=True)
        return folder

    def folder_for(self, case: Given) -> Path:
        """Return a new folder with what a case is given."""
        folder = self.fresh()
        for name, made in case.given.items():
            place = self.made(made)
            shutil.copytree(place, folder / name, symlinks=True)
            if (place.parent / TRAINER).is_dir() and place.name != TRAINER:  # what a training goes on from
                shutil.copytree(place.parent / TRAINER, folder / TRAINER)
        return folder

    def prepare(self, case: Given) -> None:
        """Make every run that a case reads or is given."""
        for name in (*case.given.values(), *getattr(case, "needs", ())):
            self.made(name)

    def made(self, name: str) -> Path:
        """Return a finished run, or one that was killed at an event, the last such: `build at rename shard-00002.h5`.

        It is made if it is not there.
        """
        whole, _, file = name.partition(" at ")
        case, place = (self.cases() | inputs(self.root))[whole], self.root / "made" / name
        if not place.exists():
            self.prepare(case)
            folder = self.folder_for(case)
            ended = self.do(case.call(), folder)
            if ended.status != 0:
                raise RuntimeError(f"the run {whole!r} that others need failed: {ended.said}")
            if file:
                what, file = file.split()
                there = [n for n, event in enumerate(ended.events, 1) if f" {what} " in event and event.endswith(file)]
                if not there:
                    raise RuntimeError(f"{whole!r} never comes to {name}")
                folder = self.folder_for(case)
                self.do(case.call(), folder, Kill(there[-1]))
            place.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(place)
        return place / case.writes

    def start(self, work: Callable[[], Any], folder: Path, kill: Kill = COUNT, **limits: Any) -> Child:
        """Do something in a child."""

        def settled() -> Any:
            settle()
            if self.mutation is not None:
                self.mutation()
            return work()

        return forked(settled, folder, kill, **limits)

    def do(self, work: Callable[[], Any], folder: Path, kill: Kill = COUNT, **limits: Any) -> Ended:
        """Do something in a child and wait for it."""
        return self.start(work, folder, kill, **limits).wait()

    def cases(self) -> dict[str, Case]:
        """Return every command that writes, by name."""
        return {case.name: case for case in commands(self.root)}


def remove(folder: Path) -> None:
    """Remove a folder that `fresh` gave."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def settle() -> None:
    """Have a child write its running states after each shard, and not every half minute."""
    from influence.pipelines.passes import collect

    collect.SAVE_EVERY = 0.0


def tree(folder: Path) -> dict[str, str]:
    """Return what lies under a folder: of every file the hash of its bytes, and of other things what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.name not in UNCOMPARED:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Return the names that are in one tree alone, or differ."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def answers(folder: Path) -> dict[str, str]:
    """Return what every run under a folder says to who opens it: a hash, or that it was refused and why.

    A refusal is told from an error that nobody foresaw, which is `broken: …`.
    """
    from influence import hessians, sgmcmc
    from influence.index import open_index
    from influence.pipelines.passes.best import read_best

    found = {}
    for path in [folder, *(path for path in _ours(folder) if path.is_dir() and not path.is_symlink())]:
        ways = {"index.h5": open_index, "best.h5": read_best, "run.h5": sgmcmc.load}
        ways |= {"factors.h5": lambda at: hessians.load(at / "factors.h5")}
        for name, read in ways.items():
            if (path / name).exists():
                where = str((path / name).relative_to(folder))
                found[where] = _answer(lambda read=read, path=path: read(path))
        if (path / "run.json").exists():
            found[f"inspect {path.relative_to(folder)}"] = _answer(lambda path=path: inspected(path))
    for path in _ours(folder):
        if path.suffix in (".npy", ".csv", ".safetensors", ".parquet", ".html") and not path.name.startswith("."):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _ours(folder: Path) -> list[Path]:
    """Return what lies under a folder, but for a Trainer's own."""
    return [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] != TRAINER]


def _answer(read: Callable[[], Any]) -> str:
    from influence.cli import paragraph

    try:
        return said(read())
    except Exception as error:
        text = paragraph(error)
        return f"broken: {text}" if text.startswith("unexpected ") else f"refused: {text}"


def inspected(path: Path) -> str:
    """Return that a run can be looked at, whatever state it is in."""
    from influence.pipelines import inspect

    inspect.run(inspect.InspectConfig(str(path)))
    return "seen"


def said(value: Any) -> str:
    """Return a hash of everything that an index, factors, chains or scores hold."""
    from influence.func.fingerprint import fingerprint
    from influence.hessians import Factors
    from influence.index import Index

    if isinstance(value, Index):
        value.verify()
        known = {"rows": value.rows(), "index": value.index, "loss": value.loss, "length": value.length}
        return fingerprint({**known, "about": json.dumps(value.fingerprint.json(), sort_keys=True)})
    if isinstance(value, Factors):
        return value.digest
    return fingerprint(_plain(value))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
