"""`stream` turns a dataset into tokens shard by shard, without holding it."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.data.documents import TextFormat
from influence.data.parsing import LARGEST_ROW
from influence.data.rewards import advantages
from influence.data.slices import (
    PLAIN,
    SliceReader,
    all_finite,
    longest,
    none_too_long,
    numbers,
    scores,
    slice_reader,
    token_slices,
)
from influence.data.sources import Records, slices
from influence.data.tokenized import NOTHING, Tokenized, check_shards, chunk, join


def stream(
    dataset: Any,
    tokenizer: Any = None,
    form: TextFormat = PLAIN,
    *,
    shard_size: int,
    rank: int = 0,
    world: int = 1,
    max_length: int | None = None,
    truncation: bool = False,
    chunk_length: int | None = None,
    max_tokens: int | None = None,
    reward_column: str | None = None,
    advantage_column: str | None = None,
    skip_nan_rewards: bool = False,
    max_document_bytes: int = LARGEST_ROW,
) -> Iterator[Tokenized]:
    """Tokenise a dataset shard by shard: the shards that `shards(tokenize(…), shard_size)` would have.

    Args:
        dataset: what `load(…, streaming=True)` returns; it is read in order and never held.
        tokenizer: as for `tokenize`.
        form: as for `tokenize`.
        shard_size: examples of a shard.
        rank: which process asks. It tokenises its own shards only, unless there are chunks or `max_tokens`, which
            depend on all that comes before.
        world: how many there are.
        max_length: as for `tokenize`.
        truncation: as for `tokenize`.
        chunk_length: as for `tokenize`; what fills no chunk is carried on, and only the last remainder is dropped.
        max_tokens: as for `tokenize`.
        reward_column: as for `tokenize`. The answers to a prompt may be anywhere, so the dataset is read twice: for the
            rewards, which are held, before this returns.
        advantage_column: as for `tokenize`.
        skip_nan_rewards: as for `tokenize`.
        max_document_bytes: as for `tokenize`.

    Returns:
        The shards of this rank.

    Raises:
        ValueError: as `tokenize`; for too long documents and bad rows when their shard is read.

    Example:
        >>> import datasets
        >>> rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8], []]}).to_iterable_dataset()
        >>> [shard.index.tolist() for shard in stream(rows, shard_size=2)]
        [[0, 1], [2]]
    """
    check_shards(shard_size, rank, world)
    scored = scores(reward_column, advantage_column, chunk_length, skip_nan_rewards)
    limit = longest(tokenizer, max_length, truncation, chunk_length)
    cut, separate = limit if truncation else None, chunk_length is not None
    how = slice_reader(dataset, tokenizer, form, cut, separate, scored, max_document_bytes)
    rewards = advantage = None
    if reward_column is not None:
        rewards, groups = _rewards(dataset, how, shard_size, max_tokens, reward_column)
        advantage = advantages(rewards, groups, skip_nan_rewards)

    def weigh(first: int, rows: Records, piece: Tokenized) -> Tokenized:
        if scored is None:
            return piece
        found = numbers(rows, scored, first)
        if rewards is None or advantage is None:
            return replace(piece, weight=all_finite(found, scored, first))
        here = slice(first, first + len(rows))
        if not torch.equal(found.nan_to_num(), rewards[here].nan_to_num()):
            raise ValueError(f"rows from {first} on have other rewards when read again: give a stream that repeats")
        return replace(piece, weight=advantage[here])

    def documents() -> Iterator[Tokenized]:
        for first, rows, piece in token_slices(dataset, how, shard_size, max_tokens, rank, world):
            if rows:
                yield none_too_long(weigh(first, rows, piece), limit)

    def chunks(length: int) -> Iterator[Tokenized]:
        read = (piece for _, _, piece in token_slices(dataset, how, shard_size, max_tokens))
        for number, shard in enumerate(_chunked(read, length, shard_size)):
            if number % world == rank:
                yield shard

    return documents() if chunk_length is None else chunks(chunk_length)


def _rewards(
    dataset: Any, how: SliceReader, size: int, max_tokens: int | None, column: str
) -> tuple[Float[Tensor, " n"], list[int]]:
    """Return all rewards, and the number of each one's prompt."""
    if max_tokens is None:
        read = slices(dataset, size, how.columns)
    else:
        read = ((first, rows) for first, rows, _ in token_slices(dataset, how, size, max_tokens))
    rewards: list[Tensor] = []
    groups: list[int] = []
    known: dict[bytes, int] = {}
    for first, rows in read:
        rewards.append(numbers(rows, column, first))
        for prompt in how.prompts(rows):
            groups.append(known.setdefault(hashlib.sha256(prompt.encode()).digest(), len(known)))
    return torch.cat([torch.zeros(0, dtype=torch.float64), *rewards]), groups


def _chunked(pieces: Iterator[Tokenized], length: int, size: int) -> Iterator[Tokenized]:
    """Yield shards of `size` chunks; the last may have fewer, and counts the remainder."""
    first, waiting = 0, None
    for piece in pieces:
        known = replace(piece, document=piece.index.repeat_interleave(piece.lengths), counts=NOTHING)
        whole, rest = chunk(known if waiting is None else join([waiting, known]), length, first)
        full = max(0, len(whole) - 1) // size * size  # the last shard waits: it counts the remainder
        for begin in range(0, full, size):
            yield whole.take(begin, begin + size)
        waiting = join([whole.take(full, len(whole)), rest])
        first += full
    if waiting is not None:
        whole, rest = chunk(waiting, length, first)
        if not first and not len(whole):
            raise ValueError(f"all documents together have {len(rest.ids)} tokens, less than chunk_length={length}")
        if len(whole):
            yield replace(whole, counts=NOTHING._replace(remainder=len(rest.ids)))
