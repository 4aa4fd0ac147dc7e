"""A training that is stopped anywhere and taken up again has the rows of one that nobody stopped, or says what lacks.

A killed child is judged twice: what can be read of it must be true, and once it was taken up again every file of its
rows is the other's to the byte.
"""

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from influence.index import open_index
from influence.pipelines import inspect
from influence.train import read_order, sum_epochs
from tests import training_kills, training_world
from tests.killing import Events, in_child
from tests.ranks import in_two_ranks
from tests.training_kills import child, trial, whole
from tests.training_world import EPOCHS, STEPS, train, trainer_of

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
        self.directory = Path(tempfile.mkdtemp(prefix="influence-copy-"))
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


def test_another_training_from_an_older_checkpoint(tmp_path: Path) -> None:
    """With other settings: what was trained before is dropped, and nothing of it is readable beside what is new."""
    old, new, changed = lambda found: 2, lambda found: 4, {"max_grad_norm": 0.01}
    for name in ("once", "killed"):
        shutil.copytree(whole("steps").directory, tmp_path / name)
        sum_epochs(tmp_path / name / "rows")
    status, events = child(tmp_path / "once", True, at=old, **changed)
    assert status == 0
    kill = event(events, r"written rows/rows-1-0")
    assert child(tmp_path / "killed", True, kill, at=old, **changed)[0] == -9
    rows = tmp_path / "killed/rows"
    assert torch.equal(open_index(rows / "epoch-0").matrix(), open_index(tmp_path / "once/rows/epoch-0").matrix())
    for reader in (lambda: open_index(rows / "epoch-1"), lambda: sum_epochs(rows), lambda: open_index(rows / "sum")):
        with pytest.raises(ValueError, match=r"not finished|not ended"):
            reader()
    assert child(tmp_path / "killed", True, at=new, **changed)[0] == 0
    assert training_kills.files_of(tmp_path / "killed") == training_kills.files_of(tmp_path / "once")
    assert whole("steps").differing(tmp_path / "once") != []


WIPES = {
    "nothing is gone": (r"os\.remove rows/ended", True),
    "the sum is": (r"os\.rmdir rows/sum", True),
    "an epoch is": (r"os\.rmdir rows/epoch-0", False),
    "the order log is": (r"os\.remove rows/order-0", False),
    "all but the manifest": (r"open rows/\.run\.json", None),
    "another manifest is there": (r"os\.rename rows/\.order-0", None),
}
"""Where a training dies that begins anew in the place of one that had ended, and whether that could still go on."""


@functools.cache
def wipe_events() -> list[str]:
    with copied("steps") as directory:
        sum_epochs(directory / "rows")
        return child(directory, False)[1]


@pytest.mark.parametrize("window", WIPES)
def test_killed_as_it_replaces_another(window: str) -> None:
    """The one that was there goes on while it is whole, and is refused then; where no row is left, there is no sum."""
    pattern, whole_still = WIPES[window]
    with copied("steps") as directory:
        assert child(directory, False, event(wipe_events(), pattern))[0] == -9
        assert whole("steps").wrong_but_readable(directory) == []
        assert child(directory, True, at=lambda found: 8)[0] == (70 if whole_still is False else 0)
        assert whole("steps").wrong_but_readable(directory) == []
        if whole_still is None:
            with pytest.raises(ValueError, match="has not ended"):
                sum_epochs(directory / "rows")
        assert child(directory, False)[0] == 0
        assert whole("steps").differing(directory) == []


DATA = training_world.dataset(11)
"""For two ranks, which pad them: one example comes twice in every epoch."""
RANKS = {
    "one has not flushed": (1, r"sync rows/rows-0-1", None),
    "one has not flushed the second epoch": (1, r"sync rows/order-1\.jsonl", None),
    "in the checkpoint": (0, r"save trainer/checkpoint-3/optimizer", None),
    "in the index": (0, r"os\.rename rows/epoch-0/\.index", None),
    "rows of one are gone": (0, r"os\.remove rows/rows-0-1", None),
    "a resume has cut one log": (0, r"was cut rows/order-0", 1),
    "rows of one are back": (0, r"os\.rename rows/\.rows-0-1", 1),
}
"""Which of two ranks dies, where, and the checkpoint that a training which had ended is taken up from, if one is."""


def ranks_train(directory: Path, resume: bool, step: int | None, dies: int, kill: str | None) -> None:
    if torch.distributed.get_rank() == dies:
        Events(directory, kill, lambda line: None).install()
    settings = {"data": DATA, "save_steps": 1, "ddp_backend": "gloo", "per_device_train_batch_size": 3}
    train(directory, resume, **{} if step is None else {"at": lambda found: step}, **settings)


@functools.cache
def whole_of_ranks() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="influence-ranks-"))
    in_two_ranks(ranks_train, directory, directory, False, None, 0, None)
    order = read_order(directory / "rows")
    assert len(order.example) == 2 * 12
    assert (directory / "trainer/checkpoint-4").exists()
    sum_epochs(directory / "rows")
    return directory


@pytest.mark.parametrize("window", RANKS)
def test_one_of_two_ranks_is_killed(tmp_path: Path, window: str) -> None:
    """A checkpoint is written once the rows of both are on the disk; what one has lost, none has a checkpoint of."""
    dies, pattern, step = RANKS[window]
    if step is not None:
        shutil.copytree(whole_of_ranks(), tmp_path, dirs_exist_ok=True)
        (tmp_path / "rendezvous").unlink()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_two_ranks(ranks_train, tmp_path, tmp_path, step is not None, step, dies, pattern)
    for rank in (0, 1):
        steps = (tmp_path / f"rows/order-{rank}.jsonl").read_bytes().count(b"\n") - 3
        assert step is not None or steps >= max(training_world.checkpoints(tmp_path), default=0)
    (tmp_path / "rendezvous").unlink()
    in_two_ranks(ranks_train, tmp_path, tmp_path, True, step, 0, None)
    sum_epochs(tmp_path / "rows")
    assert training_kills.files_of(tmp_path) == training_kills.files_of(whole_of_ranks())


# Without kills: what a resume keeps, drops and refuses


class Stop(transformers.TrainerCallback):
    """Ends an epoch or the training early, or asks for checkpoints that nobody before it knows of."""

    def __init__(self, epoch_at: int = -1, save_at: tuple[int, ...] = ()) -> None:
        self.epoch_at, self.save_at = epoch_at, save_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop |= state.global_step == self.epoch_at
        control.should_save |= state.global_step in self.save_at


def test_a_checkpoint_that_another_callback_asks_for(tmp_path: Path) -> None:
    """It is written behind our backs, right after the step: its rows are on the disk before it, and a kill shows it."""
    settings = {"save_strategy": "no", "callbacks": (Stop(save_at=(3,)),), "first": True}
    status, events = child(tmp_path / "whole", False, **settings)
    assert status == 0
    at = event(events, r"os\.mkdir trainer/checkpoint-3")
    assert events[at - 4 : at : 2] == ["sync rows/rows-0-0.bin", "sync rows/order-0.jsonl"]


def test_epochs_that_are_stopped_early(tmp_path: Path) -> None:
    """Their rows go to epochs of their own: the number that the Trainer tells was the one before."""
    trainer_of(tmp_path, callbacks=(Stop(epoch_at=2),)).train()
    order = read_order(tmp_path / "rows")
    assert order.epoch.tolist() == [0] * 6 + [1] * 12
    assert [len(open_index(tmp_path / f"rows/epoch-{epoch}")) for epoch in (0, 1)] == [6, 12]
    assert len(sum_epochs(tmp_path / "rows")) == 12


def test_an_epoch_that_max_steps_cut_short_goes_on(tmp_path: Path) -> None:
    """Its rows count as far as they go; with more steps it is the epoch of a run that was never cut."""
    train(tmp_path, max_steps=6)
    assert [len(open_index(tmp_path / f"rows/epoch-{epoch}")) for epoch in (0, 1)] == [12, 6]
    assert sum_epochs(tmp_path / "rows").index.tolist() == list(range(12))
    train(tmp_path, True, max_steps=EPOCHS * STEPS)
    assert whole("steps").differing(tmp_path) == []


def test_batches_that_were_too_large(tmp_path: Path) -> None:
    """The Trainer begins anew with smaller ones, in the middle of everything: rows of before do not count."""
    trainer, failed = trainer_of(tmp_path, auto_find_batch_size=True, collected={"overwrite": False}), []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2 and not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.train()
    order = read_order(tmp_path / "rows")
    assert failed
    assert order.step[:3].tolist() in ([0, 0, 1], [0, 1, 2]), "smaller batches"
    assert len(order.step) == EPOCHS * 12
    assert len(sum_epochs(tmp_path / "rows")) == 12


def test_a_training_that_has_not_ended(tmp_path: Path) -> None:
    """It has no sum, unless the epochs that are over are asked for; its order is read so far."""
    kill = event(whole("steps").events, r"written rows/rows-1-0")
    assert child(tmp_path, False, kill)[0] == -9
    with pytest.raises(ValueError, match=r"has not ended: resume it, or pass partial=True"):
        sum_epochs(tmp_path / "rows")
    total = sum_epochs(tmp_path / "rows", partial=True)
    assert torch.equal(total.matrix(), open_index(whole("steps").directory / "rows/epoch-0").matrix())
    assert read_order(tmp_path / "rows").step.max() == STEPS - 1


def test_what_inspect_says(tmp_path: Path) -> None:
    stopped(tmp_path, r"(?<=open trainer/checkpoint-6/trainer_state\.json\n)write rows")
    found = inspect.run(inspect.InspectConfig(str(tmp_path / "rows"), verify=True))
    assert found.facts["epochs"] == {
        0: {"steps": [0, 4], "visits": 12, "index": True},
        1: {"steps": [4, 6], "visits": 6, "index": False},
    }
    assert "not ended, 12 examples" in found.text
    assert "verified" in found.text
    assert inspect.run(inspect.InspectConfig(str(whole("steps").directory / "rows"))).facts["finished"]
    with pytest.raises(ValueError, match=r"the directory of a training, .*: open epoch-0, …, or what sum_epochs makes"):
        open_index(tmp_path / "rows")


def test_rows_that_begin_late(tmp_path: Path) -> None:
    """A directory that is new to a training which goes on: it says so, and no sum is made without being asked for."""
    train(tmp_path)
    trainer = trainer_of(tmp_path, collected={"overwrite": False})
    shutil.rmtree(tmp_path / "rows")
    with pytest.warns(UserWarning, match="goes on from step 6: the rows of the steps before are not collected"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-6"))
    assert read_order(tmp_path / "rows").step.tolist() == [6] * 3 + [7] * 3
    with pytest.raises(ValueError, match="begin at step 6: those before were not collected"):
        sum_epochs(tmp_path / "rows")
    assert len(sum_epochs(tmp_path / "rows", partial=True)) == 6


def test_order_that_is_not_kept(tmp_path: Path) -> None:
    train(tmp_path, collected={"track_order": False})
    assert not list((tmp_path / "rows").glob("order-*"))
    assert torch.equal(sum_epochs(tmp_path / "rows").matrix(), whole("steps").sums)
    with pytest.raises(FileNotFoundError, match="nothing was collected, or not in order"):
        read_order(tmp_path / "rows")
    with pytest.raises(FileNotFoundError, match=r"track_order=False\), so its training cannot be taken up again"):
        train(tmp_path, True, at=lambda found: 6)
    shutil.rmtree(tmp_path / "rows/epoch-1")
    with pytest.raises(ValueError, match=r"epoch-1 is gone"):
        sum_epochs(tmp_path / "rows")


def stopped(directory: Path, pattern: str) -> None:
    """Have a training that died before an event."""
    assert child(directory, False, event(whole("steps").events, pattern))[0] == -9


@pytest.mark.parametrize(
    ("damage", "lacks"),
    [
        (lambda rows: (rows / "rows-1-0.bin").unlink(), "step 4 and later of epoch 1"),
        (lambda rows: cut_off(rows / "rows-1-0.bin", 40), "step 5 and later of epoch 1"),
        (lambda rows: cut_off(rows / "order-0.jsonl", 600), "steps 3 to 5 of rank 0"),
        (lambda rows: flip(rows / "order-0.jsonl", 0.5), r"of rank 0 \(order-0.jsonl, damaged"),
        (lambda rows: (rows / "order-0.jsonl").unlink(), "those of epoch 0"),
        (lambda rows: shutil.rmtree(rows / "epoch-0"), "of epoch 0"),
    ],
)
def test_rows_that_a_checkpoint_counts_and_nobody_has(
    tmp_path: Path, damage: Callable[[Path], object], lacks: str
) -> None:
    """The resume says which steps, and changes nothing."""
    stopped(tmp_path, r"(?<=open trainer/checkpoint-6/trainer_state\.json\n)write rows")
    damage(tmp_path / "rows")
    before = training_kills.files_of(tmp_path)
    with pytest.raises(
        ValueError, match=f"the checkpoint has 6 steps, and of these the rows are not there of .*({lacks})"
    ):
        train(tmp_path, True)
    assert training_kills.files_of(tmp_path) == before


def cut_off(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def test_a_row_that_is_not_what_was_collected(tmp_path: Path) -> None:
    """A flipped byte among the rows: the epoch's index is refused; from a checkpoint before it the row comes again."""
    stopped(tmp_path, r"(?<=open trainer/checkpoint-6/trainer_state\.json\n)write rows")
    flip(tmp_path / "rows/rows-1-0.bin", 0.99)
    with pytest.raises(ValueError, match=r"rows-1-0.bin is damaged: row \d+ is not what was collected"):
        train(tmp_path, True)
    train(tmp_path, True, at=lambda found: 4)
    assert whole("steps").differing(tmp_path) == []


def replace(source: Path, target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


@pytest.mark.parametrize("name", ["epoch-1", "order-0.jsonl", "ended.log"])
def test_files_of_another_training(tmp_path: Path, name: str) -> None:
    """Of the same settings, so of the same id, and other rows: readers see that they do not belong together."""
    other = tmp_path / "other"
    train(other, learning_rate=0.01)
    with copied("steps") as directory:
        replace(other / "rows" / name, directory / "rows" / name)
        for reader in (read_order, sum_epochs):
            with pytest.raises(ValueError, match=r"of other steps|put here from elsewhere"):
                reader(directory / "rows")


@pytest.mark.parametrize("how", ["gone", "cut off", "flipped", "a line less", "lines of another order"])
def test_an_order_log_that_is_damaged(how: str) -> None:
    with copied("steps") as directory:
        path = directory / "rows/order-0.jsonl"
        first, lines = path.read_bytes().split(b"\n", 3)[:3], path.read_bytes().split(b"\n")[3:-1]
        kept = {
            "cut off": [*lines[:-1], lines[-1][:-30]],
            "flipped": [*lines[:3], lines[3].replace(b'"step": 3', b'"step": 2'), *lines[4:]],
            "a line less": [*lines[:3], *lines[4:]],
            "lines of another order": [lines[1], lines[0], *lines[2:]],
        }
        path.write_bytes(b"\n".join([*first, *kept.get(how, []), b""]))
        if how == "gone":
            path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=r"order-(0|\*)\.jsonl"):
            read_order(directory / "rows")
        if how == "gone":  # as with track_order=False: which indexes there must be stands in ended.log
            assert torch.equal(sum_epochs(directory / "rows").matrix(), whole("steps").sums)
        else:
            with pytest.raises(ValueError, match=r"order-0\.jsonl"):
                sum_epochs(directory / "rows")


# Files that are not ours


def test_a_directory_of_the_users_is_refused(tmp_path: Path) -> None:
    """With every name that we use, whatever is asked for; before a step is trained, and nothing in it is touched."""
    rows = tmp_path / "rows"
    for name in ("epoch-0", "sum"):
        (rows / name).mkdir(parents=True)
        (rows / name / "notes.txt").write_text("mine")
    for name in ("order-0.jsonl", "rows-0-0.bin", "ended.log", "training.json"):
        (rows / name).write_text("mine")
    before = training_kills.plain_files(rows)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="and no run: write to another directory"):
            train(tmp_path, collected={"overwrite": overwrite})
    assert training_kills.plain_files(rows) == before
    assert not (tmp_path / "trainer/checkpoint-2").exists()


@pytest.mark.parametrize("name", ["ended.log", "order-0.jsonl", "rows-0-0.bin"])
def test_a_file_of_ours_that_is_the_users_now(name: str) -> None:
    """A resume that would cut or replace it is refused."""
    with copied("steps") as directory:
        (directory / "rows" / name).write_text("mine")
        before = training_kills.plain_files(directory / "rows")
        with pytest.raises(ValueError, match=rf"{name} is no file of influence"):
            train(directory, True, at=lambda found: 2)
        after = training_kills.plain_files(directory / "rows")
        assert after[name] == b"mine"
        assert name == "rows-0-0.bin" or after == before


@pytest.mark.parametrize("name", ["epoch-1", "epoch-1 of another run", "rows-1-0.bin", "a link"])
def test_a_place_that_is_taken_meanwhile(tmp_path: Path, name: str) -> None:
    """Refused at the epoch's first batch, rather than after it; what is there stays, and so do the rows so far."""
    stopped(tmp_path, r"(?<=open trainer/checkpoint-4/trainer_state\.json\n)os\.mkdir")
    rows, notes = tmp_path / "rows", tmp_path / "notes.txt"
    notes.write_text("mine")
    if name == "epoch-1":
        (rows / name).mkdir()
        (rows / name / "notes.txt").write_text("mine")
    elif name == "epoch-1 of another run":
        shutil.copytree(whole("half").directory / "rows/epoch-1", rows / "epoch-1")
    elif name == "rows-1-0.bin":
        (rows / name).write_text("mine")
    else:
        (rows / "rows-1-0.bin").symlink_to(notes)
    before = training_kills.plain_files(rows)
    with pytest.raises((FileExistsError, ValueError), match=r"epoch-1 holds|no plain file|no file of influence"):
        train(tmp_path, True)
    after = training_kills.plain_files(rows)
    assert all(after[path] == data for path, data in before.items() if "-1" in path)
    assert notes.read_text() == "mine"
    for path in rows.glob("*-1*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(tmp_path, True)
    assert whole("steps").differing(tmp_path) == []


def test_overwriting_removes_what_is_named_alone(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "rows/notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"left in .*rows, since the run did not write it: notes.txt"):
        train(tmp_path)
    assert (tmp_path / "rows/notes.txt").read_text() == "mine"
    (tmp_path / "rows/notes.txt").unlink()
    assert whole("steps").differing(tmp_path) == []
    (tmp_path / "rows/epoch-1/notes.txt").write_text("mine")
    before = training_kills.plain_files(tmp_path / "rows")
    with pytest.raises(FileExistsError, match=r"notes.txt is not of the run"):
        train(tmp_path)
    assert training_kills.plain_files(tmp_path / "rows") == before


def test_two_trainings_at_once(tmp_path: Path) -> None:
    """The second is refused at its first batch, and the first goes on as if nothing had been."""

    class Second(transformers.TrainerCallback):
        status, error = 0, ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                refused = pytest.raises(BlockingIOError, match="being written by this very process")
                with torch.random.fork_rng(devices=[]), refused:
                    trainer_of(tmp_path / "second", collected={"path": tmp_path / "rows"}).train()
                type(self).status = in_child(lambda: train(tmp_path, save_strategy="no"), tmp_path)[0]

    trainer_of(tmp_path, callbacks=(Second(),)).train()
    assert Second.status == 70
    assert whole("steps").differing(tmp_path) == []


def test_the_directory_is_let_go_however_a_training_ends(tmp_path: Path) -> None:
    class Break(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, callbacks=(Break(),)).train()
    train(tmp_path, True)
    assert whole("steps").differing(tmp_path) == []
