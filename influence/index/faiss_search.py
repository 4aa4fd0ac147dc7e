"""Approximate search with FAISS: its index of the rows, kept beside them, and the exact scan where it finds too few."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func import top
from influence.func.numbers import check_number
from influence.func.similarity import Nearest
from influence.index import scan
from influence.index.columns import Chosen, choose
from influence.index.rows import Index
from influence.index.scan import all_decoded
from influence.index.shards import NEIGHBOURS
from influence.store import BadFileError, Lock, sync
from influence.store.folder import (
    RUN,
    Manifest,
    discard,
    manifest_of,
    read_manifest,
    write_manifest,
)
from influence.store.replacing import TEMPORARY
from influence.terminal import human

PER_LIST = 256
"""Rows that k-means looks at per centroid at most."""


@dataclass(frozen=True)
class FaissConfig:
    """Approximate search with FAISS: faster, may miss neighbours.

    Attributes:
        index_factory: FAISS's own description: Flat is exact, IVF1024,Flat looks into nprobe of 1024 cells,
            IVF1024,PQ64 stores 64 bytes per row; None leaves FAISS out: all rows are scanned, which is exact.
        mmap_index: leave the FAISS index on disk and map it, instead of holding it in memory.
        max_train_examples: rows that cells and codes are learned from, taken evenly over the index; default as many as
            FAISS looks at.
        batch_size: rows added at a time.
        num_shards: cut it into so many files; with mmap_index only one of them is in memory while they are built.
        nprobe: cells that are looked into; more are more exact, all are exact.

    Example:
        >>> FaissConfig("IVF1024,Flat", nprobe=32).num_shards
        1
    """

    index_factory: str | None = "Flat"
    mmap_index: bool = False
    max_train_examples: int | None = None
    batch_size: int = 1024
    num_shards: int = 1
    nprobe: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers below 1.

        Raises:
            ValueError: naming the field.
        """
        for name in ("max_train_examples", "batch_size", "num_shards", "nprobe"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 1)

    @property
    def factory(self) -> str:
        """The description that FAISS is given."""
        assert self.index_factory is not None, "all rows are scanned"
        return self.index_factory


@dataclass(frozen=True)
class Neighbours:
    """A FAISS index, in shards of consecutive rows.

    Attributes:
        shards: the FAISS indexes.
        begins: the first row of each.
    """

    shards: tuple[Any, ...]
    begins: tuple[int, ...]

    def search(self, queries: Float[Tensor, "q d"], k: int, nprobe: int) -> Nearest:
        """Return the neighbours that FAISS finds: largest products first, equal ones by row.

        Args:
            queries: queries over all columns.
            k: how many.
            nprobe: cells that are looked into, where there are cells.

        Returns:
            Values and rows; `-inf` and -1 where FAISS found fewer than `k`.
        """
        import faiss

        wanted = queries.detach().cpu().float().contiguous().numpy()
        best: top.Top | None = None
        for shard, begin in zip(self.shards, self.begins, strict=True):
            cells = faiss.try_extract_index_ivf(shard)
            if cells is not None:
                cells.nprobe = min(nprobe, cells.nlist)
            graph = getattr(shard, "hnsw", None)
            if graph is not None:
                graph.efSearch = max(graph.efSearch, k)
            found, ids = map(torch.from_numpy, shard.search(wanted, k))
            missing = ids < 0
            mine = top.Top(found.masked_fill(missing, -torch.inf), torch.where(missing, -1, ids + begin))
            best = top.merge(top.start(found, k) if best is None else best, mine)
        assert best is not None
        return Nearest(best.values, best.indices)


def begins_of(number: int, shards: int) -> tuple[int, ...]:
    """Return the first row of each shard."""
    return tuple(number * shard // shards for shard in range(shards))


def shards_of(index: Index, config: FaissConfig) -> Iterator[tuple[int, Any]]:
    """Yield the number and the FAISS index of each shard; whoever takes them decides what stays in memory."""
    import faiss

    empty = _trained(index, config)
    begins = (*begins_of(len(index), config.num_shards), len(index))
    rows = _matrices(index, config.batch_size)
    left = torch.empty(0, index.dim)
    for number in range(config.num_shards):
        shard, size = faiss.clone_index(empty), begins[number + 1] - begins[number]
        while shard.ntotal < size:
            left = left if len(left) else next(rows)
            taken = min(len(left), size - shard.ntotal)
            shard.add(left[:taken].numpy())
            left = left[taken:]
        yield number, shard
        del shard


def _matrices(index: Index, at_once: int) -> Iterator[Float[Tensor, "r d"]]:
    """Yield all rows in float32."""
    for rows, scale in all_decoded(index.pieces(at_once), choose(index.blocks), torch.float32, torch.device("cpu")):
        yield (rows if scale is None else rows * scale).contiguous()


def _trained(index: Index, config: FaissConfig) -> Any:
    """Return an empty FAISS index that has learned its cells and codes."""
    import faiss

    dim = index.dim
    try:
        empty = faiss.index_factory(dim, config.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS does not understand index_factory={config.index_factory!r} for rows of {dim}: {_said(error)}"
        ) from error
    cells = faiss.try_extract_index_ivf(empty)
    learned = max(PER_LIST * (1 if cells is None else cells.nlist), PER_LIST * PER_LIST)
    count = 0 if empty.is_trained else min(len(index), config.max_train_examples or learned)
    _check_memory(empty, len(index), dim, count, config)
    if not empty.is_trained:
        try:
            empty.train(_sample(index, count, config.batch_size).numpy())
        except RuntimeError as error:
            raise ValueError(
                f"FAISS cannot learn {config.index_factory!r} from {count} rows ({_said(error)}): choose fewer cells "
                "or codes, or 'Flat'"
            ) from error
    return empty


def _said(error: RuntimeError) -> str:
    """Return what FAISS says, without the place in its source."""
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: '.*?' failed: )?", "", str(error))


def _sample(index: Index, count: int, at_once: int) -> Float[Tensor, "r d"]:
    """Return rows taken evenly over the index."""
    wanted = torch.arange(count) * len(index) // count
    parts, begin = [], 0
    for rows in _matrices(index, at_once):
        inside = wanted[(wanted >= begin) & (wanted < begin + len(rows))]
        parts.append(rows[inside - begin])
        begin += len(rows)
    return torch.cat(parts)


def _check_memory(empty: Any, number: int, dim: int, train: int, config: FaissConfig) -> None:
    """Refuse to build what does not fit.

    Raises:
        MemoryError: saying how much is needed, how much there is, and what needs less.
    """
    try:
        per_row = empty.sa_code_size() + 8
    except RuntimeError:  # graphs do not say: a vector, and about 64 links in two directions
        per_row = 4 * dim + 512
    held = -(-number // config.num_shards) if config.mmap_index else number
    needed, available = max(held * per_row, 4 * train * dim), available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"FAISS {config.index_factory!r} over {number:,} rows of {dim} needs about {human(needed)}B of memory; "
            f"{human(available)}B are available. Use mmap_index=True with num_shards={-(-needed * 2 // available)}, a "
            "compressed index_factory such as 'IVF1024,PQ64', or search without FAISS, which streams the rows"
        )


def available_memory() -> int | None:
    """Return the bytes of memory that are available, where the system says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    said = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if said is None else int(said.split()[1]) << 10


KIND = "faiss"


def neighbours(index: Index, config: FaissConfig) -> Neighbours:
    """Return the FAISS index of some rows: the one that is kept, or a new one, which is then kept.

    It is kept beside the rows; where that disk cannot be written, in the user's cache.

    Args:
        index: the rows; of an index in memory it stays there.
        config: how.

    Returns:
        The FAISS index.

    Raises:
        ValueError: if FAISS does not understand the factory, or cannot learn it from so few rows.
        BadFileError: if something else stands where it would be kept.
        MemoryError: if it would not fit.
    """
    import faiss

    begins, beside = begins_of(len(index), config.num_shards), index.path
    if beside is None:
        return Neighbours(tuple(shard for _, shard in shards_of(index, config)), begins)
    names = [f"{number}.faiss" for number in range(config.num_shards)]
    key = {
        "faiss": faiss.__version__,
        "index_factory": config.index_factory,
        "max_train_examples": config.max_train_examples,
        "num_shards": config.num_shards,
        "rows": _identity(index),
    }
    wanted = manifest_of(KIND, {}, [], key, {}, names)
    name = f"{config.factory.replace(',', '_')}-{wanted.id[:16]}"
    places = [folder / name for folder in (beside / NEIGHBOURS, cache())]
    directory = next((place for place in places if _is_kept(place, wanted)), None)
    if directory is None:
        directory = places[0 if os.access(beside, os.W_OK) else 1]
        _keep(directory, wanted, index, config)
    ends = [*begins[1:], len(index)]
    sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
    read = (_read(directory / each, config, index.dim, n) for each, n in zip(names, sizes, strict=True))
    return Neighbours(tuple(read), begins)


def _identity(index: Index) -> dict[str, Any]:
    """Return what changes when anything about an index's rows does: its fingerprint, and every shard's checksums."""
    checksums = [
        [shard.places[name].sha256 for name in ("rows", "scale") if name in shard.places]
        for shard in index.about.shards
    ]
    return {"fingerprint": index.fingerprint.json(), "shards": checksums}


def cache() -> Path:
    """Return where FAISS indexes of rows on a disk that cannot be written are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "influence" / NEIGHBOURS


def _keep(directory: Path, wanted: Manifest, index: Index, config: FaissConfig) -> None:
    """Write all shards and their checksums to a temporary directory, then rename it."""
    import faiss

    folder = directory.parent
    if folder.is_symlink():
        raise BadFileError(f"{folder} is a link out of its directory, which is not followed: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, wait=True):
        if _is_kept(directory, wanted):  # by another process, meanwhile
            return
        _forget(folder, wanted)
        if directory.exists():  # and a file of it is damaged
            discard(directory)
        temporary = folder / f".{directory.name}.{wanted.id[:16]}.{secrets.token_hex(8)}.partial"
        temporary.mkdir()
        sums = {}
        for number, shard in shards_of(index, config):
            path = temporary / wanted.files[number]
            faiss.write_index(shard, str(path))
            sync(path)
            sums[path.name] = _sha256(path)
            del shard  # before the next is made
        write_manifest(temporary, wanted._replace(config={"sha256": sums}))
        os.replace(temporary, directory)
        sync(folder)


def _forget(folder: Path, wanted: Manifest) -> None:
    """Remove what killed writers left, and what was kept of the same rows before others were appended."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if TEMPORARY.fullmatch(path.name):
            for left in path.iterdir():
                left.unlink()
            path.rmdir()
        elif (path / RUN).is_file():
            kept = read_manifest(path)
            rows = {**kept.plan.get("rows", {}), "shards": wanted.plan["rows"]["shards"]}
            if kept.kind == KIND and {**kept.plan, "rows": rows} == wanted.plan:
                discard(path)


def _is_kept(directory: Path, wanted: Manifest) -> bool:
    """Whether a directory holds the FAISS index that is wanted, whole.

    Raises:
        BadFileError: if it is something else.
    """
    if not directory.is_dir():
        return False
    there = read_manifest(directory)
    if (there.kind, there.plan, there.files) != (wanted.kind, wanted.plan, wanted.files):
        raise BadFileError(f"{directory} does not hold the FAISS index that its name says: delete it")
    sums = there.config.get("sha256")
    if not isinstance(sums, Mapping):
        return False
    paths = [directory / name for name in wanted.files]
    return all(path.is_file() and sums.get(path.name) == _sha256(path) for path in paths)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, config: FaissConfig, dim: int, number: int) -> Any:
    """Return the FAISS index of a file.

    Raises:
        BadFileError: if it is no FAISS index of so many rows of so many columns.
    """
    import faiss

    cells = faiss.IO_FLAG_MMAP  # maps the lists of an IVF index, and reads any other whole
    mapped = cells if "IVF" in config.factory else getattr(faiss, "IO_FLAG_MMAP_IFC", cells)
    try:
        found = faiss.read_index(str(path), mapped if config.mmap_index else 0)
    except RuntimeError as error:
        raise BadFileError(f"{path} is no FAISS index: delete {path.parent}, and it is made again") from error
    if (found.d, found.ntotal) != (dim, number):
        raise BadFileError(
            f"{path} has {found.ntotal} rows of {found.d}, and the shards have {number} of {dim}: delete {path.parent}"
        )
    return found


def approximate(
    index: Index,
    made: Neighbours,
    matrix: Float[Tensor, "q d"],
    chosen: Chosen,
    k: int,
    reverse: bool,
    nprobe: int,
) -> Nearest:
    """Return what FAISS finds; queries for which it finds fewer than `k` are answered by the scan.

    Args:
        index: the rows.
        made: their FAISS index.
        matrix: the queries, over the chosen columns.
        chosen: the columns that are looked at.
        k: how many.
        reverse: the smallest scores, smallest first.
        nprobe: cells that are looked into.

    Returns:
        Scores and rows.
    """
    whole = matrix.new_zeros(len(matrix), index.dim)
    at = 0
    for span in chosen.spans:
        whole[:, span] = matrix[:, at : at + span.stop - span.start]
        at += span.stop - span.start
    found = made.search(-whole if reverse else whole, k, nprobe)
    values, indices = (-found.values if reverse else found.values).to(matrix.dtype), found.indices
    lacking = (indices < 0).any(1)
    if lacking.any():
        pieces = index.pieces(scan.rows_at_once(index.dim, len(matrix)))
        exact = scan.scan(pieces, matrix[lacking.to(matrix.device)], chosen, k, reverse)
        values[lacking], indices[lacking] = exact.values.cpu(), exact.indices.cpu()
    return Nearest(values, indices)
