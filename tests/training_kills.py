"""Trainings that are killed and taken up again, judged beside one that nobody stopped."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from influence.index import open_index
from influence.index.shards import ROOT
from influence.store import any_head
from influence.store.lock import LOCK
from influence.train import read_order, sum_epochs
from influence.train.order import Visits
from tests import training_world
from tests.killing import in_child


def child(directory: Path, resume: bool, kill_at: int | None = None, **settings: Any) -> tuple[int, list[str]]:
    """Train in a child, which dies at one of its file events if told."""
    return in_child(lambda: training_world.train(directory, resume, **settings), directory, kill_at)


class Whole:
    """A training that nobody stopped.

    Attributes:
        directory: of the training.
        events: its file events.
        files: the bytes of every file that must come out the same.
        order: its visits.
        sums: the sum of its epochs.
    """

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory, self.settings = directory, settings
        status, self.events = child(directory, False, **settings)
        assert status == 0
        self.order = read_order(directory / "rows")
        self.sums = sum_epochs(directory / "rows").matrix()
        self.files = files_of(directory)

    def wrong_but_readable(self, directory: Path) -> list[str]:
        """Say what of a stopped training can be read and is not what this one has there."""
        found = []
        rows = directory / "rows"
        for place in sorted(rows.glob("epoch-*")):
            mine = said(self.directory / "rows" / place.name)
            theirs = answer(functools.partial(said, place))
            if theirs is not None and not all(map(torch.equal, mine, theirs)):
                found.append(f"{place.name} is readable and wrong")
        order = answer(lambda: read_order(rows))
        if order is not None and not is_prefix(order, self.order):
            found.append("the order is readable and wrong")
        total = answer(lambda: sum_epochs(rows))
        if total is not None and not (len(total) == len(self.sums) and torch.equal(total.matrix(), self.sums)):
            found.append("the sum is readable and wrong")
        return found

    def differing(self, directory: Path) -> list[str]:
        """Say which files of a training that has ended are not there, or not as this one's."""
        if answer(lambda: sum_epochs(directory / "rows")) is None:
            return ["it has no sum"]
        theirs = files_of(directory)
        names = sorted({*theirs, *self.files})
        return [f"{name} differs" for name in names if theirs.get(name) != self.files.get(name)]


def said(place: Path) -> tuple[torch.Tensor, ...]:
    """Return what an index says."""
    index = open_index(place)
    return index.index, index.matrix(), index.loss, index.length


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file of the rows; of a root what our readers read: HDF5 writes the time behind it."""
    rows = directory / "rows"
    files = plain_files(rows)
    return {name: repr(any_head(rows / name)).encode() if name.endswith(ROOT) else data for name, data in files.items()}


def plain_files(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory, locks apart."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def answer(work: Callable[[], Any]) -> Any:
    """Return what a reader says; nothing where it refuses in words."""
    try:
        return work()
    except (ValueError, FileNotFoundError):
        return None


def is_prefix(order: Visits, whole: Visits) -> bool:
    return all(torch.equal(mine, theirs[: len(mine)]) for mine, theirs in zip(order, whole, strict=True))


@functools.cache
def whole(name: str) -> Whole:
    """Return the training of a scenario that nobody stopped."""
    directory = Path(tempfile.mkdtemp(prefix="influence-whole-"))
    return Whole(directory, **SCENARIOS[name])


def trial(name: str, kills: list[int], at: Callable[[dict[int, Path]], int | None] | None = None) -> list[str]:
    """Kill a training at an event, and each resume of it at its; say what is lost or wrong once one got through.

    Args:
        name: the scenario.
        kills: the event at which the first dies, its first resume, …
        at: chooses the checkpoint of a resume.
    """
    directory, settings = Path(tempfile.mkdtemp(prefix="influence-kill-")), SCENARIOS[name]
    chosen = {} if at is None else {"at": at}
    try:
        found = []
        for number, kill in enumerate(kills):
            status, events = child(directory, bool(number), kill, **settings, **chosen)
            if status not in (0, -9):
                found.append(f"status {status} at {events[-1:]}")
            found += whole(name).wrong_but_readable(directory)
        status, events = child(directory, True, **settings, **chosen)
        found += [] if status == 0 else [f"the resume failed after {events[-1:]}"]
        return found + whole(name).wrong_but_readable(directory) + whole(name).differing(directory)
    finally:
        shutil.rmtree(directory)


SCENARIOS: dict[str, dict[str, Any]] = {
    "steps": {},
    "epochs": {"save_strategy": "epoch", "lr_scheduler_type": "linear"},
    "half": {"collected": {"dtype": "float16"}, "save_steps": 3, "first": True},
    "int8, accumulated": {"collected": {"dtype": "int8"}, "gradient_accumulation_steps": 2, "save_steps": 1},
    "cut short": {"max_steps": 6, "save_steps": 2},
    "few kept": {"save_total_limit": 1, "save_steps": 3},
}
"""Settings of trainings."""
