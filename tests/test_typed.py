"""The checker of types itself: it finds what is wrong, in inner functions too, however often they are made."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import beartype
import beartype.roar
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from influence.data import Tokenized, collate
from tests import typed

Wrong = (beartype.roar.BeartypeCallHintViolation, jaxtyping.TypeCheckError)
checked = typed.checked(typechecker=beartype.beartype)
ROWS = Float[Tensor, "n p"]


def test_the_library_is_checked() -> None:
    shard = Tokenized(torch.tensor([5, 6, 7]).int(), None, torch.tensor([0, 1, 3]), torch.tensor([8, 9]))
    assert len(collate(shard, torch.tensor([0, 1]))["index"]) == 2
    for wrong in (torch.tensor([[0], [1]]), torch.tensor([0.0]), [0, 1]):
        with pytest.raises(Wrong):
            collate(shard, wrong)


@checked
def doubled(x: Float[Tensor, "n p"], y: Float[Tensor, " n"], wide: bool = False) -> Float[Tensor, "n p"]:
    return x.mT if wide else 2 * x


def test_axes_of_one_call_agree() -> None:
    x = torch.ones(2, 3)
    assert torch.equal(doubled(x, torch.ones(2)), 2 * x)
    assert torch.equal(doubled(torch.ones(3, 3), torch.ones(3), wide=True), torch.ones(3, 3))
    for args in ((x, torch.ones(3)), (x.long(), torch.ones(2)), (x, torch.ones(2), 1)):
        with pytest.raises(Wrong):
            doubled(*args)
    with pytest.raises(Wrong):  # what it returns is checked, under the names of what it took
        doubled(x, torch.ones(2), wide=True)
    assert doubled(torch.ones(5, 1), y=torch.ones(5)).shape == (5, 1)


def test_a_function_made_again_is_checked_again_and_is_itself() -> None:
    def times(factor: int, hint: Any = ROWS) -> Callable[[Any], Any]:
        @checked
        def scaled(x: hint, *, back: bool = factor > 5) -> Float[Tensor, "n p"]:  # type: ignore[valid-type]
            """Scale."""
            return x[:, :-1] if back and len(x) == 7 else x[0] if back else factor * x

        return scaled

    made = [times(factor) for factor in (1, 2, 3)] + [times(4, Any)]
    x = torch.ones(2, 3)
    for factor, scaled in enumerate(made, 1):
        assert torch.equal(scaled(x), factor * x)
        assert scaled.__doc__ == "Scale."
        with pytest.raises(Wrong):
            scaled(x, back=True)
        with pytest.raises(Wrong):
            scaled(x, back=None)
    for scaled in made[:3]:
        with pytest.raises(Wrong):
            scaled(x.long())
    with pytest.raises(Wrong):
        times(6)(x)


def test_what_yields_and_names_that_are_quoted() -> None:
    @checked
    def rows(x: Float[Tensor, "n p"]) -> Iterator[Float[Tensor, " p"]]:
        yield from x

    @checked
    def named(x: "Tensor", other: "NotThere | None" = None) -> int:
        return len(x)

    assert len(list(rows(torch.ones(2, 3)))) == 2
    assert named(torch.ones(2)) == 2
    with pytest.raises(Wrong):
        rows(torch.ones(2))
    with pytest.raises(Wrong):
        named(3)


def test_dataclasses() -> None:
    @checked
    @dataclass(frozen=True)
    class Pair:
        x: Float[Tensor, " n"]
        y: Float[Tensor, " n"]
        name: str = "a"

    assert Pair(torch.ones(2), torch.ones(2)).name == "a"
    for wrong in ((torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(2), 3), (torch.ones(2), 3)):
        with pytest.raises(Wrong):
            Pair(*wrong)


def test_no_function_is_kept() -> None:
    class Held:
        pass

    def made() -> weakref.ref[Held]:
        held = Held()

        @checked
        def ask(x: int) -> bool:
            return held is not None and x > 0

        assert ask(1)
        return weakref.ref(held)

    assert made()() is None
    assert made()() is None
