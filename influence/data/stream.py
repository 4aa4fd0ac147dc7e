"""A dataset to tokens shard by shard, as it is read."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from influence.data.chunking import chunk
from influence.data.documents import TextFormat
from influence.data.reading import PLAIN, all_finite, longest, none_too_long, numbers, reading
from influence.data.sources import slices
from influence.data.tokenized import NOTHING, Tokenized, check_shards, join


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
    advantage_column: str | None = None,
) -> Iterator[Tokenized]:
    """Tokenise a dataset shard by shard: the shards that `shards(tokenize(…), shard_size)` would have.

    Args:
        dataset: what `load(…, streaming=True)` returns; it is read in order and never held.
        tokenizer: as for `tokenize`.
        form: as for `tokenize`.
        shard_size: examples of a shard.
        rank: which process asks. It tokenises its own shards only, unless there are chunks, whose borders depend on all
            that comes before.
        world: how many there are.
        max_length: as for `tokenize`.
        truncation: as for `tokenize`.
        chunk_length: as for `tokenize`; what fills no chunk is carried on, and only the last remainder is dropped.
        advantage_column: as for `tokenize`. There is no `reward_column`: a prompt's answers may be far apart.

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
    if advantage_column is not None and chunk_length is not None:
        raise ValueError(f"a chunk holds several documents and cannot have the weights of column {advantage_column!r}")
    limit = longest(tokenizer, max_length, truncation, chunk_length)
    cut = limit if truncation else None
    how = reading(dataset, tokenizer, form, cut, chunk_length is not None, advantage_column)

    def documents() -> Iterator[Tokenized]:
        for number, (first, rows) in enumerate(slices(dataset, shard_size, how.columns)):
            if number % world == rank:
                shard = how.read(first, rows)
                if advantage_column is not None:
                    weight = all_finite(numbers(rows, advantage_column, first), advantage_column, first)
                    shard = replace(shard, weight=weight)
                yield none_too_long(shard, limit)

    def chunks(length: int) -> Iterator[Tokenized]:
        pieces = (how.read(first, rows) for first, rows in slices(dataset, shard_size, how.columns))
        for number, shard in enumerate(_chunked(pieces, length, shard_size)):
            if number % world == rank:
                yield shard

    return documents() if chunk_length is None else chunks(chunk_length)


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
