"""Families: where the parts of every listed architecture are, and that a head's slices are one head.

The dead-head test: what a head writes is made zero, so its queries get no gradient; nor do its keys and values once no
query head of its group writes anything. Any slice that is off by an entry leaves or takes a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence import as_blocks, chain, functionalize, per_example_grads, split_heads
from influence.families import ATTENTION, Place, heads_of, places
from influence.func.transform.blocks import head_slices
from influence.func.transform.layout import block_name
from influence.models import layer_matrices
from tests.cases import BERT, GEMMA, GPT2, LLAMA, T5, TINY, VOCAB, hf, labels_nll, moe

HEADS, LAYERS = 4, 2
WIDE = {**LLAMA, "head_dim": 6}  # head_dim is not hidden_size / heads
BLOOM = {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": LAYERS, "n_head": HEADS}
VIT = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "experts_implementation": "eager"}
ROTARY = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16, "rotary_dim": 4}
OPT = {**TINY, "ffn_dim": 24, "max_position_embeddings": 16, "word_embed_proj_dim": 16}
FALCON = {"alibi": False, "bias": True}


def without_joint_norms(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """OLMo-2 divides the queries of all heads by their common size, so that every head's weights move every head."""

    def built() -> nn.Module:
        model = build()
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
        return model

    return built


OLMO2 = hf("Olmo2ForCausalLM", "Olmo2Config", **LLAMA)

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": hf("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt_neox": hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **TINY, intermediate_size=24, max_position_embeddings=16),
    "llama": hf("LlamaForCausalLM", "LlamaConfig", **WIDE),
    "mistral": hf("MistralForCausalLM", "MistralConfig", **WIDE),
    "qwen2": hf("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "qwen3": hf("Qwen3ForCausalLM", "Qwen3Config", **WIDE),
    "gemma2": hf("Gemma2ForCausalLM", "Gemma2Config", **GEMMA),
    "gemma3_text": hf("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "phi3": hf("Phi3ForCausalLM", "Phi3Config", **LLAMA),
    "opt": hf("OPTForCausalLM", "OPTConfig", **OPT),
    "bloom": hf("BloomForCausalLM", "BloomConfig", **BLOOM),
    "falcon": hf("FalconForCausalLM", "FalconConfig", **TINY, **FALCON),
    "falcon, a key each": hf("FalconForCausalLM", "FalconConfig", **TINY, **FALCON, multi_query=False),
    "falcon, groups": hf(
        "FalconForCausalLM", "FalconConfig", **TINY, **FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gptj": hf("GPTJForCausalLM", "GPTJConfig", **ROTARY),
    "olmo2": without_joint_norms(OLMO2),
    "olmo2, as it is": OLMO2,
    "olmo": hf("OlmoForCausalLM", "OlmoConfig", **LLAMA),
    "gemma": hf("GemmaForCausalLM", "GemmaConfig", **WIDE),
    "mixtral": moe("Mixtral", "eager"),
    "qwen2_moe": moe("Qwen2Moe", "eager"),
    "qwen3_moe": hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **WIDE, **EXPERTS),
    "bert": hf("BertForMaskedLM", "BertConfig", **BERT),
    "roberta": hf("RobertaForMaskedLM", "RobertaConfig", **{**BERT, "max_position_embeddings": 18}),
    "vit": hf("ViTForImageClassification", "ViTConfig", **VIT, image_size=8, patch_size=4),
    "t5": hf(
        "T5ForConditionalGeneration", "T5Config", **{**T5, "num_layers": LAYERS}, relative_attention_num_buckets=8
    ),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name]().double().eval()
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
    return model


def batch_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    ids = torch.tensor([[5, 9, 3, 17, 21], [30, 2, 11, 8, 26]])
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "labels": ids}
    return {"input_ids": ids, "labels": ids}


def attentions(name: str) -> dict[str, dict[str, list[str]]]:
    """`{path of an attention: {role: its blocks}}`, by the table."""
    model, table, found = model_of(name), ATTENTION[model_of(name).config.model_type], {}
    roles = {
        "q": table.queries,
        "kv": table.keys + table.values,
        "o": table.outputs,
        "qkv": table.fused[:1] if table.fused else (),
    }
    for block in map(block_name, layer_matrices(model)):
        for role, suffixes in roles.items():
            for suffix in suffixes:
                if block.endswith(f".{suffix}"):
                    path = found.setdefault(block.removesuffix(suffix), {key: [] for key in roles})
                    path[role].append(block)
    return found


def dead_and_alive(name: str, path: dict[str, list[str]], killed: list[int]) -> tuple[set[str], set[str]]:
    """Which heads of an attention get no gradient once some of them write nothing."""
    blocks = [block for held in path.values() for block in held]
    loss_fn, params = functionalize(
        model_of(name), loss=labels_nll("sum"), targets=[f"{block}.weight" for block in blocks]
    )
    (output,) = (f"{block}.weight" for block in path["o"])
    layout, zeroed = loss_fn.layout[output], params[output].clone()
    written = zeroed if layout.transposed else zeroed.T  # [i, o]
    assert layout.heads is not None
    for head, (_, start, stop) in enumerate(head_slices(layout.heads)):
        if head in killed:
            written[start:stop] = 0
    params = {**params, output: zeroed}
    rows = per_example_grads(loss_fn, params, batch_of(name), transform=chain(as_blocks(), split_heads()))
    size = {head: float(row.abs().max()) for head, row in rows.items()}
    assert all(value == 0 or value > 1e-8 for value in size.values()), size
    return {head for head in size if size[head] == 0}, {head for head in size if size[head]}


def named(path: dict[str, list[str]], kinds: str, head: int) -> set[str]:
    """Names of a head's slices: `q`, or `kv` and the key head's number."""
    apart = {f"{block}.head_{head}" for block in path[kinds]}
    return apart | {f"{block}.{kind}.head_{head}" for block in path["qkv"] for kind in kinds}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "olmo2, as it is"])
def test_a_dead_head_gets_no_gradient(name: str) -> None:
    """A slice of the wrong head, of another kind, or counted by query heads where keys are shared."""
    model = model_of(name)
    (kv,) = {
        spec.kv or HEADS if spec.fused else spec.count
        for path in attentions(name).values()
        for block in path["kv"] + path["qkv"]
        if (spec := heads_of(model.config, block))
    }
    group = HEADS // kv
    for path in attentions(name).values():
        dead, alive = dead_and_alive(name, path, [])
        assert not dead
        assert len(alive) == HEADS + HEADS + 2 * kv
        dead, _ = dead_and_alive(name, path, [1])
        assert dead == named(path, "q", 1) | (named(path, "kv", 1) if group == 1 else set())
        last = [*range(HEADS - group, HEADS)]
        dead, _ = dead_and_alive(name, path, last)
        assert dead == {slot for head in last for slot in named(path, "q", head)} | named(path, "kv", kv - 1)


def test_a_norm_over_all_heads_keeps_queries_alive() -> None:
    """OLMo-2's values die with their heads; its queries and keys do not, whatever is sliced."""
    path = attentions("olmo2, as it is")["model.layers.0."]
    dead, _ = dead_and_alive("olmo2, as it is", path, [2, 3])
    assert dead == {"model.layers.0.self_attn.v_proj.head_1"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_matrix_has_heads(name: str) -> None:
    """A renamed projection falls out of the table in silence."""
    model = model_of(name)
    where, matrices = places(n for n, _ in model.named_parameters()), layer_matrices(model)
    attention = {block_name(n) for n in matrices if where[n].part == "attention"}
    assert attention == {block for path in attentions(name).values() for held in path.values() for block in held}
    assert len(attentions(name)) == LAYERS * (3 if name == "t5" else 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_its_place(name: str) -> None:
    """Asked of the modules: layers are items of a list, the readers in and out are what transformers says they are."""
    model = model_of(name)
    where = places(n for n, _ in model.named_parameters())
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS}
    if name == "t5":
        stacks = {n: m for n, m in stacks.items() if n.endswith(".block")}
    owner = {
        f"{stack}.{layer}.{within}": (stack, layer, within)
        for stack, items in stacks.items()
        for layer, item in enumerate(items)
        for within, _ in item.named_parameters()
    }
    assert {n: (p.stack, p.layer, p.within) for n, p in where.items() if p.stack is not None} == owner
    first = {id(p): n for n, p in model.named_parameters()}
    reader = model.get_input_embeddings()
    assert {where[first[id(p)]].part for p in reader.parameters()} == {"embedding"}
    writer = model.classifier if name == "vit" else model.get_output_embeddings()
    tied = writer.weight is getattr(reader, "weight", None)
    assert where[first[id(writer.weight)]].part == ("embedding" if tied else "unembedding")
    for within in {p.within for p in where.values() if p.stack is not None and p.part == "other"}:
        assert "norm" in within or "ln_" in within
    assert {p.part for p in where.values() if p.stack is not None} >= {"attention", "mlp"}


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_are_the_matrices_of_the_layers(name: str) -> None:
    """Asked of the layers' classes; experts are bare parameters, routers too."""
    model = model_of(name)
    kinds = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    for n, m in model.named_modules():
        if n.endswith((".experts", "mlp.gate")):
            kinds |= {id(p) for p in m.parameters(recurse=False)}
    outside = {id(p) for n, p in model.named_parameters() if n.startswith(("lm_head", "cls.", "classifier"))}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    expected = [n for n, p in model.named_parameters() if id(p) in kinds - outside - tied]
    assert list(layer_matrices(model)) == expected
    assert any("experts.gate_up_proj" in n for n in expected) == ("moe" in name or name == "mixtral")


def test_a_listed_family_is_a_tested_family() -> None:
    assert {*ATTENTION} == {model_of(name).config.model_type for name in FAMILIES}


def test_the_text_part_of_a_model_that_sees_has_heads() -> None:
    """Gemma 3's larger models nest their text config; the vision tower's projections have the same names."""
    text = model_of("gemma3_text").config
    config: Any = type("Config", (), {"model_type": "gemma3", "text_config": text})()
    block = "model.language_model.layers.0.self_attn.k_proj"
    assert heads_of(config, block) == heads_of(text, "model.layers.0.self_attn.k_proj") is not None
    assert heads_of(config, "model.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "base_model.model."])
def test_layers_of_an_unknown_model_are_found(prefix: str) -> None:
    """The outermost list counts, under any name; a list of bare matrices is no layer, nor is a head of two layers."""
    names = [
        "stem.0.weight",
        "stem.1.weight",
        *(f"trunk.{i}.experts.{e}.up.weight" for i in range(3) for e in range(2)),
        "trunk.1.mlp.weight",
        "tail.0.dense.weight",
        "tail.1.out.weight",
    ]
    found = places(prefix + name for name in names)
    assert {place.stack for place in found.values()} == {None, f"{prefix}trunk"}
    assert found[f"{prefix}trunk.1.mlp.weight"] == Place("mlp", f"{prefix}trunk", 1, "mlp.weight")
    assert found[f"{prefix}trunk.2.experts.1.up.weight"] == Place("other", f"{prefix}trunk", 2, "experts.1.up.weight")
    assert all(found[prefix + name].part == "other" for name in names if "trunk" not in name)


def test_one_layer_is_a_layer_if_its_list_has_a_usual_name() -> None:
    assert places(["model.layers.0.attn.weight"])["model.layers.0.attn.weight"].stack == "model.layers"
    assert places(["net.0.attn.weight"])["net.0.attn.weight"].stack is None
