"""What stands in a panel of the explorer of scores that were kept, all of them or the best and worst."""

from pathlib import Path
from typing import Any

import torch

from influence.func import top
from influence.index import open_index
from influence.index.by_example import Examples
from influence.index.exploring import Ends, Histogram, histogram
from influence.pipelines.frame.directory import names_in
from influence.pipelines.page import Page
from influence.pipelines.panels import BINS, Limits
from influence.pipelines.passes.best import read_best
from influence.pipelines.passes.queries import column
from influence.pipelines.reading_texts import query_texts


def of_scores(page: Page, path: str, examples: Examples, limits: Limits) -> list[dict[str, Any]]:
    """Return the view of scores that `influence score` kept.

    Args:
        page: the page.
        path: the run of score.
        examples: the examples that are shown.
        limits: how much to show.

    Returns:
        One view; it has no blocks and no spectrum, because score keeps no rows.

    Raises:
        ValueError: if the scores are of other examples, or fewer of them were kept.
    """
    found, bins = (
        _from_best(path, examples, limits) if (Path(path) / "best.h5").exists() else _from_all(path, examples, limits)
    )
    page.facts["queries"] = [
        text
        for name, one in zip(_names(path, len(found)), found, strict=True)
        for text in query_texts(name, len(one.values), limits.trust_remote_code)
    ]
    values, indices = (torch.cat([getattr(one, part) for one in found]) for part in ("values", "indices"))
    view = {"of": "queries", "name": "scores", "k": indices.shape[2], "indices": page.pack(indices)}
    view["values"] = page.pack(values)
    if bins:
        view["edges"] = page.pack(torch.cat([one.edges for one in bins]))
        view["counts"] = page.pack(torch.cat([one.counts for one in bins]))
    return [view]


def _from_all(path: str, examples: Examples, limits: Limits) -> tuple[list[Ends], list[Histogram]]:
    scores = open_index(path)
    shown = examples.index.index[: examples.count]
    if not torch.equal(scores.index[: examples.count], shown):
        raise ValueError(
            f"{path} scores other examples than {examples.index.path} shows: score the dataset that it was built from"
        )
    found, bins = [], []
    for name in [name for name in scores.blocks if "/" not in name]:
        each = scores.rows([name], 0, examples.count)[name].mT.contiguous()
        best, worst = (top.update(top.start(each, limits.k), signed, 0) for signed in (each, -each))
        lists = zip(best, worst._replace(values=-worst.values), strict=True)
        found.append(Ends(*(torch.stack(both, 1) for both in lists)))
        bins.append(histogram(each, None, BINS))
    return found, bins


def _from_best(path: str, examples: Examples, limits: Limits) -> tuple[list[Ends], list[Histogram]]:
    kept, found = read_best(path), []
    shown = examples.index.index[: examples.count]
    for number in range(len(kept) // 2):
        heaps = [kept[f"{column(number)}/{end}"] for end in ("best", "worst")]
        if limits.k > heaps[0].values.shape[1]:
            raise ValueError(f"k must be at most {heaps[0].values.shape[1]}, which {path} kept; got {limits.k}")
        numbers = torch.stack([heap.indices[:, : limits.k] for heap in heaps], 1)
        places = torch.searchsorted(shown, numbers).clamp(max=len(shown) - 1)
        if not torch.equal(shown[places], numbers):
            raise ValueError(
                f"{path} found examples that are not shown: raise --max-examples, or score the run's dataset"
            )
        found.append(Ends(torch.stack([heap.values[:, : limits.k] for heap in heaps], 1), places))
    return found, []


def _names(path: str, number: int) -> list[str]:
    names = names_in(path, "query")
    return [names[k] if k < len(names) else column(k) for k in range(number)]
