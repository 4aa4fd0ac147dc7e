"""Padded batches from shards, packed by length and made ahead by a thread."""

import atexit
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from influence.data.tokenized import Tokenized
from influence.func.loss.losses import IGNORED


def pack(lengths: Int[Tensor, " n"], token_budget: int, max_rows: int | None = None) -> list[Int[Tensor, " b"]]:
    """Put examples into batches, longest first, so that each padded batch holds at most `token_budget` positions.

    The widest example left sets the width `w` of a batch, which then takes the `token_budget // w` longest ones. No
    randomness: equal lengths keep their order, and each batch lists its examples in the order of the shard.

    Args:
        lengths: tokens of each example; an empty one takes one position.
        token_budget: most positions of a batch, padding included.
        max_rows: most examples of a batch.

    Returns:
        The examples of each batch: every example in exactly one.

    Raises:
        ValueError: if an example is longer than the budget, or a limit is below 1.

    Example:
        >>> import torch
        >>> [batch.tolist() for batch in pack(torch.tensor([2, 5, 1, 3]), token_budget=6)]
        [[1], [0, 3], [2]]
    """
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"token_budget and max_rows must be at least 1; got {token_budget} and {max_rows}")
    width = lengths.clamp_min(1)
    long = width > token_budget
    if bool(long.any()):
        raise ValueError(
            f"{int(long.sum())} of {len(lengths)} examples have more than token_budget={token_budget} tokens (the "
            f"longest has {int(lengths.max())}): pass token_budget of at least {int(lengths.max())}, or tokenize with "
            "truncation=True and a smaller max_length, or with chunk_length"
        )
    order = width.argsort(descending=True, stable=True)
    widths = width[order].tolist()
    packed, begin = [], 0
    while begin < len(widths):
        count = min(token_budget // widths[begin], max_rows or len(widths))
        packed.append(order[begin : begin + count].sort().values)
        begin += count
    return packed


def batches(
    shards: Tokenized | Iterable[Tokenized],
    token_budget: int,
    *,
    max_rows: int | None = None,
    prefetch: int = 4,
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of shards, each packed by itself.

    A batch is `{"input_ids", "attention_mask", "labels": int64 [n, s], "index": int64 [n]}`, and `"weight": float [n]`
    where the data have weights; padded on the right, labels -100 there and wherever there is none. Labels are not
    shifted: `labels[t]` is the token at `t`. An empty document is a row of padding.

    Args:
        shards: a dataset as one shard, or shards: `shards(tokenized, size, rank=…, world=…)`, or `stream(…)`.
        token_budget: most positions of a batch, padding included.
        max_rows: most examples of a batch.
        prefetch: how many batches a thread makes ahead of use; 0 makes each when it is asked for.

    Returns:
        The batches: the same for every `prefetch`.

    Raises:
        ValueError: if an example is longer than the budget: before the first batch for shards in memory, when its shard
            comes for a stream.
    """
    source = [shards] if isinstance(shards, Tokenized) else shards
    if isinstance(source, list):
        for shard in source:
            pack(shard.lengths.amax(0, keepdim=True) if len(shard) else shard.lengths, token_budget, max_rows)
    made = _packed_batches(source, token_budget, max_rows)
    return _prefetched(made, prefetch) if prefetch > 0 else made


def collate(shard: Tokenized, rows: Int[Tensor, " n"]) -> dict[str, Tensor]:
    """Return some examples of a shard as one padded batch.

    Args:
        shard: the shard.
        rows: their places in the shard.

    Returns:
        The batch.

    Example:
        >>> shard = Tokenized(torch.tensor([5, 6, 7]).int(), None, torch.tensor([0, 1, 3]), torch.tensor([8, 9]))
        >>> collate(shard, torch.tensor([0, 1]))["labels"]
        tensor([[   5, -100],
                [   6,    7]])
    """
    begin, end = shard.offsets[rows, None], shard.offsets[rows + 1, None]
    place = begin + torch.arange(max(1, int((end - begin).max())))
    real = place < end
    ids = _padded(shard.ids, place, real, shard.pad)
    batch = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": ids.where(real, IGNORED) if shard.labels is None else _padded(shard.labels, place, real, IGNORED),
        "index": shard.index[rows],
    }
    return batch if shard.weight is None else batch | {"weight": shard.weight[rows]}


def _padded(
    flat: Int[Tensor, " t"], place: Int[Tensor, "n s"], real: Bool[Tensor, "n s"], fill: int
) -> Int[Tensor, "n s"]:
    """Return `flat[place]` where `real`, and `fill` elsewhere."""
    if not len(flat):
        return torch.full(place.shape, fill)
    return flat[place.clamp_max(len(flat) - 1)].long().where(real, fill)


def _packed_batches(
    shards: Iterable[Tokenized], token_budget: int, max_rows: int | None
) -> Iterator[dict[str, Tensor]]:
    for shard in shards:
        for rows in pack(shard.lengths, token_budget, max_rows):
            yield collate(shard, rows)


def _prefetched(made: Iterator[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield an iterator's items, which a thread takes at most `count` items ahead."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(count)
    closed = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in made:
                put(("batch", batch))
                if closed.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    def end() -> None:
        closed.set()
        thread.join()

    thread = threading.Thread(target=work, name="influence.data.batches", daemon=True)
    thread.start()
    atexit.register(end)  # a traceback may keep its reader; a thread inside torch then aborts the process as it leaves
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        atexit.unregister(end)
        end()
