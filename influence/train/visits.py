"""The order of training: which example was seen at which step of which epoch, and under what."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence import store

KIND, SCHEMA = "visits", 2


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

    def latest(self) -> "Visits":
        """Return each example's last visit, sorted by example."""
        order = self.example.argsort(stable=True)
        index = self.example[order]
        last = torch.cat([index[1:] != index[:-1], torch.ones(min(len(index), 1), dtype=torch.bool)])
        return self.where(order[last])


def visits_of(
    index: Int[Tensor, " n"],
    losses: Float[Tensor, " n"],
    lengths: Int[Tensor, " n"],
    *,
    step: int,
    micro: int,
    epoch: int,
    rank: int,
    rate: float,
    scaled: bool,
) -> Visits:
    """Return the visits of a micro-batch."""
    index = index.cpu()
    return Visits(
        index,
        torch.full_like(index, step),
        torch.full_like(index, micro),
        torch.full_like(index, epoch),
        torch.full_like(index, rank),
        torch.full((len(index),), rate, dtype=torch.float64),
        torch.full_like(index, int(scaled)),
        losses.detach().double().cpu(),
        lengths.long().cpu(),
    )


def no_visits() -> Visits:
    """Return no visits."""
    whole, number = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return Visits(whole, whole, whole, whole, whole, number, whole, number, whole)


def joined(parts: Sequence[Visits]) -> Visits:
    """Return visits one after the other."""
    whole = (no_visits(), *parts)
    return Visits(*(torch.cat(fields) for fields in zip(*whole, strict=True)))


def write_visits(directory: str | Path, rank: int, visits: Visits) -> None:
    """Write one process's visits, atomically."""
    store.write(_path(directory, rank), visits._asdict(), {"rank": rank}, kind=KIND, schema=SCHEMA)


def read_visits(directory: str | Path, rank: int) -> Visits | None:
    """Return one process's visits, if it wrote any."""
    path = _path(directory, rank)
    return Visits(**store.read(path, kind=KIND, schema=SCHEMA)[0]) if path.exists() else None


def read_order(directory: str | Path) -> Visits:
    """Return the order in which training saw its examples: of all processes, by step, micro-batch and process.

    Args:
        directory: the `path` of a `GradientCollectorCallback`.

    Returns:
        The visits.

    Raises:
        FileNotFoundError: if there are none.
    """
    paths = sorted(Path(directory).glob("visits-*.h5"))
    if not paths:
        raise FileNotFoundError(f"there is no visits-*.h5 in {directory}: nothing was collected there, or not in order")
    found = joined([Visits(**store.read(path, kind=KIND, schema=SCHEMA)[0]) for path in paths])
    key = torch.stack([found.step, found.micro, found.rank])
    order = torch.arange(key.shape[1])
    for field in key.flip(0):
        order = order[field[order].argsort(stable=True)]
    return found.where(order)


def processes(directory: str | Path) -> int:
    """Return how many processes wrote visits."""
    return len(list(Path(directory).glob("visits-*.h5")))


def _path(directory: str | Path, rank: int) -> Path:
    return Path(directory) / f"visits-{rank}.h5"
