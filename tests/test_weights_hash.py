"""The weights hash: every number that a model computes with, and nothing else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import as_blocks, functionalize, hessians
from influence.func.fingerprint import weights_hash
from influence.models.quantised import QuantisedLinear
from tests.cases import LLAMA, batch_norm, causal_batch, hf

ONE = {**LLAMA, "num_hidden_layers": 1}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
PHI3 = hf(
    "Phi3ForCausalLM",
    "Phi3Config",
    **{**ONE, "max_position_embeddings": 16, "original_max_position_embeddings": 4},
    rope_parameters={**LONG_ROPE, "original_max_position_embeddings": 4, "factor": 4.0},
)


class FourBits:
    """Stands for bitsandbytes' state of a 4-bit weight, with one nested in it."""

    def __init__(self, nested: bool) -> None:
        self.absmax, self.blocksize, self.nested = torch.tensor([1.5, 2.5]), 64, nested
        self.code = torch.arange(16.0)

    def as_dict(self) -> dict[str, Any]:
        own = {"absmax": self.absmax, "blocksize": self.blocksize, "quant_map": self.code, "shape": (2, 64)}
        return {**own, "nested_offset": 0.25} if self.nested else own


def quantised(state: Any, packed: Tensor) -> nn.Module:
    bias = nn.Parameter(torch.ones(2), requires_grad=False)
    return nn.Sequential(QuantisedLinear(packed, state, (2, 64), torch.float32, bias), nn.Linear(2, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4)),
    "rotary": hf("LlamaForCausalLM", "LlamaConfig", **ONE),
    "int8": lambda: quantised(torch.ones(2), torch.ones(2, 64, dtype=torch.int8)),
    "int4": lambda: quantised(FourBits(nested=True), torch.ones(64, 1, dtype=torch.uint8)),
}


def hash_of(model: nn.Module, **settings: Any) -> str:
    return weights_hash(*functionalize(model, loss=lambda output, batch: output, **settings))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor a model computes with, saved or not; a zero weight without storage holds no number."""
    found = {
        name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if any(t.stride()) or t.ndim == 0
    }
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            kept = {"": layer.state} if isinstance(layer.state, Tensor) else vars(layer.state)
            found |= {f"{name}.state.{key}": t for key, t in kept.items() if isinstance(t, Tensor)}
    return found


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[request.param]().eval()


def test_any_number_counts(model: nn.Module) -> None:
    """Factors of one checkpoint used with another that differs in a buffer or in how its weights are unpacked."""
    before, names = hash_of(model), [*tensors(model)]
    assert hash_of(copy.deepcopy(model)) == before
    kinds = {name.rsplit(".", 1)[-1] for name in names}
    assert kinds & {"running_mean", "inv_freq", "packed"}
    for name in names:
        other = copy.deepcopy(model)
        value = tensors(other)[name]
        with torch.no_grad():
            value.view(-1)[-1] += 1
        assert hash_of(other) != before, name


def test_what_is_differentiated_does_not_count(model: nn.Module) -> None:
    """A query by other targets than the index's would be refused."""
    before = hash_of(model)
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    for name in names:
        assert hash_of(model, targets=name) == before
    for requires in (False, True):
        for name, p in model.named_parameters():
            p.requires_grad_(requires and name in names and any(p.stride()))
        assert hash_of(model) == before
    loss_fn, params = functionalize(model, loss=lambda output, batch: output, targets=names[0])
    assert {*loss_fn.frozen} == {name for name, _ in model.named_parameters()} - {*params}  # buffers are no parameters


# it compares a hash made on the device with the CPU's
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("name", ["batch norm", "rotary", "int8"])
def test_the_device_does_not_count(name: str) -> None:
    model = MODELS[name]()
    assert hash_of(copy.deepcopy(model).cuda()) == hash_of(model)


def test_what_unpacks_four_bits_counts_though_it_is_no_tensor() -> None:
    packed = torch.ones(64, 1, dtype=torch.uint8)
    assert hash_of(quantised(FourBits(nested=True), packed)[:1]) != hash_of(quantised(FourBits(False), packed)[:1])
    state = FourBits(nested=False)
    before = hash_of(quantised(state, packed)[:1])
    state.blocksize = 128
    assert hash_of(quantised(state, packed)[:1]) != before


def test_another_rotary_base_is_another_function() -> None:
    """The same checkpoint with its context stretched: no parameter differs."""
    build = MODELS["rotary"]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    stretched = hf("LlamaForCausalLM", "LlamaConfig", **ONE, **rope)()
    model = build()
    stretched.load_state_dict(model.state_dict())
    assert hash_of(model) != hash_of(stretched)
    loss_fn, params = functionalize(model)
    batch = {**causal_batch(3, 5, "", torch.Generator().manual_seed(0)), "index": torch.arange(3)}
    factors = hessians.shampoo.fit(loss_fn, params, [batch], transform=as_blocks(), labels="data", progress=False)
    factors.check_model(*functionalize(model, targets="*q_proj*"))
    with pytest.raises(ValueError, match="fitted at other weights"):
        factors.check_model(*functionalize(stretched))


@pytest.mark.parametrize("first", [3, 8])
def test_a_run_does_not_count(first: int) -> None:
    """Long-context rotary embeddings write their buffer anew in every forward, by its length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss_fn, params = functionalize(PHI3().eval())
    before = weights_hash(loss_fn, params)
    for length in (first, 11 - first):
        loss_fn(params, {"input_ids": torch.arange(2 * length).reshape(2, length)})
        assert weights_hash(loss_fn, params) == before


def test_a_reference_is_part_of_the_loss() -> None:
    """An index of KL gradients may be asked by a cross-entropy."""
    model, other = MODELS["rotary"](), MODELS["rotary"]()
    assert weights_hash(*functionalize(model, loss="kl", reference=other)) == weights_hash(*functionalize(model))


def test_strides_do_not_count() -> None:
    """Bytes of a tensor that does not lie in one piece, as the zero weight of a quantised layer does not."""
    whole = torch.arange(8.0)
    for strided in (whole[::2], whole.view(4, 2).T, torch.ones(1).expand(5)):
        assert weights_hash(None, {"w": strided}) == weights_hash(None, {"w": strided.clone().contiguous()})


def test_a_function_by_hand_has_its_parameters() -> None:
    w = {"w": torch.ones(2)}
    assert weights_hash(lambda params, batch: batch @ params["w"], w) == weights_hash(None, {"w": torch.ones(2)})
    assert weights_hash(None, w) != weights_hash(None, {"w": torch.zeros(2)})
