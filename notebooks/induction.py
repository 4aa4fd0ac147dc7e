"""An induction task: sequences that repeat themselves, and a small transformer that learns to look up what came next.

The first half of a sequence is random, and nothing can predict it; the second half is the first again, and a model that
finds the last place where the present token stood, and reads what followed there, predicts it without a fault.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HALF, HEADS, LAYERS = 24, 10, 2, 2
"""Token 0 begins every sequence. The tokens of a half are all different, so that there is one place to look."""


def sequences(count: int, seed: int) -> Tensor:
    """Return `[count, 1 + 2 * HALF]` tokens: a beginning, a half, and the same half again."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.rand(count, VOCABULARY - 1, generator=draw).argsort(1)[:, :HALF] + 1
    return torch.cat([torch.zeros(count, 1, dtype=torch.int64), half, half], 1)


def repeats(ids: Tensor) -> Tensor:
    """Return labels of the second half's tokens that can be known: all but its first."""
    labels = ids.clone()
    labels[:, : HALF + 2] = -100
    return labels


def make_model(seed: int) -> LlamaForCausalLM:
    """Return an untrained model, its weights drawn from a generator of its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=draw)
    return model


def learn(seed: int = 0, steps: int = 300, rate: float = 3e-3) -> LlamaForCausalLM:
    """Train a model until it has found the trick.

    Args:
        seed: of the weights and the sequences.
        steps: of training, 64 new sequences each.
        rate: of Adam, at its highest.

    Returns:
        The model.
    """
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 50, 4 * (1 - step / steps))
        ids = sequences(64, seed * 1_000_000 + step + 1)
        loss = model(input_ids=ids, labels=repeats(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def loss_without(model: LlamaForCausalLM, ids: Tensor, layer: int | None = None, head: int | None = None) -> float:
    """Return the loss of the repeats, with what one head writes set to zero."""
    weight = None if layer is None else model.model.layers[layer].self_attn.o_proj.weight
    before = None if weight is None else weight.clone()
    if weight is not None:
        size = weight.shape[1] // HEADS
        weight[:, head * size : (head + 1) * size] = 0
    loss = model(input_ids=ids, labels=repeats(ids)).loss.item()
    if weight is not None:
        weight.copy_(before)
    return loss
