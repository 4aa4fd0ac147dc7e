"""The unembedding: a language model's last linear map, apart from what comes before it.

A vocabulary of 128,000 makes its logits a model's largest tensor by far. Where nothing but the loss needs them they
are computed a few positions at a time, from what the unembedding sees.
"""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from influence.types import Params

ENTRIES = 1 << 25
"""Logits that exist at a time: 128 MiB in float32. A batch of no more than this is not cut."""
LARGE = 1 << 14
"""A smaller vocabulary is never cut: a batch would have to hold thousands of positions."""


class Unembedding(NamedTuple):
    """A model cut before its last linear map.

    Attributes:
        before: the skeleton of the model, which returns what the map sees as its logits.
        needed: names of the parameters it has.
        weight: name of the map's weight, `[v, d]`.
        bias: name of its bias.
        cap: `c` of logits `c tanh(z / c)`, where the model caps them.
        vocabulary: `v`.
    """

    before: nn.Module
    needed: frozenset[str]
    weight: str
    bias: str | None
    cap: float | None
    vocabulary: int


class Logits(NamedTuple):
    """A model's logits, or what they are made of.

    Attributes:
        seen: the logits themselves, or what the unembedding sees.
        fixed: the unembedding's weight and bias; nothing where `seen` are the logits.
        cap: as in `Unembedding`.
    """

    seen: Float[Tensor, "*n d"]
    fixed: tuple[Tensor, ...] = ()
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """How many there are at a position."""
        return self.fixed[0].shape[0] if self.fixed else self.seen.shape[-1]

    def made(self, seen: Float[Tensor, "*n d"], *fixed: Tensor) -> Float[Tensor, "*n v"]:
        """Return the logits of some positions."""
        if not fixed:
            return seen
        z = F.linear(seen, *fixed)
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


def positions_at_once(vocabulary: int) -> int:
    """Return how many positions' logits exist at a time."""
    return max(1, ENTRIES // vocabulary)


def unembedding(model: nn.Module, values: Params) -> Unembedding | None:
    """Cut a language model before its last linear map.

    That the model does nothing more to the map's result than cap it is tried, on two tokens.

    Args:
        model: the skeleton of a model.
        values: all its parameters.

    Returns:
        The model in two parts; `None` where its vocabulary is small, the last map is no plain linear one (an adapter's,
        a quantised one), or more follows (a scale).
    """
    skeleton: Any = model
    if not hasattr(skeleton, "get_output_embeddings") or getattr(skeleton, "main_input_name", "") != "input_ids":
        return None
    head: Any = skeleton.get_output_embeddings()
    if type(head) is not nn.Linear or head.out_features < LARGE or skeleton.config.is_encoder_decoder:
        return None
    names = {id(p): name for name, p in skeleton.named_parameters()}
    weight, bias = names[id(head.weight)], None if head.bias is None else names[id(head.bias)]
    path = next(name for name, module in skeleton.named_modules() if module is head)
    before: Any = copy.deepcopy(skeleton)
    cap = getattr(before.config, "final_logit_softcapping", None)
    if cap is not None:
        before.config.final_logit_softcapping = None
    seen = Seen()
    before.set_submodule(path, seen)
    needed = {name for name, _ in before.named_parameters()}
    if not needed <= set(values):
        return None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=values[weight].device)
    with torch.no_grad():
        found = torch.func.functional_call(before, {name: values[name] for name in needed}, (), {"input_ids": tokens})
    if getattr(found, "logits", None) is not seen.input:
        return None
    before.set_submodule(path, nn.Identity())
    return Unembedding(before, frozenset(needed), weight, bias, cap, head.out_features)


class Seen(nn.Module):
    """Returns its input, and remembers it."""

    input: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input itself."""
        self.input = x
        return x
