"""Heads: which entries of an attention weight belong to which head, asked of each architecture's own code.

The attention function is watched: the rows of a fused weight on which one head's queries depend are that head's rows.
The columns of an output projection that get no gradient when one head's output is cut off are that head's columns.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import BloomAttention

from influence import Heads, as_blocks, chain, functionalize, per_example_grads, project, split_heads
from tests.cases import BERT, GPT2, LLAMA, TINY, VOCAB, hf, lora
from tests.oracles import error

HEADS = 4


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    fused: str = ""  # the fused weight's block, or
    apart: tuple[str, ...] = ()  # those of queries, keys and values
    output: str = ""
    kv: int = HEADS


def separate(prefix: str, output: str, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> dict[str, Any]:
    return {"apart": tuple(f"{prefix}.{name}" for name in names), "output": f"{prefix}.{output}"}


FALCON = {"fused": "transformer.h.0.self_attention.query_key_value", "output": "transformer.h.0.self_attention.dense"}
ONE = {**TINY, "num_hidden_layers": 1}
WIDE = {"num_hidden_layers": 1, "head_dim": 6, "attention_bias": True}
FAMILIES = {
    "gpt2": Family(
        hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1}),
        fused="transformer.h.0.attn.c_attn",
        output="transformer.h.0.attn.c_proj",
    ),
    "gpt_neox": Family(
        hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **ONE, intermediate_size=24, max_position_embeddings=16),
        fused="gpt_neox.layers.0.attention.query_key_value",
        output="gpt_neox.layers.0.attention.dense",
    ),
    "bloom": Family(
        hf("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=4), **FALCON
    ),
    "falcon, one key": Family(hf("FalconForCausalLM", "FalconConfig", **ONE, bias=True), **FALCON, kv=1),
    "falcon, a key each": Family(
        hf("FalconForCausalLM", "FalconConfig", **ONE, multi_query=False, bias=True), **FALCON
    ),
    "falcon, groups": Family(
        hf("FalconForCausalLM", "FalconConfig", **ONE, new_decoder_architecture=True, num_kv_heads=2), **FALCON, kv=2
    ),
    "llama": Family(
        hf(
            "LlamaForCausalLM",
            "LlamaConfig",
            **{**LLAMA, **WIDE},
        ),
        **separate("model.layers.0.self_attn", "o_proj"),
        kv=2,
    ),
    "phi3": Family(
        hf("Phi3ForCausalLM", "Phi3Config", **{**LLAMA, "num_hidden_layers": 1}),
        fused="model.layers.0.self_attn.qkv_proj",
        output="model.layers.0.self_attn.o_proj",
        kv=2,
    ),
    "opt": Family(
        hf("OPTForCausalLM", "OPTConfig", **ONE, ffn_dim=24, max_position_embeddings=16, word_embed_proj_dim=16),
        **separate("model.decoder.layers.0.self_attn", "out_proj"),
    ),
    "bert": Family(
        hf("BertForTokenClassification", "BertConfig", **{**BERT, "num_hidden_layers": 1}),
        **separate("bert.encoder.layer.0.attention", "output.dense", ("self.query", "self.key", "self.value")),
    ),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name].build().double().eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return model


@contextmanager
def watched(cut: int | None = None) -> Iterator[list[tuple[Tensor, ...]]]:
    """Record queries, keys and values `[n, heads, s, d]` of every attention; cut off the output of one head."""
    seen: list[tuple[Tensor, ...]] = []
    sdpa, reshape, merge = F.scaled_dot_product_attention, BloomAttention._reshape, BloomAttention._merge_heads

    def without(out: Tensor) -> Tensor:
        return out if cut is None else out * (torch.arange(HEADS) != cut).to(out)[:, None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query, key, value))
        return without(sdpa(query, key, value, *args, **kwargs))

    def bloom_reshape(self: BloomAttention, fused: Tensor) -> tuple[Tensor, ...]:
        seen.append(reshape(self, fused))
        return seen[-1]

    def bloom_merge(self: BloomAttention, x: Tensor) -> Tensor:
        return merge(self, without(x.unflatten(0, (-1, HEADS))).flatten(0, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        patch.setattr(BloomAttention, "_reshape", bloom_reshape)
        patch.setattr(BloomAttention, "_merge_heads", bloom_merge)
        yield seen


IDS = torch.tensor([[5, 9, 3, 17, 21], [30, 2, 11, 8, 26]])


def entries(grad: Tensor, transposed: bool, axis: int) -> tuple[int, ...]:
    """Indices along an axis of the block at which a stored weight's gradient is not zero."""
    block = grad.T if transposed else grad
    return tuple(block.abs().sum(1 - axis).nonzero().flatten().tolist())


def own_heads(name: str) -> dict[str, tuple[int, ...]]:
    """`{head block: entries of the whole block's axis}`, from the architecture's own code."""
    model, family = model_of(name), FAMILIES[name]
    weights, turned = dict(model.named_parameters()), name == "gpt2"
    with watched() as seen:
        model(input_ids=IDS)
    found = {}
    for kind, tensor, block in zip("qkv", seen[0], family.apart or (family.fused,) * 3, strict=True):
        weight = weights[f"{block}.weight"]
        heads = [torch.autograd.grad(tensor[:, h].sum(), weight, retain_graph=True)[0] for h in range(tensor.shape[1])]
        for h, rows in enumerate(dict.fromkeys(entries(grad, turned, 0) for grad in heads)):  # shared keys come once
            found[f"{block}.{kind}.head_{h}" if family.fused else f"{block}.head_{h}"] = rows
    weight = weights[f"{family.output}.weight"]
    for h in range(HEADS):
        with watched(cut=h):
            out = model(input_ids=IDS).logits.square().sum()
        kept = entries(torch.autograd.grad(out, weight)[0], turned, 1)
        size = weight.shape[0] if turned else weight.shape[1]
        found[f"{family.output}.head_{h}"] = tuple(sorted({*range(size)} - {*kept}))
    return found


def library_heads(name: str) -> dict[str, tuple[int, ...]]:
    """The same from `split_heads`, by sending through it a gradient whose entries are their own place."""
    model, family = model_of(name), FAMILIES[name]
    layout, found = functionalize(model, loss=lambda output, batch: output.logits.sum((1, 2)))[0].layout, {}
    for block in (*(family.apart or (family.fused,)), family.output):
        weight, axis = dict(model.named_parameters())[f"{block}.weight"], int(block == family.output)
        along = 1 - axis if name == "gpt2" else axis
        places = torch.arange(weight.shape[along], dtype=weight.dtype)
        grad = (places if along else places[:, None]).expand(weight.shape)[None]
        rows = chain(as_blocks(), split_heads()).apply({f"{block}.weight": grad}, layout)
        for head, row in rows.items():
            assert (row[0] == row[0].select(1 - axis, 0).unsqueeze(1 - axis)).all()
            found[head] = tuple(row[0].select(1 - axis, 0).int().tolist())
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_where_the_model_has_them(name: str) -> None:
    """Interleaved taken for concatenated, key heads counted as query heads, hidden_size / heads for head_dim."""
    own = own_heads(name)
    assert library_heads(name) == own
    counts = {kind: sum(f".{kind}.head_" in block for block in own) for kind in "qkv"}
    if FAMILIES[name].fused:
        assert counts == {"q": HEADS, "k": FAMILIES[name].kv, "v": FAMILIES[name].kv}
    else:
        assert [sum(block.startswith(f"{w}.head_") for block in own) for w in FAMILIES[name].apart] == [
            HEADS,
            FAMILIES[name].kv,
            FAMILIES[name].kv,
        ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_reassemble_the_whole_block(name: str, bias: bool) -> None:
    """A head's rows folded into the wrong place, a bias given to no head or to every head of an output projection."""
    family = FAMILIES[name]
    attention = [f"{block}.*" for block in (*(family.apart or [family.fused]), family.output)]
    loss_fn, params = functionalize(
        model_of(name), loss=lambda output, batch: output.logits.square().sum((1, 2)), targets=attention
    )
    batch = {"input_ids": IDS}
    whole = per_example_grads(loss_fn, params, batch, transform=as_blocks(bias))
    heads = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(bias), split_heads()))
    rebuilt = {block: torch.full_like(row, float("nan")) for block, row in whole.items()}
    for head, places in library_heads(name).items():
        block, index = next(b for b in whole if head.startswith(f"{b}.")), torch.tensor(places)
        axis = 2 if block == family.output else 1
        rebuilt[block].index_copy_(axis, index, heads.pop(head))
    for rest, row in heads.items():  # biases of their own, and that of the output projection
        if rest in rebuilt:
            rebuilt[rest] = row
        else:
            assert rest == f"{family.output}.bias"
            rebuilt[family.output][..., -1] = row
    assert error(rebuilt, dict(whole)).value <= 1e-10  # BLOOM computes its attention bias in float32


def test_adapters_hide_no_heads() -> None:
    """LoRA renames `q_proj` to `q_proj.base_layer`; its own matrices have no heads."""
    layout = functionalize(lora(), targets="*base_layer*")[0].layout
    prefix = "base_model.model.model.layers.0.self_attn"
    assert layout[f"{prefix}.q_proj.base_layer.weight"].heads == Heads(4, 4)
    assert layout[f"{prefix}.k_proj.weight"].heads == Heads(2, 4)
    assert layout[f"{prefix}.q_proj.lora_A.default.weight"].heads is None


def test_heads_given_by_hand_are_taken_as_given() -> None:
    """A glob that matches more than meant is the user's; one that is more special, and later, wins."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    loss_fn, params = functionalize(model, loss=lambda output, batch: output.sum(1))
    transform = chain(as_blocks(bias=True), split_heads({"*": Heads(2, 4), "1": Heads(4, 2, "in")}))
    rows = per_example_grads(loss_fn, params, (torch.eye(6), torch.zeros(6)), transform=transform)
    assert {k: tuple(row.shape) for k, row in rows.items()} == {
        "0.head_0": (6, 4, 7),
        "0.head_1": (6, 4, 7),
        **{f"1.head_{h}": (6, 4, 2) for h in range(4)},
        "1.bias": (6, 4),
    }


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ({"0": Heads(3, 3)}, ["covers 9 of the 8 entries", "'0'", "'out'"]),
        ({"0": Heads(2, 3)}, ["covers 6 of the 8 entries"]),
        ({"0": Heads(2, 3, "in")}, ["'in'", "covers 6 of the 5 entries"]),
        ({"0": Heads(2, 2, fused="concatenated")}, ["covers 12 of the 8 entries", "kv="]),
        ({"0": Heads(6, 1, fused="concatenated", kv=3)}, ["covers 12 of the 8 entries", "kv=3"]),
        ({"0": Heads(2, 4, fused="mixed")}, ["mixed", "concatenated", "interleaved", "grouped"]),
        ({"0": Heads(2, 4, "middle")}, ["middle", "'out'", "'in'"]),
        ({"0.bias": Heads(2, 4)}, ["vector", "0.bias"]),
        ({"2.weight": Heads(2, 4)}, ["no block matches '2.weight'", "near misses"]),
        ({"layers.*.q_proj": Heads(2, 4)}, ["no block matches 'layers.*.q_proj'", "near misses"]),
        (None, ["knows no attention heads", "families", "split_heads({"]),
    ],
    ids=str,
)
def test_heads_that_do_not_fit_are_refused(heads: dict[str, Heads] | None, words: list[str]) -> None:
    """Heads that leave a remainder would give it to nobody; a misspelt block would be passed over in silence."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss_fn, params = functionalize(model, loss=lambda output, batch: output.sum(1))
    with pytest.raises(ValueError, match=r"split_heads|Heads") as refusal:
        per_example_grads(
            loss_fn, params, (torch.ones(2, 5), torch.zeros(2)), transform=chain(as_blocks(), split_heads(heads))
        )
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_groups_that_do_not_divide_are_refused() -> None:
    """Three query heads on two keys: the entries add up, and no head is where it is said to be."""
    loss_fn, params = functionalize(nn.Linear(5, 7), loss=lambda output, batch: output.sum(1))
    transform = chain(as_blocks(), split_heads({"weight": Heads(3, 1, fused="grouped", kv=2)}))
    with pytest.raises(ValueError, match="kv"):
        per_example_grads(loss_fn, params, (torch.ones(2, 5), torch.zeros(2)), transform=transform)


def test_slices_of_a_vocabulary_are_projected_like_any_other() -> None:
    """One-hot factors went through a partial side by an index of the whole vocabulary."""

    def loss_fn(params: dict[str, Tensor], ids: Tensor) -> Tensor:
        return F.embedding(ids, params["table"]).sin().sum((1, 2))

    table = {"table": torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[0, 3, 7], [4, 4, 5]])
    sketch = chain(as_blocks(), split_heads({"table": Heads(2, 4)}), project(2))
    rows = per_example_grads(loss_fn, table, ids, transform=sketch, engine="batched")
    expected = per_example_grads(loss_fn, table, ids, transform=sketch, engine="loop")
    for name, row in expected.items():
        torch.testing.assert_close(rows[name], row)
