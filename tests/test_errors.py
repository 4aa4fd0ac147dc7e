"""Bad input: each mistake is refused with the words that say what came and what to do; nothing is lost silently."""

import inspect

import pytest
import torch
from torch import Tensor

from influence import per_example_grads
from influence.func.engine.batch import check_params
from tests import messages


@pytest.mark.parametrize("case", messages.CASES, ids=lambda case: case.name)
def test_the_message_names_what_came_and_the_way_out(case: messages.Bad) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        case.call()
    missing = [word for word in case.words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_nonfinite_zero_counts_and_reports_and_keeps_the_rest() -> None:
    # the whole example goes, not the one block: half a row would be a wrong row
    with pytest.warns(UserWarning, match=r"1 of 3 rows were not finite and were set to zero: \[81\]"):
        rows = per_example_grads(messages.overflowing, messages.W, messages.BROKEN, nonfinite="zero")
    clean = messages.BROKEN | {"scale": torch.ones(3)}
    expected = per_example_grads(messages.overflowing, messages.W, clean)
    assert (rows["w"][1] == 0).all()
    torch.testing.assert_close(rows["w"][[0, 2]], expected["w"][[0, 2]])


def test_nonfinite_zero_counts_the_batch_and_not_its_chunks() -> None:
    # each chunk counted its own rows from 0: "row 0 of 1" for every one of them
    with pytest.warns(UserWarning, match=r"1 of 3 rows were not finite and were set to zero: \[1\]"):
        per_example_grads(messages.overflowing, messages.W, messages.UNFINISHED, nonfinite="zero", chunk_size=1)


def test_parameters_in_a_list_are_refused_without_the_type_hook_too() -> None:
    # the hook refuses them first in this process; users have no hook
    with pytest.raises(ValueError, match="params must be a dictionary"):
        inspect.unwrap(check_params)([torch.ones(2)])


def test_finite_rows_whose_sum_overflows_are_not_refused() -> None:
    # the fast check adds a row up; a half-precision row of large finite values must survive it
    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x * params["w"]).sum(1)

    big = torch.full((2, 64), 6e4, dtype=torch.float16)
    rows = per_example_grads(loss_fn, {"w": torch.zeros(64, dtype=torch.float16)}, big, engine="loop")
    assert torch.equal(rows["w"], big)


def test_an_error_of_the_users_own_function_arrives_as_it_is() -> None:
    # a failing loss must not be mistaken for something that only another engine can run
    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        per_example_grads(loss_fn, messages.W, messages.X)
