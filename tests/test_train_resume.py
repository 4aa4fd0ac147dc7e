"""A training that is stopped anywhere and taken up again has the rows of one that nobody stopped, or says what lacks.

A killed child is judged twice: what can be read of it must be true, and once it was taken up again every file of its
rows is the other's to the byte.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from influence.index import build, open_index
from influence.train import read_order, sum_epochs
from tests import training_kills, training_world
from tests.killing import in_child
from tests.training_kills import child, trial, whole
from tests.training_world import EPOCHS, STEPS, own_loss, train, trainer_of

WINDOWS = {
    "the manifest is not there yet": r"os\.rename rows/\.run\.json",
    "the order log is not there yet": r"os\.rename rows/\.order-0",
    "the first row": r"half a write rows/rows-0-0",
    "a step's line": r"half a write rows/order-0",
    "rows that are not flushed": r"sync rows/rows-0-0",
    "rows that are, and no line": r"sync rows/order-0",
    "before a checkpoint": r"os\.mkdir trainer/checkpoint-2",
    "in a checkpoint": r"save trainer/checkpoint-2/optimizer",
    "between a checkpoint and what comes then": r"(?<=open trainer/checkpoint-2/trainer_state\.json\n)write rows",
    "between an epoch's last checkpoint and its end": r"(?<=open trainer/checkpoint-4/trainer_state\.json\n)os\.mkdir",
    "in an epoch's index": r"os\.rename rows/epoch-0/\.run\.json",
    "in its shards": r"os\.rename rows/epoch-0/\.shard-00001",
    "before its root": r"os\.rename rows/epoch-0/\.index",
    "between the index and the end of its rows": r"os\.remove rows/rows-0-0",
    "at the next epoch": r"os\.rename rows/\.rows-1-0",
    "in the next epoch": r"written rows/rows-1-0",
    "after the last checkpoint": r"(?<=open trainer/checkpoint-8/trainer_state\.json\n)os\.mkdir",
    "in the last index": r"os\.rename rows/epoch-1/\.index",
    "at the end": r"os\.rename rows/\.ended",
}
"""Where a training dies: before the first event that is called so."""


def event(events: list[str], pattern: str) -> int:
    """Return the number of the first event that is called so."""
    text = "\n".join(events)
    found = re.search(pattern, text)
    assert found is not None, pattern
    return text.count("\n", 0, found.start())


@pytest.mark.parametrize("window", WINDOWS)
def test_killed(window: str) -> None:
    assert trial("steps", [event(whole("steps").events, WINDOWS[window])]) == []


@pytest.mark.parametrize("name", [name for name in training_kills.SCENARIOS if name != "steps"])
def test_killed_in_another_way(name: str) -> None:
    """Checkpoints at the end of epochs, asked for by who comes after us; half precision; …: at the riskiest windows."""
    for pattern in (r"(?<=trainer_state\.json\n)\S+ rows", r"os\.rename rows/epoch-0/\.index"):
        assert trial(name, [event(whole(name).events, pattern)]) == []


RESUMES = {
    "nothing was cut": r"os\.remove rows/ended",
    "the order log is cut": r"was cut rows/order-0",
    "the later epoch is let go": r"os\.remove rows/epoch-1/shard",
    "rows come back": r"os\.rename rows/\.rows-0-0",
    "rows are back, and an index too": r"os\.remove rows/epoch-0/index",
    "its root is gone": r"os\.remove rows/epoch-0/shard-00001",
    "a new row": r"written rows/rows-0-0",
    "the index again": r"os\.rename rows/epoch-0/\.index",
}
"""Where a resume dies that comes back from step 2 to an epoch whose index was written."""


@functools.cache
def resume_events() -> list[str]:
    with copied("steps") as directory:
        status, events = child(directory, True, at=lambda found: 2)
        assert status == 0
        assert whole("steps").differing(directory) == []
        return events


class copied:
    """A copy of a training that has ended."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Path:
        self.directory = Path(training_kills.tempfile.mkdtemp(prefix="influence-copy-"))
        shutil.copytree(whole(self.name).directory, self.directory, dirs_exist_ok=True)
        return self.directory

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.directory)


@pytest.mark.parametrize("window", RESUMES)
def test_killed_in_a_resume_from_an_older_checkpoint(window: str) -> None:
    """And taken up again from the same, or from an older one still; from a newer one it is refused, or as it was."""
    kill = event(resume_events(), RESUMES[window])
    with copied("steps") as directory:
        assert child(directory, True, kill, at=lambda found: 2)[0] == -9
        assert whole("steps").wrong_but_readable(directory) == []
        newer = directory.with_name(directory.name + "-newer")
        shutil.copytree(directory, newer)
        status, _ = child(newer, True, at=lambda found: 6)
        assert whole("steps").wrong_but_readable(newer) == []
        assert status == (0 if kill <= event(resume_events(), r"cut rows/order-0") else 70)
        if not status:
            assert whole("steps").differing(newer) == []
        shutil.rmtree(newer)
        status, _ = child(directory, True, at=lambda found: 2)
        assert status == 0
        assert whole("steps").differing(directory) == []
