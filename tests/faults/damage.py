"""Damage: every file that is read is flipped, zeroed, cut, appended to, swapped, and made to say what it may not."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.faults import formats, kills
from tests.faults.commands import Work, called
from tests.faults.forks import Ended
from tests.faults.results import Result, Task
from tests.faults.world import World, differing, remove, said, tree

TIMES = {"flip": 8, "zero": 8, "cut": 4, "append": 2}
"""How often each file is damaged in each way, by other seeds."""
STATED = 30
"""Most attributes of a file that are given another type."""
FEW = 6
"""How many of all these a sample has."""
MEMORY = 4 << 30
"""Bytes that a reader may take."""
OTHERS: tuple[Any, ...] = (None, "x", -1, 2.5, True, [], {}, [None], {"x": []}, 10**30, "../../x")
"""What an attribute is replaced by, where that is of another type."""


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        name: its name.
        protocol: of what it reads.
        given: runs that lie in its folder, by their name there.
        files: globs of the files that are damaged.
        work: what is typed, or a function whose value is the answer.
        other: for each of `given`, another run of the same kind, whose files are swapped in.
        resumes: the command that it goes on with: the answer is what lies there then.
    """

    name: str
    protocol: str
    given: Mapping[str, str]
    files: tuple[str, ...]
    work: Work
    other: Mapping[str, str] = field(default_factory=dict)
    resumes: str = ""


def readers(world: World) -> dict[str, Reader]:
    """Return everything that reads a file, by name."""
    gold = str(world.root / "gold.jsonl")
    ask = ["query", "run", "--text", "the home of bacy is the attic", "--k", "3", "--json"]
    index, scores = ("index.h5", "shard-0000[01].h5", "run.json", "config.yaml"), {"run": "score"}
    chains = ("run.h5", "run.json", "config.yaml")
    built, fitted, sampled = ({"run": name} for name in ("build", "hessian ekfac", "sample"))
    score = [*_typed(world, "score")]
    score[score.index("--query") + 1] = "asked"
    score.append("--json")
    judge = ["recall", "run", "--gold", gold, "--json"]
    return {
        reader.name: reader
        for reader in (
            Reader("open_index", "index", built, index, _opened, {"run": "build other"}),
            Reader("query", "index", built, index, ask, {"run": "build other"}),
            Reader("inspect index", "index", built, index, ["inspect", "run", "--verify", "--json"]),
            Reader("export", "index", built, index, ["export", "run", "--to", "rows.npy"]),
            Reader("explore", "index", built, index, ["explore", "run", "--to", "page.html", "--progress", "False"]),
            Reader("score", "index", {"asked": "reduce"}, ("index.h5", "shard-00000.h5", "run.json", "config.yaml"),
                   score, {"asked": "reduce other"}),
            Reader("recall", "scores", scores, index, judge, {"run": "score other"}),
            Reader("recall top", "scores", {"run": "score top"}, ("best.h5", "run.json", "config.yaml"),
                   [*judge, "--k", "3"]),
            Reader("factors", "factors", fitted, ("factors.h5",), _loaded, {"run": "hessian ekfac other"}),
            Reader("inspect factors", "factors", fitted, ("factors.h5", "run.json", "config.yaml"),
                   ["inspect", "run", "--json"]),
            Reader("sgmcmc.load", "chains", sampled, ("run.h5",), _sampled, {"run": "sample other"}),
            Reader("llc", "chains", sampled, chains, ["llc", "run", "--json"], {"run": "sample other"}),
            Reader("bif", "chains", sampled, chains, ["bif", "run", "--restriction", "l0h0", "--json"]),
            Reader("inspect chains", "chains", sampled, chains, ["inspect", "run", "--verify", "--json"]),
            Reader("query faiss", "faiss", {"run": "query faiss"}, ("faiss/*/*",),
                   [*_typed(world, "query faiss"), "--json"]),
            Reader("order", "callback", {"rows": "callback"},
                   ("order-0.jsonl", "ended.log", "run.json", "epoch-0/*.h5", "epoch-0/run.json", "epoch-1/index.h5"),
                   _ordered),
            Reader("resume build", "index", {"run": "build at rename shard-00002.h5"},
                   ("shard-*.h5", "run.json", "config.yaml"), _typed(world, "build"),
                   {"run": "build other at rename shard-00002.h5"}, resumes="build"),
            Reader("resume score top", "scores", {"run": "score top at rename partial-00000.h5"},
                   ("partial-*.h5", "run.json", "config.yaml"), _typed(world, "score top"), resumes="score top"),
            Reader("resume hessian", "factors", {"run": "hessian kfac at rename partial-00000.h5"},
                   ("partial-*.h5", "run.json", "config.yaml"), _typed(world, "hessian kfac"),
                   {"run": "hessian kfac other at rename partial-00000.h5"}, resumes="hessian kfac"),
            Reader("resume ekfac", "factors", {"run": "hessian ekfac at rename eigenvalues-00000.h5"},
                   ("kfac.h5", "eigenvalues-*.h5", "partial-*.h5"), _typed(world, "hessian ekfac"),
                   {"run": "hessian ekfac other at rename eigenvalues-00000.h5"}, resumes="hessian ekfac"),
            Reader("resume callback", "callback", {"rows": "callback at fsync order-0.jsonl"},
                   ("order-0.jsonl", "rows-1-0.bin", "run.json"),
                   world.cases()["callback"].work, {"rows": "callback other at fsync order-0.jsonl"},
                   resumes="callback"),
            Reader("resume sample", "chains", {"run": "sample at rename state.h5"},
                   ("chains-*/state.h5", "chains-*/segment-*.h5", "run.json", "config.yaml"), _typed(world, "sample"),
                   {"run": "sample other at rename state.h5"}, resumes="sample"),
        )
    }  # fmt: skip


def _typed(world: World, name: str) -> list[str]:
    work = world.cases()[name].work
    assert isinstance(work, list)
    return work


def _opened() -> str:
    from influence.index import open_index

    return said(open_index("run"))


def _loaded() -> str:
    from influence.hessians import load as load_factors

    return said(load_factors("run"))


def _sampled() -> str:
    from influence import sgmcmc

    return said(sgmcmc.load("run"))


def _ordered() -> str:
    from influence.train import read_order, sum_epochs

    return said({"order": read_order("rows"), "sum": said(sum_epochs("rows"))})


def tasks(world: World, reader: Reader, draw: Random, few: bool = False) -> Iterator[Task]:
    """Yield the damage to what a reader reads."""
    if few:
        yield from draw.sample(list(tasks(world, reader, draw)), FEW)
        return
    folder = world.folder_for(reader)
    places = [path.relative_to(folder) for path in _files(reader, folder)]
    for place in places:
        for how, times in TIMES.items():
            for _ in range(times):
                yield Task("damage", reader.name, f"{place}:{how}:{draw.randrange(1 << 16)}")
        if place.parts[0] in reader.other:
            yield Task("damage", reader.name, f"{place}:swap:0")
        if place.suffix in (".json", ".yaml", ".h5"):
            nodes = list(_nodes(formats.facts(folder / place)))
            for number in sorted(draw.sample(range(len(nodes)), min(len(nodes), STATED))):
                yield Task("damage", reader.name, f"{place}:state:{number}.{draw.randrange(1 << 16)}")
    remove(folder)


def run(world: World, task: Task) -> Result:
    """Damage one file and read it."""
    reader = readers(world)[task.case]
    expected = _expected(world, reader)
    folder = world.folder_for(reader)
    try:
        place, how, seed = task.what.rsplit(":", 2)
        happened = harm(world, reader, folder, place, how, seed)
        ended, answer = _asked(world, reader, folder)
    finally:
        remove(folder)
    outcome, why = judged(ended, answer, expected, Path(place), how)
    if outcome == "wrong" and _may_differ(place, happened):
        outcome = "same"
    return Result(task, reader.protocol, outcome, f"{place} {happened}: {why}")


def judged(ended: Ended, answer: Any, expected: Any, place: Path, how: str) -> tuple[str, str]:
    """Return what came of reading a damaged file."""
    if ended.fault:
        return ended.fault, ended.brief()
    if ended.refused:  # facts that are whole and do not fit may be refused in any words
        named = place.name in ended.complained or (place.name == "run.json" and str(place.parent) in ended.complained)
        return "refused" if named or how == "state" else "unclear", ended.brief()
    if answer == expected:
        return "same", ""
    if isinstance(answer, dict) and isinstance(expected, dict):
        return "wrong", f"another answer: {differing(answer, expected)[:5]}; {ended.brief()}"
    return "wrong", f"another answer: {str(answer)[:300]}; expected {str(expected)[:300]}"


def _may_differ(place: str, happened: str) -> bool:
    """Whether another answer is right: of settings to replay a run by, and of facts that may be so, or be left out."""
    if place.endswith(formats.SETTINGS):
        return True
    says, _, what = happened.partition("says: ")
    where, is_what, _ = what.partition(" is ")
    less = " is None, was" in what or " is left out, was" in what
    return says == "" and bool(is_what) and (less or any(part in formats.FREE for part in where.split(".")))


def harm(world: World, reader: Reader, folder: Path, place: str, how: str, seed: str) -> str:
    """Damage a file; say what was done."""
    path = folder / place
    if how == "swap":
        given, _, inner = place.partition("/")
        shutil.copyfile(world.made(reader.other[given]) / inner, path)
        return "is another run's"
    if how == "state":
        number, _, seed = seed.partition(".")
        return _state(path, int(number), Random(seed))
    return HARMS[how](path, Random(seed))


def _flip(path: Path, draw: Random) -> str:
    held = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(held)), draw.randrange(8)
    held[at] ^= 1 << bit
    path.write_bytes(held)
    return f"has bit {bit} of byte {at} flipped"


def _zero(path: Path, draw: Random) -> str:
    held = bytearray(path.read_bytes())
    size = draw.choice([64, 512, 4096])
    at = draw.randrange(max(len(held) // 64, 1)) * 64
    held[at : at + size] = bytes(len(held[at : at + size]))
    path.write_bytes(held)
    return f"has {size} zeros at {at}"


def _cut(path: Path, draw: Random) -> str:
    held = path.read_bytes()
    size = draw.choice([0, len(held.rstrip()) - 1, draw.randrange(len(held)), draw.randrange(len(held))])
    path.write_bytes(held[:size])
    return f"is cut to {size} of {len(held)} bytes"


def _append(path: Path, draw: Random) -> str:
    size = draw.choice([1, 512, 1 << 16])
    with path.open("ab") as file:
        file.write(draw.randbytes(size))
    return f"has {size} bytes more"


HARMS: dict[str, Callable[[Path, Random], str]] = {"flip": _flip, "zero": _zero, "cut": _cut, "append": _append}


def _state(path: Path, number: int, draw: Random) -> str:
    """Give one attribute of a file's facts another type, or leave it out."""
    known = formats.facts(path)
    where, value = list(_nodes(known))[number]
    *before, last = where
    holder = known
    for key in before:
        holder = holder[key]
    others = [other for other in OTHERS if type(other) is not type(value)]
    choice = draw.randrange(len(others) + 1)
    if choice == len(others):
        del holder[last]
    else:
        holder[last] = others[choice]
    formats.rewrite(path, known)
    now = "is left out" if choice == len(others) else f"is {others[choice]!r}"
    return f"says: {'.'.join(map(str, where))} {now}, was {str(value)[:40]}"


def _nodes(value: Any, *where: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every attribute of some JSON, with the way to it."""
    if where:
        yield where, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from _nodes(inner, *where, key)


def _files(reader: Reader, folder: Path) -> list[Path]:
    return sorted({path for name in reader.given for glob in reader.files for path in (folder / name).glob(glob)})


def _asked(world: World, reader: Reader, folder: Path) -> tuple[Ended, Any]:
    """Read what lies in a folder, within limits; return how that ended and the answer."""
    ended = world.do(called(reader.work), folder, memory=MEMORY)
    if reader.resumes:
        unequal = kills.reference(world, world.cases()[reader.resumes]).unequal
        return ended, {name: it for name, it in kills.compared(folder).items() if name not in unequal}
    if ended.value is not None:
        return ended, ended.value
    made = {name: it for name, it in tree(folder).items() if "/" not in name and it != "folder"}
    return ended, {"said": ended.said.removesuffix(ended.complained), **made}


def _expected(world: World, reader: Reader) -> Any:
    """Return the answer of undamaged files, which must be the same twice."""
    if reader.resumes:
        known = kills.reference(world, world.cases()[reader.resumes])
        return {name: it for name, it in known.tree.items() if name not in known.unequal}
    place = world.root / "references" / f"read {reader.name}.json"
    if not place.exists():
        answers = []
        for _ in range(2):
            folder = world.folder_for(reader)
            ended, answer = _asked(world, reader, folder)
            if ended.status != 0:
                raise RuntimeError(f"{reader.name} fails by itself: {ended.said}")
            answers.append(answer)
            remove(folder)
        if answers[0] != answers[1]:
            raise RuntimeError(f"{reader.name} answers otherwise at another time: {answers}")
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(answers[0]))
    return json.loads(place.read_text())


def prepare(world: World, reader: Reader) -> None:
    """Make everything that a reader's tasks need."""
    world.prepare(reader)
    for name in reader.other.values():
        world.made(name)
    _expected(world, reader)
