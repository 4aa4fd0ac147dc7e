"""A whole dataset to tokens."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from influence.data.chunking import chunk
from influence.data.documents import TextFormat
from influence.data.reading import PLAIN, all_finite, longest, none_too_long, numbers, reading
from influence.data.rewards import advantages
from influence.data.sources import slices
from influence.data.tokenized import Tokenized, count, join

SLICE = 1000
"""Rows tokenised at a time: enough to keep the tokenizer's threads busy, few enough to be nothing in memory."""


def tokenize(
    dataset: Any,
    tokenizer: Any = None,
    form: TextFormat = PLAIN,
    *,
    max_length: int | None = None,
    truncation: bool = False,
    chunk_length: int | None = None,
    max_tokens: int | None = None,
    reward_column: str | None = None,
    advantage_column: str | None = None,
    skip_nan_rewards: bool = False,
) -> Tokenized:
    """Tokenise a dataset.

    Args:
        dataset: what `load` returns. An `IterableDataset` is read to its end; `stream` reads one shard at a time.
        tokenizer: a fast tokenizer of `transformers`; not needed for tokenised rows.
        form: which columns hold the text.
        max_length: the longest document allowed, by default the tokenizer's limit; `context_length` tells a model's.
        truncation: cut longer documents instead of refusing them.
        chunk_length: cut the documents, one after the other, into chunks of so many tokens instead.
        max_tokens: keep the first documents, as many as have at most so many tokens together.
        reward_column: weigh each example's loss by its Dr. GRPO advantage over the other answers to its prompt.
        advantage_column: weigh each example's loss by this column.
        skip_nan_rewards: give rows with a NaN reward the weight 0 instead of refusing them.

    Returns:
        The tokens; `report()` says what was counted. Every row keeps its number, empty ones too.

    Raises:
        ValueError: if a column is missing, there is no row, documents are too long, or arguments exclude one another.

    Example:
        >>> import datasets
        >>> rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8], []]})
        >>> tokenize(rows).report()
        '3 documents, 4 tokens, the longest has 3; 1 empty; 1 of one token'
    """
    if reward_column is not None and advantage_column is not None:
        raise ValueError("pass reward_column or advantage_column, not both")
    scored = reward_column or advantage_column
    if scored is not None and chunk_length is not None:
        raise ValueError(f"a chunk holds several documents and cannot have the weights of column {scored!r}")
    limit = longest(tokenizer, max_length, truncation, chunk_length)
    how = reading(dataset, tokenizer, form, limit if truncation else None, chunk_length is not None, scored)
    pieces: list[Tokenized] = []
    scores: list[Tensor] = []
    prompts: list[str] = []
    total = 0
    for first, rows in slices(dataset, SLICE, how.columns):
        pieces.append(how.read(first, rows))
        if scored is not None:
            scores.append(numbers(rows, scored, first))
        if reward_column is not None:
            prompts += how.prompts(rows)
        total += len(pieces[-1].ids)
        if max_tokens is not None and total > max_tokens:
            break
    if not pieces:
        raise ValueError("the dataset is empty: it has no row")
    tokenized = join(pieces)
    if max_tokens is not None:
        tokenized = _first_tokens(tokenized, max_tokens)
    tokenized = replace(tokenized, counts=tokenized.counts._replace(notice=how.notice))
    if scored is not None:
        known = torch.cat(scores)[: len(tokenized)]
        if reward_column is not None:
            known = advantages(known, prompts[: len(known)], skip_nan_rewards)
        tokenized = replace(tokenized, weight=all_finite(known, scored))
    if chunk_length is None:
        return none_too_long(tokenized, limit)
    chunks, rest = chunk(tokenized, chunk_length)
    if not len(chunks):
        raise ValueError(f"all documents together have {len(rest.ids)} tokens, less than chunk_length={chunk_length}")
    return replace(chunks, counts=chunks.counts._replace(remainder=len(rest.ids)))


def _first_tokens(tokenized: Tokenized, most: int) -> Tokenized:
    """Keep the first documents that have at most `most` tokens together."""
    kept = int((tokenized.offsets[1:] <= most).sum())
    if not kept or not int(tokenized.offsets[kept]):
        raise ValueError(f"max_tokens={most} keeps no token: the first document with any has more; raise it")
    if kept == len(tokenized):
        return tokenized
    short = count(tokenized.take(0, kept))
    return replace(short, counts=short.counts._replace(stopped=kept))
