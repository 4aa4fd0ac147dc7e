"""What stands in a panel of the explorer under one measure: an index's examples scored with one another, or queries."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.index import open_index
from influence.index.by_example import Examples
from influence.index.exploring import (
    Asked,
    Ends,
    Histogram,
    Weights,
    block_parts,
    ends,
    histogram,
    products,
    spectra,
    token_parts,
)
from influence.pipelines.frame.outcome import progress
from influence.pipelines.page import Page
from influence.pipelines.passes.queries import load_queries
from influence.pipelines.reading_texts import query_texts

AT_ONCE = 1 << 26
"""Entries of rows that are asked about in one pass over the index."""
BINS, VALUES = 32, 128
"""Bins of a histogram, and eigenvalues that are kept."""


class Limits(NamedTuple):
    """How much of everything is shown, and how; fields as in `ExploreConfig`."""

    k: int
    max_tokens: int
    sample: int
    device: str
    progress: bool | None
    trust_remote_code: bool = False


class Looked(NamedTuple):
    """What was found for some rows under one measure."""

    ends: Ends
    parts: Float[Tensor, "q 2 b"]
    histogram: Histogram
    tokens: Float[Tensor, " t"] | None


def estimated(examples: Examples, limits: Limits) -> int:
    """Return about how many characters the views of examples take in the page."""
    width = 2 if examples.count < 1 << 16 else 4
    each = 2 * limits.k * (width + 4) + 8 * len(examples.columns.inside) + 2 * BINS + 8
    if examples.index.per_token:
        mean = float(examples.index.offsets[: examples.count + 1].diff().clamp(max=limits.max_tokens).double().mean())
        each += int(2 * limits.k * (mean + 4))
    return len(measures_of(examples)) * examples.count * each * 4 // 3


def measures_of(examples: Examples) -> dict[str, Weights]:
    """Return the measures of an index and the weight of each row under them."""
    if examples.index.fingerprint.cosine:
        return {"cosine": None}
    norms = examples.squared_norms().sqrt()
    return {"inner product": None, "cosine": torch.where(norms > 0, 1 / norms, 0)}


def of_examples(
    page: Page, examples: Examples, limits: Limits, lengths: Int[Tensor, " n"], name: str = ""
) -> list[dict[str, Any]]:
    """Return the views of the examples of an index scored with one another, numbers packed into the page.

    Args:
        page: the page.
        examples: the examples.
        limits: how much to show.
        lengths: how many tokens of each example the page has.
        name: the run, where there are several.

    Returns:
        A view per measure.
    """
    measures = measures_of(examples)

    def asked(begin: int, end: int) -> Asked:
        own = torch.arange(begin, end)
        weight = {measure: None if w is None else w[own] for measure, w in measures.items()}
        return Asked(examples.take(own).to(limits.device), weight, own.to(limits.device))

    return _views(page, "examples", examples, asked, examples.count, measures, limits, lengths, name)


def of_queries(
    page: Page, path: str, examples: Examples, limits: Limits, lengths: Int[Tensor, " n"], name: str = ""
) -> list[dict[str, Any]]:
    """Return the views of the rows of another run against the examples of an index.

    Args:
        page: the page.
        path: the run of build or reduce whose rows are the queries.
        examples: the examples.
        limits: how much to show.
        lengths: how many tokens of each example the page has.
        name: the run of the examples, where there are several.

    Returns:
        A view per measure.

    Raises:
        ValueError: if the rows do not belong together, naming the field and both values.
    """
    theirs = open_index(path)
    [queries] = load_queries([path], examples.index.fingerprint, examples.index.blocks)
    rows = examples.columns.matrix(queries.rows)
    if theirs.per_token:
        whose = torch.arange(theirs.examples).repeat_interleave(theirs.offsets.diff())
        rows = rows.new_zeros(theirs.examples, rows.shape[1]).index_add_(0, whose, rows)
    rows = rows.to(torch.promote_types(rows.dtype, examples.dtype))
    norms = rows.norm(dim=1)
    measures = measures_of(examples)
    inverse = {name: None if w is None else torch.where(norms > 0, 1 / norms, 0) for name, w in measures.items()}

    def asked(begin: int, end: int) -> Asked:
        weight = {measure: None if w is None else w[begin:end] for measure, w in inverse.items()}
        return Asked(rows[begin:end].to(limits.device), weight)

    page.facts["queries"] = query_texts(path, len(rows), limits.trust_remote_code)
    return _views(page, "queries", examples, asked, len(rows), measures, limits, lengths, name)


def _views(
    page: Page,
    of: str,
    examples: Examples,
    asked: Callable[[int, int], Asked],
    number: int,
    measures: Mapping[str, Weights],
    limits: Limits,
    lengths: Int[Tensor, " n"],
    name: str,
) -> list[dict[str, Any]]:
    sampled = torch.arange(min(limits.sample, examples.count)) * examples.count // min(limits.sample, examples.count)
    sample = examples.take(sampled)
    step = max(16, min(2048, AT_ONCE // max(examples.index.dim, 1)))
    looked: dict[str, list[Looked]] = {measure: [] for measure in measures}
    with progress(f"explore {of}", number, limits.progress, unit="rows") as seen:
        for begin in range(0, number, step):
            batch = asked(begin, min(begin + step, number))
            for measure, found in _look(batch, examples, measures, limits, sample, sampled, lengths):
                looked[measure].append(found)
            seen(len(batch.rows))
    views = []
    for measure, parts in looked.items():
        weight = measures[measure]
        rows = sample if weight is None else sample * weight[sampled, None]
        view = {"of": of, "name": f"{name} · {measure}" if name else measure}
        views.append(view | _packed(page, parts, lengths) | _spectra(rows, examples))
    return views


def _look(
    asked: Asked,
    examples: Examples,
    measures: Mapping[str, Weights],
    limits: Limits,
    sample: Float[Tensor, "m d"],
    sampled: Int[Tensor, " m"],
    lengths: Int[Tensor, " n"],
) -> Iterator[tuple[str, Looked]]:
    """Yield what is found for a batch of rows, measure by measure."""
    found = ends(examples, asked, measures, limits.k)
    parts = block_parts(examples, asked, found, measures)
    for name, lists in found.items():
        weights = measures[name]
        scores = products(asked, name, sample, None if weights is None else weights[sampled])
        itself = None if asked.own is None else asked.own[:, None] == sampled.to(asked.own.device)
        bins = histogram(scores, itself, BINS)
        tokens = None
        if examples.index.per_token:
            tokens = token_parts(examples, asked, lists, asked.weight[name], weights, lengths)
        yield name, Looked(lists, parts[name], bins, tokens)


def _packed(page: Page, looked: list[Looked], lengths: Int[Tensor, " n"]) -> dict[str, Any]:
    """Return the view of one measure, its numbers packed."""
    indices = torch.cat([one.ends.indices for one in looked])
    view = {
        "k": indices.shape[2],
        "indices": page.pack(indices),
        "values": page.pack(torch.cat([one.ends.values for one in looked])),
        "parts": page.pack(torch.cat([one.parts for one in looked])),
        "edges": page.pack(torch.cat([one.histogram.edges for one in looked])),
        "counts": page.pack(torch.cat([one.histogram.counts for one in looked])),
    }
    told = [one.tokens for one in looked if one.tokens is not None]
    return view | (_coloured(page, torch.cat(told), lengths[indices.flatten(1)]) if told else {})


def _coloured(page: Page, parts: Float[Tensor, " t"], lengths: Int[Tensor, "q pairs"]) -> dict[str, Any]:
    """Return tokens' parts of scores, in 127 steps of the largest of each pair to either side."""
    pairs = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
    largest = torch.zeros(lengths.numel()).scatter_reduce_(0, pairs, parts.abs(), "amax")
    steps = (parts / torch.where(largest > 0, largest, 1)[pairs] * 127).round().to(torch.int8)
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.sum(1).cumsum(0)])
    return {
        "tokens": page.pack(steps[:, None]),
        "begins": page.pack(begins[:, None]),
        "largest": page.pack(largest.view(lengths.shape)),
    }


def _spectra(rows: Float[Tensor, "m d"], examples: Examples) -> dict[str, Any]:
    whole, blocks = spectra(rows, examples.columns)
    return {
        "spectrum": {"values": _short(whole.values), "rank": whole.rank, "of": len(rows), "dim": rows.shape[1]},
        "blocks": [
            {"name": name, "rank": one.rank, "trace": float(one.values.sum()), "dim": min(rows[:, at].shape)}
            for (name, one), at in zip(blocks.items(), examples.columns.inside.values(), strict=True)
        ],
    }


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values[:VALUES].tolist() if math.isfinite(value)]
