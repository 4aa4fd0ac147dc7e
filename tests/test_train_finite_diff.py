"""Finite differences against directional derivatives, and weights that come back to the bit."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import as_blocks, chain, functionalize, per_example_grads, project, unit_norm
from influence.train import FiniteDiff, direction_of, step_for
from tests.cases import hf

GPT2 = {"vocab_size": 40, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


def setting(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, dict[str, Tensor], dict[str, Tensor]]:
    model = hf("GPT2LMHeadModel", "GPT2Config", **GPT2)().to(dtype)
    loss_fn, params = functionalize(model)
    batch = {"input_ids": torch.randint(40, (3, 6), generator=torch.Generator().manual_seed(0))}
    return model, loss_fn, params, batch


def derivative(loss_fn: Any, params: dict[str, Tensor], direction: dict[str, Tensor], batch: Any) -> Tensor:
    """Each example's own gradient by autograd, times the direction."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = loss_fn(leaves, batch)
    grads = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses]
    return torch.stack([sum((g * direction[name]).sum() for name, g in zip(leaves, own, strict=True)) for own in grads])


@pytest.mark.parametrize(("central", "order"), [(True, 2), (False, 1)])
def test_the_error_falls_as_its_order_says(central: bool, order: int) -> None:
    _, loss_fn, params, batch = setting()
    rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), unit_norm()))
    direction = direction_of(rows, loss_fn.layout, torch.tensor([1.0, 0.0, -2.0]))
    exact = derivative(loss_fn, params, direction, batch)
    steps = [2.0**-10, 2.0**-11, 2.0**-12]
    errors = [(FiniteDiff(direction, h).effect(loss_fn, params, batch, central) - exact).norm() for h in steps]
    for coarse, fine in pairwise(errors):
        torch.testing.assert_close(torch.log2(coarse / fine), torch.tensor(float(order)).double(), atol=0.1, rtol=0)


def test_the_effect_of_a_training_step_is_the_inner_product() -> None:
    """⟨∇ℓ_m, g_n⟩ for every pair, at an eighth of the step for gentle losses; float32 too."""
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-2)):
        _, loss_fn, params, batch = setting(dtype)
        rows = per_example_grads(loss_fn, params, batch)
        for n in range(3):
            direction = direction_of(rows, loss_fn.layout, torch.eye(3)[n])
            expected = sum(row.double().flatten(1) @ row[n].double().flatten() for row in rows.values())
            found = FiniteDiff(direction, step_for(params, direction) / 8).effect(loss_fn, params, batch)
            assert (found - expected).norm() <= bound * expected.norm()


def test_both_forms_agree_and_weights_come_back_to_the_bit() -> None:
    model, loss_fn, params, batch = setting(torch.bfloat16)
    direction = direction_of(per_example_grads(loss_fn, params, batch), loss_fn.layout)
    diff = FiniteDiff(direction, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = [p.requires_grad for p in model.parameters()]
    pure = loss_fn(diff.moved(params), batch)
    with diff.applied(model) as moved:
        assert moved is model
        inside = loss_fn(params, batch)  # which alias the module's
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(KeyError, match="inside"), diff.applied(model, by=-1.0):
        raise KeyError("inside")
    assert torch.equal(pure, inside)
    assert all(p.view(torch.int16).equal(before[name].view(torch.int16)) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == versions


def test_a_bias_in_its_block_goes_back_to_its_place() -> None:
    model = nn.Linear(3, 2).double()
    loss_fn, params = functionalize(model, loss="squared_error")
    batch = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    plain = direction_of(per_example_grads(loss_fn, params, batch), loss_fn.layout)
    blocks = direction_of(per_example_grads(loss_fn, params, batch, transform=as_blocks(bias=True)), loss_fn.layout)
    assert plain.keys() == blocks.keys() == {"weight", "bias"}
    assert all(torch.allclose(plain[name], blocks[name], rtol=1e-12) for name in plain)


def test_what_is_no_direction() -> None:
    _, loss_fn, params, batch = setting()
    sketch = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), project(2)))
    with pytest.raises(ValueError, match="are no whole gradients of parameters"):
        direction_of(sketch, loss_fn.layout)
    with pytest.raises(ValueError, match="the direction is of nope, which is none of the"):
        FiniteDiff({"nope": torch.ones(1)}, 0.1).moved(params)
    name = next(iter(params))
    with pytest.raises(ValueError, match=r"the direction has shape \[1\] at .*: pass it in the parameter's own shape"):
        FiniteDiff({name: torch.ones(1)}, 0.1).moved(params)
    with pytest.raises(ValueError, match="the direction is zero"):
        step_for(params, {name: torch.zeros_like(params[name])})
