"""The plan of a pass: what will be done, how long it takes, what it needs. Printed before anything is written."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence import data
from influence.pipelines.frame.configs import RunConfig
from influence.pipelines.frame.prepare import peak_memory
from influence.terminal import duration, size


class Prediction(NamedTuple):
    """What a pass will take.

    Attributes:
        what: what is made, in words.
        directory: where.
        examples: examples of all shards.
        tokens: tokens of all shards.
        shards: how many shards there are.
        world: how many ranks share them.
        speed: tokens a second of one rank, measured on one full batch.
        seconds: of the pass.
        memory: bytes of one rank at its peak.
        disk: bytes that will be written.
        free: bytes that the disk has.
        notes: whatever else is worth knowing.
    """

    what: str
    directory: str
    examples: int
    tokens: int
    shards: int
    world: int
    speed: float
    seconds: float
    memory: int
    disk: int
    free: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the plan as one line, and a line for each note."""
        ranks = "" if self.world == 1 else f" on {self.world} ranks"
        line = (
            f"plan: {self.what} → {self.directory}: {self.examples:,} examples, {self.tokens:,} tokens in "
            f"{self.shards:,} shard{'s' * (self.shards != 1)}{ranks}; about {duration(self.seconds)} at "
            f"{self.speed * self.world:,.0f} tokens/s; memory about {size(self.memory)}; disk {size(self.disk)} of "
            f"{size(self.free)} free"
        )
        return "\n".join([line, *(f"      {note}" for note in self.notes)])


def predict(
    what: str,
    directory: Path,
    shards: Sequence[data.Tokenized],
    step: Callable[[dict[str, Tensor]], Any],
    first: dict[str, Tensor],
    execution: RunConfig,
    *,
    world: int = 1,
    disk: int = 0,
    memory: int = 0,
    notes: Sequence[str] = (),
    resumes: bool = True,
) -> Prediction:
    """Predict a pass from one batch, timed.

    Args:
        what: what is made.
        directory: where.
        shards: all shards.
        step: what is done with a batch.
        first: a full batch, which was seen once already.
        execution: how batches are packed.
        world: how many ranks there are.
        disk: bytes that will be written.
        memory: bytes that are held besides what the step takes.
        notes: whatever else is worth knowing.
        resumes: whether shards that are there are of this run.

    Returns:
        The prediction, of what is left to do.

    Raises:
        OSError: if the disk has not that much room.
    """
    began = time.perf_counter()
    step(first)
    if execution.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    positions = sum(
        len(rows) * max(1, int(shard.lengths[rows].max()))
        for shard in shards
        for rows in data.pack(shard.lengths, execution.token_budget, execution.max_rows)
    )
    whole = positions / first["input_ids"].numel() * seconds
    tokens = sum(len(shard.ids) for shard in shards)
    speed = tokens / whole if whole else 0.0
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    ready = [*directory.glob("shard-*.h5")] if resumes and not execution.overwrite else []
    if ready:
        notes = [f"{len(ready):,} of {len(shards):,} shards are there already", *notes]
        whole *= max(len(shards) - len(ready), 0) / len(shards)
        disk = max(disk - sum(path.stat().st_size for path in ready), 0)
    if disk > free:
        raise OSError(
            f"no space: {directory} will take {size(disk)} and its disk has {size(free)} free. Choose a smaller "
            "--projection-dim, a half-precision --dtype, or another disk"
        )
    return Prediction(
        what,
        str(directory),
        sum(len(shard) for shard in shards),
        tokens,
        len(shards),
        world,
        speed,
        whole / world,
        peak_memory(execution.device) + memory,
        disk,
        free,
        tuple(note for note in notes if note),
    )


def first_batch(shards: Sequence[data.Tokenized], batches: Callable[[data.Tokenized], Any]) -> dict[str, Tensor]:
    """Return the first batch of a dataset, whose packing puts its longest examples there.

    Raises:
        ValueError: if there is no example.
    """
    for shard in shards:
        made = batches(shard)
        for batch in made:
            made.close()
            return batch
    raise ValueError("the dataset has no example")


def shard_ranges(shards: Sequence[data.Tokenized]) -> list[tuple[int, int]]:
    """Return where each shard begins and ends in the dataset, for `run.json`."""
    begins = [int(shard.index[0]) for shard in shards]
    return [(begin, begin + len(shard)) for begin, shard in zip(begins, shards, strict=True)]
