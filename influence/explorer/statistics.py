r"""The explorer's statistics of an index, computed as its rows stream by: no matrix of all pairs is ever held.

For each query row `q`, under each measure with weights `w` (1 for the inner product, `1/‖g_n‖` for cosine):

$$s_{qn} = w_q w_n \langle g_q, g_n \rangle = \sum_b w_q w_n \langle g_q^b, g_n^b \rangle$$

the `k` largest and the `k` smallest scores, each block's part of their sums, each token's part of each, and a
histogram.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence.explorer.by_example import Examples
from influence.func import top
from influence.func.top import Top
from influence.index import scan
from influence.index.columns import Chosen

DECODED_AT_ONCE = 1 << 25
"""Entries of rows that are decoded at a time."""

Weights: TypeAlias = Float[Tensor, " _"] | None
"""A factor for each row; `None` is 1."""


class QueryRows(NamedTuple):
    """Rows whose scores with all examples are wanted.

    Attributes:
        rows: the rows.
        weight: the factor of each row under each measure.
        own: where the rows are examples themselves, which ones: an example is not among its own neighbours.
    """

    rows: Float[Tensor, "q d"]
    weight: Mapping[str, Weights]
    own: Int[Tensor, " q"] | None = None


class Ends(NamedTuple):
    """Both ends of each query's scores.

    Attributes:
        values: scores; `[:, 0]` the largest, largest first; `[:, 1]` the smallest, smallest first.
        indices: the examples that have them, by their place in the index.
    """

    values: Float[Tensor, "q 2 k"]
    indices: Int[Tensor, "q 2 k"]


class Histogram(NamedTuple):
    """Counts of each query's scores in bins.

    Attributes:
        edges: the first edge and the last; the bins between them have equal widths.
        counts: scores in each bin.
    """

    edges: Float[Tensor, "q 2"]
    counts: Int[Tensor, "q bins"]


class Spectrum(NamedTuple):
    r"""The eigenvalues of the Gram matrix of rows, and how many of them matter.

    Attributes:
        values: eigenvalues of $\frac{1}{n} \sum_n w_n^2 g_n g_n^\top$, largest first.
        rank: the effective rank, `exp` of the entropy of the eigenvalues' shares (Roy and Vetterli, 2007).
    """

    values: Float[Tensor, " r"]
    rank: float


def ends(examples: Examples, queries: QueryRows, measures: Mapping[str, Weights], k: int) -> dict[str, Ends]:
    """Return both ends of the exact scores with every example, by measure; equal scores in the order of examples.

    Costs `2 q n d` FLOPs and one pass over the rows for all measures together, on the device of the queries.
    """
    found = {(name, sign): top.start(queries.rows, k) for name in measures for sign in (1, -1)}
    weights = {name: None if w is None else w.to(queries.rows) for name, w in measures.items()}
    for begin, scores in scan.products(
        examples.pieces(scan.rows_a_piece(len(queries.rows))), queries.rows, examples.columns
    ):
        here = slice(begin, begin + scores.shape[1])
        self_scores = None if queries.own is None else _inside(queries.own, here)
        for (name, sign), best in found.items():
            weight = weights[name]
            signed = scores * sign if weight is None else scores * (sign * weight[here])
            if self_scores is not None:
                signed[self_scores] = -torch.inf
            found[name, sign] = top.update(best, signed, begin)
    return {name: _both(found[name, 1], found[name, -1], queries.weight[name]) for name in measures}


def _inside(own: Int[Tensor, " q"], here: slice) -> tuple[Tensor, Tensor]:
    """Return where queries meet themselves among the examples of a slice."""
    query = ((own >= here.start) & (own < here.stop)).nonzero()[:, 0]
    return query, own[query] - here.start


def _both(largest: Top, smallest: Top, weight: Weights) -> Ends:
    values = torch.stack([largest.values, -smallest.values], 1)
    scaled = values if weight is None else values * weight.to(values)[:, None, None]
    return Ends(scaled.cpu(), torch.stack([largest.indices, smallest.indices], 1).cpu())


def block_parts(
    examples: Examples, queries: QueryRows, found: Mapping[str, Ends], measures: Mapping[str, Weights]
) -> dict[str, Float[Tensor, "q 2 b"]]:
    """Return each block's part of the sum of each list's scores, by measure: the parts add up to that sum."""
    columns = examples.columns
    parts = {name: torch.empty(len(queries.rows), 2, len(columns.inside), dtype=queries.rows.dtype) for name in found}
    k = next(iter(found.values())).indices.shape[2]
    for some in torch.arange(len(queries.rows)).split(max(1, DECODED_AT_ONCE // (2 * k * len(found) * columns.dim))):
        numbers, where = torch.stack([ends.indices[some] for ends in found.values()]).unique(return_inverse=True)
        rows, mine = examples.take(numbers).to(queries.rows), queries.rows[some.to(queries.rows.device)]
        for (name, lists), places in zip(found.items(), where, strict=True):
            for end in range(lists.indices.shape[1]):
                own, theirs = queries.weight[name], measures[name]
                weight = torch.ones(len(some), k) if theirs is None else theirs[lists.indices[some, end]]
                weight = weight if own is None else weight * own[some, None]
                mixing = mine.new_zeros(len(some), len(numbers))
                mixing.scatter_add_(1, places[:, end].to(mine.device), weight.to(mine))
                product = (mixing @ rows) * mine
                parts[name][some, end] = torch.stack([product[:, at].sum(1) for at in columns.inside.values()], 1).cpu()
    return parts


def token_parts(
    examples: Examples, queries: QueryRows, found: Ends, own: Weights, theirs: Weights, lengths: Int[Tensor, " n"]
) -> Float[Tensor, " t"]:
    """Return each token's part of every score in the lists, flat: `lengths[example]` numbers a score, 0 without a row.

    `own` and `theirs` are the factors of the queries and of the examples. Tokens behind the first `lengths` are left
    out.
    """
    out = [torch.zeros(0)]
    longest = max(1, int(examples.index.offsets.diff().max()))
    for query, lists in enumerate(found.indices):
        for numbers in lists.flatten().split(max(1, DECODED_AT_ONCE // (longest * examples.index.dim))):
            rows, whose = examples.tokens_of(numbers)
            scores = examples.index.take(rows).to(queries.rows) @ queries.rows[query]
            if theirs is not None:
                scores = scores * theirs.to(scores)[numbers.to(scores.device)][whose.to(scores.device)]
            scores = (scores if own is None else scores * own[query].to(scores)).float().cpu()
            size, position = lengths[numbers], examples.index.position[rows]
            shown = position < size[whose]
            flat = torch.zeros(int(size.sum()))
            flat[((size.cumsum(0) - size)[whose] + position)[shown]] = scores[shown]
            out.append(flat)
    return torch.cat(out)


def products(queries: QueryRows, name: str, rows: Float[Tensor, "m d"], theirs: Weights) -> Float[Tensor, "q m"]:
    """Return the scores of the queries with some examples' rows, whose factors are `theirs`, under a measure."""
    scores, own = queries.rows @ rows.to(queries.rows).mT, queries.weight[name]
    scores = scores if theirs is None else scores * theirs.to(scores)
    return scores if own is None else scores * own.to(scores)[:, None]


def histogram(scores: Float[Tensor, "q m"], left_out: Bool[Tensor, "q m"] | None = None, bins: int = 32) -> Histogram:
    """Return the histogram of each query's scores, from its smallest to its largest, without those left out.

    Example:
        >>> import torch
        >>> histogram(torch.tensor([[0.0, 1.0, 3.0, 4.0]]), bins=2).counts
        tensor([[2, 2]])
    """
    left_out = torch.zeros_like(scores, dtype=torch.bool) if left_out is None else left_out
    low = scores.masked_fill(left_out, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(left_out, -torch.inf).amax(1, keepdim=True)
    width = torch.where(high > low, high - low, 1)
    place = ((scores - low) / width * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(len(scores), bins, dtype=torch.int64, device=scores.device)
    counts.scatter_add_(1, place, (~left_out).long())
    return Histogram(torch.cat([low, high], 1).cpu(), counts.cpu())


def spectrum(rows: Float[Tensor, "m d"]) -> Spectrum:
    """Return the spectrum of weighted rows, in float64, by the smaller of their two Gram matrices; all zero: rank 0.

    Example:
        >>> import torch
        >>> round(spectrum(torch.eye(3)).rank, 12)
        3.0
    """
    rows = rows.double()
    gram = rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows
    values = torch.linalg.eigvalsh(gram / max(len(rows), 1)).flip(0).clamp(min=0)
    total = values.sum()
    if not total > 0:
        return Spectrum(values, 0.0)
    share = values / total
    return Spectrum(values, float(torch.exp(-torch.xlogy(share, share).sum())))


def spectra(rows: Float[Tensor, "m d"], columns: Chosen) -> tuple[Spectrum, dict[str, Spectrum]]:
    """Return the spectrum of rows over all blocks, and of each block alone."""
    return spectrum(rows), {name: spectrum(rows[:, where]) for name, where in columns.inside.items()}
