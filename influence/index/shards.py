"""Shards: their names, which of a run are whole, and the sink that writes a slice of a dataset's rows to one file.

Rows may come in any order, as packing has it, and in any batches: `index` says which is which. So the file is the same
for every batch size, world size and resume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence import store
from influence.func.fold import Sink
from influence.func.loss.losses import widen
from influence.index.columns import Columns, Encoded, Unstorable, check_dtype, encode
from influence.store import BadFileError
from influence.store.folder import RUN, Manifest, read_manifest
from influence.store.schema import conform
from influence.types import Rows

ROOT = "index.h5"
SHARDS, PARTIALS = "shard-#.h5", "partial-#.h5"
NEIGHBOURS = "faiss"
"""Directory of the FAISS indexes that were made of a run; they are made again when they are gone."""
FILES = (ROOT, f"{NEIGHBOURS}/", SHARDS)
"""What a run of rows may hold; the root, by which it is finished, first."""
SCHEMA = 1
KIND = "shard"


class Collected(NamedTuple):
    """What a step gives a shard: the rows of a batch, and what is known of its examples.

    Attributes:
        rows: `{block: [n, …]}`, or `[total, …]` where every token has a row.
        loss: each example's loss.
        length: each example's tokens; 1 each if nothing is said.
        document: for chunks, the row of the dataset that each row is from.
        offsets: for token rows, where each example's begin, and where the last one's end.
        positions: for token rows, each row's position in its example.
    """

    rows: Rows
    loss: Float[Tensor, " n"]
    length: Int[Tensor, " n"] | None = None
    document: Int[Tensor, " r"] | None = None
    offsets: Int[Tensor, " n_and_1"] | None = None
    positions: Int[Tensor, " r"] | None = None


class ShardFacts(NamedTuple):
    """The facts of a shard as JSON holds them."""

    number: int
    begin: int
    end: int
    examples: int
    rows: int
    dtype: str
    per_token: bool
    blocks: list[dict[str, Any]]


@dataclass(frozen=True)
class StoredBatch:
    """A batch as it will be stored."""

    index: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    stored: Encoded
    per_example: dict[str, Tensor]
    per_row: dict[str, Tensor]


class StoredBatches(NamedTuple):
    """What a shard has seen so far."""

    parts: tuple[StoredBatch, ...]


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.h5"


def shard_paths(directory: str | Path) -> list[Path]:
    """Return the files of a directory that are named as shards are."""
    return sorted(path for path in Path(directory).glob("shard-*.h5") if path.stem.partition("-")[2].isdecimal())


def number_of(path: Path) -> int:
    """Return a shard's number, as its name says it."""
    return int(path.stem.partition("-")[2])


def planned_shards(manifest: Manifest) -> list[list[int]] | None:
    """Return begin and end of every planned shard; `None` where they come as they come."""
    shards = manifest.plan.get("shards")
    where = f"{RUN}: the plan's shards"
    return None if shards is None else [[*ends] for ends in conform(shards, list[tuple[int, int]], where)]


def owner(manifest: Manifest, number: int) -> str:
    """Return the id that a shard carries: the run's, or that of the append which it came with."""
    ids = [str(change["id"]) for change in manifest.appended if int(change["first"]) <= number]
    return ids[-1] if ids else manifest.id


def stamp(directory: str | Path, number: int) -> str:
    """Return the id that a shard of a directory carries; nothing where no run was started."""
    return owner(read_manifest(directory), number) if (Path(directory) / RUN).exists() else ""


def done(directory: str | Path, first: int = 0, every_byte: bool = True) -> set[int]:
    """Return the numbers of the shards of a run that are there and whole.

    Args:
        directory: the run.
        first: the first that is looked at: those before it are an index's, to which others are appended.
        every_byte: read every byte of them; otherwise what they say of themselves, which shows what was cut off.

    Returns:
        The numbers.

    Raises:
        BadFileError: if a shard is another run's.
    """
    manifest = read_manifest(directory) if (Path(directory) / RUN).exists() else None
    finished = set()
    for path in [path for path in shard_paths(directory) if number_of(path) >= first]:
        number = number_of(path)
        try:
            store.any_head(path)
        except BadFileError:
            continue  # cut off or damaged: it is made again
        run = "" if manifest is None else owner(manifest, number)
        head = store.read_head(path, kind=KIND, schema=SCHEMA, run=run)
        try:
            if every_byte:
                store.check_whole(path, kind=KIND, schema=SCHEMA, run=run)
        except BadFileError:
            continue
        if head.about["number"] == number:
            finished.add(number)
    return finished


def shard_sink(
    directory: str | Path,
    number: int,
    expected: tuple[int, int] | None,
    columns: Columns,
    dtype: str = "float32",
    per_token: bool = False,
) -> Sink:
    """Return a sink that holds one shard's rows as they will be stored, and writes them when it is finalised.

    Args:
        directory: the run, already started.
        number: the shard's number in the plan.
        expected: the dataset's rows `begin` to `end` that the shard must hold, each once; `None` takes what comes.
        columns: the blocks of a row: `Columns(rows_of.plan.folded.row_shapes)`.
        dtype: the stored type.
        per_token: whether there is a row for every token.

    Returns:
        A sink of `Collected` values, whose result is the file. Holding a shard takes twice its size of memory when it
        is written.

    Raises:
        ValueError: if the type is unknown; when finalised, if examples are missing or came twice.
    """
    check_dtype(dtype)
    path = Path(directory) / shard_name(number)

    def finalize(state: StoredBatches) -> Path:
        tensors = gather(state, expected, columns, dtype, per_token, str(path))
        (index,) = tensors["index"]
        ends = expected or ((int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0))
        about = {
            "number": number,
            "begin": ends[0],
            "end": ends[1],
            "examples": len(index),
            "rows": sum(map(len, tensors["rows"])),
            "dtype": dtype,
            "per_token": per_token,
            "blocks": columns.json(),
        }
        store.write(path, tensors, about, kind=KIND, schema=SCHEMA, run=stamp(directory, number))
        return path

    return _sink(columns, dtype, per_token, finalize)


def memory_sink(columns: Columns, dtype: str = "float32", per_token: bool = False) -> Sink:
    """Return the same sink for rows that stay in memory: its result are the tensors that a file would hold."""
    check_dtype(dtype)

    def finalize(state: StoredBatches) -> dict[str, Tensor]:
        found = gather(state, None, columns, dtype, per_token, "the rows in memory")
        return {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in found.items()}

    return _sink(columns, dtype, per_token, finalize)


def _sink(columns: Columns, dtype: str, per_token: bool, finalize: Any) -> Sink:
    def update(state: StoredBatches, index: Int[Tensor, " n"], value: Collected) -> StoredBatches:
        return StoredBatches((*state.parts, stored_batch(index.cpu(), value, columns, dtype, per_token)))

    return Sink(lambda: StoredBatches(()), update, lambda a, b: StoredBatches(a.parts + b.parts), finalize)


def stored_batch(
    index: Int[Tensor, " n"], value: Collected, columns: Columns, dtype: str, per_token: bool
) -> StoredBatch:
    """Return a batch as it will be stored.

    Raises:
        ValueError: if it has token rows where there should be none, or the other way round, or a row that cannot be
            stored.
    """
    if (value.offsets is None) == per_token:
        got, wanted = ("no offsets", "token") if per_token else ("offsets", "example")
        raise ValueError(
            f"this shard has a row for every {wanted}, and the batch has {got}: pass per_token={not per_token}"
        )
    rows = columns.joined(value.rows)
    counts = torch.ones_like(index) if value.offsets is None else value.offsets.diff().cpu()
    length = torch.ones_like(index) if value.length is None else value.length.cpu()
    if not (len(index) == len(value.loss) == len(counts) == len(length) and int(counts.sum()) == len(rows)):
        raise ValueError(
            f"a batch of {len(index)} examples came with {len(value.loss)} losses, {len(length)} lengths and "
            f"{len(rows)} rows for {int(counts.sum())}"
        )
    try:
        stored = encode(rows, dtype, columns)
    except Unstorable as error:
        which = int(index.repeat_interleave(counts)[error.row])
        raise ValueError(f"example {which} of the dataset: {error}") from error
    per_row = {} if value.positions is None else {"position": value.positions.long().cpu()}
    if value.document is not None:
        per_row["document"] = value.document.long().cpu()
    per_example = {"loss": widen(value.loss.detach()).cpu(), "length": length.long()}
    return StoredBatch(
        index.long(),
        counts,
        Encoded(stored.values.cpu(), None if stored.scale is None else stored.scale.cpu()),
        per_example,
        per_row,
    )


def gather(
    state: StoredBatches, expected: tuple[int, int] | None, columns: Columns, dtype: str, per_token: bool, name: str
) -> dict[str, list[Tensor]]:
    """Return the tensors of a shard in the dataset's order, each in pieces.

    Raises:
        ValueError: if examples are missing, came twice, or should not be here.
    """
    parts = state.parts or (_nothing(columns, dtype, per_token),)
    index, order = torch.cat([part.index for part in parts]).sort(stable=True)
    check_index(index, expected, name)
    counts = torch.cat([part.counts for part in parts])
    offsets = torch.cat([counts.new_zeros(1), counts[order].cumsum(0)])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    places = place.split([len(part.index) for part in parts])
    in_runs = all(bool((each.diff() == 1).all()) for each in places)
    if in_runs:  # nothing to move: the pieces are written one after the other
        first = [int(each[0]) if len(each) else -1 for each in places]
        parts = tuple(parts[number] for number in sorted(range(len(parts)), key=first.__getitem__))

    def by_row(tensors: list[Tensor]) -> list[Tensor]:
        return tensors if in_runs else [_placed(tensors, parts, places, offsets)]

    found = {"rows": by_row([part.stored.values for part in parts]), "index": [index]}
    scales = [part.stored.scale for part in parts if part.stored.scale is not None]
    if scales:
        found["scale"] = by_row(scales)
    for key in parts[0].per_example:
        each = torch.cat([part.per_example[key] for part in parts])
        found[key] = [each if in_runs else each[order]]
    for key in parts[0].per_row:
        found[key] = by_row([part.per_row[key] for part in parts])
    return found | ({"offsets": [offsets]} if per_token else {})


def check_index(index: Int[Tensor, " n"], expected: tuple[int, int] | None, name: str) -> None:
    """Refuse sorted rows of a dataset that are not each there once.

    Raises:
        ValueError: naming the first that is wrong.
    """
    again = index[1:][index.diff() == 0]
    if len(again):
        raise ValueError(
            f"{name}: row {int(again[0])} of the dataset came more than once ({len(again)} such): `index` must count "
            "on over all batches"
        )
    if expected is None:
        return
    wanted = torch.arange(*expected)
    if torch.equal(index, wanted):
        return
    missing = wanted[~torch.isin(wanted, index)]
    foreign = index[~torch.isin(index, wanted)]
    if len(missing) or len(foreign):
        which, count = ("did not come", missing) if len(missing) else ("do not belong here", foreign)
        raise ValueError(
            f"{name} holds rows {expected[0]} to {expected[1] - 1} of the dataset; {len(count)} {which}, the first of "
            f"them {int(count[0])}"
        )


def _placed(
    tensors: list[Tensor], parts: tuple[StoredBatch, ...], places: tuple[Tensor, ...], offsets: Int[Tensor, " n_and_1"]
) -> Tensor:
    """Put what came in parts where its examples belong."""
    out = tensors[0].new_empty((int(offsets[-1]), *tensors[0].shape[1:]))
    for part, place, tensor in zip(parts, places, tensors, strict=True):
        within = torch.arange(len(tensor)) - (part.counts.cumsum(0) - part.counts).repeat_interleave(part.counts)
        out[offsets[place].repeat_interleave(part.counts) + within] = tensor
    return out


def _nothing(columns: Columns, dtype: str, per_token: bool) -> StoredBatch:
    none = torch.zeros(0, dtype=torch.int64)
    value = Collected(
        {name: torch.zeros(0, *shape) for name, shape in columns.shapes.items()},
        torch.zeros(0),
        offsets=torch.zeros(1, dtype=torch.int64) if per_token else None,
        positions=none if per_token else None,
    )
    return stored_batch(none, value, columns, dtype, per_token)
