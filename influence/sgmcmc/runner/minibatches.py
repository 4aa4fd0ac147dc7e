"""The examples of each step, a pure function of (seed, chain, step), and their loss at the anchor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from influence.func.engine.batch import batch_size, take
from influence.func.fingerprint import fingerprint
from influence.sgmcmc.samplers.langevin import generator
from influence.sgmcmc.samplers.target import Target, mean_loss, position_losses
from influence.types import Batch


@dataclass(frozen=True)
class Source:
    """A dataset as a size and a way to fetch rows; `source_of` makes one of a batch in memory.

    Attributes:
        size: how many examples there are.
        fetch: `index [n] -> batch`; a dictionary batch has `index` itself.
        identity: what the data are, for caches: a hash.
    """

    size: int
    fetch: Callable[[Int[Tensor, " n"]], Batch]
    identity: str


Data: TypeAlias = Source | Dataset[Any] | Batch
"""A `Source`, a torch `Dataset` that is read by number, or a pytree of tensors with the example axis first."""

HASHED_AT_ONCE = 256
"""Examples of a torch `Dataset` that are read together to say which data they are."""


def source_of(data: Data) -> Source:
    """Return a dataset as a source.

    Example:
        >>> import torch
        >>> source = source_of({"x": torch.arange(5) * 10})
        >>> source.size, source.fetch(torch.tensor([3, 1]))
        (5, {'x': tensor([30, 10]), 'index': tensor([3, 1])})
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, TensorDataset):
        return source_of(data.tensors)
    if isinstance(data, Dataset):
        return _source_of_dataset(data)

    def fetch(index: Int[Tensor, " n"]) -> Batch:
        batch: Any = take(data, index)
        return {**batch, "index": index} if isinstance(batch, dict) and "index" not in batch else batch

    return Source(batch_size(data), fetch, _identity(data))


def _source_of_dataset(data: Dataset[Any]) -> Source:
    """Return a torch dataset as a source. It is read once for its identity, and must give an example alike each time.

    Raises:
        TypeError: if it cannot be read by number, or has no length.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(f"{type(data).__name__} cannot be read by number: pass a Dataset with __len__ and __getitem__")
    size = len(data)

    def fetch(index: Int[Tensor, " n"]) -> Batch:
        batch = default_collate([data[i] for i in index.tolist()])
        if isinstance(batch, dict):
            return {"index": index, **batch}
        return tuple(batch) if isinstance(batch, list) else batch

    pieces = torch.arange(size).split(HASHED_AT_ONCE)
    return Source(size, fetch, fingerprint([_identity(fetch(piece)) for piece in pieces]))


def _identity(data: Batch) -> str:
    """Return a hash of a batch."""
    return fingerprint(data if isinstance(data, Mapping) else list(data) if isinstance(data, tuple) else [data])


def check_size(source: Source, batch_size: int | None) -> int:
    """Return the batch size, all of the data where it is `None`; refuse a dataset smaller than a batch."""
    size = source.size if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all data at every step; got {size}")
    if size > source.size:
        raise ValueError(
            f"the dataset has {source.size} examples, fewer than one batch of {size}: lower batch_size, or pass "
            "batch_size=None for all of it at every step"
        )
    return size


def batch_index(seed: int, chain: int, step: int, size: int, batch: int) -> Int[Tensor, " batch"]:
    """Return the rows of a dataset that a step sees: an epoch visits each once, what fills no batch is left out.

    Chains that share their data pass the same number as `chain`.

    Example:
        >>> sorted(torch.cat([batch_index(0, 1, step, 6, 2) for step in range(3)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    if batch == size:
        return torch.arange(size)
    epoch, at = divmod(step, size // batch)
    return _permutation(seed, chain, epoch, size)[at * batch : (at + 1) * batch]


def sample_rows(seed: int, size: int, count: int) -> Int[Tensor, " count"]:
    """Return some rows of a dataset, drawn without replacement, in order."""
    if count >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator(seed, "rows"))[:count].sort().values


@lru_cache(maxsize=64)
def _permutation(seed: int, chain: int, epoch: int, size: int) -> Int[Tensor, " size"]:
    return torch.randperm(size, generator=generator(seed, "order", chain, epoch))


Baseline = Callable[[Int[Tensor, " n"] | None, Batch], float]
"""`(rows, batch) -> the batch's mean loss at the anchor`."""


def baseline_of(target: Target, source: Source | None, kind: str, batch: int, steps: int) -> tuple[Baseline, str]:
    """Return the baseline of a run of `steps` batches, and which kind was taken.

    `"lookup"` computes every example's loss once; `"paired"` the batch's beside each step, one more forward pass;
    `"auto"` takes what needs fewer forward passes.
    """

    def paired(rows: Int[Tensor, " n"] | None, batch: Batch) -> float:
        with torch.no_grad():
            return float(mean_loss(target, target.anchor, batch))

    if source is None:
        once = cache(lambda: paired(None, None))
        return lambda rows, batch: once(), "once"
    # a table is made when it is first asked for: a plan, or a run that is read, needs none
    if batch == source.size:
        table = cache(lambda: _anchor_table(target, source, min(batch, 256)))
        mean = cache(lambda: float(table()[0].sum() / table()[1].sum()))
        return lambda rows, batch: mean(), "once"
    if kind == "paired" or (kind == "auto" and source.size > steps * batch):
        return paired, "paired"
    table = cache(lambda: _anchor_table(target, source, batch))

    def lookup(rows: Int[Tensor, " n"] | None, batch: Batch) -> float:
        sums, counts = table()
        return float(sums[rows].sum() / counts[rows].sum())

    return lookup, "lookup"


def _anchor_table(target: Target, source: Source, batch: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return every example's summed loss at the anchor, in float64, and its labelled positions."""
    sums, counts = [], []
    with torch.no_grad():
        for begin in range(0, source.size, batch):
            rows = torch.arange(begin, min(begin + batch, source.size))
            found = position_losses(target.loss_fn, {**target.frozen, **target.anchor}, source.fetch(rows))
            sums.append((found[0].double() * found[1]).sum(1).cpu())
            counts.append(found[1].sum(1).double().cpu())
    return torch.cat(sums), torch.cat(counts)
