"""Epochs: from the scratch of an epoch to its index, in the dataset's order; and the sum of several."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence import store
from influence.func.layout import Layout
from influence.func.transform import Transform
from influence.index import (
    Collected,
    Columns,
    Fingerprint,
    Index,
    fingerprint_of,
    finish,
    open_index,
    shard_sink,
    start,
)
from influence.train.scratch import Scratch
from influence.train.visits import read_order

FACTS = "training.json"
"""What a collection is, beside its rows."""
WEIGHTS = "those of each step of a training run"
"""What the fingerprint says of the weights: rows of one index are of many."""


class Facts(NamedTuple):
    """What is known of a run's rows once the first batch was planned.

    Attributes:
        examples: how many the dataset has.
        columns: the blocks of a row.
        wide: the type of the scratch.
        dtype: the stored type.
        shard_size: most examples of a shard.
        config: the collection's settings.
        transform: what was made of the gradients, without the optimizer's scale.
        loss_fn: the examples' loss.
        layout: the parameters' layout.
    """

    examples: int
    columns: Columns
    wide: str
    dtype: str
    shard_size: int
    config: dict[str, Any]
    transform: Transform
    loss_fn: Any
    layout: Layout

    def json(self) -> dict[str, Any]:
        """Return what two runs must have in common to be one."""
        return {
            "examples": self.examples,
            "blocks": {name: list(shape) for name, shape in self.columns.shapes.items()},
            "transform": repr(self.transform),
            "fingerprint": self.transform.fingerprint,
            "wide": self.wide,
            **self.config,
        }

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the rows; an optimizer's live scale counts as one on the training side."""
        found = fingerprint_of(
            self.loss_fn, None, self.transform, self.columns.shapes, WEIGHTS, self.config, self.layout
        )
        if self.config.get("scale") is None:
            return found
        live = {"step": "the optimizer's own", "moments": "those of each step", "eps": None}
        return replace(found, complement={**found.complement, "scaling": live})


def check_facts(path: Path, facts: Facts, write: bool) -> None:
    """Refuse to mix rows of two collections in one directory; note which this is, where none was.

    Raises:
        ValueError: naming what differs, and both values.
    """
    place, mine = path / FACTS, facts.json()
    if not place.exists():
        if write:
            text = json.dumps(mine, indent=1) + "\n"
            with store.replacing(place, len(text)) as name:
                name.write_text(text)
        return
    there = json.loads(place.read_text())
    for key, value in mine.items():
        if there.get(key) != value:
            raise ValueError(
                f"{path} holds rows of a run whose {key} is {there.get(key)}, and this run's is {value}: resume with "
                "the same, or write to another directory"
            )


def wipe(path: Path) -> None:
    """Delete what another collection left: its facts last, so that it never looks like another's."""
    for place in (*path.glob("epoch-*"), path / "sum"):
        if (place / "run.json").exists():
            shutil.rmtree(place)
    for old in (*path.glob("visits-*.h5"), *path.glob("scratch-*.bin"), path / FACTS):
        old.unlink(missing_ok=True)


def epoch_path(path: Path, epoch: int) -> Path:
    """Return where an epoch's index is."""
    return path / f"epoch-{epoch}"


def open_scratch(path: Path, facts: Facts, epoch: int) -> Scratch:
    """Return the epoch's scratch; where a resume comes back to an epoch whose index was written, with its rows."""
    place = path / f"scratch-{epoch}.bin"
    fresh = not place.exists()
    scratch = Scratch(place, facts.examples, facts.columns.dim, getattr(torch, facts.wide))
    if fresh and (epoch_path(path, epoch) / "index.h5").exists():
        there = open_index(epoch_path(path, epoch))
        scratch.put(there.index, there.matrix())
    return scratch


def finish_epoch(path: Path, facts: Facts, epoch: int, scratch: Scratch, seconds: float) -> None:
    """Write the index of the examples that the epoch visited, shard by shard, and drop the scratch.

    An example that came twice (as ranks pad their last batch) has its last visit's row.
    """
    order = read_order(path)
    visits = order.where(order.epoch == epoch).latest()
    config = {**facts.config, "epoch": epoch, "seconds": round(seconds, 3)}
    plan = {"dtype": facts.dtype, "shard_size": facts.shard_size, "per_token": False}
    directory = epoch_path(path, epoch)
    with start(directory, "index", config, (), plan, facts.fingerprint(), overwrite=True) as run:
        for number, begin in enumerate(range(0, len(visits.example), facts.shard_size)):
            some = visits.where(torch.arange(begin, min(begin + facts.shard_size, len(visits.example))))
            rows = facts.columns.split(scratch.rows[some.example])
            _write_shard(run.directory, number, facts.columns, facts.dtype, some.example, rows, some.loss, some.length)
        finish(run.directory)
    scratch.remove()


def sum_epochs(path: str | Path) -> Index:
    """Add an example's rows over the epochs, `Σ_e row_e`, into an index `sum` beside theirs.

    Args:
        path: the `path` of a `GradientCollectorCallback`, whose training is done.

    Returns:
        The index; its losses are those of the last epoch.

    Raises:
        FileNotFoundError: if there are no epochs.
        ValueError: if the epochs have other columns than one another.
    """
    path = Path(path)
    places = sorted(path.glob("epoch-*"), key=lambda place: int(place.name.split("-")[1]))
    if not places:
        raise FileNotFoundError(f"there is no epoch-*/ in {path}: collect with GradientCollectorCallback first")
    epochs = [open_index(place) for place in places]
    last = epochs[-1]
    if any(epoch.blocks != last.blocks for epoch in epochs):
        raise ValueError(f"the epochs in {path} have different blocks: they are of different collections")
    examples = torch.cat([epoch.index for epoch in epochs]).unique()
    size = int(last.about.plan["shard_size"])
    config = {**last.about.config, "epoch": None, "epochs": len(epochs)}
    with start(path / "sum", "index", config, (), last.about.plan, last.fingerprint, overwrite=True) as run:
        for number, begin in enumerate(range(0, len(examples), size)):
            some = examples[begin : begin + size]
            total = torch.zeros(len(some), last.dim, dtype=torch.float64)
            loss, length = torch.zeros(len(some), dtype=torch.float64), torch.zeros(len(some), dtype=torch.int64)
            for epoch in epochs:
                at = torch.isin(epoch.index, some).nonzero().flatten()
                to = torch.searchsorted(some, epoch.index[at])
                if len(at):
                    between = slice(int(at[0]), int(at[-1]) + 1)  # an index is sorted, so its part is contiguous
                    total[to] += epoch.matrix(between.start, between.stop)[at - at[0]]
                    loss[to], length[to] = epoch.loss[at].double(), epoch.length[at]
            wide = total if last.dtype == "float64" else total.float()
            _write_shard(run.directory, number, last.columns, last.dtype, some, last.columns.split(wide), loss, length)
        finish(run.directory)
    return open_index(path / "sum")


def _write_shard(
    directory: Path, number: int, columns: Columns, dtype: str, index: Tensor, rows: Any, loss: Tensor, length: Tensor
) -> None:
    sink = shard_sink(directory, number, None, columns, dtype)
    sink.finalize(sink.update(sink.init(), index, Collected(rows, loss, length)))
