"""Texts as a batch, for a query that is typed."""

from collections.abc import Sequence
from typing import Any

import torch

from influence.func.losses import IGNORED
from influence.types import Batch


def as_batch(texts: Sequence[str], tokenizer: Any) -> Batch:
    """Return texts as one batch, padded on the right, every token labelled.

    Args:
        texts: the texts.
        tokenizer: as `transformers` loads it.

    Returns:
        `{"input_ids", "attention_mask", "labels"}`.

    Raises:
        ValueError: if there is no tokenizer, no text, or one of fewer than two tokens.
    """
    if tokenizer is None:
        raise ValueError("texts need tokenizer=, or tokenize=: a function from texts to a batch")
    if not texts:
        raise ValueError("the query is empty: it has no text")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    short = [i for i, tokens in enumerate(ids) if len(tokens) < 2]
    if short:
        raise ValueError(
            f"text {short[0]}, {texts[short[0]]!r}, has {len(ids[short[0]])} tokens: a language model's loss needs two"
        )
    fill = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    lengths = torch.tensor([len(tokens) for tokens in ids])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.full(real.shape, fill)
    padded[real] = torch.tensor([number for tokens in ids for number in tokens])
    return {"input_ids": padded, "attention_mask": real.long(), "labels": padded.where(real, IGNORED)}
