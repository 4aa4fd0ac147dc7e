"""Folds: several sinks in one pass, any split of the batches, any bracketing of the merges: the same result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import Sink, as_blocks, chain, fold, functionalize, per_example_grads, per_example_grads_fn, project
from influence.func.sinks import gram, mean, score, total

Rows = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = {"a": normal(7, 2, 3), "b": normal(7, 4, seed=1)}
QUERIES = {"b": normal(3, 4, seed=2), "a": normal(3, 2, 3, seed=3)}
SINKS: dict[str, Callable[[], Sink]] = {"mean": mean, "sum": total, "gram": gram, "score": lambda: score(QUERIES)}
DENSE: dict[str, Any] = {
    "mean": {name: row.mean(0) for name, row in ROWS.items()},
    "sum": {name: row.sum(0) for name, row in ROWS.items()},
    "gram": {name: row.flatten(1).T @ row.flatten(1) / 7 for name, row in ROWS.items()},
    "score": sum(ROWS[name].flatten(1) @ QUERIES[name].flatten(1).T for name in ROWS),
}


def step(batch: dict[str, Tensor]) -> Rows:
    return {name: row[batch["index"]] for name, row in ROWS.items()}


def cut(sizes: list[int], order: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    return iter([{"index": index} for index in (torch.arange(7) if order is None else order).split(sizes)])


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 1], [1] * 7], ids=str)
def test_any_split_gives_the_dense_result(sizes: list[int]) -> None:
    """A mean of means; a Gram matrix over batches instead of examples."""
    for name, sink in SINKS.items():
        same(fold(step, cut(sizes), {name: sink()})[name], DENSE[name])


def test_several_sinks_in_one_pass_are_separate_passes() -> None:
    """Sinks that share a state, or an iterator that the first one uses up; and one step per batch."""
    calls: list[int] = []

    def counted(batch: dict[str, Tensor]) -> Rows:
        calls.append(len(batch["index"]))
        return step(batch)

    found = fold(counted, cut([3, 4]), {name: sink() for name, sink in SINKS.items()})
    assert calls == [3, 4]
    for name, sink in SINKS.items():
        same(found[name], fold(step, cut([3, 4]), {name: sink()})[name])


def state(sink: Sink, index: list[int]) -> Any:
    rows = {name: row[index] for name, row in ROWS.items()}
    return sink.update(sink.init(), torch.tensor(index, dtype=torch.int64), rows)


@pytest.mark.parametrize("name", SINKS)
def test_merge_is_associative_with_the_empty_state_as_its_unit(name: str) -> None:
    """Ranks that merge in another order, a rank that got no batch, a resumed run."""
    sink = SINKS[name]()
    a, b, c, merge = state(sink, [0, 1]), state(sink, [2]), state(sink, [3, 4, 5, 6]), sink.merge
    for merged in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(merge(sink.init(), a), merge(merge(b, sink.init()), c)),
        merge(c, merge(a, b)),
    ):
        same(sink.finalize(merged), DENSE[name])


def test_merge_leaves_its_arguments_alone() -> None:
    """A state that is added to in place is counted twice when a run resumes from it."""
    sink = total()
    a, b = state(sink, [0, 1]), state(sink, [2])
    before = {name: value.clone() for name, value in a.sums.items()}
    sink.merge(a, b)
    sink.update(a, torch.tensor([3]), {name: row[3:4] for name, row in ROWS.items()})
    same(a.sums, before)


def test_scores_come_in_the_order_of_the_index() -> None:
    """Batches sorted by length, shards of several ranks: scores in the order they were met are other examples'."""
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    same(fold(step, cut([2, 5], order), {"score": score(QUERIES)})["score"], DENSE["score"])
    sink = score(QUERIES)
    same(sink.finalize(sink.merge(state(sink, [4, 5, 6]), state(sink, [0, 1, 2, 3]))), DENSE["score"])


def test_rows_are_counted_where_there_is_no_index() -> None:
    """Every batch counted from 0: the scores of all batches would lie on top of each other."""
    batches = [ROWS["a"][:3], ROWS["a"][3:]]
    found = fold(lambda rows: {"a": rows}, batches, {"score": score({"a": QUERIES["a"]})})["score"]
    same(found, ROWS["a"].flatten(1) @ QUERIES["a"].flatten(1).T)


def test_no_batches_give_empty_results() -> None:
    """A rank without data: an empty score, not an error about nothing."""
    found = fold(step, [], {name: sink() for name, sink in SINKS.items()})
    assert found["score"].shape == (0, 3)
    assert found["sum"] == found["mean"] == found["gram"] == {}


def test_queries_of_other_blocks_are_refused() -> None:
    """Blocks compared by place: scores of query against key matrices."""
    with pytest.raises(ValueError, match=r"queries have blocks .*the rows have"):
        fold(step, cut([7]), {"score": score({"a": QUERIES["a"]})})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    """A sum of 3000 ones in bfloat16 stops at 256."""
    batches = [{"w": torch.ones(100, 1).to(dtype)} for _ in range(30)]
    queries = {"w": torch.full((1, 1), 2.0)}
    found = fold(lambda rows: rows, batches, {"sum": total(), "mean": mean(), "gram": gram(), "score": score(queries)})
    assert found["sum"]["w"].dtype == torch.float32
    assert found["sum"]["w"].item() == 3000
    assert found["mean"]["w"].item() == found["gram"]["w"].item() == 1
    assert (found["score"] == 2).all()


def test_queries_of_another_precision_are_met() -> None:
    """Queries in float64 scored against rows in float32, as when a query was computed with more care."""
    found = fold(lambda rows: rows, [{"w": torch.ones(2, 3)}], {"score": score({"w": normal(1, 3)})})["score"]
    torch.testing.assert_close(found.double(), normal(1, 3).sum().expand(2, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ["batched", "vmap", "loop"])
def test_chunks_bound_how_many_examples_are_ever_seen(engine: str) -> None:
    """A check of the plan on the whole first batch: the memory that `chunk_size` was to bound is taken once."""
    loss_fn, params = functionalize(nn.Linear(3, 2))
    seen: list[int] = []

    def counted(params: Rows, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return loss_fn(params, batch)

    batch = torch.ones(20, 3), torch.zeros(20, dtype=torch.int64)
    per_example_grads(counted, params, batch, engine=engine, chunk_size=4)
    assert max(seen) <= 4


def test_a_planned_fold_runs_one_forward_per_batch() -> None:
    """A plan made anew, or a guard run again, at every batch: it is repeated on the 2nd, 4th, 8th … alone."""
    loss_fn, params = functionalize(nn.Linear(3, 2).double())
    calls: list[int] = []

    def counted(params: Rows, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return loss_fn(params, batch)

    batches = [(normal(n, 3, seed=n), torch.zeros(n, dtype=torch.int64)) for n in (4, 2, 5)]
    transform = chain(as_blocks(bias=True), project(2))
    rows_of = per_example_grads_fn(counted, params, batches[0], transform=transform)
    calls.clear()
    for _ in range(4):
        rows_of(params, batches[0])
    assert calls == [4] * 6  # one more for each check, on the 2nd and the 4th batch
    calls.clear()
    found = fold(lambda batch: rows_of(params, batch), batches, {"sum": total(), "mean": mean()})
    assert calls == [4, 2, 5]
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    rows = per_example_grads(counted, params, whole, transform=transform)
    same(found["sum"], {name: row.sum(0) for name, row in rows.items()})
