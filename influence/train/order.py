"""The order log of a process: what each step of a training saw, and a checksum of each row that was made of it.

A line is a step, made when the step has been taken, so a step is there once and whole or not at all:

    <sha256 of the digest of the line before and of the rest of this one> {"step": …, "epoch": …, "example": […], …}

The log is what counts: a row that no line speaks of was never collected, and a line whose row is not there is missed.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.store import BadFileError
from influence.store.growing import Growing, make
from influence.store.hdf5 import parsed
from influence.store.schema import conform


class Visits(NamedTuple):
    """Visits of examples, in the order of training; entry i of every field is of one visit.

    Attributes:
        example: its row in the dataset.
        step: updates made before it: the row is a gradient at the weights after that many.
        micro: which micro-batch of the step.
        epoch: the epoch, from 0.
        rank: the process that saw it.
        rate: the learning rate of the step's update (the first parameter group's).
        scaled: 1 where the optimizer's moments scaled the row, 0 where there were none yet or none were asked for.
        loss: the example's loss.
        length: its labelled positions.
    """

    example: Int[Tensor, " v"]
    step: Int[Tensor, " v"]
    micro: Int[Tensor, " v"]
    epoch: Int[Tensor, " v"]
    rank: Int[Tensor, " v"]
    rate: Float[Tensor, " v"]
    scaled: Int[Tensor, " v"]
    loss: Float[Tensor, " v"]
    length: Int[Tensor, " v"]

    def where(self, chosen: Tensor) -> "Visits":
        """Return some visits, chosen by a mask or by places."""
        return Visits(*(field[chosen] for field in self))

    def first(self) -> "Visits":
        """Return each example's first visit, sorted by example."""
        return self.where(first_of(self.example))


def no_visits() -> Visits:
    """Return no visits."""
    whole, number = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return Visits(whole, whole, whole, whole, whole, number, whole, number, whole)


def joined(parts: Sequence[Visits]) -> Visits:
    """Return visits one after the other."""
    whole = (no_visits(), *parts)
    return Visits(*(torch.cat(fields) for fields in zip(*whole, strict=True)))


def first_of(example: Int[Tensor, " v"]) -> Int[Tensor, " n"]:
    """Return where each number comes first, sorted by number."""
    order = example.argsort(stable=True)
    found = example[order]
    first = torch.cat([torch.ones(min(len(found), 1), dtype=torch.bool), found[1:] != found[:-1]])
    return order[first]


def in_order(visits: Visits) -> Int[Tensor, " v"]:
    """Return the places of visits in the order of training: by step, micro-batch and process."""
    order = torch.arange(len(visits.step))
    for field in (visits.rank, visits.micro, visits.step):
        order = order[field[order].argsort(stable=True)]
    return order


KIND = "order"


class Line(NamedTuple):
    """What a process saw in a step.

    Attributes:
        step: updates made before it.
        epoch: the epoch.
        rate: the learning rate of the step's update.
        scaled: 1 where the optimizer's moments scaled the rows.
        micro: examples of each micro-batch.
        example: the examples, one after the other.
        loss: their losses.
        length: their labelled positions.
        crc: checksums (crc32) of their rows as they are stored.
    """

    step: int
    epoch: int
    rate: float
    scaled: int
    micro: list[int]
    example: list[int]
    loss: list[float]
    length: list[int]
    crc: list[int]


LARGEST = 1 << 53
"""No number of a line is larger."""
NUMBERS = (int,)
KINDS: dict[str, Any] = {"step": int, "epoch": int, "rate": float, "scaled": int} | {
    "micro": NUMBERS,
    "example": NUMBERS,
    "loss": (float,),
    "length": NUMBERS,
    "crc": NUMBERS,
}
"""The types of a line's fields; of lists, in a tuple, those of their items."""


class About(NamedTuple):
    """What an order log says of itself.

    Attributes:
        rank: the process.
        began: the step at which it began.
    """

    rank: int
    began: int


class Log(NamedTuple):
    """A process's order log as it was read.

    Attributes:
        path: the file.
        began: the step at which it began; `None` where there is no file.
        lines: its lines as far as they are whole.
        digests: the checksum that ends with each line.
        ends: the byte behind each line.
        damaged: whether something other than an unfinished line is behind them.
    """

    path: Path
    began: int | None
    lines: list[Line]
    digests: list[str]
    ends: list[int]
    damaged: bool

    @property
    def end(self) -> int:
        """The step behind the last line."""
        return self.lines[-1].step + 1 if self.lines else self.began or 0

    def before(self, step: int) -> "Log":
        """Return the log without what came at a step or after it."""
        count = sum(line.step < step for line in self.lines)
        return self._replace(lines=self.lines[:count], digests=self.digests[:count], ends=self.ends[:count])

    def head(self, epoch: int) -> str:
        """Return the checksum that stands for all up to the end of an epoch; nothing where it was not seen."""
        found = [digest for line, digest in zip(self.lines, self.digests, strict=True) if line.epoch == epoch]
        return found[-1] if found else ""


class Laid(NamedTuple):
    """An epoch's visits in the order of training, and where their rows are.

    Attributes:
        visits: the visits.
        number: of each visit's row, counted over its process's rows of the epoch.
        crc: the row's checksum.
    """

    visits: Visits
    number: Int[Tensor, " v"]
    crc: Int[Tensor, " v"]

    def where(self, chosen: Tensor) -> "Laid":
        """Return some of them, chosen by a mask or by places."""
        return Laid(self.visits.where(chosen), self.number[chosen], self.crc[chosen])


class Order:
    """A process's order log, open to grow."""

    def __init__(self, directory: Path, run: str, rank: int, began: int) -> None:
        """Go on with the log that is there, or make one that begins at a step."""
        path = order_path(directory, rank)
        if not path.exists() and not path.is_symlink():
            make(path, kind=KIND, run=run, about=About(rank, began)._asdict())
        there = read_log(directory, run, rank)
        self._file = Growing(path, kind=KIND, run=run, grow=True)
        self._digest = there.digests[-1] if there.digests else _seed(run, rank, there.began)

    def append(self, line: Line) -> None:
        """Put a step at the end."""
        text = json.dumps(line._asdict())
        digest = _chained(self._digest, text.encode())
        self._file.append(f"{digest} {text}\n".encode())
        self._digest = digest

    def sync(self) -> None:
        """Have the log on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def order_path(directory: Path, rank: int) -> Path:
    """Return where a process's order log is."""
    return directory / f"order-{rank}.jsonl"


def read_log(directory: Path, run: str, rank: int) -> Log:
    """Read a process's order log, as far as its lines are whole.

    Raises:
        BadFileError: if it is another run's or process's, or its beginning is damaged.
    """
    path = order_path(directory, rank)
    if not path.exists() and not path.is_symlink():
        return Log(path, None, [], [], [], False)
    file = Growing(path, kind=KIND, run=run)
    try:
        data = file.read(file.begin, file.size - file.begin)
    finally:
        file.close()
    about = conform(file.about, About, str(path))
    if about.rank != rank:
        raise BadFileError(f"{path} is the order log of rank {about.rank}: it was put here from elsewhere")
    log = Log(path, about.began, [], [], [], False)
    at, digest = 0, _seed(run, rank, about.began)
    while (end := data.find(b"\n", at)) >= 0:
        said, _, text = data[at:end].partition(b" ")
        digest = _chained(digest, text)
        if said != digest.encode():
            return log._replace(damaged=True)
        log.lines.append(_line(text, path))
        log.digests.append(digest)
        log.ends.append(file.begin + end + 1)
        at = end + 1
    return log


def read_logs(directory: Path, run: str, world: int) -> list[Log]:
    """Read the order logs of every process."""
    return [read_log(directory, run, rank) for rank in range(world)]


def cut(log: Log, run: str, rank: int, step: int) -> None:
    """Cut off what came at a step or after it."""
    kept = log.before(step)
    if log.began is None:
        return
    if not kept.lines:
        make(log.path, kind=KIND, run=run, about=About(rank, step)._asdict())
        return
    file = Growing(log.path, kind=KIND, run=run, grow=True)
    file.cut(kept.ends[-1])
    file.close()


def missing(logs: Sequence[Log], end: int) -> list[str]:
    """Say which steps before one have no line: of which process, and where its log is damaged."""
    began = min((log.began for log in logs if log.began is not None), default=end)
    found = []
    for rank, log in enumerate(logs):
        spans, wanted = [], began
        for step in [*(line.step for line in log.lines if line.step < end), end]:
            if step < wanted:
                spans.append(f"{step}, which comes twice,")
            elif step > wanted:
                spans.append(f"{wanted} to {step - 1}" if step - wanted > 1 else f"{wanted}")
            wanted = step + 1
        if spans and began < end:
            why = ", damaged" if log.damaged else "" if log.began is not None else ", which is gone"
            listed = ", ".join(spans[:5]) + ("…" if len(spans) > 5 else "")
            found.append(f"steps {listed} of rank {rank} ({log.path.name}{why})")
    return found


def laid(logs: Sequence[Log], epoch: int) -> Laid:
    """Return an epoch's visits in the order of training, and where their rows are."""
    visits, numbers, crcs = [], [], []
    for rank, log in enumerate(logs):
        lines = [line for line in log.lines if line.epoch == epoch]
        visits.append(visits_of(lines, rank))
        numbers.append(torch.arange(len(visits[-1].example)))
        crcs.append(torch.tensor([crc for line in lines for crc in line.crc], dtype=torch.int64))
    found = joined(visits)
    return Laid(found, torch.cat(numbers), torch.cat(crcs)).where(in_order(found))


def visits_of(lines: Iterable[Line], rank: int) -> Visits:
    """Return the visits of a process's steps."""
    lines = list(lines)
    counts = torch.tensor([len(line.example) for line in lines], dtype=torch.int64)

    def each(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([getattr(line, name) for line in lines], dtype=dtype).repeat_interleave(counts)

    def every(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([value for line in lines for value in getattr(line, name)], dtype=dtype)

    micro = torch.tensor([i for line in lines for i, n in enumerate(line.micro) for _ in range(n)], dtype=torch.int64)
    return Visits(
        every("example"),
        each("step"),
        micro,
        each("epoch"),
        torch.full_like(micro, rank),
        each("rate", torch.float64),
        each("scaled"),
        every("loss", torch.float64),
        every("length"),
    )


def _line(text: bytes, path: Path) -> Line:
    """Return a line; its checksum holds, so only who made it on purpose can make it odd."""
    held = parsed(text, path)
    if not isinstance(held, dict) or held.keys() != KINDS.keys() or not all(map(_fits, held.values(), KINDS.values())):
        raise BadFileError(f"{path} is not what it says: a line is no step of a training")
    line = Line(**held)
    every = (line.step, line.epoch, *line.micro, *line.example, *line.length, *line.crc)
    if min(every) < 0 or max(every) > LARGEST:
        raise BadFileError(f"{path} is not what it says: a line has the number {min(every)} or {max(every)}")
    if not (sum(line.micro) == len(line.example) == len(line.loss) == len(line.length) == len(line.crc)):
        raise BadFileError(f"{path} is not what it says: step {line.step} has lists of unequal lengths")
    return line


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, or a list of nothing else: a line may have many, so they are seen at once."""
    return {*map(type, value)} <= {*kind} if isinstance(kind, tuple) and type(value) is list else type(value) is kind


def _seed(run: str, rank: int, began: int | None) -> str:
    return hashlib.sha256(f"{run} {rank} {began}".encode()).hexdigest()


def _chained(before: str, text: bytes) -> str:
    return hashlib.sha256(before.encode() + text).hexdigest()
