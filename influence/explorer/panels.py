"""The views of the explorer's panels: an index's examples among themselves, queries, or scores that are given."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from influence.explorer.by_example import Examples, summed_tokens
from influence.explorer.html_page import Draft
from influence.explorer.statistics import (
    Ends,
    Histogram,
    QueryRows,
    Weights,
    block_parts,
    ends,
    histogram,
    products,
    spectra,
    token_parts,
)
from influence.func import top
from influence.index import Index
from influence.index.attributor import rows_for

QUERIES_AT_ONCE = 1 << 26
"""Entries of query rows that are scored in one pass over the index."""
BINS, EIGENVALUES = 32, 128
"""Bins of a histogram, and eigenvalues that are kept."""


class PageOptions(NamedTuple):
    """How much a page shows, and where it is computed: arguments of `explorer.page`."""

    k: int
    max_tokens: int
    sample: int
    device: str
    progress: bool | None


class _Statistics(NamedTuple):
    """The statistics of a batch of query rows under one measure."""

    ends: Ends
    parts: Float[Tensor, "q 2 b"]
    histogram: Histogram
    tokens: Float[Tensor, " t"] | None


def estimated_size(examples: Examples, options: PageOptions, tokens: bool) -> int:
    """Return about how many characters the views of examples take in the page, with colours of tokens or without."""
    width = 2 if examples.count < 1 << 16 else 4
    each = 2 * options.k * (width + 4) + 8 * len(examples.columns.inside) + 2 * BINS + 8
    if tokens:
        mean = float(examples.index.offsets[: examples.count + 1].diff().clamp(max=options.max_tokens).double().mean())
        each += int(2 * options.k * (mean + 4))
    return len(measures_of(examples)) * examples.count * each * 4 // 3


def measures_of(examples: Examples) -> dict[str, Weights]:
    """Return the measures of an index and the factor of each row under them; unit rows have the cosine alone."""
    if examples.index.fingerprint.cosine:
        return {"cosine": None}
    norms = examples.squared_norms().sqrt()
    return {"inner product": None, "cosine": torch.where(norms > 0, 1 / norms, 0)}


def of_examples(
    draft: Draft, examples: Examples, options: PageOptions, lengths: Int[Tensor, " n"] | None, name: str = ""
) -> list[dict[str, Any]]:
    """Return a view per measure of the examples scored with one another.

    `lengths` says how many tokens of each example are coloured; `name` is the run, where the page shows several.
    """
    measures = measures_of(examples)

    def batch(begin: int, end: int) -> QueryRows:
        own = torch.arange(begin, end)
        weight = {measure: None if w is None else w[own] for measure, w in measures.items()}
        return QueryRows(examples.take(own).to(options.device), weight, own.to(options.device))

    return _views(draft, "examples", examples, batch, examples.count, measures, options, lengths, name)


def of_queries(
    draft: Draft,
    queries: Index,
    examples: Examples,
    options: PageOptions,
    lengths: Int[Tensor, " n"] | None,
    name: str = "",
) -> list[dict[str, Any]]:
    """Return a view per measure of the rows of another index against the examples; arguments as in `of_examples`.

    Raises:
        FingerprintError: if the rows do not belong together, naming the field and both values.
    """
    rows = examples.columns.matrix(rows_for(queries, examples.index.fingerprint, examples.columns))
    rows = summed_tokens(rows, queries.offsets) if queries.per_token else rows
    rows = rows.to(torch.promote_types(rows.dtype, examples.dtype))
    norms = rows.norm(dim=1)
    measures = measures_of(examples)
    inverse = {name: None if w is None else torch.where(norms > 0, 1 / norms, 0) for name, w in measures.items()}

    def batch(begin: int, end: int) -> QueryRows:
        weight = {measure: None if w is None else w[begin:end] for measure, w in inverse.items()}
        return QueryRows(rows[begin:end].to(options.device), weight)

    return _views(draft, "queries", examples, batch, len(rows), measures, options, lengths, name)


def of_scores(draft: Draft, scores: Float[Tensor, "q n"] | Ends, k: int) -> list[dict[str, Any]]:
    """Return the view of scores that are given: all of them, or both ends; it has no blocks and no spectrum."""
    bins = None if isinstance(scores, Ends) else histogram(scores, None, BINS)
    if isinstance(scores, Ends):
        lists = Ends(scores.values[:, :, :k], scores.indices[:, :, :k])
    else:
        largest, smallest = (top.update(top.start(each, k), each, 0) for each in (scores, -scores))
        both = zip(largest, smallest._replace(values=-smallest.values), strict=True)
        lists = Ends(*(torch.stack(pair, 1) for pair in both))
    view = {"of": "queries", "name": "scores", "k": k}
    view |= {"indices": draft.pack(lists.indices), "values": draft.pack(lists.values)}
    return [view if bins is None else view | {"edges": draft.pack(bins.edges), "counts": draft.pack(bins.counts)}]


def _views(
    draft: Draft,
    of: str,
    examples: Examples,
    batch: Callable[[int, int], QueryRows],
    number: int,
    measures: Mapping[str, Weights],
    options: PageOptions,
    lengths: Int[Tensor, " n"] | None,
    name: str,
) -> list[dict[str, Any]]:
    sampled = torch.arange(min(options.sample, examples.count)) * examples.count // min(options.sample, examples.count)
    sample = examples.take(sampled)
    step = max(16, min(2048, QUERIES_AT_ONCE // max(examples.index.dim, 1)))
    found: dict[str, list[_Statistics]] = {measure: [] for measure in measures}
    hidden = None if options.progress is None else not options.progress
    with tqdm(total=number, desc=f"explore {of}", unit="rows", disable=hidden, dynamic_ncols=True) as bar:
        for begin in range(0, number, step):
            queries = batch(begin, min(begin + step, number))
            for measure, one in _statistics(queries, examples, measures, options.k, sample, sampled, lengths):
                found[measure].append(one)
            bar.update(len(queries.rows))
    views = []
    for measure, batches in found.items():
        weight = measures[measure]
        rows = sample if weight is None else sample * weight[sampled, None]
        view = {"of": of, "name": f"{name} · {measure}" if name else measure}
        views.append(view | _packed(draft, batches, lengths) | _spectra(rows, examples))
    return views


def _statistics(
    queries: QueryRows,
    examples: Examples,
    measures: Mapping[str, Weights],
    k: int,
    sample: Float[Tensor, "m d"],
    sampled: Int[Tensor, " m"],
    lengths: Int[Tensor, " n"] | None,
) -> Iterator[tuple[str, _Statistics]]:
    """Yield the statistics of a batch of query rows, measure by measure."""
    found = ends(examples, queries, measures, k)
    parts = block_parts(examples, queries, found, measures)
    for name, lists in found.items():
        weights = measures[name]
        scores = products(queries, name, sample, None if weights is None else weights[sampled])
        itself = None if queries.own is None else queries.own[:, None] == sampled.to(queries.own.device)
        tokens = None
        if lengths is not None:
            tokens = token_parts(examples, queries, lists, queries.weight[name], weights, lengths)
        yield name, _Statistics(lists, parts[name], histogram(scores, itself, BINS), tokens)


def _packed(draft: Draft, batches: list[_Statistics], lengths: Int[Tensor, " n"] | None) -> dict[str, Any]:
    """Return the view of one measure, its numbers packed."""
    indices = torch.cat([one.ends.indices for one in batches])
    view = {
        "k": indices.shape[2],
        "indices": draft.pack(indices),
        "values": draft.pack(torch.cat([one.ends.values for one in batches])),
        "parts": draft.pack(torch.cat([one.parts for one in batches])),
        "edges": draft.pack(torch.cat([one.histogram.edges for one in batches])),
        "counts": draft.pack(torch.cat([one.histogram.counts for one in batches])),
    }
    if lengths is None:
        return view
    tokens = [one.tokens for one in batches if one.tokens is not None]
    return view | _colours(draft, torch.cat(tokens), lengths[indices.flatten(1)])


def _colours(draft: Draft, parts: Float[Tensor, " t"], lengths: Int[Tensor, "q pairs"]) -> dict[str, Any]:
    """Return tokens' parts of scores, packed as whole numbers from -127 to 127 with the largest part of each pair."""
    pairs = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
    largest = torch.zeros(lengths.numel()).scatter_reduce_(0, pairs, parts.abs(), "amax")
    steps = (parts / torch.where(largest > 0, largest, 1)[pairs] * 127).round().to(torch.int8)
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.sum(1).cumsum(0)])
    return {
        "tokens": draft.pack(steps[:, None]),
        "begins": draft.pack(begins[:, None]),
        "largest": draft.pack(largest.view(lengths.shape)),
    }


def _spectra(rows: Float[Tensor, "m d"], examples: Examples) -> dict[str, Any]:
    whole, blocks = spectra(rows, examples.columns)
    values = [float(f"{value:.6g}") for value in whole.values[:EIGENVALUES].tolist() if math.isfinite(value)]
    return {
        "spectrum": {"values": values, "rank": whole.rank, "of": len(rows), "dim": rows.shape[1]},
        "blocks": [
            {"name": name, "rank": one.rank, "trace": float(one.values.sum()), "dim": min(rows[:, at].shape)}
            for (name, one), at in zip(blocks.items(), examples.columns.inside.values(), strict=True)
        ],
    }
