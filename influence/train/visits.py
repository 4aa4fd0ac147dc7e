"""Visits: which example was seen at which step of which epoch, and under what."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
