"""What a process has open while it collects."""

from dataclasses import dataclass, field

from torch import Tensor

from influence.store import Lock
from influence.train.facts import Training
from influence.train.order import Line, Order
from influence.train.scratch import Scratch


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
