"""Two at once: writers that are started together in one directory. One of them wins, and the other is told so."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.commands import Case, Work, called, python_build, python_sample
from tests.faults.forks import Ended, Kill
from tests.faults.results import Result, Task
from tests.faults.world import TRAINER, World, differing, remove, tree

TIMES = 6
"""How often each pair is started, the second so much later, by a seed."""


@dataclass(frozen=True)
class Pair:
    """Two writers of one directory.

    Attributes:
        name: of both.
        protocol: of the first.
        case: the first, with what it is given.
        second: what the other does, where the first works.
    """

    name: str
    protocol: str
    case: Case
    second: Work


def pairs(world: World) -> dict[str, Pair]:
    """Return every pair, by name."""
    cases = world.cases()

    def typed(name: str, *more: str) -> list[str]:
        work = cases[name].work
        assert isinstance(work, list)
        return [*work, *more]

    def pair(name: str, first: str, second: Work) -> Pair:
        return Pair(name, cases[first].protocol, cases[first], second)

    other = ["--dataset", str(world.root / "reverse.jsonl")]
    made = [
        pair("build, build", "build", typed("build")),
        pair("build, build of other data", "build", typed("build", *other)),
        pair("build, build over", "build", typed("build", "--overwrite")),
        pair("build, other build over", "build", typed("build", *other, "--overwrite")),
        pair("build, sample", "build", typed("sample")),
        pair("build, hessian", "build", typed("hessian kfac")),
        pair("append, append", "append", typed("append")),
        pair("python build, python build", "python build", python_build),
        pair("score, reduce", "score", typed("reduce")),
        pair("score, score top", "score", typed("score top")),
        pair("hessian, hessian", "hessian kfac", typed("hessian kfac")),
        pair("hessian, hessian of other data", "hessian kfac", typed("hessian kfac", *other)),
        pair("ekfac, its step", "hessian ekfac", typed("hessian kfac")),
        pair("recipe, recipe", "ekfac", typed("ekfac")),
        pair("recipe, other recipe", "ekfac", typed("trackstar")),
        pair("sample, sample", "sample", typed("sample")),
        pair("sample, sample of another seed", "sample", typed("sample", "--seed", "1")),
        pair("sample, sample over", "sample", typed("sample", "--seed", "1", "--overwrite")),
        pair("sample, build", "sample", typed("build")),
        pair("python sample, python sample", "python sample", python_sample),
        pair("python sample, another seed", "python sample", lambda: python_sample(1)),
        pair("python sample, sample", "python sample", typed("sample")),
        pair("export, export", "export npy", typed("export npy", "--overwrite")),
        pair("faiss, faiss", "query faiss", typed("query faiss")),
        Pair("callback, callback", "callback", Case("", "callback", lambda: _trains("a"), writes="rows"),
             lambda: _trains("b")),
    ]  # fmt: skip
    return {each.name: each for each in made}


def tasks(pair: Pair, draw: Random, times: int = TIMES) -> list[Task]:
    """Return the starts of a pair: at once, and the second later by a share of the first's time."""
    shares = [0.0, *((n + draw.random()) / (times - 1) for n in range(times - 1))]
    return [Task("pair", pair.name, f"{share:.2f}") for share in shares]


@dataclass(frozen=True)
class Alone:
    """What two writers leave when nobody disturbs them.

    Attributes:
        first: the first by itself.
        second: the second by itself.
        both: the second behind the first; nothing where it is refused then.
        seconds: how long the first takes.
        unequal: files that are other bytes when the same is done at another time.
    """

    first: dict[str, str]
    second: dict[str, str]
    both: dict[str, str]
    seconds: float
    unequal: list[str]


def run(world: World, task: Task) -> Result:
    """Start two writers, and see whose work is there."""
    pair = pairs(world)[task.case]
    expected = alone(world, pair)
    folder = world.folder_for(pair.case)
    gates = [os.pipe() for _ in range(2)]
    try:
        works = pair.case.call(), called(pair.second)
        children = [world.start(work, folder, start=gate[0]) for work, gate in zip(works, gates, strict=True)]
        os.write(gates[0][1], b"!")
        time.sleep(float(task.what) * expected.seconds)
        os.write(gates[1][1], b"!")
        first, second = (child.wait() for child in children)
        found = _of(folder)
    finally:
        for end in (end for gate in gates for end in gate):
            os.close(end)
        remove(folder)
    outcome, why = judged(first, second, found, expected)
    return Result(task, pair.protocol, outcome, f"{why}first: {first.brief()}; second: {second.brief()}")


def judged(first: Ended, second: Ended, found: dict[str, str], expected: Alone) -> tuple[str, str]:
    """Return what came of two writers: each is done or refused, and what lies there is the work of who is done."""
    for each in (first, second):
        if each.fault:
            return each.fault, ""
    if first.refused and second.refused:
        return "lost", "neither was done; "
    if first.refused or second.refused:
        mine = expected.second if first.refused else expected.first
        outcome = "refused"
    else:  # one after the other, or the same work
        mine = expected.both or (expected.first if expected.first == expected.second else {})
        outcome = "same"
    other = [name for name in differing(found, mine) if mine.get(name) is None or name not in expected.unequal]
    if not other:
        return outcome, ""
    return "mixed", f"what is there is not the work of who was done: {other[:6]}; "


def alone(world: World, pair: Pair) -> Alone:
    """Return what a pair's writers leave when nobody disturbs them, made once in a world."""
    place = world.root / "references" / f"pair {pair.name}.json"
    if not place.exists():
        world.prepare(pair.case)
        folders = [world.folder_for(pair.case) for _ in range(3)]
        works = [(pair.case.call(), 0), (called(pair.second), 0), (pair.case.call(), 100_000)]
        ended = [world.do(work, at, Kill(later=s)) for (work, s), at in zip(works, folders, strict=True)]
        if any(each.status != 0 for each in ended):
            raise RuntimeError(f"{pair.name} fails by itself: {[each.said for each in ended]}")
        first, second, later = map(_of, folders)
        behind = world.do(called(pair.second), folders[0])
        made = Alone(
            first, second, _of(folders[0]) if behind.status == 0 else {}, ended[0].seconds, differing(first, later)
        )
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(made.__dict__))
        for folder in folders:
            remove(folder)
    return Alone(**json.loads(place.read_text()))


def _of(folder: Path) -> dict[str, str]:
    return {name: it for name, it in tree(folder).items() if Path(name).parts[0] not in (TRAINER, "a", "b")}


def _trains(directory: str) -> None:
    """Train in a directory of one's own, with rows in one that is shared."""
    import warnings

    from influence import train
    from tests import training_world

    warnings.simplefilter("ignore")
    collector = train.GradientCollectorCallback
    training_world.GradientCollectorCallback = lambda path, **settings: collector("rows", **settings)
    training_world.train(Path(directory), num_train_epochs=1)
