"""Forwards that others put on a model: what they close over is the model itself, and its copy has to see the copy."""

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from influence import functionalize, per_example_grads
from tests.cases import LLAMA, hf

BATCH = {"input_ids": torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))}


def llama() -> nn.Module:
    return hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)().double()


def patched(model: nn.Module, style: str) -> nn.Module:
    """As TRL's fused unembedding does, as accelerate's casts do, and as a hook that others write."""
    before = model.forward
    if style == "closure":

        @functools.wraps(type(model).forward)
        def forward(self: Any, *args: Any, more: bool = False, **kwargs: Any) -> Any:
            return model(*args, **kwargs) if more else before(*args, **kwargs)

        model.forward = types.MethodType(forward, model)
    elif style == "decorated":
        inner = before.__func__
        model.forward = types.MethodType(lambda self, *args, **kwargs: inner(self, *args, **kwargs), model)
    elif style == "again":  # closes over itself, and over a name that is not bound yet

        def again(*args: Any, tried: bool | None = False, **kwargs: Any) -> Any:
            if tried is None:
                return unbound
            return before(*args, **kwargs) if tried else again(*args, tried=True, **kwargs)

        model.forward = again
        if model is None:
            unbound = None
    else:
        model.forward = lambda *args, **kwargs: before(*args, **kwargs)
    return model


@pytest.mark.parametrize("style", ["closure", "decorated", "again", "bare"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_rows_are_those_without_the_patch(style: str, engine: str) -> None:
    """They were zero, without a word: the loss was computed at the original's weights."""
    model = llama()
    expected = per_example_grads(*functionalize(model, targets="*proj.weight"), BATCH, engine="loop")
    patched(model, style)
    loss_fn, params = functionalize(model, targets="*proj.weight")
    found = per_example_grads(loss_fn, params, BATCH, engine=engine)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-12)
    moved = {name: 2 * p for name, p in params.items()}
    assert not torch.allclose(loss_fn(moved, BATCH), loss_fn(params, BATCH))


KEPT: dict[str, nn.Module] = {}


def test_a_forward_that_finds_the_model_elsewhere_is_refused() -> None:
    """The original's own parameters require gradients, so that the loss has one; but not by what it was given."""
    model, KEPT["model"] = llama(), llama()
    model.forward = lambda *args, **kwargs: KEPT["model"](*args, **kwargs)
    loss_fn, params = functionalize(model, targets="*proj.weight")
    with pytest.raises(ValueError, match=r"no gradient with respect to any of model\.layers\.0"):
        per_example_grads(loss_fn, params, BATCH)
