"""The automatic budget against devices of a known size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence.data import Tokenized, auto_token_budget, batches

DATA = Tokenized(torch.arange(100).int(), None, torch.tensor([0, 3, 3, 10, *range(11, 101)]), torch.arange(93))
"""The longest example, row 2, has 7 tokens."""


def memory_of(positions: int, seen: list[int] | None = None) -> Callable[[dict[str, Tensor]], None]:
    def trial(batch: dict[str, Tensor]) -> None:
        if seen is not None:
            seen.append(batch["input_ids"].numel())
        if batch["input_ids"].numel() > positions:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return trial


@pytest.mark.parametrize("memory", [7, 13, 14, 35, 100, 101, 400, 500])
def test_the_budget_fits_and_is_within_a_sixteenth_of_the_largest(memory: int) -> None:
    budget = auto_token_budget(memory_of(memory), DATA)
    rows, best = budget // 7, memory // 7
    assert budget % 7 == 0
    assert best - max(1, rows // 16) < rows <= best
    for batch in batches(DATA, budget):
        memory_of(memory)(batch)


def test_memory_without_an_end_stops_at_the_whole_dataset_or_at_the_most() -> None:
    # doubling for ever, on a CPU
    assert auto_token_budget(memory_of(10**9), DATA) == 93 * 7
    seen: list[int] = []
    assert auto_token_budget(memory_of(10**9, seen), DATA, most=100) == 98
    assert max(seen) <= 100


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(batch: dict[str, Tensor]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        auto_token_budget(broken, DATA)


def test_what_was_measured_is_remembered_under_all_that_matters(tmp_path: Path) -> None:
    seen: list[int] = []
    cache = tmp_path / "a" / "budgets.json"

    def measured(key: dict[str, Any], **settings: Any) -> int:
        seen.clear()
        return auto_token_budget(memory_of(100, seen), DATA, cache=cache, key=key, **settings)

    assert measured({"model": "a", "dtype": "bfloat16"}) == 98
    assert seen
    assert measured({"dtype": "bfloat16", "model": "a"}) == 98
    assert not seen
    assert measured({"model": "a", "dtype": "float32"}) == 98
    assert seen
    assert measured({"model": "a", "dtype": "bfloat16"}, most=50) == 49
    assert seen
    assert measured({"model": "a", "dtype": "bfloat16"}) == 98
    assert not seen
    assert [file.name for file in cache.parent.iterdir()] == ["budgets.json"]


def test_what_cannot_be_tried_is_refused() -> None:
    with pytest.raises(ValueError, match="not even one example of 7 tokens fits on cpu: tokenize with truncation=True"):
        auto_token_budget(memory_of(6), DATA)
    with pytest.raises(ValueError, match="most=6 has no room for the longest example, of 7 tokens"):
        auto_token_budget(memory_of(6), DATA, most=6)
    with pytest.raises(ValueError, match="pass them as key="):
        auto_token_budget(memory_of(6), DATA, cache="budgets.json")
    with pytest.raises(ValueError, match="the dataset has no token"):
        auto_token_budget(memory_of(6), DATA.take(1, 2))
