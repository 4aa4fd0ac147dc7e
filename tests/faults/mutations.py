"""Mutations: with one check of the library taken out, the faults that it is for must show, or the harness is blind."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.faults.results import Result, Task
from tests.faults.world import World


class Equal(str):
    """A text that is equal to any."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


@dataclass(frozen=True)
class Mutation:
    """One check that is taken out.

    Attributes:
        name: which.
        out: takes it out, in a child.
        shows: names of faults, one of which must show.
        at: instead, of a case: what file events of a child that has it out must be killed half done.
    """

    name: str
    out: Callable[[], None]
    shows: Sequence[str] = ()
    at: tuple[str, str] | None = None

    def tasks(self, world: World) -> list[Task]:
        """Return the faults that must show it; made where the mutation is in force."""
        if self.at is None:
            return [Task.read(name) for name in self.shows]
        name, what = self.at
        case = world.cases()[name]
        events = world.do(case.call(), world.folder_for(case)).events
        return [Task("kill", name, f"{n}h") for n, event in enumerate(events, 1) if event.endswith(what)]


def no_checksums() -> None:
    """Every checksum of a tensor holds."""
    from influence.store import hdf5

    taken = hdf5.sha256
    hdf5.sha256 = lambda buffers: Equal(taken(buffers))


def no_ids() -> None:
    """A file of another run is as good as one's own."""
    from influence.store import hdf5

    read = hdf5.read_head
    hdf5.read_head = lambda path, *, kind, schema, run=None: read(path, kind=kind, schema=schema)


def no_lock() -> None:
    """Everybody gets the lock."""
    from influence.store import lock

    lock.fcntl = SimpleNamespace(lockf=lambda *_: None, LOCK_EX=0, LOCK_NB=0)


def no_rename() -> None:
    """A file is copied to its name, and is not there at once."""

    def copied(source: Any, to: Any, **_: Any) -> None:
        held = open(source, "rb").read()  # noqa: SIM115
        with open(to, "wb", buffering=0) as file:
            file.write(held)
        os.unlink(source)

    os.replace = copied


def no_owner() -> None:
    """Any directory is taken for one of ours."""
    from influence.store import folder

    folder._left_by_a_start = lambda path: True


def no_tidying() -> None:
    """What a dead writer left stays."""
    from influence.store import folder

    folder.temporaries = lambda directory, runs: []


MUTATIONS = {
    mutation.name: mutation
    for mutation in (
        Mutation("no checksums", no_checksums, [f"damage/factors/run/factors.h5:flip:{n}" for n in range(9)]),
        Mutation("no ids", no_ids, ["damage/resume hessian/run/partial-00000.h5:swap:0"]),
        Mutation("no lock", no_lock, [f"pair/python sample, another seed/{n}" for n in (0.0, 0.2, 0.4, 0.6)]),
        Mutation("no rename", no_rename, at=("build", " write /run/run.json")),
        Mutation("no owner", no_owner, ["foreign/build/factors.h5"]),
        Mutation("no tidying", no_tidying, [f"kill/hessian kfac/{n}" for n in (60, 90, 120)]),
    )
}


def run(world: World, task: Task, inject: Callable[[World, Task], Result]) -> Result:
    """Take a check out, and inject the faults that it is for until one shows."""
    mutation = MUTATIONS[task.case]
    world.mutation = mutation.out
    try:
        for inner in mutation.tasks(world):
            result = inject(world, inner)
            if result.bad:
                return Result(task, "harness", "same", f"shows: {result.task}: {result.outcome}: {result.detail}")
    finally:
        world.mutation = None
    return Result(task, "harness", "unseen", "a check is out, and no fault shows")
