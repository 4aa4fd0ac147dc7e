"""Documents cut into pieces of one length, each token knowing which document it is from."""

from dataclasses import replace

import torch

from influence.data.tokenized import NOTHING, Tokenized


def chunk(documents: Tokenized, length: int, first: int = 0) -> tuple[Tokenized, Tokenized]:
    """Cut documents, one after the other, into chunks of exactly `length` tokens.

    A chunk is a row of its own, with its own number; `document` says of each token which row of the dataset it is from.

    Args:
        documents: the documents.
        length: tokens of a chunk.
        first: the number of the first chunk.

    Returns:
        The chunks, and the tokens left at the end as one shorter chunk (or none): put it before the documents that
        follow, or drop it.

    Raises:
        ValueError: if the documents have weights, which a chunk of several documents cannot have.

    Example:
        >>> documents = Tokenized(torch.arange(5).int(), None, torch.tensor([0, 3, 5]), torch.tensor([0, 1]))
        >>> chunks, rest = chunk(documents, 2)
        >>> chunks.document.tolist(), rest.ids.tolist()
        ([0, 0, 0, 1], [4])
    """
    if length < 2:
        raise ValueError(f"chunk_length must be at least 2, one token to predict another; got {length}")
    if documents.weight is not None:
        raise ValueError("a chunk holds several documents and cannot have their weights: leave out rewards or chunks")
    document = documents.document
    if document is None:
        document = documents.index.repeat_interleave(documents.lengths)
    count = len(documents.ids) // length
    offsets = torch.arange(0, (count + 1) * length, length)
    rest = len(documents.ids) - count * length
    whole = replace(
        documents,
        document=document,
        offsets=torch.cat([offsets, offsets[-1:] + rest]) if rest else offsets,
        index=torch.arange(first, first + count + bool(rest)),
    )
    return whole.take(0, count), replace(whole.take(count, count + bool(rest)), counts=NOTHING)
