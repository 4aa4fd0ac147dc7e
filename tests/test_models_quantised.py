"""Quantised linears: the rows of the dense model that has the rounded weights, without a dense weight.

bitsandbytes may be missing; then its own formats are not tested here, and the test says so. The 8-bit layer is also
built by hand, from integers and scales.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from influence import as_blocks, chain, functionalize, per_example_grads, split_heads
from influence.func.fingerprint import weights_hash
from influence.models import describe, layer_matrices, load
from influence.models.quantised import QuantisedLinear, unpack
from tests.cases import LLAMA, hf
from tests.oracles import error

SIZES = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "attention_bias": True, "vocab_size": 64}
IDS = torch.tensor([[5, 9, 3, 17, 21], [30, 2, 11, 8, 26]])
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: its formats are not tested"
)


def quantise(model: nn.Module) -> nn.Module:
    """Round the linears of a model's layers to 8 bits, row by row."""
    for owner in list(model.model.layers.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach()
                largest = weight.abs().amax(1)
                packed = (weight * 127 / largest[:, None]).round().to(torch.int8)
                shape = (layer.out_features, layer.in_features)
                setattr(owner, name, QuantisedLinear(packed, largest, shape, weight.dtype, layer.bias))
    return model


def llama() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf("LlamaForCausalLM", "LlamaConfig", **SIZES)().eval()
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def dense_like(quantised: nn.Module) -> nn.Module:
    """The same model with its rounded weights written out."""
    model, kinds = llama().to(next(quantised.parameters()).dtype), []
    for name, layer in quantised.named_modules():
        if isinstance(layer, QuantisedLinear):
            model.get_submodule(name).weight.data = unpack(layer.packed.data, layer.state, layer.weight.dtype)
            kinds.append(name)
    assert len(kinds) == 2 * 7
    return model


def check_rows(model: nn.Module, tolerance: float) -> None:
    """Weights, biases and norms of a quantised model, by every engine, whole and by heads."""
    dense, batch, targets = dense_like(model), {"input_ids": IDS}, ["*layers*.weight", "*.bias"]
    loss_fn, params = functionalize(model, targets=targets)
    dense_fn, weights = functionalize(dense, targets=targets)
    assert list(params) == list(weights)
    heads = chain(as_blocks(bias=True), split_heads())
    for transform in (None, heads):
        expected = per_example_grads(dense_fn, weights, batch, engine="loop", transform=transform)
        for engine in ("loop", "vmap", "batched"):
            rows = per_example_grads(loss_fn, params, batch, engine=engine, transform=transform)
            assert error(dict(rows), dict(expected)).value <= tolerance


def test_rows_are_those_of_the_rounded_weights() -> None:
    """Gradients by a weight that is not there; a matrix without its names, heads or bias."""
    model = quantise(llama().double())
    assert layer_matrices(model) == layer_matrices(llama())
    check_rows(model, 1e-10)


def test_the_zero_weight_takes_no_storage_and_no_product() -> None:
    """A dense weight held beside the packed one, made by a move, or multiplied when nobody differentiates by it."""
    layer = quantise(llama()).model.layers[0].mlp.up_proj
    for moved in (layer, copy.deepcopy(layer).double(), copy.deepcopy(layer).to("meta")):
        assert moved.weight.shape == (128, 64)
        assert moved.weight.untyped_storage().nbytes() <= 8
        assert not moved.weight.requires_grad
    assert layer.weight.dtype == torch.float32
    assert moved.packed.is_meta
    assert moved.state.is_meta
    layer.packed.data.zero_()
    infinite = torch.full((3, 64), float("inf"))
    layer.state = torch.ones(128)
    layer.packed.data.fill_(1)
    assert not layer(infinite).isnan().any()  # inf · 0 of the zero weight


def test_a_weight_that_is_no_longer_zero_counts() -> None:
    """Training and sampling move away from the quantised weight."""
    layer = quantise(llama()).model.layers[0].mlp.up_proj
    x, change = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.ones(128, 64)
    base = layer(x)
    assert base.shape == (3, 128)
    moved = torch.func.functional_call(layer, {"weight": change}, (x,))
    torch.testing.assert_close(moved - base, (x @ change.T), rtol=1e-4, atol=1e-4)
    layer.weight = nn.Parameter(change)
    torch.testing.assert_close(layer.double().weight.detach(), change.double())


def test_second_derivatives_and_batches_go_through() -> None:
    """Gauss-Newton products differentiate the backward; `vmap` batches along any axis."""
    layer = quantise(llama().double()).model.layers[0].mlp.up_proj
    weight = unpack(layer.packed.data, layer.state, torch.float64)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def energy(vector: Tensor, through: Any) -> Tensor:
        return through(vector).sin().sum()

    dense = lambda vector: vector @ weight.T  # noqa: E731
    for order in (lambda f: torch.func.grad(f), lambda f: torch.func.jacrev(torch.func.grad(f))):
        own = torch.func.vmap(order(lambda v: energy(v, layer)), 1)(x)
        torch.testing.assert_close(own, torch.func.vmap(order(lambda v: energy(v, dense)), 1)(x))


def test_adapters_go_on_quantised_layers() -> None:
    """PEFT takes them for linear layers; the rows are those of LoRA on the rounded weights."""

    def adapted(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            return peft.get_peft_model(model, config).eval()

    quantised = quantise(llama().double())
    dense, model, batch = adapted(dense_like(quantised)), adapted(quantised), {"input_ids": IDS}
    names = layer_matrices(model)
    assert names == layer_matrices(dense)
    assert len(names) == 2 * 2 * 2
    expected = per_example_grads(*functionalize(dense, targets=names), batch, engine="loop")
    for engine in ("vmap", "batched"):
        rows = per_example_grads(*functionalize(model, targets=names), batch, engine=engine)
        assert error(dict(rows), dict(expected)).value <= 1e-10


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_models_of_bitsandbytes(tmp_path: Path, precision: str) -> None:
    """bitsandbytes' layers refuse `torch.func`, and lost their gradient on CPUs after a call without one."""
    llama().save_pretrained(tmp_path)
    model = load(tmp_path, precision=precision)
    with torch.no_grad():
        model(input_ids=IDS)
    assert describe(model).splitlines()[1:] == describe(llama()).splitlines()[1:]
    check_rows(model, 1e-4)
    before = weights_hash(*functionalize(model))
    assert weights_hash(*functionalize(model, targets="*q_proj*")) == before
    state = model.model.layers[1].mlp.up_proj.state
    (state if precision == "int8" else state.state2.absmax).view(-1)[0] += 1
    assert weights_hash(*functionalize(model)) != before
    (state if precision == "int8" else state.state2.absmax).view(-1)[0] -= 1
    far, scale = dense_like(model)(input_ids=IDS).logits, llama()(input_ids=IDS).logits
    assert 0 < (far - scale).norm() < 0.5 * scale.norm()  # rounded, and no worse
    config = transformers.BitsAndBytesConfig(**{f"load_in_{precision[3:]}bit": True})
    own = load(tmp_path, model_kwargs={"quantization_config": config, "device_map": "cpu"})
    assert sum(isinstance(layer, QuantisedLinear) for layer in own.modules()) == 2 * 7
    lora = load(tmp_path, precision=precision, peft_init_kwargs={"r": 2, "target_modules": ["q_proj"]})
    rows = per_example_grads(*functionalize(lora, targets=layer_matrices(lora)), {"input_ids": IDS})
    assert all(row.any() == ("lora_B" in name) for name, row in rows.items())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{precision}.*pip install 'influence\[bnb\]'"):
        load(tmp_path, precision=precision)
    with pytest.raises(ImportError, match=r"adapter needs PEFT: pip install 'influence\[peft\]'"):
        load(tmp_path, adapter=tmp_path)
