"""Restrictions: a dead head gives its own weights no gradient, a living one does; other words are refused."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import families, functionalize, sgmcmc
from influence.sgmcmc.runner import restrict
from tests.cases import LLAMA, VOCAB, hf
from tests.test_heads import FAMILIES, IDS, model_of


def batch_of(name: str) -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS % 3} if name == "bert" else {"input_ids": IDS}


@functools.cache
def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    return functionalize(model_of(name))


def gradients(name: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
    loss_fn, _ = made(name)
    return sgmcmc.gradient_at(loss_fn, params, [batch_of(name)])


def parts(name: str, word: str) -> tuple[dict[str, Tensor], str]:
    """A restriction's masks, and the name of the output projection among them."""
    loss_fn, params = made(name)
    masks = sgmcmc.masks(loss_fn, params, word)
    output = next(key for key in masks if key == f"{FAMILIES[name].output}.weight")
    assert f"{FAMILIES[name].output}.bias" not in masks
    return masks, output


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["h", "g"])
def test_a_dead_head_gives_its_weights_no_gradient(name: str, kind: str) -> None:
    """The peer takes hidden_size / heads for head_dim, and cuts key heads in pieces; heads of a group overlap there."""
    _, params = made(name)
    kv = FAMILIES[name].kv
    for number in range(4 if kind == "h" else kv):
        masks, output = parts(name, f"l0{kind}{number}")
        dead = {**params, output: params[output].masked_fill(masks[output], 0.0)}
        silent, alive = gradients(name, dead), gradients(name, params)
        for key, mask in masks.items():
            if key == output:
                continue
            scale = float(alive[key].abs().max())
            assert float(silent[key][mask].abs().max()) <= 1e-12 * max(scale, 1e-300), (key, number)
            rows = alive[key].abs().reshape(mask.shape)[mask]
            assert float((rows > 1e-9 * scale).double().mean()) > 0.4, (key, number)  # and all of them move otherwise


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_tile_the_attention_and_heads_tile_queries_and_outputs(name: str) -> None:
    """Heads of one group do not overlap: K and V belong to a head only if no other shares them."""
    kv = FAMILIES[name].kv
    for words in ([f"l0h{h}" for h in range(4)], [f"l0g{g}" for g in range(kv)]):
        counts: dict[str, Tensor] = {}
        for word in words:
            for key, mask in parts(name, word)[0].items():
                counts[key] = counts.get(key, torch.zeros(mask.shape, dtype=torch.int)) + mask.int()
        for key, count in counts.items():
            assert int(count.max()) == 1, key
        if words[0].startswith("l0g") or kv == 4:
            weights = [key for key in counts if key.endswith("weight")]
            assert all(int(counts[key].min()) == 1 for key in weights)
            assert len(weights) == (2 if FAMILIES[name].fused else 4)
    whole = parts(name, "l0h1")[0]
    union = sgmcmc.masks(*made(name), ["l0h1", "l0h1"])
    assert all(torch.equal(union[key], mask) for key, mask in whole.items())


def test_words_choose_layers_parts_embeddings_and_unions() -> None:
    model = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True)()
    loss_fn, params = functionalize(model)
    chosen = lambda word: set(sgmcmc.masks(loss_fn, params, word))  # noqa: E731
    assert chosen("full") == chosen(None) == set(params)
    assert chosen("l1") == {name for name in params if ".layers.1." in name}
    assert chosen("L0 Attn") == {name for name in params if ".layers.0.self_attn." in name}
    assert chosen("l1mlp") == {name for name in params if ".layers.1.mlp." in name}
    assert chosen("embed") == chosen("unembed") == {"model.embed_tokens.weight"}  # tied: one matrix
    assert chosen(["l0 attn", "*.norm.weight"]) == chosen("l0 attn") | {"model.norm.weight"}
    both = sgmcmc.masks(loss_fn, params, ["l0h0", "l0 attn"])
    assert both["model.layers.0.self_attn.q_proj.weight"] is True  # the whole beats a part
    heads = sgmcmc.masks(loss_fn, params, ["l0h0", "l0h3"])
    assert int(heads["model.layers.0.self_attn.q_proj.weight"].sum()) == 2 * 4 * 16
    assert "model.layers.0.self_attn.k_proj.weight" not in heads
    group = sgmcmc.masks(loss_fn, params, "l0g1")
    assert int(group["model.layers.0.self_attn.k_proj.weight"].sum()) == 4 * 16
    text = sgmcmc.preview(loss_fn, params, "l0g1")
    assert text.splitlines()[0] == f"384 of {sum(p.numel() for p in params.values()):,} weights move"


def test_key_biases_move_only_where_they_have_a_gradient() -> None:
    """Added to every score of a query, a key bias cancels in softmax, unless a rotation comes between."""
    masks = sgmcmc.masks(*made("opt"), "l0h1")
    prefix = "model.decoder.layers.0.self_attn"
    assert f"{prefix}.q_proj.bias" in masks
    assert f"{prefix}.v_proj.bias" in masks
    assert f"{prefix}.k_proj.weight" in masks
    assert f"{prefix}.k_proj.bias" not in masks
    assert "model.layers.0.self_attn.k_proj.bias" in sgmcmc.masks(*made("llama"), "l0g1")
    fused = sgmcmc.masks(*made("gpt2"), "l0h0")
    assert int(fused["transformer.h.0.attn.c_attn.bias"].sum()) == 2 * 4
    assert (
        int(sgmcmc.masks(*made("gpt_neox"), "l0h0")["gpt_neox.layers.0.attention.query_key_value.bias"].sum()) == 3 * 4
    )


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("l0h4", ["'l0h4'", "4 heads, counted from 0"]),
        ("l0g2", ["'l0g2'", "2 groups of heads"]),
        ("l1", ["'l1'", "layers 0 to 0"]),
        ("l0 attention", ["no word of the grammar", "l0 attn"]),
        ("model.norm.wieght", ["model.norm.weight"]),
        (["full", "l0"], ["'full' in a union"]),
        ([], ["a word, a list of words"]),
    ],
    ids=str,
)
def test_words_that_mean_nothing_are_refused(word: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        sgmcmc.masks(*made("llama"), word)
    assert all(each in str(refusal.value) for each in words), refusal.value


def test_models_of_two_stacks_and_of_none() -> None:
    t5 = hf("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=1,
            num_heads=4, decoder_start_token_id=0)()  # fmt: skip
    loss_fn, params = functionalize(t5)
    with pytest.raises(ValueError, match=r"any of the lists of layers \['decoder.block', 'encoder.block'\]"):
        sgmcmc.masks(loss_fn, params, "l0")
    chosen = sgmcmc.masks(loss_fn, params, "encoder.block:l0h2")
    assert set(chosen) == {f"encoder.block.0.layer.0.SelfAttention.{which}.weight" for which in "qkvo"}
    plain = functionalize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="names no layer"):
        sgmcmc.masks(*plain, "l0h0")
    with pytest.raises(ValueError, match="finds no unembedding by name"):
        sgmcmc.masks(*plain, "unembed")


class Odd(nn.Module):
    """One layer of grouped attention, whose weights are called as no family calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="odd", num_attention_heads=4, num_key_value_heads=2, hidden_size=16)
        layer = nn.ModuleDict({"attention": nn.ModuleDict()})
        for name, rows in {"wq": 16, "wk": 8, "wv": 8, "kept": 16}.items():
            layer["attention"][name] = nn.Linear(16, rows)  # type: ignore[index]
        self.layers = nn.ModuleList([layer])


def test_keys_and_values_are_known_by_their_family_and_heads_not_by_the_first_letter_of_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`wk` and `wv` were taken for queries, and `kept`, an output projection, would have been a key."""
    odd = families.Attention(("attention.wq",), ("attention.wk",), ("attention.wv",), ("attention.kept",))
    monkeypatch.setattr(families, "ATTENTION", {"odd": odd})
    loss_fn, params = functionalize(Odd())
    moving = lambda word: {  # noqa: E731
        name.removeprefix("layers.0.attention."): sorted({int(i) for i in mask.nonzero()[:, axis] // 4})
        for name, mask in sgmcmc.masks(loss_fn, params, word).items()
        for axis in [int("kept" in name)]
    }
    query = {"wq.weight": [1], "wq.bias": [1], "kept.weight": [1]}
    assert moving("l0h1") == query
    shared = {f"{name}.{part}": [1] for name in ("wk", "wv") for part in ("weight", "bias")}
    assert moving("l0g1") == {"wq.weight": [2, 3], "wq.bias": [2, 3], "kept.weight": [2, 3]} | shared
    monkeypatch.setattr(restrict, "KEY_BIAS_CANCELS", ("odd",))
    assert moving("l0g1").keys() == {"wq.weight", "wq.bias", "kept.weight", *shared} - {"wk.bias"}


def test_a_restricted_run_moves_its_head_alone() -> None:
    loss_fn, params = made("llama")
    target = sgmcmc.local_posterior(loss_fn, params, 10.0, mask=sgmcmc.masks(loss_fn, params, "l0h1"))
    sampler = sgmcmc.sgld.build(target, 1e-4)
    state = sampler.init(params, sampler.noise(0, 0, 0))
    state, _ = sampler.step(state, batch_of("llama"), sampler.noise(0, 0, 1))
    assert len(target.frozen) == len(params) - len(state.params)
    for key, p in state.params.items():
        mask = target.mask[key]
        assert torch.equal(p[~mask], params[key][~mask])
        assert bool((p[mask] != params[key][mask]).all())
