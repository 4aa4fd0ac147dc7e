"""Optimizer state as moments: every format as that optimizer really wrote it, under every order of parameters."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from influence import Factored, as_blocks, chain, functionalize, per_example_grads, scale_by_adafactor, scale_by_adam
from influence.train import load_from_optimizer, read_optimizer
from tests import shard_optimizer
from tests.cases import LLAMA, hf
from tests.ranks import in_two_ranks
from tests.shard_optimizer import adam, small

GPT2 = {"vocab_size": 40, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
RANK = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def gpt2() -> nn.Module:
    return hf("GPT2LMHeadModel", "GPT2Config", **GPT2)().float()


def llama() -> nn.Module:
    return hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)().float()


def lora() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), peft.LoraConfig(**RANK))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def batch_of(model: nn.Module, step: int) -> tuple[Any, Tensor]:
    draw = torch.Generator().manual_seed(step)
    if isinstance(model, nn.Sequential):
        return (torch.randn(4, 2, 4, 4, generator=draw),), torch.zeros(())
    return (torch.randint(40, (4, 6), generator=draw),), torch.zeros(())


def update(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        out = model(*batch_of(model, step)[0])
        logits = getattr(out, "logits", out)
        nn.functional.cross_entropy(logits.flatten(0, -2), logits.argsort(-1).flatten(0, -2)[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def adafactor(p: Any) -> torch.optim.Optimizer:
    return transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adam,
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "torch Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers Adafactor": adafactor,
    "transformers Adafactor with β₁": lambda p: transformers.Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9
    ),
}


def truth(state: dict[str, Any], p: Tensor) -> Tensor:
    """The second moment that the optimizer divides by, in full, by each library's own formula."""
    if "max_exp_avg_sq" in state:
        return state["max_exp_avg_sq"]
    if "row_var" in state:
        row, col = state["row_var"], state["col_var"]
        return row @ col / row.mean(-2, keepdim=True)
    if "exp_avg_sq_row" in state:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
    return state["exp_avg_sq"] if "exp_avg_sq" in state else state["variance"]


def same(model: nn.Module, moments: Any, optimizer: torch.optim.Optimizer, names: set[str] | None = None) -> None:
    """Loaded moments are those in the optimizer's memory, found by the parameters' identity."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(moments.second) == (set(own) if names is None else names)
    for name, v in moments.to_adam().second.items():
        expected = truth(optimizer.state[own[name]], own[name])
        torch.testing.assert_close(v.reshape(expected.shape), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("build", [gpt2, conv], ids=["gpt2", "conv"])
def test_files_hold_what_the_optimizer_does(tmp_path: Path, kind: str, build: Callable[[], nn.Module]) -> None:
    """torch.save and safetensors; tied weights (GPT-2's), convolutions, vectors."""
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    update(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    flat = {
        f"state.{n}.{k}": v for n, e in optimizer.state_dict()["state"].items() for k, v in e.items() if v is not None
    }
    tensors = {key: torch.as_tensor(value).contiguous() for key, value in flat.items()}
    groups = json.dumps([{**group, "params": group["params"]} for group in optimizer.state_dict()["param_groups"]])
    safetensors.torch.save_file(tensors, tmp_path / "optimizer.safetensors", {"param_groups": groups})
    for source in (tmp_path, tmp_path / "optimizer.pt", tmp_path / "optimizer.safetensors", optimizer):
        same(model, load_from_optimizer(model, source), optimizer)
        assert set(read_optimizer(model, source).rates.values()) == {1e-2}
    if build is gpt2 and "Adafactor" in kind:
        assert isinstance(load_from_optimizer(model, tmp_path).second["transformer.h.0.attn.c_attn.weight"], Factored)


def test_what_is_loaded_does_not_move_with_the_optimizer() -> None:
    model = conv()
    optimizer = adam(model.parameters())
    update(model, optimizer)
    before = load_from_optimizer(model, optimizer).second["0.weight"]
    kept = before.clone()
    update(model, optimizer)
    assert torch.equal(before, kept)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("build", [gpt2, llama, lora], ids=["gpt2", "llama", "lora"])
def test_a_checkpoint_of_the_trainer(tmp_path: Path, optim: str, build: Callable[[], nn.Module]) -> None:
    """Its groups with and without decay, PEFT's names, and one entry for tied weights."""
    model = build()
    trainer = trained(model, tmp_path, optim=optim)
    loaded = load_from_optimizer(model, tmp_path / "checkpoint-2")
    same(model, loaded, trainer.optimizer.optimizer)
    same(model, load_from_optimizer(model, trainer.optimizer), trainer.optimizer.optimizer)
    names = sorted(loaded.second)[1:4]
    assert set(load_from_optimizer(model, tmp_path / "checkpoint-2", targets=names).second) == set(names)


def trained(model: nn.Module, path: Path, **settings: Any) -> transformers.Trainer:
    draw = torch.Generator().manual_seed(0)
    data = [{key: torch.randint(40, (6,), generator=draw) for key in ("input_ids", "labels")} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=2,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return trainer


def groups_of(model: nn.Module, how: str) -> Any:
    named = dict(model.named_parameters())
    if how == "named":
        return named.items()
    if how == "matrices first":
        return [{"params": [p for p in named.values() if (p.ndim >= 2) == first]} for first in (True, False)]
    decays = {n for n in transformers.trainer_pt_utils.get_parameter_names(model, [nn.LayerNorm]) if "bias" not in n}
    return [{"params": [p for n, p in named.items() if (n in decays) == first]} for first in (True, False)]


@pytest.mark.parametrize("how", ["named", "matrices first", "the Trainer's, once"])
def test_orders_of_parameters(tmp_path: Path, how: str) -> None:
    model = llama()
    optimizer = adam(groups_of(model, how))
    update(model, optimizer)
    torch.save({"optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "optimizer.bin")
    same(model, load_from_optimizer(model, tmp_path), optimizer)


def test_frozen_parameters_are_counted_or_not(tmp_path: Path) -> None:
    """An optimizer of all parameters, and one of those that train; and another optimizer that names its entries."""
    for trainable_alone in (True, False):
        model = llama()
        frozen = [p for n, p in model.named_parameters() if "mlp" in n]
        for p in frozen:
            p.requires_grad_(False)
        chosen = [p for p in model.parameters() if p.requires_grad or not trainable_alone]
        optimizer = adam(chosen)
        update(model, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        same(model, load_from_optimizer(model, tmp_path), optimizer)
    held = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    for number, entry in held["state"].items():
        entry["param_name"] = f"module._orig_mod.{names[number]}"
    held["state"] = {2 * len(names) - number: entry for number, entry in held["state"].items()}
    held["param_groups"][0]["params"] = [*held["state"]]
    same(model, load_from_optimizer(model, held), optimizer)


def test_adapters_by_names_without_the_adapter(tmp_path: Path) -> None:
    """As FSDP names them, whose keys are names; the adapter's own is left out of a saved one."""
    model = lora()
    optimizer = adam([p for p in model.parameters() if p.requires_grad])
    update(model, optimizer)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    held = optimizer.state_dict()
    short = [name.replace(".default.", ".") for name in names]
    held["state"] = {short[number]: entry for number, entry in held["state"].items()}
    held["param_groups"][0]["params"] = short
    torch.save(held, tmp_path / "optimizer.bin")
    same(model, load_from_optimizer(model, tmp_path), optimizer)


def test_shards_of_two_ranks(tmp_path: Path) -> None:
    """FSDP2 on two gloo ranks writes DCP shards; one process reads them whole."""
    in_two_ranks(shard_optimizer.shard, tmp_path, tmp_path)
    model = small()
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    found = read_optimizer(model, tmp_path / "checkpoint")
    assert set(found.entries) == set(expected)
    for name, entry in found.entries.items():
        assert torch.equal(entry.second, expected[name]["exp_avg_sq"])
        assert torch.equal(entry.first, expected[name]["exp_avg"])
        assert entry.step == 2
    assert set(found.rates.values()) == {1e-2}
    found.moments(bias_correction=True)


# bitsandbytes


def dynamic_map(signed: bool) -> Tensor:
    """The dynamic 8-bit type: seven decades, each with twice the values of the one below, then 0 and 1.

    arXiv 2110.02861, section 2.1: the decade of `10^-(6-k)` holds the midpoints of `2^k` (signed) or `2^(k+1)` equal
    parts of [0.1, 1]; signed values come with both signs.
    """
    values = [0.0, 1.0]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2**k + 1 if signed else 2 ** (k + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (k - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += middles + ([-m for m in middles] if signed else [])
    assert len(values) == 256
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantise(x: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The reference arithmetic, entry by entry: the nearest value of the table to what is left of a block's largest."""
    codes, largest = torch.zeros(x.numel(), dtype=torch.uint8), []
    flat = x.flatten()
    for begin in range(0, len(flat), block):
        part = flat[begin : begin + block]
        largest.append(part.abs().max())
        codes[begin : begin + block] = (part[:, None] / largest[-1] - table).abs().argmin(1).to(torch.uint8)
    return codes.reshape(x.shape), torch.stack(largest)


class Adam8bit(torch.optim.Optimizer):
    """bitsandbytes' AdamW as its state dict shows it: codes from 4096 entries on, float32 below."""

    def __init__(self, params: Any, block: int = 256, nested: bool = True) -> None:
        super().__init__(params, {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8})
        self.block, self.nested = block, nested
        self.exact: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            m, v = torch.zeros_like(p), torch.zeros_like(p)
            entry = self.state[p]
            if entry:
                m, v = (self.decode(entry, k) for k in (1, 2))
            m, v = 0.9 * m + 0.1 * p.grad, 0.99 * v + 0.01 * p.grad**2
            self.exact[p] = 0.99 * self.exact.get(p, torch.zeros_like(p)) + 0.01 * p.grad**2
            entry["step"] = entry.get("step", 0) + 1
            for k, value in ((1, m), (2, v)):
                entry[f"state{k}"] = value
                if p.numel() >= 4096:
                    entry[f"qmap{k}"] = dynamic_map(signed=k == 1)
                    entry[f"state{k}"], entry[f"absmax{k}"] = quantise(value, entry[f"qmap{k}"], self.block)

    def decode(self, entry: dict[str, Any], k: int) -> Tensor:
        if f"qmap{k}" not in entry:
            return entry[f"state{k}"]
        out = torch.zeros(entry[f"state{k}"].shape)
        for i, code in enumerate(entry[f"state{k}"].flatten().tolist()):
            out.view(-1)[i] = entry[f"qmap{k}"][code] * entry[f"absmax{k}"][i // self.block]
        return out

    def state_dict(self) -> dict[str, Any]:
        held = super().state_dict()
        if self.nested:
            held["state"] = {
                number: {
                    "step": entry["step"],
                    "__bnb_optimizer_quant_state__": {k: v for k, v in entry.items() if k != "step"},
                }
                for number, entry in held["state"].items()
            }
        return held


@pytest.mark.parametrize(("block", "nested"), [(256, True), (2048, False)])
def test_eight_bit_codes_are_dequantised(tmp_path: Path, block: int, nested: bool) -> None:
    """Codes taken for numbers would be up to 255; and a second moment decoded right is near the exact one."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(70, 60)
    optimizer = Adam8bit(model.parameters(), block, nested)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for source in (tmp_path, optimizer):
        found = read_optimizer(model, source)
        for name, p in model.named_parameters():
            entry = found.entries[name]
            assert torch.equal(entry.second, optimizer.decode(optimizer.state[p], 2))
            assert torch.equal(entry.first, optimizer.decode(optimizer.state[p], 1))
            off = (entry.second - optimizer.exact[p]).norm() / optimizer.exact[p].norm()
            assert off < (0.02 if p.numel() >= 4096 else 1e-6)
    debiased = found.moments(bias_correction=True).second["weight"]
    torch.testing.assert_close(debiased, found.entries["weight"].second / (1 - 0.99**2))
    del optimizer.state[model.weight]["absmax2"]
    with pytest.raises(ValueError, match="an 8-bit moment came without absmax2: the codes alone say nothing"):
        load_from_optimizer(model, optimizer)


# What it is for


@pytest.mark.parametrize("kind", ["AdamW", "transformers Adafactor"])
def test_rows_are_scaled_as_the_update_scales(kind: str) -> None:
    """On square `Conv1D` weights, where a transposed moment has the right shape; against the formula by hand."""
    model = gpt2()
    optimizer = OPTIMIZERS[kind](model.parameters())
    update(model, optimizer)
    name = "transformer.h.0.attn.c_proj"
    loss_fn, params = functionalize(model, targets=f"{name}.weight")
    batch = {"input_ids": batch_of(model, 7)[0][0]}
    scaler = scale_by_adam if kind == "AdamW" else scale_by_adafactor
    moments = load_from_optimizer(model, optimizer, targets=f"{name}.weight")
    rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), scaler(moments)))
    raw = per_example_grads(loss_fn, params, batch)[f"{name}.weight"]
    p = params[f"{name}.weight"]
    v = truth(next(e for q, e in optimizer.state.items() if q.data_ptr() == p.data_ptr()), p)
    expected = raw / (v.sqrt() + (1e-8 if kind == "AdamW" else 0))
    torch.testing.assert_close(rows[name], expected.mT, rtol=1e-5, atol=1e-9)


def test_the_direction_is_the_step_that_adam_takes() -> None:
    model = small()
    optimizer = adam(model.parameters(), weight_decay=0.0)
    for _ in range(3):
        before = copy.deepcopy(model)
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    state = read_optimizer(model, optimizer)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        step = -(p - q).detach() / state.rates[name]
        torch.testing.assert_close(state.direction()[name], step, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.first()[name], optimizer.state[p]["exp_avg"])


# Bad input


def refused(model: nn.Module, source: Any, match: str, **settings: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_from_optimizer(model, source, **settings)


def test_another_model(tmp_path: Path) -> None:
    model = llama()
    optimizer = adam(model.parameters())
    update(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    refused(gpt2(), tmp_path, r"holds 21 parameters in groups of \[21\]; GPT2LMHeadModel gives \[28\]: it is the optim")
    wider = hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "intermediate_size": 20})().float()
    refused(wider, tmp_path, r"the moment of 'model.layers.0.mlp.gate_proj.weight' has shape .* another model")
    refused(
        llama(), optimizer, "none of the optimizer's 21 parameters is one of this LlamaForCausalLM's: pass the very"
    )
    refused(gpt2(), adam_by_name(model), "of parameters that GPT2LMHeadModel does not have: model.embed_tokens.weight")


def adam_by_name(model: nn.Module) -> dict[str, Any]:
    optimizer = adam(model.named_parameters())
    update(model, optimizer)
    return optimizer.state_dict()


def test_unknown_optimizers_and_missing_moments(tmp_path: Path) -> None:
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.ones(2, 3)
    model(x).sum().backward()
    sgd.step()
    refused(model, sgd, "keeps momentum_buffer for '0.weight', and no second moment: expected the state of Adam")
    fresh = adam(model.parameters())
    refused(model, fresh, "no moment of 4 of 4 parameters: 0.weight, 0.bias, 2.weight, 2.bias. They were not trained")
    half = adam(model[2].parameters())
    update_half(model, half, x)
    assert set(load_from_optimizer(model, half).second) == {"2.weight", "2.bias"}
    refused(model, half, "no moment of 2 of 4 parameters: 0.weight, 0.bias", targets="*")
    refused(model, half, "targets='1.*' matches none", targets="1.*")
    groups = adam([{"params": [p]} for p in model.parameters()])
    update_half(model, groups, x)
    refused(model, groups.state_dict(), r"4 parameters in groups of \[1, 1, 1, 1\]; Sequential gives one or two groups")


def update_half(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).sum().backward()
    optimizer.step()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_no_pickle_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state": {}, "more": Evil()}, tmp_path / "evil.pt")
    refused(small(), tmp_path / "evil.pt", "holds more than tensors and numbers, and is not unpickled")
    folder = tmp_path / "optimizer_0"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(small(), tmp_path, "asks for builtins.print, which is no table of contents: not read")
    assert "executed" not in capsys.readouterr().out


def test_nothing_there(tmp_path: Path) -> None:
    refused(small(), tmp_path, r"holds no optimizer: looked for optimizer.pt, optimizer.bin, .* save_only_model=False")
    torch.save({"weights": torch.ones(2)}, tmp_path / "optimizer.pt")
    refused(small(), tmp_path, "holds weights, and no optimizer: expected 'state' and 'param_groups'")
