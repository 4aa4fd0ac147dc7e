"""Tokenised examples in flat tensors: counted, joined, dealt out in shards, cut into chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.loss.losses import IGNORED


class Counts(NamedTuple):
    """What was counted while documents became tokens.

    Attributes:
        documents: rows of the dataset.
        empty: of them, those without a token.
        single: those of one token, which predict nothing.
        unlabelled: those of more tokens, none of which is labelled and predicted.
        truncated: those that were cut.
        stopped: the row at which `max_tokens` was reached; it and all after it are left out.
        remainder: tokens at the end that filled no chunk.
        notice: anything else to know.
    """

    documents: int = 0
    empty: int = 0
    single: int = 0
    unlabelled: int = 0
    truncated: int = 0
    stopped: int = 0
    remainder: int = 0
    notice: str = ""


NOTHING = Counts()
"""Nothing counted."""


@dataclass(frozen=True)
class Tokenized:
    """Examples as tokens.

    Attributes:
        ids: the token ids of all examples, one after the other.
        labels: their labels, -100 where there is none; `None` where every token is its own label.
        offsets: where each example begins, and where the last one ends.
        index: the row of each example: in the dataset, or among the chunks.
        pad: the id that fills a batch.
        weight: what each example's loss is multiplied with, if anything.
        document: for chunks, the row of the dataset that each token is from.
        counts: what was seen on the way.
    """

    ids: Int[Tensor, " t"]
    labels: Int[Tensor, " t"] | None
    offsets: Int[Tensor, " n_and_1"]
    index: Int[Tensor, " n"]
    pad: int = 0
    weight: Float[Tensor, " n"] | None = None
    document: Int[Tensor, " t"] | None = None
    counts: Counts = NOTHING

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """Tokens of each example."""
        return self.offsets.diff()

    def take(self, begin: int, end: int) -> "Tokenized":
        """Return a contiguous slice of the examples: views, no copies."""
        offsets = self.offsets[begin : end + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return replace(
            self,
            ids=self.ids[tokens],
            labels=None if self.labels is None else self.labels[tokens],
            offsets=offsets - offsets[0],
            index=self.index[begin:end],
            weight=None if self.weight is None else self.weight[begin:end],
            document=None if self.document is None else self.document[tokens],
        )

    def report(self) -> str:
        """Return what was counted, in a line."""
        counts, longest = self.counts, int(self.lengths.max()) if len(self) else 0
        what = "documents" if self.document is None else f"chunks of {counts.documents:,} documents"
        said = [
            (len(self), f"{len(self):,} {what}, {len(self.ids):,} tokens, the longest has {longest:,}"),
            (counts.empty, f"{counts.empty:,} empty"),
            (counts.single, f"{counts.single:,} of one token"),
            (counts.unlabelled, f"{counts.unlabelled:,} without a label to predict"),
            (counts.truncated, f"{counts.truncated:,} truncated"),
            (counts.stopped, f"max_tokens was reached at row {counts.stopped:,}; the rest is left out"),
            (counts.remainder, f"{counts.remainder:,} tokens at the end filled no chunk and were dropped"),
            (counts.notice, counts.notice),
        ]
        return "; ".join(text for count, text in said if count)


def shards(tokenized: Tokenized, size: int, *, rank: int = 0, world: int = 1) -> list[Tokenized]:
    """Return the shards of a rank: contiguous slices of the dataset, dealt out in turn.

    Args:
        tokenized: the dataset.
        size: examples of a shard; the last may have fewer.
        rank: which process asks.
        world: how many there are.

    Returns:
        Shards `rank`, `rank + world`, …, as views.

    Raises:
        ValueError: if the size is below 1, or there is no such rank.

    Example:
        >>> empty = Tokenized(torch.zeros(0, dtype=torch.int32), None, torch.zeros(8).long(), torch.arange(7))
        >>> [shard.index.tolist() for shard in shards(empty, 2, rank=1, world=2)]
        [[2, 3], [6]]
    """
    check_shards(size, rank, world)
    begins = range(rank * size, len(tokenized), world * size)
    return [tokenized.take(begin, min(begin + size, len(tokenized))) for begin in begins]


def check_shards(size: int, rank: int, world: int) -> None:
    """Refuse a shard size or rank that is out of range.

    Raises:
        ValueError: saying what came.
    """
    if size < 1:
        raise ValueError(f"a shard holds at least 1 example; got {size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to world - 1; got rank={rank} of world={world}")


def flat(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None, first: int, pad: int = 0) -> Tokenized:
    """Return documents, numbered from `first`, as flat tensors, counted; without labels every token is its own."""
    lengths = torch.tensor([len(document) for document in ids], dtype=torch.int64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    joined = None if labels is None else _flat(labels)
    return count(Tokenized(_flat(ids), joined, offsets, torch.arange(first, first + len(ids)), pad))


def count(documents: Tokenized) -> Tokenized:
    """Return documents with their counts."""
    lengths, unlabelled = documents.lengths, 0
    if documents.labels is not None:
        predicted = documents.labels != IGNORED
        predicted[documents.offsets[:-1][lengths > 0]] = False
        each = torch.cat([lengths.new_zeros(1), predicted.cumsum(0)])[documents.offsets].diff()
        unlabelled = int(((each == 0) & (lengths > 1)).sum())
    counts = documents.counts._replace(
        documents=len(documents),
        empty=int((lengths == 0).sum()),
        single=int((lengths == 1).sum()),
        unlabelled=unlabelled,
    )
    return replace(documents, counts=counts)


def join(pieces: Sequence[Tokenized]) -> Tokenized:
    """Return pieces of a dataset as one; if one of them has labels, the whole has."""
    if len(pieces) == 1:
        return pieces[0]
    labelled = any(piece.labels is not None for piece in pieces)
    ends = torch.tensor([len(piece.ids) for piece in pieces]).cumsum(0)
    starts = [0, *ends[:-1].tolist()]
    sums = [sum(parts) for parts in zip(*(piece.counts[:-1] for piece in pieces), strict=True)]
    return Tokenized(
        torch.cat([piece.ids for piece in pieces]),
        torch.cat([piece.ids if piece.labels is None else piece.labels for piece in pieces]) if labelled else None,
        torch.cat([*(p.offsets[:-1] + start for p, start in zip(pieces, starts, strict=True)), ends[-1:]]),
        torch.cat([piece.index for piece in pieces]),
        pieces[0].pad,
        _cat_present([piece.weight for piece in pieces]),
        _cat_present([piece.document for piece in pieces]),
        Counts._make([*sums, pieces[0].counts.notice]),
    )


def _cat_present(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _flat(lists: Sequence[Sequence[int]]) -> Int[Tensor, " t"]:
    return torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32)


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
