"""What the faults happen to: a tiny world, every command that writes, and what can be read of what it wrote.

Every command runs in a fresh folder and writes to `run` in it, by that relative name: so two runs of the same work are
the same bytes, wherever the folder is, and nothing has to be normalised.
"""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.forks import Ended, Kill, forked, refusing

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
    "matplotlib.figure",
    "influence.cli",
    "influence.train",
    "influence.viz",
)
"""What children would import each for itself."""
UNCOMPARED = (".lock",)
"""Files of a run directory that say who is at it, and nothing of the work."""


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        name: its name.
        protocol: which way of writing to a disk it is an instance of.
        work: what it does in its folder: what is typed after `influence`, or a function of Python.
        given: finished runs that lie in the folder before it starts, by the name there.
        needs: finished runs elsewhere, which it reads.
        every: whether each of its file events is killed; otherwise a seeded thirty.
        over: whether `--overwrite` is a flag of it.
    """

    name: str
    protocol: str
    work: list[str] | Callable[[], Any]
    given: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    every: bool = False
    over: bool = True

    def call(self, more: list[str] | None = None) -> Callable[[], Any]:
        """Return what a child does."""
        if callable(self.work):
            return refusing(self.work)
        typed = [*self.work, *(more or [])]

        def run() -> int:
            from influence.cli import main

            return main(typed)

        return run


class World:
    """A model, a corpus, questions, and finished runs that commands read, made once."""

    def __init__(self, root: Path) -> None:
        """Make model and data in a directory; runs are made when they are first asked for."""
        from notebooks.make_corpus import make

        self.root = root.resolve()
        make(self.root, DOCUMENTS, steps=0, hidden=16, layers=1, double=True)
        rows = (self.root / "corpus.jsonl").read_text().splitlines()
        (self.root / "more.jsonl").write_text("\n".join(rows[:9]) + "\n")
        (self.root / "work").mkdir()
        self._numbers = iter(range(1 << 30))
        for name in IMPORTS:
            importlib.import_module(name)

    def fresh(self) -> Path:
        """Return a new folder."""
        folder = self.root / "work" / f"{os.getpid()}-{next(self._numbers)}" / "at"
        folder.mkdir(parents=True)
        return folder

    def folder_for(self, case: Case) -> Path:
        """Return a new folder with what a case is given."""
        folder = self.fresh()
        for name, made in case.given.items():
            shutil.copytree(self.made(made) / "run", folder / name, symlinks=True)
        return folder

    def prepare(self, case: Case) -> None:
        """Make every run that a case reads or is given."""
        for name in (*case.given.values(), *case.needs):
            self.made(name)

    def made(self, name: str) -> Path:
        """Return the folder of a finished run, made if it is not there."""
        place = self.root / "made" / name
        if not place.exists():
            case = self.cases()[name]
            self.prepare(case)
            folder = self.folder_for(case)
            ended = self.do(case.call(), folder, Kill())
            if ended.status != 0:
                raise RuntimeError(f"the run {name!r} that others need failed: {ended.said}")
            place.parent.mkdir(exist_ok=True)
            folder.rename(place)
        return place

    def do(self, work: Callable[[], Any], folder: Path, kill: Kill | None = None, **limits: Any) -> Ended:
        """Do something in a child and wait for it."""
        return forked(lambda: (settle(), work())[1], folder, kill, **limits).wait()

    def cases(self) -> dict[str, Case]:
        """Return every command that writes, by name."""
        return {case.name: case for case in _cases(self.root)}


def remove(folder: Path) -> None:
    """Remove a folder that `fresh` gave."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def settle() -> None:
    """Make a child's work the same every time, and its running states be written after each shard."""
    from types import SimpleNamespace

    from influence.index import starting
    from influence.pipelines import collect

    collect.SAVE_EVERY = 0.0
    if hasattr(starting, "secrets"):  # a run's stamp was random once
        starting.secrets = SimpleNamespace(token_hex=lambda size: "0" * 2 * size)


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
    from influence.pipelines.ends import read_best

    found = {}
    for path in [folder, *sorted(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
        ways = {"index.h5": open_index, "best.h5": read_best, "run.h5": sgmcmc.load}
        ways |= {"factors.h5": lambda at: hessians.load(at / "factors.h5")}
        for name, read in ways.items():
            if (path / name).exists():
                where = str((path / name).relative_to(folder))
                found[where] = _answer(lambda read=read, path=path: read(path))
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".npy", ".csv", ".safetensors", ".parquet", ".html") and not path.name.startswith("."):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _answer(read: Callable[[], Any]) -> str:
    from influence.cli import paragraph

    try:
        return said(read())
    except Exception as error:
        text = paragraph(error)
        return f"broken: {text}" if text.startswith("unexpected ") else f"refused: {text}"


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


def _cases(root: Path) -> list[Case]:
    model, corpus, questions = (str(root / name) for name in ("model", "corpus.jsonl", "questions.jsonl"))
    mean = str(root / "made/reduce/run")
    of_model = ["--model", model, "--token-budget", "256", "--dtype", "float64", "--progress", "False"]
    small = [*of_model, "--dataset", corpus, "--run", "run", "--shard-size", "8"]
    asked = [*of_model, "--dataset", questions, "--run", "run", "--shard-size", "2"]
    rows = ["--projection-dim", "4"]
    chains = ["--model", model, "--dataset", corpus, "--run", "run", "--progress", "False", "--num-draws", "8"]
    chains += ["--num-burnin-steps", "2", "--batch-size", "4", "--num-chains", "2", "--localization", "1000"]
    chains += ["--checkpoint-every", "3"]
    watched = ["--observables", f"questions={questions}", "data", "--observed", "4"]
    fits = {
        method: Case(f"hessian {method}", "factors", ["hessian", *small, "--method", method])
        for method in ("kfac", "ekfac", "tkfac", "shampoo")
    }
    return [
        Case("build", "index", ["build", *small, *rows], every=True),
        Case("append", "index", ["build", *small, *rows, "--append", "--dataset", str(root / "more.jsonl")],
             {"run": "build"}, every=True, over=False),
        Case("build over", "index", ["build", *small, *rows, "--overwrite"], {"run": "reduce"}, every=True, over=False),
        Case("reduce", "index", ["reduce", *asked, *rows]),
        Case("score", "scores", ["score", *small, *rows, "--query", mean], needs=("reduce",), every=True),
        Case("score top", "scores", ["score", *small, *rows, "--query", mean, "--top-k", "3"], needs=("reduce",),
             every=True),
        Case("hessian kfac", "factors", fits["kfac"].work, every=True),
        Case("hessian ekfac", "factors", fits["ekfac"].work, every=True),
        Case("hessian tkfac", "factors", fits["tkfac"].work),
        Case("hessian shampoo", "factors", fits["shampoo"].work),
        Case("hessian autocorrelation", "factors", ["hessian", *small, *rows, "--method", "autocorrelation"]),
        Case("sample", "chains", ["sample", *chains, *watched], every=True),
        Case("sample over", "chains", ["sample", *chains, "--overwrite"], {"run": "sample"}, every=True, over=False),
        Case("llc", "chains", ["llc", *chains]),
    ]  # fmt: skip
