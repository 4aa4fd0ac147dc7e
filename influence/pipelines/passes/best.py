"""The ends of scores: each query's best and worst examples, from all scores or from a heap that was kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.fold import Sink
from influence.func.top import Top, merge, start
from influence.index import Index, open_index
from influence.pipelines.frame.directory import names_in
from influence.pipelines.frame.outcome import Outcome
from influence.pipelines.passes.queries import column
from influence.store.folder import run_id
from influence.terminal import table
from influence.visible import visible


def best(k: int, queries: int, reverse: bool = False) -> Sink:
    """Return a sink of scores `[n, q]` that keeps the k best of each query; equal ones in the dataset's order.

    Args:
        k: how many, at most as many as there are examples.
        queries: how many queries there are.
        reverse: keep the lowest instead.

    Returns:
        The sink, whose result is a `Top` of the scores.

    Raises:
        ValueError: if `k` is less than 1.

    Example:
        >>> heap = best(1, 2)
        >>> heap.update(heap.init(), torch.tensor([7, 8]), torch.tensor([[1.0, 4.0], [2.0, 3.0]])).indices.tolist()
        [[8], [7]]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    sign = -1 if reverse else 1

    def update(state: Top, index: Int[Tensor, " n"], scores: Float[Tensor, "n q"]) -> Top:
        seen = Top(sign * scores.mT.cpu(), index[None].expand(queries, -1))
        return merge(state._replace(values=state.values.to(seen.values.dtype)), seen)

    def finalize(state: Top) -> Top:
        return state._replace(values=sign * state.values)

    return Sink(lambda: start(torch.zeros(queries, 1), k), update, merge, finalize)


AT_ONCE = 1 << 14
"""Scores that are looked through at once."""
BEST = "best.h5"
SHOWN = 3
"""Queries, and examples of each, that are shown."""


def write_best(path: Path, run: str, heaps: Mapping[str, Top], queries: Sequence[str], mode: str) -> None:
    """Write the best and worst examples of every query."""
    from influence import store

    tensors = {f"{name}/{key}": value for name, heap in heaps.items() for key, value in heap._asdict().items()}
    store.write(path, tensors, {"queries": list(queries), "mode": mode}, kind="best", schema=1, run=run)


def read_best(path: str | Path) -> dict[str, Top]:
    """Return the best and worst examples that a run with `top_k` kept: `{"query0/best": …, "query0/worst": …}`."""
    from influence import store

    file = Path(path) / BEST if Path(path).is_dir() else Path(path)
    tensors, _ = store.read(file, kind="best", schema=1, run=run_id(file.parent))
    names = [f"{column(number)}/{end}" for number in range(len(tensors) // 4) for end in ("best", "worst")]
    if not names or {*tensors} != {f"{name}/{key}" for name in names for key in Top._fields}:
        raise store.BadFileError(f"{file} is not what it says: its tensors are {', '.join(sorted(tensors)[:5])} …")
    heaps = {name: Top(tensors[f"{name}/values"], tensors[f"{name}/indices"]) for name in names}
    for name, heap in heaps.items():
        fits = heap.values.ndim == 2 and heap.values.shape == heap.indices.shape
        if not (fits and heap.values.is_floating_point() and heap.indices.dtype == torch.int64):
            raise store.BadFileError(f"{file} is not what it says: {name} has no scores and examples of one shape")
    return heaps


class End(NamedTuple):
    """One end of each query's scores.

    Attributes:
        values: the scores.
        indices: the examples, by their row in the dataset or their chunk's number.
        positions: where every token has a score, the token.
    """

    values: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]
    positions: Int[Tensor, "q k"] | None = None

    def facts(self) -> dict[str, Any]:
        """Return it as JSON can write it."""
        return {name: value.tolist() for name, value in self._asdict().items() if value is not None}


def _where(index: Index, rows: Int[Tensor, "q k"]) -> tuple[Tensor, Tensor | None]:
    """Return which examples rows are of, and which of their tokens."""
    return index.place(rows) if index.per_token else (index.index[rows], None)


def ends(run: str | Path, k: int = 5) -> dict[str, End]:
    """Return each query run's best and worst examples, from all scores or from those that were kept."""
    if (Path(run) / "best.h5").is_file():
        return {name: End(heap.values[:, :k], heap.indices[:, :k]) for name, heap in read_best(run).items()}
    index = open_index(run)
    found = {}
    for name, shape in index.blocks.items():
        if "/" in name:  # a block's part of a score
            continue
        for end, reverse in (("best", False), ("worst", True)):
            heap = best(min(k, len(index)), shape[0], reverse)
            state = heap.init()
            for begin in range(0, len(index), AT_ONCE):
                scores = index.rows([name], begin, begin + AT_ONCE)[name]
                state = heap.update(state, torch.arange(begin, begin + len(scores)), scores)
            values, rows = heap.finalize(state)
            found[f"{name}/{end}"] = End(values, *_where(index, rows))
    return found


def outcome_of(run: str | Path) -> Outcome:
    """Return what there is to say of finished scores: the ends of each query's."""
    names = names_in(run, "query")
    found = ends(run)
    facts: dict[str, Any] = {"run": str(run), "queries": []}
    lines = []
    for number in range(len(found) // 2):
        top, bottom = (found[f"{column(number)}/{end}"] for end in ("best", "worst"))
        name = names[number] if number < len(names) else column(number)
        ways = {"best": top, "worst": bottom}
        facts["queries"].append(
            {"query": name, "rows": len(top.values)} | {end: heap.facts() for end, heap in ways.items()}
        )
        shown = range(min(SHOWN, len(top.values)))
        rows = [
            [row, rank + 1, *(value[row, rank].item() for value in top if value is not None)]
            for row in shown
            for rank in range(min(SHOWN, top.values.shape[1]))
        ]
        head = ["query", "rank", "score", "example", *(["token"] if top.positions is not None else [])]
        lines += [f"{visible(name, lines=False)}: {len(top.values):,} query rows", table(head, rows, "  ")]
    return Outcome(str(run), facts, "\n".join([*lines, f"scores in {run}"]))
