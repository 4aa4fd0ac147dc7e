"""Every mistake on the command line and what it says: `python -m tests.messages cli` prints them, typed for real."""

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from influence import store
from influence.cli import main
from influence.store.lock import HELD, Lock
from notebooks.make_corpus import make

DOCUMENTS = 25


class Mistake(NamedTuple):
    """One mistake: what it is, how it is typed, and the words that its message must hold.

    Attributes:
        name: the mistake.
        typed: from the folder that `prepare` made to what is typed; it may damage a copy of a run first.
        words: parts of the message.
        status: the exit status.
    """

    name: str
    typed: Callable[[Path], list[object]]
    words: tuple[str, ...]
    status: int = 1


def prepare(folder: Path) -> None:
    """Make a model, a corpus, and runs of them."""
    make(folder, DOCUMENTS, steps=0, hidden=16, layers=1)
    (folder / "short.jsonl").write_text('{"text": "babo"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"text": "babo " * 400}) + "\n")
    shutil.copytree(folder / "model", folder / "other")
    from influence.models import load

    model = load(folder / "other")
    next(iter(model.parameters())).data.mul_(2)
    model.save_pretrained(folder / "other")
    for flags in (
        command(folder, "build", "corpus"),
        command(folder, "reduce", "mean"),
        command(folder, "score", "scores", "--query", folder / "mean"),
        command(folder, "hessian", "factors", "--method", "autocorrelation"),
    ):
        assert main(list(map(str, flags))) == 0


def command(folder: Path, name: str, run: str, *more: object, data: str = "corpus.jsonl") -> list[object]:
    made = [name, folder / run, "--model", folder / "model", "--dataset", folder / data]
    return [*made, "--shard-size", 8, "--projection-dim", 4, *more]


def build(*more: object, run: str = "new", data: str = "corpus.jsonl") -> Callable[[Path], list[object]]:
    return lambda folder: command(folder, "build", run, *more, data=data)


def score(*more: object, query: str = "mean") -> Callable[[Path], list[object]]:
    return lambda folder: command(folder, "score", "new", "--query", folder / query, *more)


def ask(*more: object, index: str = "corpus", text: str = "babo lives in") -> Callable[[Path], list[object]]:
    return lambda folder: ["query", folder / index, "--text", text, *more]


def instead(typed: Callable[[Path], list[object]], flag: str, value: str) -> Callable[[Path], list[object]]:
    def changed(folder: Path) -> list[object]:
        flags = typed(folder)
        flags[flags.index(flag) + 1] = value.format(folder=folder)
        return flags

    return changed


def damaged(how: Callable[[Path], None], typed: Callable[[Path], list[object]]) -> Callable[[Path], list[object]]:
    """Damage a copy of the index, which is then called `damaged`."""

    def made(folder: Path) -> list[object]:
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(folder / "corpus", folder / "damaged")
        how(folder / "damaged")
        return typed(folder)

    return made


def flip(run: Path) -> None:
    shard = run / "shard-00002.h5"
    whole = bytearray(shard.read_bytes())
    whole[store.locate(shard)["rows"].offset + 5] ^= 1
    shard.write_bytes(whole)


def cut_off(run: Path) -> None:
    shard = run / "shard-00002.h5"
    shard.write_bytes(shard.read_bytes()[:-7])


def lose(run: Path) -> None:
    (run / "shard-00002.h5").unlink()


def unfinish(run: Path) -> None:
    (run / "index.h5").unlink()


def file_in_the_way(folder: Path) -> list[object]:
    (folder / "a-file").write_text("")
    return build(run="a-file")(folder)


def folder_of_mine(folder: Path) -> list[object]:
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "notes.txt").write_text("mine")
    return build("--overwrite", run="mine")(folder)


def bad_yaml(folder: Path) -> list[object]:
    (folder / "bad.yaml").write_text("run: a\nmodel: {model: m}\ndata: {dataset: d, colour: red}\n")
    return ["build", "--config", folder / "bad.yaml"]


MISTAKES = [
    Mistake("no such command", lambda folder: ["bild"], ("no such command", "build, reduce"), 2),
    Mistake("no such option", build("--projektion", 3), ("--projektion",), 2),
    Mistake("a number that is none", build("--max-examples", -1), ("--max-examples must be at least 1; got -1",), 2),
    Mistake("no such model here", instead(build(), "--model", "{folder}/nothing"), ("there is no folder", "nothing")),
    Mistake("no such model", instead(build(), "--model", "nobody/nothing"), ("no model 'nobody/nothing'", "Hub")),
    Mistake("no such dataset", build(data="nothing.jsonl"), ("no file", "nothing.jsonl")),
    Mistake("no such column", build("--prompt-column", "body"), ("no column 'body'", "pass --prompt-column")),
    Mistake("no such parameters", build("--targets", "*.wieght"), ("--targets *.wieght matches none", "near misses")),
    Mistake("no such device", build("--device", "nowhere"), ("the device 'nowhere' cannot be used here",)),
    Mistake("no such loss", build("--loss", "crossentropy"), ("--loss must be one of cross_entropy",)),
    Mistake("documents of one token alone", build(data="short.jsonl"), ("none of the 1 documents", "1 of one token")),
    Mistake("a document that is too long", build(data="long.jsonl"), ("longer than", "pass --truncation")),
    Mistake("the run exists", build(run="corpus"), ("holds a run of kind 'index' (finished; 4 of 4", "--overwrite")),
    Mistake(
        "the run is another's",
        lambda folder: command(folder, "score", "mean", "--query", folder / "mean"),
        ("holds a finished run of influence reduce", "--overwrite"),
    ),
    Mistake("the run is a file", file_in_the_way, ("a-file is a file, and a run is a directory",)),
    Mistake("the run is a folder of mine", folder_of_mine, ("notes.txt and no run",)),
    Mistake(
        "another plan on resume",
        damaged(unfinish, build("--token-budget", 99, run="damaged")),
        ("Its plan has --token-budget = 4096, and this run's has 99",),
    ),
    Mistake("a second writer", build(run="locked"), ("locked is being written by",)),
    Mistake("another model's weights", ask("--model", "other"), ("the query's weights is", "(field 'weights')")),
    Mistake(
        "another seed", score("--projection-seed", 1), ("the query's project.seed is 0, and the stored rows' is 1",)
    ),
    Mistake("another metric", score("--unit-norm"), ("--unit-norm is None, and the stored rows' is {'eps': 1e-12}",)),
    Mistake(
        "curvature on one side",
        ask("--hessian", "factors", "--power", -0.5),
        ("the query's curvature is", "Make both sides with --power -0.5, or one with --power -1.0"),
    ),
    Mistake("curvature of other rows", build("--bias", "--hessian", "factors"), ("were fitted under", "Pass the same")),
    Mistake("scores for gradients", score(query="scores"), ("holds scores, and no gradients",)),
    Mistake("a flipped bit", damaged(flip, ask(index="damaged")), ("shard-00002.h5 is damaged", "'rows'")),
    Mistake("a shard cut off", damaged(cut_off, ask(index="damaged")), ("shard-00002.h5 is cut off", "bytes")),
    Mistake("a shard gone", damaged(lose, ask(index="damaged")), ("shard-00002.h5", "missing")),
    Mistake("not finished", damaged(unfinish, ask(index="damaged")), ("It is not finished: run the same command",)),
    Mistake("no run", ask(index="nothing"), ("there is no index at", "nothing")),
    Mistake("no space, foreseen", build("--projection-dim", 0, run="disk/whole"), ("no space", "its disk has")),
    Mistake("no space, met", build(run="disk/run"), ("no space left for", "free some space and run the same again")),
    Mistake("k too large", ask("--k", 26), ("--k must be between 1 and the number of rows, 25; got 26",)),
    Mistake("top k too large", score("--top-k", 26), ("--top-k must be between 1 and the number of examples, 25",)),
    Mistake("an empty query", ask(text=" "), ("the query is empty",)),
    Mistake("a query of one token", ask(text="babo"), ("has 1 token", "longer text")),
    Mistake("no such block", ask("--blocks", "nothing"), ("'nothing' matches none",)),
    Mistake("no such FAISS index", ask("--faiss.index-factory", "Flut"), ("--faiss.index-factory Flut",)),
    Mistake("too few rows for FAISS", ask("--faiss.index-factory", "IVF99,Flat"), ("cannot learn 'IVF99,Flat'",)),
    Mistake("no folder to record in", ask("--record", "nowhere/out.csv"), ("there is no folder nowhere", "--record")),
    Mistake("a configuration that says more", bad_yaml, ("unknown field data.colour", "data_kwargs")),
]


@contextlib.contextmanager
def conditions(mistake: Mistake, folder: Path) -> Iterator[bool]:
    """Hold what a mistake needs: another writer, or a small disk; false where this user may not have it."""
    if mistake.name == "a second writer":
        (folder / "locked").mkdir(exist_ok=True)
        with Lock(folder / "locked"):
            yield True
    elif mistake.name.startswith("no space"):
        (folder / "disk").mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder / "disk")]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            yield False
            return
        try:
            yield True
        finally:
            subprocess.run(["umount", str(folder / "disk")], check=True)
    else:
        yield True


def print_all(*more: str) -> None:
    """Type every mistake in a process of its own, and print what it says on standard error, and its exit status."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with contextlib.redirect_stdout(None):
            prepare(folder)
        for mistake in MISTAKES:
            with conditions(mistake, folder) as held:
                if not held:
                    print(f"* {mistake.name}: this user may not mount a small disk")
                    continue
                flags = [str(flag) for flag in mistake.typed(folder)]
                status, said = told([*flags, *more], folder)
            print(f"* {mistake.name}: influence {shlex.join(flags).replace(f'{folder}/', '')}\n    exit {status}")
            lines = [line for line in said.replace(f"{folder}/", "").splitlines() if line.strip()]
            print("\n".join(f"    {line}" for line in lines), flush=True)


def told(flags: list[str], folder: Path) -> tuple[int, str]:
    """Run a command in a process that is forked, in a folder so that messages name short paths."""
    file = folder / "said"
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(flags, folder, file))
    process.start()
    process.join()
    return process.exitcode or 0, file.read_text()


def _tell(flags: list[str], folder: Path, file: Path) -> None:
    HELD.clear()  # the lock is the other process's, which the kernel knows
    os.environ |= {"COLUMNS": "120"}
    os.chdir(folder)
    with open(file, "w") as said:
        os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        status = main(flags)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)
