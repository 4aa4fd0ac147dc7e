"""The tree of a model, written out by hand, and the default targets of models that are in no table."""

import re

import peft
import pytest
import torch
from torch import nn

from influence.models import describe, layer_matrices
from tests.cases import CASES, GPT2, VOCAB, Case, Residual, hf, lora

GPT2_TREE = """\
GPT2LMHeadModel (gpt2): 7,488 parameters, float32 on cpu
├─ embedding: 896
│  ├─ transformer.wte [40, 16] 640
│  └─ transformer.wpe [16, 16] 256
├─ transformer.h × 2: 6,560
│  └─ 0–1: 3,280 each
│     ├─ attention: 1,088
│     │  ├─ attn.c_attn* [48, 16] + bias 816, 4 query and 4 key heads × 4, concatenated
│     │  └─ attn.c_proj* [16, 16] + bias 272, 4 heads × 4 (inputs)
│     ├─ mlp: 2,128
│     │  ├─ mlp.c_fc* [64, 16] + bias 1,088
│     │  └─ mlp.c_proj* [16, 64] + bias 1,040
│     └─ other: 64
│        ├─ ln_1 [16] 16
│        ├─ ln_1.bias [16] 16
│        ├─ ln_2 [16] 16
│        └─ ln_2.bias [16] 16
├─ other: 32
│  ├─ transformer.ln_f [16] 16
│  └─ transformer.ln_f.bias [16] 16
└─ lm_head: tied to transformer.wte
* default targets: 8 matrices, 6,144 parameters"""

UNLIKE_TREE = """\
Stages: 604 parameters, float32 on cpu
├─ stages × 4: 464
│  ├─ 0, 2–3: 152 each
│  │  ├─ conv* [4, 36] 144
│  │  ├─ norm [4] 4
│  │  └─ norm.bias [4] 4
│  └─ 1: 8
│     ├─ norm [4] 4
│     └─ norm.bias [4] 4
├─ embed [20, 4] 80
└─ head [12, 4] + bias 60
* default targets: 3 matrices, 432 parameters"""


class Stages(nn.Module):
    """A list of an unusual name, whose layers are not all alike."""

    def __init__(self) -> None:
        super().__init__()
        bare = nn.Module()
        bare.norm = nn.GroupNorm(2, 4)
        layers = [Residual(4, nn.GroupNorm(2, 4)) for _ in range(3)]
        self.stages = nn.ModuleList([layers[0], bare, *layers[1:]])
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 12)


def test_the_tree_of_a_known_family() -> None:
    """Conv1D turned round, a bias on its matrix's line, like layers once, the head tied to the embedding."""
    assert describe(hf("GPT2LMHeadModel", "GPT2Config", **GPT2)()) == GPT2_TREE


def test_the_tree_of_an_unknown_model() -> None:
    assert describe(Stages()) == UNLIKE_TREE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_has_a_tree_that_adds_up(case: Case) -> None:
    """A parameter that is in no branch, or in two."""
    model = case.build()
    lines = describe(model).splitlines()
    total = sum(p.numel() for p in model.parameters())
    assert f" {total:,} parameters" in lines[0]
    branches = [line for line in lines[1:-1] if line[0] in "├└" and ": tied to " not in line]
    counts = [re.search(r"(?:: |\] |bias )([\d,]+?)(?:, \d.*)?$", line) for line in branches]
    assert sum(int(count[1].replace(",", "")) for count in counts if count) == total
    names = layer_matrices(model)
    assert f"{sum(dict(model.named_parameters())[n].numel() for n in names):,} parameters" in lines[-1]


def test_the_description_leaves_the_model_alone() -> None:
    model = Stages().train()
    before = {n: (p, p._version, p.requires_grad) for n, p in model.named_parameters()}
    describe(model)
    after = {n: (p, p._version, p.requires_grad) for n, p in model.named_parameters()}
    assert all(before[n][0] is after[n][0] and before[n][1:] == after[n][1:] for n in before)
    assert model.training


def test_targets_without_layers_are_all_matrices() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 3))
    assert layer_matrices(model) == ("2.weight", "3.weight")
    with pytest.raises(ValueError, match=r"Sequential has no matrix.*targets="):
        layer_matrices(nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)))


def test_targets_of_adapters_are_the_active_ones() -> None:
    """The base's weights, and adapters that are not in use (their gradient is zero)."""
    model = lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["gate_proj"]))
    first = layer_matrices(model)
    assert first
    assert all(".lora_" in name and name.endswith(".default.weight") for name in first)
    model.set_adapter("second")
    prefix = "base_model.model.model.layers"
    assert layer_matrices(model) == tuple(
        f"{prefix}.{i}.mlp.gate_proj.lora_{which}.second.weight" for i in range(2) for which in "AB"
    )


def test_integers_are_no_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros((4, 4), dtype=torch.int8), requires_grad=False)
    assert layer_matrices(model) == ("1.weight",)
    assert describe(model).startswith("Sequential: 24 parameters, float32 on cpu\n")
