"""The root of a run: one file that presents all shards, written last.

Its facts name every shard with its size, its checksums and where its datasets begin, so a reader can map the shards
without opening them one by one; its virtual datasets serve whoever has h5py and nothing else.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence import store
from influence.index.columns import Columns, from_json
from influence.index.provenance import Fingerprint
from influence.index.shards import KIND, ROOT, ShardFacts, check_index, owner, planned_shards, shard_name, shard_paths
from influence.index.shards import SCHEMA as SHARD_SCHEMA
from influence.store import BadFileError, Place
from influence.store.folder import RUN, Manifest, read_manifest, write_manifest
from influence.store.schema import conform

SCHEMA = 1

HEADER = "(header)"
"""Name of the checksum over a shard's bytes outside its datasets."""
MISSING: dict[str, Any] = {"bfloat16": 0x7FC0, "int8": -128, "int64": -1}
"""What a virtual dataset shows where a shard is gone; NaN for numbers."""


class Shard(NamedTuple):
    """What the root knows of a shard.

    Attributes:
        file: its name beside the root.
        bytes: its size.
        begin: the first row of the dataset in it.
        end: the one behind its last.
        examples: how many examples it holds.
        rows: how many rows.
        header: checksum of everything outside the datasets.
        places: where its datasets are, and their checksums.
    """

    file: str
    bytes: int
    begin: int
    end: int
    examples: int
    rows: int
    header: str
    places: dict[str, Place]


class About(NamedTuple):
    """What is known of an index.

    Attributes:
        kind: what the run holds.
        dtype: the stored type.
        per_token: whether there is a row for every token.
        columns: the blocks.
        fingerprint: what the rows are.
        config: the configuration.
        command: what to type to make it again.
        plan: the shards as planned.
        shards: the shards.
        appended: command, configuration and records of every append.
    """

    kind: str
    dtype: str
    per_token: bool
    columns: Columns
    fingerprint: Fingerprint
    config: dict[str, Any]
    command: list[str]
    plan: dict[str, Any]
    shards: tuple[Shard, ...]
    appended: tuple[dict[str, Any], ...] = ()

    def json(self) -> dict[str, Any]:
        """Return the facts as the root holds them."""
        known = {key: value for key, value in self._asdict().items() if key != "columns"}
        return known | {
            "blocks": self.columns.json(),
            "fingerprint": self.fingerprint.json(),
            "rows": sum(shard.rows for shard in self.shards),
            "examples": sum(shard.examples for shard in self.shards),
            "shards": [s._asdict() | {"places": {k: p._asdict() for k, p in s.places.items()}} for s in self.shards],
        }


class Facts(NamedTuple):
    """The facts of a root as JSON holds them; see `About`."""

    kind: str
    dtype: str
    per_token: bool
    fingerprint: dict[str, Any]
    config: dict[str, Any]
    command: list[str]
    plan: dict[str, Any]
    shards: tuple[Shard, ...]
    appended: tuple[dict[str, Any], ...]
    blocks: list[dict[str, Any]]
    rows: int
    examples: int


def about_of(facts: Any, where: str) -> About:
    """Return the facts of a root.

    Raises:
        BadFileError: if they are not what a root says.
    """
    held = conform(facts, Facts, where)
    for shard in held.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
            raise BadFileError(f"{where} is not what it says: {shard.file!r} is no shard beside it")
        store.check_places(shard.places, shard.bytes, where)
    columns = from_json(held.blocks, where)
    _check_shapes(held, columns.dim, where)
    known = {key: value for key, value in held._asdict().items() if key not in ("blocks", "rows", "examples")}
    return About(**{**known, "columns": columns, "fingerprint": Fingerprint.from_json(held.fingerprint)})


def _check_shapes(held: Facts, dim: int, where: str) -> None:
    """Refuse a root whose shards have other shapes than it says.

    Raises:
        BadFileError: naming the file and the shard.
    """
    for shard in held.shards:
        n, r = shard.examples, shard.rows
        wanted = {"rows": (r, dim), "loss": (n,), "length": (n,), "index": (n,)}
        wanted |= {"offsets": (n + 1,), "position": (r,)} if held.per_token else {}
        wanted |= {"document": (r,)} if "document" in shard.places else {}
        for key, shape in wanted.items():
            if key not in shard.places or shard.places[key].shape != shape:
                raise BadFileError(f"{where} is not what it says: {shard.file} has no {key!r} of the shape {shape}")
    if held.rows != sum(shard.rows for shard in held.shards):
        raise BadFileError(f"{where} is not what it says: its shards do not have {held.rows} rows together")


def read_root(directory: str | Path, run: str | None = None) -> About:
    """Read the root of a run.

    Args:
        directory: the run.
        run: the id that it should have; `None` takes any.

    Raises:
        FileNotFoundError: if there is none: the run was not finished.
        BadFileError: if it is damaged, of another schema or another run's.
    """
    path = Path(directory) / ROOT
    return about_of(store.read_facts(path, kind="index", schema=SCHEMA, run=run), str(path))


def finish(directory: str | Path) -> Path:
    """Write the root of a run whose shards are all there; replaced atomically if there is one.

    Args:
        directory: the run.

    Returns:
        The root.

    Raises:
        ValueError: if shards are missing, damaged, or of another run; naming the first.
    """
    directory = Path(directory)
    run = read_manifest(directory)
    planned = planned_shards(run)
    is_open = planned is None or run.plan.get("open", False)
    if is_open or planned is None:
        count = len(shard_paths(directory))
        if not count:
            raise ValueError(f"{directory} has no shard: an index of nothing still has one shard of no rows")
    else:
        count = len(planned)
    missing = [number for number in range(count) if not (directory / shard_name(number)).exists()]
    if missing:
        raise ValueError(
            f"{directory} is not finished: {len(missing)} of {count} shards are missing, the first of them "
            f"{shard_name(missing[0])}. Run it again to resume"
        )
    facts = [_facts(directory / shard_name(number), run, number, planned) for number in range(count)]
    first = facts[0]
    for number, other in enumerate(facts):
        for key in ("dtype", "per_token", "blocks"):
            mine, theirs = getattr(first, key), getattr(other, key)
            if mine != theirs:
                raise BadFileError(
                    f"{directory / shard_name(number)} has {key} {str(theirs)[:120]}, and {shard_name(0)} has "
                    f"{str(mine)[:120]}: they are no shards of one run"
                )
    shards = tuple(_shard(directory / shard_name(number), about) for number, about in enumerate(facts))
    if is_open:
        index = torch.cat([_dataset(directory, shard, "index") for shard in shards]).sort().values
        check_index(index, None, str(directory))
        plan = {key: value for key, value in run.plan.items() if key != "open"}
        run = run._replace(plan={**plan, "shards": [[shard.begin, shard.end] for shard in shards]})
        write_manifest(directory, run)
    about = About(
        run.kind,
        first.dtype,
        first.per_token,
        from_json(first.blocks, str(directory / shard_name(0))),
        Fingerprint.from_json(run.fingerprint),
        run.config,
        run.command,
        run.plan,
        shards,
        tuple(run.appended),
    )
    write_root(directory, about, run.id)
    return directory / ROOT


def _facts(path: Path, run: Manifest, number: int, planned: Any) -> ShardFacts:
    about = conform(
        store.read_facts(path, kind=KIND, schema=SHARD_SCHEMA, run=owner(run, number)), ShardFacts, str(path)
    )
    if about.number != number:
        raise BadFileError(f"{path} is shard {about.number}: delete it, and run this one again to resume")
    ends = [about.begin, about.end]
    if planned is not None and number < len(planned) and planned[number] != ends:
        raise ValueError(f"{path} holds rows {ends} of the dataset, and {RUN} plans {planned[number]}")
    return about


def _shard(path: Path, about: ShardFacts) -> Shard:
    places = store.locate(path)
    ends = about.begin, about.end, about.examples, about.rows
    return Shard(path.name, path.stat().st_size, *ends, header_of(path, places), places)


def header_of(path: Path, places: dict[str, Place]) -> str:
    """Return the checksum of a file's bytes outside its datasets."""
    digest = hashlib.sha256()
    end = 0
    with open(path, "rb") as file:
        for place in sorted(place for place in places.values() if place.bytes):
            file.seek(end)
            digest.update(file.read(place.offset - end))
            end = place.offset + place.bytes
        file.seek(end)
        digest.update(file.read())
    return digest.hexdigest()


def write_root(directory: Path, about: About, run: str = "") -> None:
    """Write the root, atomically."""

    def present(file: Any) -> None:
        names = {key for shard in about.shards for key in shard.places} - {"offsets"}
        for key in sorted(names):
            _virtual(file, key, about.shards)

    offsets = {"offsets": global_offsets(directory, about.shards)} if about.per_token else {}
    store.write(directory / ROOT, offsets, about.json(), kind="index", schema=SCHEMA, run=run, extend=present)


def global_offsets(directory: Path, shards: Sequence[Shard]) -> Tensor:
    """Return where each example's rows begin, counted over all shards."""
    found, rows = [torch.zeros(1, dtype=torch.int64)], 0
    for shard in shards:
        found.append(_dataset(directory, shard, "offsets")[1:] + rows)
        rows += shard.rows
    return torch.cat(found)


def _dataset(directory: Path, shard: Shard, name: str) -> Tensor:
    return store.mapped(store.map_file(directory / shard.file), shard.places[name])


def _virtual(file: Any, key: str, shards: Sequence[Shard]) -> None:
    import h5py

    having = [shard for shard in shards if key in shard.places]
    if any(shard.rows and key not in shard.places for shard in shards):
        return  # known of some alone
    first = having[0].places[key]
    dtype = "<u2" if first.dtype == "bfloat16" else _numpy(first.dtype)
    length = sum(shard.places[key].shape[0] for shard in having)
    if length and all(first.shape[1:]):
        layout = h5py.VirtualLayout((length, *first.shape[1:]), dtype)
        layout.dcpl.set_obj_track_times(False)  # the same rows are the same bytes
        begin = 0
        for shard in having:
            shape = shard.places[key].shape
            if shape[0]:
                layout[begin : begin + shape[0]] = h5py.VirtualSource(shard.file, key, shape, dtype)
            begin += shape[0]
        dataset = file.create_virtual_dataset(key, layout, fillvalue=MISSING.get(first.dtype, float("nan")))
    else:
        dataset = file.create_dataset(key, (length, *first.shape[1:]), dtype)
    if first.dtype == "bfloat16":
        dataset.attrs["dtype"] = "bfloat16"


def _numpy(dtype: str) -> Any:
    import numpy

    return numpy.dtype(dtype).newbyteorder("<")
