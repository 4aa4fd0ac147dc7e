"""Loading: every architecture as it was saved, in every precision, with adapters; and what is refused."""

import importlib
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from influence import functionalize, per_example_grads
from influence.models import layer_matrices, load
from tests.cases import BERT, LLAMA, hf
from tests.oracles import error
from tests.test_families import FAMILIES, batch_of, model_of

RANK = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
TASK = {"t5": "seq2seq", "bert": "masked", "roberta": "masked", "vit": "image"}


def save(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)())


@pytest.fixture
def adapter(tmp_path: Path, llama: Path) -> Path:
    model = load(llama, peft_init_kwargs={**RANK, "init_lora_weights": False})
    return save(tmp_path / "adapter", model)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "olmo2"])
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, name: str) -> None:
    """Renamed and tied weights, fused experts, a dtype; and the generators are as they were."""
    saved, state = model_of(name), torch.random.get_rng_state()
    experts = {"experts_implementation": "eager"} if "experts" in str(saved) else {}
    loaded = load(save(tmp_path, saved), task=TASK.get(name, "causal"), model_kwargs=experts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is type(saved)
    assert not loaded.training
    own, other = dict(saved.named_parameters()), dict(loaded.named_parameters())
    assert own.keys() == other.keys()
    assert all(torch.equal(own[n], other[n]) and own[n].dtype == other[n].dtype for n in own)
    assert all(p.requires_grad for p in loaded.parameters())
    batch = {k: v for k, v in batch_of(name).items() if k != "labels"}
    tolerance = 1e-6 if name.startswith("gemma") else 1e-12  # whose embedding scale stays float32 when loaded
    torch.testing.assert_close(loaded(**batch).logits, saved(**batch).logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp64", torch.float64),
    ],
)
def test_precision_is_of_all_weights_and_of_adapters(llama: Path, precision: str, dtype: torch.dtype) -> None:
    save(llama, load(llama, precision="bf16"))
    default = torch.get_default_dtype()
    for fresh in (None, RANK):
        model = load(str(llama), precision=precision, peft_init_kwargs=fresh, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == default


def test_more_arguments_reach_transformers(llama: Path) -> None:
    model = load(llama, model_kwargs={"attn_implementation": "eager", "dtype": torch.float64}, revision="main")
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float64


def test_a_saved_adapter_is_put_on_its_base(llama: Path, adapter: Path) -> None:
    """By the base, and by the adapter alone, which names its base."""
    models = load(llama, adapter=adapter), load(adapter), load(str(adapter), precision="bf16")
    for model, dtype in zip(models, (torch.float32, torch.float32, torch.bfloat16), strict=True):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())  # PEFT's own: it is there to be used
        saved = peft.load_peft_weights(str(adapter), device="cpu")
        own = peft.get_peft_model_state_dict(model)
        assert own.keys() == saved.keys()
        assert all(torch.equal(own[n], saved[n].to(own[n])) for n in own)


def test_an_adapter_without_a_base_says_so(llama: Path, adapter: Path) -> None:
    config = peft.PeftConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = None
    config.save_pretrained(str(adapter))
    with pytest.raises(ValueError, match="does not name its base"):
        load(adapter)
    with pytest.warns(UserWarning, match="made for an unnamed base"):
        load(llama, adapter=adapter)


def test_an_adapter_whose_base_was_moved_says_so(llama: Path, adapter: Path) -> None:
    llama.rename(llama.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*llama.* names it as its base; load\(base, adapter="):
        load(adapter)


def test_revisions_are_of_their_own_repository(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision of an adapter was asked of its base, and the base's, which the adapter names, forgotten."""
    config = peft.PeftConfig.from_pretrained(str(adapter))
    config.revision = "of-the-base"
    config.save_pretrained(str(adapter))
    room, asked = importlib.import_module("influence.models.load"), {}
    whole, weights = room._whole, peft.load_peft_weights

    def watched(path: str, task: str, source: Any) -> nn.Module:
        asked["base"] = source["revision"]
        return whole(path, task, source)

    def weighed(*args: Any, **kwargs: Any) -> Any:
        asked.setdefault("adapter", kwargs["revision"])
        return weights(*args, **kwargs)

    monkeypatch.setattr(room, "_whole", watched)
    monkeypatch.setattr(peft, "load_peft_weights", weighed)
    load(adapter, revision="of-the-adapter")
    assert asked == {"base": "of-the-base", "adapter": "of-the-adapter"}


def test_a_fresh_adapter_follows_its_seed_alone(llama: Path) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        state = torch.random.get_rng_state()
        model = load(llama, peft_init_kwargs=RANK, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    first = drawn(0)
    torch.manual_seed(5)
    assert set(first) == set(layer_matrices(load(llama, peft_init_kwargs=RANK)))
    assert all(torch.equal(first[n], p) for n, p in drawn(0).items())
    assert not all(torch.equal(first[n], p) for n, p in drawn(1).items())


def test_fresh_adapters_are_drawn_as_peft_draws_them(llama: Path) -> None:
    """`A` within ±1/√i and filling it, `B` zero or within ±1/√r: kaiming's uniform with a = √5."""
    for settings, bound in ((RANK, 0.0), ({**RANK, "init_lora_weights": False}, 2**-0.5)):
        model = load(llama, peft_init_kwargs={**settings, "lora_alpha": 6})
        a = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n])
        b = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n])
        assert 0.23 < a.abs().max() <= 16**-0.5
        assert 0.9 * bound <= b.abs().max() <= bound
        assert abs(float(a.mean())) < 5 * 16**-0.5 / (3 * a.numel()) ** 0.5
        assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 3.0}


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"target_modules": ["embed_tokens"]}]
)
def test_other_fresh_adapters_are_refused(llama: Path, settings: dict[str, Any]) -> None:
    """Their initial values need the base's weights or another distribution."""
    with pytest.raises(ValueError, match=r"plain LoRA.*give adapter="):
        load(llama, peft_init_kwargs={**RANK, **settings})


def test_rows_of_an_adapted_layer_are_those_of_the_merged_one(llama: Path, adapter: Path) -> None:
    """`y = (W + s B A) x`: the base's rows are the merged weight's `G`, the adapter's are `s G Aᵀ` and `s Bᵀ G`."""
    adapted = load(adapter, precision="fp64")
    merged = load(adapter, precision="fp64").merge_and_unload()
    batch = batch_of("llama")
    loss_fn, params = functionalize(merged, targets=layer_matrices(merged))
    whole = per_example_grads(loss_fn, params, batch, engine="loop")
    names = [n for n, _ in adapted.named_parameters() if "base_layer" in n]
    loss_fn, params = functionalize(adapted, targets=[*names, *layer_matrices(adapted)])
    rows = per_example_grads(loss_fn, params, batch, engine="batched")
    expected, scale = {}, adapted.peft_config["default"].lora_alpha / 2
    assert scale != 1
    for name in names:
        grad = whole[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        a, b = (name.replace("base_layer", f"lora_{which}.default") for which in "AB")
        expected |= {name: grad, a: scale * params[b].T @ grad, b: scale * grad @ params[a].T}
    assert len(expected) == 3 * 4
    assert error(dict(rows), expected).value <= 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, ["auto, fp32, bf16, fp16, fp64, int8, int4", "'fp8'"]),
        ({"task": "summary"}, ["causal, seq2seq, masked", "'summary'"]),
        ({"precision": "fp32", "model_kwargs": {"dtype": "auto"}}, ["'fp32'", "dtype", "give one"]),
        ({"adapter": "a", "peft_init_kwargs": {}}, ["give one of them"]),
        ({"task": "sequence"}, ["no weights for score.weight", "random", "'sequence'"]),
        ({"task": "masked"}, ["AutoModelForMaskedLM", "task"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(llama: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        load(llama, **options)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_upstream_says_that_a_class_does_not_know_a_model() -> None:
    """The words by which `load` knows that it was given the wrong task."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForMaskedLM.from_config(transformers.LlamaConfig(**LLAMA))


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    """Transformers answers a misspelt folder with a lesson on the names of repositories."""
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load(path)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 3}), ["lacks", "layers.2"]),
        (hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1}), ["lacks", "layers.1"]),
        (hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "hidden_size": 32}), ["size mismatch"]),
        (FAMILIES["gpt2"], ["not found in the base model"]),
    ],
    ids=["more layers", "fewer layers", "wider", "another family"],
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, adapter: Path, base: Any, words: list[str]) -> None:
    """PEFT passes over layers that one of them lacks, with a warning at best."""
    with pytest.raises(ValueError, match=r"was made for .*llama and does not fit .*other") as refusal:
        load(save(tmp_path / "other", base()), adapter=adapter)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_an_adapter_of_a_like_base_is_pointed_out(tmp_path: Path, adapter: Path) -> None:
    base = save(tmp_path / "twin", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)())
    with pytest.warns(UserWarning, match=r"was made for .*llama: check"):
        load(base, adapter=adapter)
    with pytest.raises(ValueError, match=r"is an adapter .* itself"):
        load(adapter, adapter=adapter)


def test_a_bidirectional_model_is_no_causal_one(tmp_path: Path) -> None:
    """BERT as a causal model sees the tokens that it is to predict: losses near zero, and nothing said."""
    save(tmp_path, hf("BertForMaskedLM", "BertConfig", **BERT)())
    with pytest.raises(ValueError, match=r"no causal model.*is_decoder"):
        load(tmp_path)
    assert load(tmp_path, model_kwargs={"is_decoder": True}).config.is_decoder


def test_remote_code_is_off_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path)
    with pytest.raises(SystemExit, match="remote code ran"):
        load(tmp_path, trust_remote_code=True)
