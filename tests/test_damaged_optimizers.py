"""An optimizer's state with any one of its parts of another type, or gone: it is refused by name, or it is one."""

from typing import Any

import pytest
import torch
from torch import nn

from influence import train
from tests.damage import changes


def trained() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer.state_dict()


def test_any_part_of_another_type_is_refused_or_read(capsys: Any) -> None:
    model, whole = trained()
    assert {*train.read_optimizer(model, whole).moments(True).second} == {"weight", "bias"}
    refused = taken = 0
    for state in changes(whole):
        if not isinstance(state, dict):  # what is no state at all is a mistake of the caller's
            continue
        try:
            read = train.read_optimizer(model, state)
            assert all(v.isfinite().all() for v in read.moments().second.values())  # type: ignore[union-attr]
            train.adam_update(read)
            assert all(rate >= 0 for rate in read.rates.values())
        except ValueError as error:
            assert str(error)  # noqa: PT017 -- or it is read
            refused += 1
        else:
            taken += 1
    assert refused > taken


@pytest.mark.parametrize("how", ["empty", "cut", "half", "text", "zeros"])
def test_a_file_that_is_damaged_is_named(how: str, tmp_path: Any) -> None:
    model, whole = trained()
    path = tmp_path / "optimizer.pt"
    torch.save(whole, path)
    kept = path.read_bytes()
    damaged = {"empty": b"", "cut": kept[:-50], "half": kept[:100], "text": b"hello", "zeros": bytes(len(kept))}
    path.write_bytes(damaged[how])
    with pytest.raises(ValueError, match=f"^{path} "):
        train.read_optimizer(model, path)
