"""What a training run has to say: the order of its examples, and the sum of its epochs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.index import Collected, Index, open_index
from influence.index.shards import StoredBatch, stored_batch
from influence.train.epochs import epoch_path, epochs_of, write_index
from influence.train.facts import SUM, Training, read_training
from influence.train.order import Visits, in_order, joined, visits_of
from influence.train.record import checked_logs, is_indexed, read_ended, refuse_missing


def read_order(directory: str | Path) -> Visits:
    """Return the order in which training saw its examples: of all processes, by step, micro-batch and process.

    Of a training that goes on, these are the visits so far; of one that was killed, those up to the last step of which
    every process has a record.

    Args:
        directory: the `path` of a `GradientCollectorCallback`.

    Returns:
        The visits.

    Raises:
        FileNotFoundError: if there are none.
        BadFileError: if visits are missing, or an index is not of these visits; naming them.
    """
    logs = checked_logs(read_training(directory))
    found = joined([visits_of(log.lines, rank) for rank, log in enumerate(logs)])
    return found.where(in_order(found))


def sum_epochs(path: str | Path, partial: bool = False) -> Index:
    """Add an example's rows over the epochs, `Σ_e row_e`, into an index `sum` beside theirs.

    Args:
        path: the `path` of a `GradientCollectorCallback`, whose training is done. An epoch that `max_steps` cut short
            counts as far as it went.
        partial: add what there is of a training that has not ended, or whose first steps were not collected: the
            epochs that are over.

    Returns:
        The index; its losses are those of the last epoch.

    Raises:
        FileNotFoundError: if there are no epochs.
        ValueError: if the training has not ended, or rows of it are missing; naming them.
    """
    training = read_training(path)
    numbers = _numbers(training, partial)
    if not numbers:
        raise FileNotFoundError(f"there is no epoch-*/ in {path}: no epoch is over yet")
    epochs = [open_index(epoch_path(training.path, number)) for number in numbers]
    if any(epoch.blocks != dict(training.stored.columns.shapes) for epoch in epochs):
        raise ValueError(f"the epochs in {path} have different blocks: they are of different collections")
    examples = torch.cat([epoch.index for epoch in epochs]).unique()
    more = {"training": training.id, "epochs": numbers, "order": epochs[-1].about.plan["order"]}
    said = {"epoch": None, "epochs": len(epochs)}

    def part(at: slice) -> StoredBatch:
        return _summed(training, epochs, examples[at])

    write_index(training, training.path / SUM, examples, more, said, part)
    return open_index(training.path / SUM)


def progress(path: str | Path) -> dict[str, Any]:
    """Return how far a training's rows are: whether it has ended, its steps, and each epoch's, visits and index.

    Args:
        path: the `path` of a `GradientCollectorCallback`.

    Raises:
        BadFileError: if visits are missing, or an index is not of these visits; naming them.
    """
    training, order = read_training(path), read_order(path)
    epochs = {
        epoch: {
            "steps": [int(order.step[order.epoch == epoch].min()), int(order.step[order.epoch == epoch].max()) + 1],
            "visits": int((order.epoch == epoch).sum()),
            "index": is_indexed(training, epoch),
        }
        for epoch in order.epoch.unique().tolist()
    }
    return {"finished": read_ended(training) is not None, "examples": training.plan.examples, "epochs": epochs}


def _numbers(training: Training, partial: bool) -> list[int]:
    """Return the epochs to add.

    Raises:
        ValueError: if some are missing.
    """
    ended = read_ended(training)
    if ended is None and not partial:
        raise ValueError(
            f"the training in {training.path} has not ended: resume it, or pass partial=True to add the epochs that "
            "are over"
        )
    if ended is not None and ended.steps[0] and not partial:
        raise ValueError(
            f"the rows in {training.path} begin at step {ended.steps[0]}: those before were not collected. Pass "
            "partial=True to add the others"
        )
    if ended is not None:
        refuse_missing(training, ended)
        if not any(training.path.glob("order-*.jsonl")):  # track_order=False
            return sorted(ended.heads)
    return [number for number in epochs_of(checked_logs(training)) if is_indexed(training, number)]


def _summed(training: Training, epochs: list[Index], some: Tensor) -> StoredBatch:
    """Return the sums of some examples' rows, which stand side by side in every index."""
    dim, columns = training.stored.columns.dim, training.stored.columns
    total = torch.zeros(len(some), dim, dtype=torch.float64)
    loss, length = torch.zeros(len(some), dtype=torch.float64), torch.zeros(len(some), dtype=torch.int64)
    for epoch in epochs:
        at = torch.isin(epoch.index, some).nonzero().flatten()
        to = torch.searchsorted(some, epoch.index[at])
        if len(at):
            between = slice(int(at[0]), int(at[-1]) + 1)  # an index is sorted, so its part is contiguous
            total[to] += epoch.matrix(between.start, between.stop)[at - at[0]]
            loss[to], length[to] = epoch.loss[at].double(), epoch.length[at]
    wide = total if training.plan.dtype == "float64" else total.float()
    return stored_batch(some, Collected(columns.split(wide), loss, length), columns, training.plan.dtype, False)
