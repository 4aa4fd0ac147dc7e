"""How well scores find what they should: recall@k and mean reciprocal rank against the known answers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Recall(NamedTuple):
    """What a ranking finds.

    Attributes:
        queries: how many there are.
        recall: `{k: share of queries with a gold document among the first k}`.
        mrr: mean of `1 / rank` of each query's first gold document.
    """

    queries: int
    recall: dict[int, float]
    mrr: float


def first_gold(scores: Float[Tensor, "q n"], gold: Sequence[Sequence[int]]) -> Int[Tensor, " q"]:
    """Return the rank of each query's best gold document: 1 is the highest score; equal scores are ordered by column.

    Args:
        scores: the scores.
        gold: for each query, the columns of its gold documents.

    Returns:
        The ranks.

    Raises:
        ValueError: if a query has no gold, a column does not exist, or a score is not finite.

    Example:
        >>> import torch
        >>> first_gold(torch.tensor([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0]]), [[0, 2], [1]])
        tensor([2, 2])
    """
    _check(gold, len(scores), scores.shape[1])
    if not bool(torch.isfinite(scores).all()):
        at = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"the score of query {at[0]} and document {at[1]} is not finite, so it has no rank")
    ranks = []
    for row, known in zip(scores, gold, strict=True):
        right = torch.tensor(sorted(set(known)), device=scores.device)
        best = right[row[right].argmax()]
        above = (row > row[best]).sum() + (row[:best] == row[best]).sum()
        ranks.append(int(above) + 1)
    return torch.tensor(ranks)


def first_gold_listed(found: Int[Tensor, "q k"], gold: Sequence[Sequence[int]]) -> Int[Tensor, " q"]:
    """Return the rank of each query's first gold document in a list of what was found; 0 where it is not listed.

    Args:
        found: the documents of each query, best first.
        gold: for each query, its gold documents.

    Returns:
        The ranks.

    Raises:
        ValueError: if a query has no gold.

    Example:
        >>> import torch
        >>> first_gold_listed(torch.tensor([[7, 3], [7, 3]]), [[3, 9], [9]])
        tensor([2, 0])
    """
    _check(gold, len(found), None)
    ranks = []
    for row, known in zip(found.tolist(), gold, strict=True):
        right = set(known)
        ranks.append(next((rank for rank, document in enumerate(row, 1) if document in right), 0))
    return torch.tensor(ranks)


def recall(ranks: Int[Tensor, " q"], at: Sequence[int] = (1, 10)) -> Recall:
    r"""Return recall@k and the mean reciprocal rank.

    $$\text{recall@}k = \frac1q \sum_i [r_i \le k], \qquad \text{MRR} = \frac1q \sum_i \frac1{r_i}$$

    with `r` the rank of the first gold document: what fact tracing calls recall (Chang et al. 2024).

    Args:
        ranks: of each query's first gold document; 0 where it was not found.
        at: the `k`.

    Returns:
        The metrics.

    Raises:
        ValueError: if there is no query, or a `k` is less than 1.

    Example:
        >>> import torch
        >>> recall(torch.tensor([1, 2, 0, 20]), at=(1, 10))
        Recall(queries=4, recall={1: 0.25, 10: 0.5}, mrr=0.3875)
    """
    if not len(ranks):
        raise ValueError("there is no query, and so no recall")
    if not at or min(at) < 1:
        raise ValueError(f"recall@k needs k of at least 1; got {tuple(at)}")
    found = ranks > 0
    shares = {k: float((found & (ranks <= k)).double().mean()) for k in at}
    inverse = torch.where(found, 1 / ranks.clamp_min(1).double(), 0.0)
    return Recall(len(ranks), shares, float(inverse.mean()))


def _check(gold: Sequence[Sequence[int]], queries: int, documents: int | None) -> None:
    if len(gold) != queries:
        raise ValueError(f"there are {queries} queries, and gold for {len(gold)}: give a list of gold for each")
    for number, known in enumerate(gold):
        if not len(known):
            raise ValueError(f"query {number} has no gold document: leave the query out, or say what is right")
        if documents is not None and not (min(known) >= 0 and max(known) < documents):
            raise ValueError(f"gold of query {number} must be among {documents} documents; got {list(known)}")
