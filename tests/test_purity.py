"""Nothing the library does is seen from outside: the model, the generators and torch's messages stay as they are."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from influence import (
    Moments,
    as_blocks,
    chain,
    explain,
    fold,
    functionalize,
    hessians,
    per_example_grads,
    per_example_grads_fn,
    per_token_grads,
    project,
    scale_by_adam,
    similarity,
    sinks,
    split_heads,
    two_sided,
    unit_norm,
)
from influence.func.engine.reference import TORCH_MESSAGES


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=8, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.requires_grad_(False)
    return model.train()


BATCH = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
INDEXED = BATCH | {"index": torch.arange(2)}


def everything(model: nn.Module) -> dict[str, Callable[[], Any]]:
    loss_fn, params = functionalize(model)
    sketch = chain(as_blocks(), split_heads(), project(3), unit_norm())
    moments = Moments({name: torch.ones_like(p) for name, p in params.items()})
    rows = per_example_grads(loss_fn, params, BATCH, transform=sketch)
    planned = per_example_grads_fn(loss_fn, params, BATCH, transform=sketch)
    return {
        "functionalize": lambda: functionalize(model, reduction="mean", targets="*mlp*"),
        **{
            engine: lambda engine=engine: per_example_grads(loss_fn, params, BATCH, engine=engine, check=True)
            for engine in ("batched", "vmap", "loop", "auto")
        },
        "folded": lambda: planned(params, BATCH),
        "global": lambda: sketch_all(loss_fn, params),
        "adam": lambda: per_example_grads(
            loss_fn, params, BATCH, transform=chain(as_blocks(), scale_by_adam(moments), project(2))
        ),
        "per token, use": lambda: per_token_grads(loss_fn, params, BATCH),
        "per token, loss": lambda: per_token_grads(loss_fn, params, BATCH, position="loss"),
        "explain": lambda: str(explain(loss_fn, params, BATCH)),
        "similarity": lambda: (similarity.nearest(rows, rows, k=1), similarity.products(loss_fn, params, BATCH)),
        **{
            name: lambda fit=fit: fit.fit(loss_fn, params, [INDEXED], transform=as_blocks(bias=True))
            for name, fit in (
                ("kfac", hessians.kfac),
                ("tkfac", hessians.tkfac),
                ("shampoo", hessians.shampoo),
                ("ekfac", hessians.ekfac),
            )
        },
        "autocorrelation": lambda: hessians.autocorrelation.fit(loss_fn, params, [INDEXED], transform=sketch),
        "whitened": lambda: whitened(loss_fn, params),
        "products": lambda: solved(loss_fn, params),
        "fold": lambda: fold(lambda batch: planned(params, batch), [BATCH], {"gram": sinks.gram()}),
    }


def whitened(loss_fn: Any, params: dict[str, Tensor]) -> Any:
    factors = hessians.ekfac.fit(loss_fn, params, [INDEXED])
    both = two_sided(factors).query
    return per_example_grads(loss_fn, params, BATCH, transform=both), str(factors), factors.digest


def solved(loss_fn: Any, params: dict[str, Tensor]) -> Any:
    rhs = per_example_grads(loss_fn, params, BATCH)
    for make in (hessians.products.hessian_product, hessians.products.ggn_product, hessians.products.fisher_product):
        make(loss_fn, params, [BATCH])(rhs)
    product = hessians.products.ggn_product(loss_fn, params, [BATCH])
    return hessians.cg.solve(product, rhs, 10.0, tolerance=1e-3)


def sketch_all(loss_fn: Any, params: dict[str, Tensor]) -> Any:
    kinds = ("sparse", "srht", "normal")
    return [
        per_example_grads(loss_fn, params, BATCH, transform=chain(as_blocks(), project(2, kind=kind, target="global")))
        for kind in kinds
    ]


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a careless library could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {
            name: (t.data_ptr(), t.dtype, t.device, t.requires_grad, type(t), t.grad is None, t._version)
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "modules": {
            name: (m.training, sorted(vars(m)), [len(getattr(m, hook)) for hook in hooks])
            for name, m in model.named_modules()
        },
    }


def generators() -> tuple[Any, ...]:
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), position, rest


NAMES = list(everything(gpt2()))


@pytest.mark.parametrize("name", NAMES)
def test_model_and_generators_are_untouched(name: str) -> None:
    model = gpt2()
    call = everything(model)[name]
    seen, state, values = picture(model), generators(), {k: v.clone() for k, v in model.state_dict().items()}
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()
    call()
    assert picture(model) == seen
    assert generators() == state
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()) == flags


def test_pythons_generator_is_untouched() -> None:
    # in a process without the type hook: beartype itself draws from Python's generator to pick what it checks
    code = """
import random
from tests.test_purity import everything, gpt2
calls = everything(gpt2())
state = random.getstate()
moved = [name for name, call in calls.items() if (call(), random.getstate() != state)[1]]
print(moved)
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("engine", ["batched", "vmap", "loop"])
def test_grad_mode_of_the_caller_makes_no_difference(engine: str) -> None:
    # a collection loop stands under no_grad, as every loop without training does
    loss_fn, params = functionalize(gpt2())
    expected = per_example_grads(loss_fn, params, BATCH, engine=engine)
    with torch.no_grad():
        rows = per_example_grads(loss_fn, params, BATCH, engine=engine)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(rows[name], row) and not rows[name].requires_grad for name, row in expected.items())


def test_a_refused_random_function_has_drawn_nothing() -> None:
    # refused after the draw, the generator would stand elsewhere than without the call
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers"):
        per_example_grads(
            lambda p, x: torch.nn.functional.dropout(x @ p["w"], 0.5).sum(1), {"w": torch.eye(3)}, torch.ones(2, 3)
        )
    assert torch.equal(torch.get_rng_state(), state)


def branch(x: Tensor) -> Tensor:
    return x.sum() if x.sum() > 0 else -x.sum()


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Saved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


SAVED = Saved()


def checkpointed(x: Tensor) -> Tensor:
    return torch.func.functional_call(SAVED, dict(SAVED.named_parameters()), (x,)).sum()


def recomputed(x: Tensor) -> Tensor:
    """Outside torch.func the failure comes later, when the skeleton's parameters are empty again."""
    loss_fn, params = functionalize(Saved(), loss=lambda y, batch: y.sum(1))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    torch.autograd.grad(loss_fn(leaves, (x[None],)).sum(), list(leaves.values()))
    return x


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "data-dependent control flow": branch,
    "randomness": lambda x: torch.nn.functional.dropout(x, 0.5).sum(),
    "saved tensor hooks": checkpointed,
    "setup_context": lambda x: OldStyle.apply(x).sum(),
    "doesn't match the broadcast shape": lambda x: torch.zeros(3).add_(x).sum(),
}


def test_every_translated_message_is_pinned() -> None:
    assert {*UPSTREAM, "on device meta"} == set(TORCH_MESSAGES)


def test_torch_still_says_that_checkpointed_parameters_are_gone() -> None:
    with pytest.raises(RuntimeError, match="on device meta"):
        recomputed(torch.ones(3))


@pytest.mark.parametrize("words", UPSTREAM)
def test_torch_still_says_what_we_translate(words: str) -> None:
    # a torch that words it differently must fail here, not leave users with the cryptic text
    with pytest.raises(RuntimeError) as caught:
        torch.func.vmap(torch.func.grad(UPSTREAM[words]))(torch.ones(2, 3))
    assert words in str(caught.value)
