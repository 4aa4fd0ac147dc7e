"""The record of a training run: what is on disk, and what of it a checkpoint counts.

A run's directory holds its manifest `run.json`; `order-<rank>.jsonl`, what each step saw; `rows-<epoch>-<rank>.bin`,
the rows of an epoch that goes on; `epoch-<n>/`, the index of one that is over; `ended.log`, when the training is; and
`sum/`. What holds after every event, so after every kill:

1. A step of the order logs has its rows, in a file of rows or in the index of its epoch, and a checksum of each.
2. Before the Trainer writes a checkpoint, the steps before it and their rows are on the disk, of every process.
3. While a whole index of an epoch is there, no row is added to the epoch.

A training that goes on from a checkpoint first cuts the order logs at its step, and then makes the rest agree with
them: rows, indexes and the sum that are of later steps go, and epochs that are over get their index.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from influence.index.shards import ROOT
from influence.store import BadFileError, Lock
from influence.store.folder import RUN, Manifest, read_manifest, refuse_foreign, take
from influence.store.growing import Growing, make
from influence.store.schema import conform
from influence.train.epochs import (
    epoch_path,
    epochs_of,
    heads,
    index_of,
    is_whole,
    let_go,
    unwrite_epoch,
    write_epoch,
)
from influence.train.facts import ENDED, RUN_KIND, SUM, Training, read_training, refuse_another, training_of
from influence.train.order import Line, Log, Order, cut, missing, order_path, read_log, read_logs
from influence.train.scratch import Scratch, remove_scratch, scratch_path


@dataclass
class Pending:
    """A step whose update is not made yet: its rows are in the file, and no line of the order log says so.

    Attributes:
        step: updates made before it.
        epoch: the epoch.
        rate: the learning rate.
        scaled: whether the optimizer's moments scaled the rows.
        before: how many rows the file had before it.
        micro: how many examples each micro-batch had.
    """

    step: int
    epoch: int
    rate: float
    scaled: bool
    before: int
    micro: list[int] = field(default_factory=list)
    example: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    crc: list[int] = field(default_factory=list)

    def add(self, example: Tensor, loss: Tensor, length: Tensor, crc: list[int]) -> None:
        """Add a micro-batch."""
        self.micro.append(len(example))
        self.example += example.tolist()
        self.loss += loss.detach().double().tolist()
        self.length += length.tolist()
        self.crc += crc

    def line(self) -> Line:
        """Return the step as the order log has it."""
        known = self.step, self.epoch, self.rate, int(self.scaled)
        return Line(*known, self.micro, self.example, self.loss, self.length, self.crc)


@dataclass
class Session:
    """What a process has open of a run.

    Attributes:
        lock: the run's, which the first process has.
        training: the run; `None` before the first batch.
        order: this process's order log.
        rows: its rows of the epoch; `None` before the epoch's first batch.
        pending: the step that is being made.
    """

    lock: Lock | None = None
    training: Training | None = None
    order: Order | None = None
    rows: Scratch | None = None
    pending: Pending | None = None

    def end_step(self) -> None:
        """Put the pending step in the order log: its update was made."""
        pending, self.pending = self.pending, None
        if pending is not None:
            assert self.order is not None
            self.order.append(pending.line())

    def drop_step(self) -> None:
        """Forget the pending step, whose update was never made."""
        pending, self.pending = self.pending, None
        if pending is not None and self.rows is not None:
            self.rows.keep(pending.before)

    def sync(self) -> None:
        """Have the rows, and then the lines that speak of them, on the disk."""
        for file in (self.rows, self.order):
            if file is not None:
                file.sync()

    def close_rows(self) -> None:
        """End the epoch's rows, whose place is the index from now on: the log that speaks of them is on the disk."""
        if self.order is not None:
            self.order.sync()
        if self.rows is not None:
            self.rows.close()
        self.rows = None

    def close(self) -> None:
        """Close everything, and give the lock back."""
        for file in (self.rows, self.order):
            if file is not None:
                file.close()
        if self.lock is not None:
            self.lock.release()
        self.lock, self.training, self.order, self.rows, self.pending = None, None, None, None, None


class Ended(NamedTuple):
    """What a training that has ended says of itself.

    Attributes:
        steps: the step at which collection began, and the one behind the last.
        epochs: each epoch, and each process's checksum of all that it saw up to its end.
    """

    steps: tuple[int, int]
    epochs: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def heads(self) -> dict[int, list[str]]:
        """The checksums by the number of their epoch."""
        return {epoch: list(order) for epoch, order in self.epochs}


def check(path: Path, step: int, world: int, overwrite: bool) -> None:
    """Refuse to begin in a directory, or to go on from a step; nothing is changed.

    Raises:
        FileExistsError: if something else is there, or rows of a run that this one would begin anew.
        ValueError: if other processes collected before, or rows of steps that the checkpoint counts are not there.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, and a run is a directory: write to another place")
    refuse_foreign(path)
    if not (path / RUN).exists():
        if step:
            _warn_late(path, step)
        return
    if not step:
        if not overwrite:
            raise FileExistsError(
                f"{path} holds {_what(path)}, and this one begins anew: pass overwrite=True to replace them, "
                "or write to another directory; to go on, call trainer.train(resume_from_checkpoint=True)"
            )
        return
    training = read_training(path)
    if training.plan.world != world:
        raise ValueError(
            f"{path} was collected by {training.plan.world} processes, and this run has {world}: resume with as many, "
            "or write to another directory"
        )
    if all(log.began is None for log in _check_steps(training, step)):
        _warn_late(path, step)  # a start was cut off before it had a row


def last_epoch(path: Path, rank: int, step: int) -> int:
    """Return the epoch of the last step before one; 0 where there is none."""
    if not step or not (path / RUN).exists():
        return 0
    lines = read_log(path, read_manifest(path).id, rank).before(step).lines
    return lines[-1].epoch if lines else 0


def open_run(path: Path, wanted: Manifest, overwrite: bool) -> tuple[Lock, Training]:
    """Take a run's directory, to begin or to go on.

    Raises:
        ValueError: if it holds rows of another collection; naming what differs.
    """
    lock, there = take(path, wanted, overwrite)
    try:
        if there is not None:
            refuse_another(path, there, wanted)
        return lock, training_of(path, wanted if there is None else there)
    except BaseException:
        lock.release()
        raise


def go_on(training: Training, step: int, epoch: int | None) -> None:
    """Cut the record at a step, and make everything agree with what is left.

    Args:
        training: the run; this process has its lock.
        step: the checkpoint's: rows of the steps before it are kept.
        epoch: the epoch that goes on now; `None` where the training is at its end.

    Raises:
        ValueError: if rows of steps before it are not there.
    """
    logs = _check_steps(training, step)
    if read_ended(training) is not None:
        (training.path / ENDED).unlink()
    if index_of(training, training.path / SUM) is not None:
        let_go(training.path / SUM)
    for rank, log in enumerate(logs):
        cut(log, training.id, rank, step)
    logs = read_logs(training.path, training.id, training.plan.world)
    kept = epochs_of(logs)
    for number in _indexed(training):
        if number not in kept:
            let_go(epoch_path(training.path, number))
    for number in _scratched(training):
        if number not in kept:
            remove_scratch(training.path, training.id, number, range(training.plan.world))
    for number in kept:
        whole = is_whole(training, logs, number)
        if number == epoch or not whole:
            _reopen(training, logs, number)
        if number != epoch:
            finish_epoch(training, logs, number)


def finish_epoch(training: Training, logs: Sequence[Log], epoch: int) -> None:
    """Write an epoch's index where it is not there, and remove the rows that it is made of."""
    if is_whole(training, logs, epoch):
        remove_scratch(training.path, training.id, epoch, range(training.plan.world))
    else:
        write_epoch(training, logs, epoch)


def end(training: Training, track_order: bool) -> None:
    """Write what is left to write of a training that is over."""
    logs = read_logs(training.path, training.id, training.plan.world)
    for epoch in epochs_of(logs):
        finish_epoch(training, logs, epoch)
    if not epochs_of(logs):
        return  # nothing was collected
    began = min((log.began for log in logs if log.began is not None), default=0)
    steps = (began, max((log.end for log in logs), default=0))
    epochs = tuple((epoch, tuple(heads(logs, epoch))) for epoch in epochs_of(logs))
    make(training.path / ENDED, kind="ended", run=training.id, about=Ended(steps, epochs)._asdict())
    if not track_order:
        for rank in range(training.plan.world):
            order_path(training.path, rank).unlink(missing_ok=True)


def read_ended(training: Training) -> Ended | None:
    """Return what a training that has ended says of itself; `None` where it has not.

    Raises:
        BadFileError: if that is damaged, or another run's.
    """
    path = training.path / ENDED
    if not path.exists() and not path.is_symlink():
        return None
    file = Growing(path, kind="ended", run=training.id)
    file.close()
    return conform(file.about, Ended, str(path))


def checked_logs(training: Training) -> list[Log]:
    """Read the order logs, up to the last step that all of them have, for who reads a run.

    Raises:
        FileNotFoundError: if they were not kept.
        BadFileError: if steps are missing, or an index is of other steps.
    """
    orders = {epoch: _plan_of(training, epoch).get("order") for epoch in _indexed(training)}  # a writer adds to them
    ended = read_ended(training)
    logs = read_logs(training.path, training.id, training.plan.world)
    if all(log.began is None for log in logs):
        raise FileNotFoundError(f"there is no order-*.jsonl in {training.path}: nothing was collected, or not in order")
    last = min(log.end for log in logs) if ended is None else ended.steps[1]
    lost = missing(logs, last)
    lost += [f"those of {log.path.name}, which is gone" for log in logs if log.began is None and not lost]
    lost += [f"those behind step {log.end - 1} in {log.path.name}, damaged" for log in logs if log.damaged and not lost]
    if lost:
        raise BadFileError(f"{training.path}: the record of what was trained lacks {_listed(lost)}{_WAY_ON}")
    logs = [log.before(last) for log in logs]
    for epoch, order in orders.items():
        if order != heads(logs, epoch):
            raise BadFileError(
                f"{epoch_path(training.path, epoch)} is of other steps than the order logs have: a resume was cut off, "
                f"or it was put here from elsewhere{_WAY_ON}"
            )
    if ended is not None:
        if ended.heads != {epoch: heads(logs, epoch) for epoch in epochs_of(logs)}:
            raise BadFileError(f"{training.path / ENDED} is of other steps than the order logs have{_WAY_ON}")
        refuse_missing(training, ended)
    return logs


def refuse_missing(training: Training, ended: Ended) -> None:
    """Refuse a run that has ended and has not the index of every epoch.

    Raises:
        BadFileError: naming the first that is not there, or is of other steps.
    """
    for epoch, order in ended.heads.items():
        if not is_indexed(training, epoch):
            raise BadFileError(f"{epoch_path(training.path, epoch)} is gone, or its index.h5 is{_WAY_ON}")
        if _plan_of(training, epoch).get("order") != order:
            raise BadFileError(
                f"{epoch_path(training.path, epoch)} is of other steps than the training had: it was put here from "
                f"elsewhere{_WAY_ON}"
            )


_WAY_ON = ". Resume the training from a checkpoint before them, which collects them again, or restore the files"


def _warn_late(path: Path, step: int) -> None:
    warnings.warn(
        f"{path} holds no rows yet, and this training goes on from step {step}: the rows of the steps before are not "
        "collected. If they are in another directory, give that one",
        stacklevel=2,
    )


def is_indexed(training: Training, epoch: int) -> bool:
    """Whether an epoch's index is there, and whole."""
    place = epoch_path(training.path, epoch)
    return index_of(training, place) is not None and (place / ROOT).exists()


def _check_steps(training: Training, step: int) -> list[Log]:
    """Refuse to go on from a step where rows of the steps before it are not there; return the order logs."""
    if not all(log.exists() for log in _orders(training)) and (training.path / ENDED).exists():
        raise FileNotFoundError(
            f"{training.path} has no order-*.jsonl (track_order=False), so its training cannot be taken up again: "
            "write to another directory"
        )
    logs = read_logs(training.path, training.id, training.plan.world)
    lost = missing(logs, step)
    before = [log.before(step) for log in logs]
    for epoch in _indexed(training):
        steps = _steps_of(training, epoch)
        if steps[0] < step and epoch not in epochs_of(before):
            lost.append(f"those of epoch {epoch} (its index is of steps {steps[0]} to {steps[1] - 1})")
    for epoch in epochs_of(before):
        lost += [] if is_indexed(training, epoch) else _rows_lost(training, before, epoch)
    if lost:
        raise BadFileError(
            f"{training.path}: the checkpoint has {step} steps, and of these the rows are not there of "
            f"{_listed(lost)}. Go on from a checkpoint before them, or write to another directory"
        )
    return logs


def _rows_lost(training: Training, logs: Sequence[Log], epoch: int) -> list[str]:
    """Say from which step of an epoch on the rows are not there."""
    found = []
    for rank, log in enumerate(logs):
        path, needed = scratch_path(training.path, epoch, rank), 0
        try:
            file = Scratch(training.path, training.id, epoch, rank, training.stored)
            have = len(file)
            file.close()
        except FileNotFoundError:
            have = 0
        for line in log.lines:
            if line.epoch == epoch:
                needed += len(line.example)
                if needed > have:
                    found.append(f"step {line.step} and later of epoch {epoch} ({path.name} ends before them)")
                    break
    return found


def _reopen(training: Training, logs: Sequence[Log], epoch: int) -> None:
    """Have an epoch's rows in files, as many as the order logs have, and no index of it."""
    if is_indexed(training, epoch):
        unwrite_epoch(training, logs, epoch)
    for rank, log in enumerate(logs):
        count = sum(len(line.example) for line in log.lines if line.epoch == epoch)
        if scratch_path(training.path, epoch, rank).exists():
            file = Scratch(training.path, training.id, epoch, rank, training.stored, grow=True)
            file.keep(count)
            file.close()


def _indexed(training: Training) -> list[int]:
    """Return the epochs of which this run has a whole index."""
    found = []
    for place in training.path.glob("epoch-*"):
        number = place.name.removeprefix("epoch-")
        named = number.isdecimal() and place == epoch_path(training.path, int(number))
        whole = named and not place.is_symlink() and (place / RUN).exists() and (place / ROOT).exists()
        if whole and read_manifest(place).plan.get("training") == training.id:
            found.append(int(number))
    return sorted(found)


def _plan_of(training: Training, epoch: int) -> dict[str, Any]:
    return read_manifest(epoch_path(training.path, epoch)).plan


def _steps_of(training: Training, epoch: int) -> tuple[int, int]:
    """Return the first step of an epoch's index, and the one behind its last."""
    where = f"{epoch_path(training.path, epoch) / RUN}: the plan's steps"
    return conform(_plan_of(training, epoch).get("steps"), tuple[int, int], where)


def _scratched(training: Training) -> list[int]:
    """Return the epochs of which there are files of rows."""
    names = [path.stem.split("-") for path in training.path.glob("rows-*-*.bin")]
    return sorted({int(name[1]) for name in names if len(name) == 3 and name[1].isdecimal()})


def _orders(training: Training) -> list[Path]:
    return [order_path(training.path, rank) for rank in range(training.plan.world)]


def _what(path: Path) -> str:
    kind = read_manifest(path).kind
    return "rows of a training run" if kind == RUN_KIND else f"a run of kind {kind!r}"


def _listed(lost: Sequence[Any]) -> str:
    return "; ".join(map(str, lost[:5])) + ("…" if len(lost) > 5 else "")
