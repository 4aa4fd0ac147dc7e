"""The guard in a loop: whose rows it checks, against whose backward, and when it is repeated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import (
    as_blocks,
    chain,
    functionalize,
    per_example_grads,
    per_example_grads_fn,
    project,
    unit_norm,
)
from influence.func.engine.per_token import per_token_grads_fn
from influence.func.engine.plan import CHECKED, GUARD_TOLERANCE

WRONG = "plan of the first batch is wrong for this one"
LIMIT = GUARD_TOLERANCE[torch.float64][0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """More than 8 examples go through the same operations on the same parameters in another order of axes."""
    n, s, d = x.shape
    y = (x.transpose(0, 1) if n > 8 else x).reshape(-1, d)
    y = (y @ params["w"]).sin()
    return (y.reshape(s, n, -1).transpose(0, 1) if n > 8 else y.reshape(n, s, -1)).sum((1, 2))


PARAMS = {"w": normal(4, 4)}


@pytest.mark.parametrize("transform", [None, chain(as_blocks(), project(2)), chain(as_blocks(), unit_norm())])
def test_the_rows_that_are_checked_are_those_of_the_whole_batch(transform: Any) -> None:
    """Rows computed anew for the few examples that are checked: they are right, and the batch's are wrong."""
    rows_of = per_example_grads_fn(turned, PARAMS, normal(3, 5, 4), transform=transform)
    assert rows_of.plan.engine == "batched"
    rows_of(PARAMS, normal(3, 5, 4))
    with pytest.raises(ValueError, match=WRONG):
        rows_of(PARAMS, normal(40, 5, 4, seed=1))


def test_a_first_batch_of_many_examples_is_checked_as_a_whole() -> None:
    rows_of = per_example_grads_fn(turned, PARAMS, x := normal(40, 5, 4))
    assert rows_of.plan.engine == "vmap"
    assert "the check Σ c·row = ∇ Σ c·ℓ fails at 'w'" in str(rows_of.plan)
    expected = per_example_grads(turned, PARAMS, x, engine="loop")
    torch.testing.assert_close(rows_of(PARAMS, x)["w"], expected["w"], rtol=1e-12, atol=1e-12)


class TurnedForCausalLM(nn.Module):
    """A language model of two maps, with the same fault."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        for p in self.parameters():
            p.data = normal(*p.shape, seed=p.numel())

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        n, s = input_ids.shape
        h = self.head(self.table(input_ids.T if n > 8 else input_ids).reshape(n * s, -1))
        return h.reshape(s, n, -1).transpose(0, 1) if n > 8 else h.reshape(n, s, -1)


@pytest.mark.parametrize("position", ["use", "loss"])
def test_rows_of_tokens_are_checked_by_their_sum(position: str) -> None:
    """Rows with positions, in the wrong order of axes."""
    loss_fn, params = functionalize(TurnedForCausalLM(), targets="head.weight")
    few, many = ({"input_ids": torch.randint(7, (n, 5), generator=torch.Generator().manual_seed(n))} for n in (3, 40))
    rows_of = per_token_grads_fn(loss_fn, params, few, position=position)
    for _ in range(3):
        rows_of(params, few)
    with pytest.raises(ValueError, match=WRONG):
        rows_of(params, many)


def test_a_check_costs_a_backward_over_few_examples_and_takes_others_each_time() -> None:
    """A plain backward over the whole batch takes longer than its rows did; the same few leave the rest unseen."""
    seen: list[Tensor] = []

    def counted(params: dict[str, Tensor], x: Tensor) -> Tensor:
        seen.append(x[:, 0])
        return (x @ params["w"]).square().sum(1)

    x = normal(64, 3)
    rows_of = per_example_grads_fn(counted, {"w": torch.eye(3).double()}, x)
    assert rows_of.plan.guard is not None
    assert rows_of.plan.guard <= LIMIT
    seen.clear()
    for _ in range(9):
        rows_of({"w": torch.eye(3).double()}, x)
    checks = [first for first in seen if len(first) < 64]
    assert [len(first) for first in seen].count(64) == 9
    assert [len(first) for first in checks] == [CHECKED] * 3  # on the 2nd, the 4th and the 8th
    assert len(set(torch.cat(checks).tolist())) > 2 * CHECKED


def test_a_check_that_showed_nothing_is_repeated_on_the_next_batch() -> None:
    """Documents without a label come second: their gradient is zero, and nothing was checked."""

    def masked(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return turned(params, batch["x"]) * batch["labelled"]

    def made(n: int, labelled: float) -> dict[str, Tensor]:
        return {"x": normal(n, 5, 4, seed=n), "labelled": torch.full((n,), labelled, dtype=torch.float64)}

    rows_of = per_example_grads_fn(masked, PARAMS, made(3, 1.0))
    rows_of(PARAMS, made(3, 1.0))
    rows_of(PARAMS, made(4, 0.0))
    with pytest.raises(ValueError, match=WRONG):
        rows_of(PARAMS, made(40, 1.0))
