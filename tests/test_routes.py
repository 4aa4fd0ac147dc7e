"""Models that a rule, a trace or a transform could misread: each must be right by whatever route it takes.

The zoo of `tests.cases` asks whether every kind of model works; this asks whether each route knows its limits, and
whether the plan says which one was taken.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from influence import explain, functionalize, per_example_grads, per_example_grads_fn
from influence.func import rules
from tests.cases import CASES, Case, images, labels_nll, labelled_tokens, sequences
from tests.oracles import error, per_example
from tests.worst import ENGINES, function_of, measure, refused, truth_of

BY_NAME = {case.name: case for case in CASES}


class Functional(nn.Module):
    """Calls with arguments that a rule may overlook."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Parameter(torch.zeros(40, 8)), nn.Parameter(torch.zeros(5, 8))
        self.shift, self.lift = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(1, 1))
        self.square, self.direction = nn.Parameter(torch.eye(16, 8)), nn.Parameter(torch.zeros(8))
        self.rms, self.wide, self.head = nn.RMSNorm(8), nn.LayerNorm((2, 4)), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.table, padding_idx=-1)
        x = x + F.embedding(torch.arange(input_ids.shape[1]), self.places, padding_idx=0)
        x = torch.add(x, self.shift, alpha=2)
        x = torch.sub(self.lift, x, alpha=3)
        x = self.rms(F.linear(weight=self.square[4:12], input=x))
        x = self.wide(x.unflatten(-1, (2, 4))).flatten(-2)
        flat = torch.addmm(self.direction, x.flatten(0, 1), self.square[:8].T, beta=2, alpha=3)
        return self.head(flat.tanh().view_as(x) * (x @ self.direction).unsqueeze(-1).exp())


class Stopped(nn.Module):
    """Uses that carry no gradient beside uses that do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.layer(x)
        x = self.layer(x).tanh() + target * self.gain.detach()
        return self.head(x * self.gain / self.gain.detach().norm())


class Written(nn.Module):
    """Parameters written into data in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.bias, self.head = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.bias
        x[:, 0] = self.token
        return self.head(x.cumsum(1).tanh())


class Scale(torch.autograd.Function):
    """An old-style function of a parameter: probes do not see inside, torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Scale.apply(self.enter(x), self.gain).tanh())


class Checkpointed(nn.Module):
    """Uses its parameters once more during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Sandwiched(nn.Module):
    """A linear on ``[h · n · s, d]``: the example is neither the slow nor the fast index."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.each, self.head = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).unflatten(-1, (2, 4)).permute(2, 0, 1, 3)
        x = self.each(x.reshape(-1, 4)).view(x.shape).tanh()
        return self.head(x.permute(1, 2, 0, 3).flatten(-2))


class Attention(nn.Module):
    """Fused attention with grouped queries, a scale, and a mask that leaves some queries nothing to see."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.embed(input_ids)).split([8, 4, 4], -1)
        q, k, v = (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in (q, k, v))
        if attention_mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        else:
            seen = attention_mask[:, None, None, :].bool() & attention_mask[:, None, :, None].bool()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.tril(), enable_gqa=True)
        return self.head(y.transpose(1, 2).flatten(-2))


def plain_tokens(n: int, s: int, pads: str, generator: torch.Generator) -> dict[str, Tensor]:
    batch = labelled_tokens(n, s, pads, generator)
    batch["input_ids"][0, 1], batch["input_ids"][-1, 0] = 39, 39  # the padding row of `padding_idx=-1`
    return batch


HAZARDS = [
    Case("functional", Functional, plain_tokens, labels_nll, "alpha, beta, keywords, slices, a negative padding_idx"),
    Case("stopped", Stopped, images(4), labels_nll, "gradient through detach and no_grad"),
    Case("written", Written, sequences(6), labels_nll, "a probe written into a tensor loses its example axis"),
    Case(
        "scaled", Scaled, images(4), labels_nll, "a parameter inside an autograd.Function", refuses={"vmap": "always"}
    ),
    Case("checkpointed", Checkpointed, images(4), labels_nll, "uses counted twice", refuses={"vmap": "always"}),
    Case("sandwiched", Sandwiched, sequences(6), labels_nll, "rows of the wrong example, with nothing to show for it"),
    Case(
        "attention",
        Attention,
        labelled_tokens,
        labels_nll,
        "queries without keys: NaN for zero",
        pads="left",
        strip=False,
    ),
]
