r"""Approximate neighbours: FAISS indexes of the stored rows, and how they are made.

What FAISS sees are the rows as stored, after their transform: preconditioned once, then normed, as the index was. A
search over some blocks sets the query's other columns to zero, `⟨[q_b, 0], g⟩ = ⟨q_b, g_b⟩`, so one FAISS index serves
all of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func import top
from influence.func.plan import human
from influence.func.similarity import Nearest
from influence.index.chosen import Chosen
from influence.index.scan import Piece, all_decoded

PER_LIST = 256
"""Rows that k-means looks at per centroid at most."""


@dataclass(frozen=True)
class FaissConfig:
    """How FAISS finds neighbours.

    Attributes:
        index_factory: FAISS's own description: `"Flat"` is exact, `"IVF1024,Flat"` looks into `nprobe` of 1024 cells,
            `"IVF1024,PQ64"` stores 64 bytes per row.
        mmap_index: leave the FAISS index on disk and map it, instead of holding it in memory.
        max_train_examples: rows that cells and codes are learned from, taken evenly over the index; `None` takes as
            many as FAISS looks at.
        batch_size: rows added at a time.
        num_shards: cut it into so many files; with `mmap_index` only one of them is in memory while they are built.
        nprobe: cells that are looked into; more are more exact, all are exact.

    Example:
        >>> FaissConfig("IVF1024,Flat", nprobe=32).num_shards
        1
    """

    index_factory: str = "Flat"
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
            if value is not None and value < 1:
                raise ValueError(f"FaissConfig({name}={value}): must be at least 1")


@dataclass(frozen=True)
class Stored:
    """Rows that a FAISS index can be made of.

    Attributes:
        pieces: from rows at once to all rows, in order.
        number: how many there are.
        chosen: their columns: all of them.
        identity: what changes when anything about them does.
    """

    pieces: Callable[[int], Iterable[Piece]]
    number: int
    chosen: Chosen
    identity: Mapping[str, Any]


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


def shards_of(stored: Stored, config: FaissConfig) -> Iterator[tuple[int, Any]]:
    """Yield the number and the FAISS index of each shard; whoever takes them decides what stays in memory."""
    import faiss

    empty = _trained(stored, config)
    begins = (*begins_of(stored.number, config.num_shards), stored.number)
    rows = _matrices(stored, config.batch_size)
    left = torch.empty(0, stored.chosen.dim)
    for number in range(config.num_shards):
        shard, size = faiss.clone_index(empty), begins[number + 1] - begins[number]
        while shard.ntotal < size:
            left = left if len(left) else next(rows)
            taken = min(len(left), size - shard.ntotal)
            shard.add(left[:taken].numpy())
            left = left[taken:]
        yield number, shard
        del shard


def _matrices(stored: Stored, at_once: int) -> Iterator[Float[Tensor, "r d"]]:
    """Yield all rows in float32."""
    for rows, scale in all_decoded(stored.pieces(at_once), stored.chosen, torch.float32, torch.device("cpu")):
        yield (rows if scale is None else rows * scale).contiguous()


def _trained(stored: Stored, config: FaissConfig) -> Any:
    """Return an empty FAISS index that has learned its cells and codes."""
    import faiss

    dim = stored.chosen.dim
    try:
        empty = faiss.index_factory(dim, config.index_factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS does not understand index_factory={config.index_factory!r} for rows of {dim}: {_said(error)}"
        ) from error
    cells = faiss.try_extract_index_ivf(empty)
    learned = max(PER_LIST * (1 if cells is None else cells.nlist), PER_LIST * PER_LIST)
    count = 0 if empty.is_trained else min(stored.number, config.max_train_examples or learned)
    _check_memory(empty, stored.number, dim, count, config)
    if not empty.is_trained:
        try:
            empty.train(_sample(stored, count, config.batch_size).numpy())
        except RuntimeError as error:
            raise ValueError(
                f"FAISS cannot learn {config.index_factory!r} from {count} rows ({_said(error)}): choose fewer cells "
                "or codes, or 'Flat'"
            ) from error
    return empty


def _said(error: RuntimeError) -> str:
    """Return what FAISS says, without the place in its source."""
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: '.*?' failed: )?", "", str(error))


def _sample(stored: Stored, count: int, at_once: int) -> Float[Tensor, "r d"]:
    """Return rows taken evenly over the index."""
    wanted = torch.arange(count) * stored.number // count
    parts, begin = [], 0
    for rows in _matrices(stored, at_once):
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
