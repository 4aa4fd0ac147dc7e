"""Kills: each command ends by SIGKILL at a file event, is read, is typed again, and must be as if nobody killed it."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.commands import Case
from tests.faults.forks import Kill
from tests.faults.results import Result, Task
from tests.faults.world import TRAINER, World, answers, differing, remove, tree

SAMPLE = 30
"""Kills of a command that is one more instance of its protocol."""


@dataclass(frozen=True)
class Reference:
    """What a command does when nobody disturbs it.

    Attributes:
        tree: what its folder holds then.
        answers: what is read there.
        before: what was read before it began.
        events: what it did to files.
        seconds: how long it took.
        unequal: files that are other bytes when the same is done at another time.
        trouble: why there is no reference.
    """

    tree: dict[str, str]
    answers: dict[str, str]
    before: dict[str, str]
    events: list[str]
    seconds: float
    unequal: list[str]
    trouble: str = ""


def reference(world: World, case: Case) -> Reference:
    """Return a command's reference, made once in a world."""
    place = world.root / "references" / f"{case.name}.json"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(_made(world, case).__dict__))
    return Reference(**json.loads(place.read_text()))


def _made(world: World, case: Case) -> Reference:
    world.prepare(case)
    folders = [world.folder_for(case) for _ in range(2)]
    before = world.do(lambda: answers(folders[0]), folders[0])
    first, second = (world.do(case.call(), folder, Kill(later=n * 100_000)) for n, folder in enumerate(folders))
    trees = [compared(folder) for folder in folders]
    read = world.do(lambda: answers(folders[0]), folders[0])
    for folder in folders:
        remove(folder)
    trouble = "".join(each.brief() for each in (before, first, second, read) if each.status != 0)
    trouble += "".join(f"{name} is {said}; " for name, said in (read.value or {}).items() if ": " in said)
    unequal = differing(*trees)
    return Reference(trees[0], read.value, before.value, first.events, first.seconds, unequal, trouble)


def tasks(world: World, case: Case, draw: Random, most: int | None = None) -> list[Task]:
    """Return the kills of a command: at every event or a sample of them, some in the middle of a write, some by time.

    Args:
        world: the world.
        case: the command.
        draw: decides the samples.
        most: at most so many.
    """
    once = Task("kill", case.name, "nobody")
    if reference(world, case).trouble:
        return [once]
    events = reference(world, case).events
    writes = [n for n, event in enumerate(events, 1) if event.split()[1] in ("write", "pwrite", "pwrite64", "fwrite")]
    whole = [f"{n}" for n in range(1, len(events) + 1)]
    halves = [f"{n}h" for n in draw.sample(writes, min(len(writes), SAMPLE // 3))]
    times = [f"{draw.random():.3f}t" for _ in range(SAMPLE // 6)]
    if not case.every:
        whole = draw.sample(whole, min(len(whole), SAMPLE - len(halves) - len(times)))
    chosen = whole + halves + times
    if most is not None and most < len(chosen):
        renames = [f"{n}" for n, event in enumerate(events, 1) if event.split()[1] not in ("write", "pwrite64")]
        chosen = draw.sample(renames, min(most, len(renames)))
    return [once, *(Task("kill", case.name, what) for what in chosen)]


def run(world: World, task: Task) -> Result:
    """Kill a command once, and see what is left of it."""
    case = world.cases()[task.case]
    expected = reference(world, case)
    if expected.trouble:
        return Result(task, case.protocol, "lost", f"it fails by itself: {expected.trouble}")
    if task.what == "nobody":
        detail = f"the same at another time is other bytes: {expected.unequal}" if expected.unequal else ""
        return Result(task, case.protocol, "unequal" if expected.unequal else "same", detail)
    folder = world.folder_for(case)
    try:
        outcome, detail = _killed(world, case, expected, folder, task.what)
    finally:
        remove(folder)
    return Result(task, case.protocol, outcome, detail)


def _killed(world: World, case: Case, expected: Reference, folder: Path, what: str) -> tuple[str, str]:
    if what.endswith("t"):
        ended = world.do(case.call(), folder, limit=float(what[:-1]) * expected.seconds)
    else:
        ended = world.do(case.call(), folder, Kill(int(what.removesuffix("h")), what.endswith("h")))
    at = f"killed at {ended.events[-1]}" if ended.events else "killed before any event"
    if ended.status not in (None, -9, 0):
        return ended.fault or "lost", f"it was not killed: {ended.brief()}"
    read = world.do(lambda: answers(folder), folder)
    if read.fault or read.value is None:
        return read.fault or "traceback", f"{at}; reading: {read.brief()}"
    for name, said in read.value.items():
        if said.startswith("broken: "):
            return "traceback", f"{at}; {name} is {said}"
        if name.startswith("inspect "):
            continue
        between = any(part.startswith("chains-") for part in Path(name).parts)  # a share, before it is joined
        if not between and ": " not in said and said not in (expected.answers.get(name), expected.before.get(name)):
            return "wrong", f"{at}; {name} is read, and is not what it should be"
    there = compared(folder)
    again = world.do(case.call_again(), folder)
    if again.fault:
        return again.fault, f"{at}; again: {again.brief()}"
    found = compared(folder)
    other = [name for name in differing(found, expected.tree) if name not in expected.unequal]
    if not other and expected.unequal:
        read = world.do(lambda: answers(folder), folder)
        other = differing(read.value or {}, expected.answers)
    if not other:
        return "same", at
    whole = again.status == 0 or not any(there.get(name) != it for name, it in expected.tree.items())
    more = all(name not in expected.tree for name in other)
    return "left" if whole and more else "lost", f"{at}; again: {again.brief()}; other: {other[:6]}"


def compared(folder: Path) -> dict[str, str]:
    """Return what of a folder must be the same."""
    return {name: it for name, it in tree(folder).items() if Path(name).parts[0] != TRAINER}
