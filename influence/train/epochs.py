"""Epochs: from the rows of an epoch to its index, in the dataset's order, and back."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from influence.func.loss.losses import widen
from influence.index import Fingerprint, Index, finish, open_index, shard_sink, start
from influence.index.columns import Encoded
from influence.index.shards import ROOT, StoredBatch, StoredBatches
from influence.store import BadFileError, sync
from influence.store.folder import RUN, Manifest, clear, read_manifest, refuse_foreign
from influence.train.facts import Training
from influence.train.order import Laid, Log, first_of, laid
from influence.train.scratch import Scratch, checksums, make_scratch, remove_scratch

AT_ONCE = 1 << 26
"""Bytes of rows that are moved at once."""


def epoch_path(path: Path, epoch: int) -> Path:
    """Return where an epoch's index is."""
    return path / f"epoch-{epoch}"


def index_of(training: Training, place: Path) -> Manifest | None:
    """Return the manifest of an index that this run began in a folder of its own; `None` where the place is free.

    Raises:
        FileExistsError: if something else is there.
    """
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise FileExistsError(f"{place} is no folder of this training's: move it away, or write to another directory")
    refuse_foreign(place)
    if not (place / RUN).exists():
        return None
    found = read_manifest(place)
    if found.plan.get("training") != training.id:
        raise FileExistsError(f"{place} holds another run: move it away, or write to another directory")
    return found


def is_whole(training: Training, logs: Sequence[Log], epoch: int) -> bool:
    """Whether the index of an epoch is there, and of the very steps that the order logs have."""
    place = epoch_path(training.path, epoch)
    found = index_of(training, place)
    return found is not None and (place / ROOT).exists() and found.plan.get("order") == heads(logs, epoch)


def heads(logs: Sequence[Log], epoch: int) -> list[str]:
    """Return each process's checksum of all that it saw up to the end of an epoch."""
    return [log.head(epoch) for log in logs]


def epochs_of(logs: Sequence[Log]) -> list[int]:
    """Return the epochs that the order logs have steps of."""
    return sorted({line.epoch for log in logs for line in log.lines})


def write_epoch(training: Training, logs: Sequence[Log], epoch: int) -> None:
    """Write the index of the examples that an epoch visited, shard by shard, and remove the rows that it is made of.

    An example that came twice (as ranks pad their last batch) has its first visit's row: what a resume keeps is then
    what was there before the epoch went on.
    """
    found = laid(logs, epoch)
    found = found.where(first_of(found.visits.example))
    steps = [line.step for log in logs for line in log.lines if line.epoch == epoch]
    more = {"training": training.id, "epoch": epoch, "steps": [min(steps), max(steps) + 1]}
    files = {
        rank: Scratch(training.path, training.id, epoch, rank, training.stored)
        for rank in found.visits.rank.unique().tolist()
    }
    try:
        write_index(
            training,
            epoch_path(training.path, epoch),
            found.visits.example,
            {**more, "order": heads(logs, epoch)},
            {"epoch": epoch},
            lambda at: _part(training, files, found.where(torch.arange(at.start, at.stop))),
        )
    finally:
        for file in files.values():
            file.close()
    remove_scratch(training.path, training.id, epoch, range(training.plan.world))


def write_index(
    training: Training,
    directory: Path,
    examples: Int[Tensor, " n"],
    more: dict[str, Any],
    said: dict[str, Any],
    part: Any,
) -> None:
    """Write an index of some examples.

    Args:
        training: the run.
        directory: where.
        examples: the examples, sorted.
        more: what its plan has beside the training's.
        said: what its configuration has beside the training's.
        part: makes the rows of a slice of the examples.
    """
    size = training.plan.shard_size
    slices = [slice(begin, min(begin + size, len(examples))) for begin in range(0, len(examples), size)]
    shards = [[int(examples[at.start]), int(examples[at.stop - 1]) + 1] for at in slices]
    plan = {"dtype": training.plan.dtype, "shard_size": size, "per_token": False, **more, "shards": shards}
    config = {**training.manifest.config, **said}
    fingerprint = Fingerprint.from_json(training.manifest.fingerprint)
    index_of(training, directory)
    with start(directory, "index", config, (), plan, fingerprint, overwrite=True) as run:
        for number, at in enumerate(slices):
            sink = shard_sink(run.directory, number, None, training.stored.columns, training.plan.dtype)
            sink.finalize(StoredBatches((part(at),)))
        finish(run.directory)


def unwrite_epoch(training: Training, logs: Sequence[Log], epoch: int) -> None:
    """Make the rows of an epoch's visits of its index again, and then let go of that: the epoch goes on.

    A visit that was not its example's first has no row in the index. Its place is filled with zeros, which nothing
    reads: the first visit stays the first, whatever comes behind it.

    Raises:
        BadFileError: if the index holds other rows than the order logs say.
    """
    place = epoch_path(training.path, epoch)
    index, found = open_index(place), laid(logs, epoch)
    if index.dtype != training.plan.dtype or index.blocks != dict(training.stored.columns.shapes):
        raise BadFileError(f"{place} holds other rows than its training: restore it, or write to another directory")
    first = torch.zeros(len(found.crc), dtype=torch.bool)
    first[first_of(found.visits.example)] = True
    for rank in range(training.plan.world):
        mine = found.visits.rank == rank
        back = found.number[mine].argsort()
        rows = found.where(mine).where(back)
        pieces = _rows_again(training, index, rows, first[mine][back])
        make_scratch(training.path, training.id, epoch, rank, training.stored, pieces, len(rows.crc))
    let_go(place)


def let_go(place: Path) -> None:
    """Remove an index of ours, its root first: it is not finished from then on, whatever happens."""
    (place / ROOT).unlink(missing_ok=True)
    sync(place)
    clear(place, read_manifest(place))


def _part(training: Training, files: dict[int, Scratch], some: Laid) -> StoredBatch:
    """Return visits' rows and what is known of them as a shard takes them."""
    stored = training.stored
    data = torch.zeros(len(some.crc), stored.bytes, dtype=torch.uint8).numpy()
    for rank, file in files.items():
        mine = some.visits.rank == rank
        try:
            data[mine.numpy()] = file.take(some.number[mine], some.crc[mine])
        except BadFileError as error:
            raise BadFileError(f"{error} (epoch {int(some.visits.epoch[0])})") from error
    per_example = {"loss": widen(some.visits.loss), "length": some.visits.length}
    return StoredBatch(some.visits.example, torch.ones_like(some.number), stored.encoded(data), per_example, {})


def _rows_again(training: Training, index: Index, rows: Laid, first: Tensor) -> Iterator[Any]:
    """Yield the bytes of visits' rows as an index has them, some at a time."""
    stored = training.stored
    size = max(1, AT_ONCE // max(stored.bytes, 1))
    for begin in range(0, len(rows.crc), size):
        some = slice(begin, begin + size)
        data = torch.zeros(len(rows.crc[some]), stored.bytes, dtype=torch.uint8).numpy()
        kept = first[some]
        if not bool(kept.any()):
            yield data.tobytes()
            continue
        example = rows.visits.example[some][kept]
        at = torch.searchsorted(index.index, example).clamp_max(max(len(index) - 1, 0))
        there = len(index) and torch.equal(index.index[at], example)
        found = stored.joined(_taken(index, at)) if there else data[:0]
        if not there or checksums(found) != rows.crc[some][kept].tolist():
            raise BadFileError(
                f"{index.path} holds other rows than the order log says: it was put here from elsewhere, or the log "
                "was. Restore them, or write to another directory"
            )
        data[kept.numpy()] = found
        yield data.tobytes()


def _taken(index: Index, rows: Int[Tensor, " m"]) -> Encoded:
    """Return rows of an index as they are stored."""
    values, scales, places, begin = [], [], [], 0
    for part in index.parts:
        here = ((rows >= begin) & (rows < begin + part.rows)).nonzero()[:, 0]
        if len(here):
            stored, scale = part.get("rows"), part.get("scale")
            assert stored is not None
            places.append(here)
            values.append(stored[rows[here] - begin])
            scales += [] if scale is None else [scale[rows[here] - begin]]
        begin += part.rows
    back = torch.cat(places).argsort()
    return Encoded(torch.cat(values)[back], torch.cat(scales)[back] if scales else None)
