"""Faults, injected into every command that writes and every file that is read.

    python -m tests.faults                    # all of them, in at most an hour on two cores
    python -m tests.faults --sample           # a seeded few of each, in a minute
    python -m tests.faults --only kill/build  # those whose names begin so
    python -m tests.faults --replay 'kill/build/17'

Exit status 1 if any fault shows in the library.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

from tests.faults import damage, foreign, forks, kills, mutations, pairs
from tests.faults.results import Result, Task, table
from tests.faults.world import World

RUN = {"kill": kills.run, "damage": damage.run, "pair": pairs.run, "foreign": foreign.run}
KILLED = {"build": 4, "score top": 3, "hessian kfac": 3, "sample": 4, "callback": 4}
"""How many kills of which command a sample has."""
READ = ("open_index", "factors", "sgmcmc.load", "recall top", "order", "query faiss", "resume hessian", "resume sample")
"""Which readers are in a sample."""
PAIRED = ("build, build of other data", "python sample, another seed")
"""Which pairs."""
OWNED = ("build", "hessian kfac", "sample")
"""Which commands are run in folders of the user's."""
MUTATED = ("no checksums", "no ids", "no owner", "no rename")
"""Which checks are taken out."""


def tasks(world: World, seed: int, sample: bool, only: str) -> Iterator[Task]:
    """Yield every fault to inject; each case's sample is drawn from a seed of its own."""
    cases, readers, pairings = world.cases(), damage.readers(world), pairs.pairs(world)
    variants = foreign.variants()[:3] if sample else foreign.variants()
    ways: list[tuple[str, Iterable[str], Callable[[str, Random], Iterable[Task]]]] = [
        ("kill", KILLED if sample else cases, lambda name, draw: kills.tasks(world, cases[name], draw, most(name))),
        ("damage", READ if sample else readers, lambda name, draw: damage.tasks(world, readers[name], draw, sample)),
        (
            "pair",
            PAIRED if sample else pairings,
            lambda name, draw: pairs.tasks(pairings[name], draw, 2 if sample else 6),
        ),
        ("foreign", OWNED if sample else cases, lambda name, draw: foreign.tasks(cases[name], variants)),
        ("mutation", MUTATED if sample else mutations.MUTATIONS, lambda name, draw: [Task("mutation", name, "")]),
    ]

    def most(name: str) -> int | None:
        return KILLED[name] if sample else None

    for kind, names, made in ways:
        for name in names:
            if f"{kind}/{name}/".startswith(only) or only.startswith(f"{kind}/{name}/"):
                try:
                    yield from made(name, Random(f"{seed} {kind} {name}"))
                except RuntimeError:  # what it needs cannot be made: running it says why
                    yield Task(kind, name, "nobody")


def prepare(world: World, task: Task) -> None:
    """Make what a task needs, so that those who share it find it."""
    if task.kind == "mutation":
        mutation = mutations.MUTATIONS[task.case]
        for name in mutation.shows or [f"kill/{mutation.at and mutation.at[0]}/"]:
            prepare(world, Task.read(name))
    elif task.kind == "damage":
        damage.prepare(world, damage.readers(world)[task.case])
    elif task.kind == "pair":
        pairs.alone(world, pairs.pairs(world)[task.case])
    else:
        world.prepare(world.cases()[task.case])
        if task.kind == "kill":
            kills.reference(world, world.cases()[task.case])
        if task.what.endswith(" in a run"):
            world.made(task.case)


def inject(world: World, chosen: list[Task], jobs: int, shown: bool) -> list[Result]:
    """Inject faults, in processes that were forked before any thread was."""
    for task in {(task.kind, task.case): task for task in chosen}.values():
        with contextlib.suppress(RuntimeError):
            prepare(world, task)
    found: list[Result] = []
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(jobs, _keep, (world,)) as pool:
        for number, result in enumerate(pool.imap_unordered(_one, chosen), 1):
            found.append(result)
            if result.bad:
                print(f"{result.outcome}: {result.task}: {result.detail}\n    {result.task.replay}", flush=True)
            elif shown and number % 50 == 0:
                print(f"{number} of {len(chosen)} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def one(world: World, task: Task) -> Result:
    """Inject one fault."""
    return mutations.run(world, task, one) if task.kind == "mutation" else RUN[task.kind](world, task)


_world: World


def _keep(world: World) -> None:
    global _world
    _world = world


def _one(task: Task) -> Result:
    try:
        return one(_world, task)
    except RuntimeError as error:
        return Result(task, task.case, "lost", f"nobody disturbed it: {error}")


def main() -> int:
    """Inject what was asked for and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose names begin so: kill, kill/build, foreign/sample")
    parser.add_argument("--replay", help="one fault, by its name")
    parser.add_argument("--sample", action="store_true", help="a seeded few of each")
    parser.add_argument("--list", action="store_true", help="name the faults, and inject none")
    parser.add_argument("--most", type=int, help="at most so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", help="write every result to this file")
    options = parser.parse_args()
    forks.preloaded("tests.faults", sys.argv[1:])
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="influence-faults-") as folder:
        world = World(Path(folder))
        if options.replay:
            (result,) = inject(world, [Task.read(options.replay)], 1, False)
            print(f"{result.outcome}: {result.detail}")
            return int(result.bad)
        chosen = [
            t for t in tasks(world, options.seed, options.sample, options.only) if str(t).startswith(options.only)
        ]
        if options.most is not None and options.most < len(chosen):
            chosen = Random(options.seed).sample(chosen, options.most)
        if options.list:
            print(*chosen, sep="\n")
            return 0
        results = inject(world, chosen, options.jobs, sys.stderr.isatty())
    print(table(results))
    bad = sum(result.bad for result in results)
    print(f"{len(results)} faults injected in {time.monotonic() - began:.0f} s: {bad} show in the library")
    if options.json:
        Path(options.json).write_text(json.dumps([result.json() for result in results], indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
