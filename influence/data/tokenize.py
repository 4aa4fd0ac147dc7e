"""`tokenize` turns a whole dataset into tokens in memory."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from influence.data.documents import TextFormat
from influence.data.parsing import LARGEST_ROW
from influence.data.rewards import advantages
from influence.data.slices import PLAIN, all_finite, longest, none_too_long, numbers, scores, slice_reader, token_slices
from influence.data.tokenized import Tokenized, chunk, join

SLICE = 1000
"""Rows tokenised at a time: enough to keep the tokenizer's threads busy, few enough to take little memory."""


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
    max_document_bytes: int = LARGEST_ROW,
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
        max_document_bytes: refuse documents whose text has more bytes: a tokenizer takes many times as much memory.

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
    scored = scores(reward_column, advantage_column, chunk_length, skip_nan_rewards)
    limit = longest(tokenizer, max_length, truncation, chunk_length)
    cut, separate = limit if truncation else None, chunk_length is not None
    how = slice_reader(dataset, tokenizer, form, cut, separate, scored, max_document_bytes)
    read: list[Tokenized] = []
    known: list[Tensor] = []
    prompts: list[str] = []
    for first, rows, piece in token_slices(dataset, how, SLICE, max_tokens):
        read.append(piece)
        if scored is not None:
            known.append(numbers(rows, scored, first))
        if reward_column is not None:
            prompts += how.prompts(rows)
    tokenized = join(read)
    tokenized = replace(tokenized, counts=tokenized.counts._replace(notice=how.notice))
    if scored is not None:
        weight = torch.cat(known)
        if reward_column is not None:
            weight = advantages(weight, prompts, skip_nan_rewards)
        tokenized = replace(tokenized, weight=all_finite(weight, scored))
    if chunk_length is None:
        return none_too_long(tokenized, limit)
    chunks, rest = chunk(tokenized, chunk_length)
    if not len(chunks):
        raise ValueError(f"all documents together have {len(rest.ids)} tokens, less than chunk_length={chunk_length}")
    return replace(chunks, counts=chunks.counts._replace(remainder=len(rest.ids)))
