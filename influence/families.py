"""The one table of model families: which axis of which attention weight its heads tile. Imports no transformers.

A family is found by `config.model_type`. Weights are matched by the end of their parameter's name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from influence.func.layout import Heads


class Attention(NamedTuple):
    """How a family's attention weights hold their heads.

    Attributes:
        queries: suffixes of query weights.
        keys: suffixes of key and value weights.
        outputs: suffixes of output projections (heads on the input axis).
        fused: suffix of a fused query-key-value weight, and its order.
    """

    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    fused: tuple[str, str] | None = None


LLAMA = Attention(("self_attn.q_proj",), ("self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
BERT = Attention(("attention.self.query",), ("attention.self.key", "attention.self.value"), ("attention.output.dense",))

ATTENTION: Mapping[str, Attention] = {
    "gpt2": Attention(outputs=("attn.c_proj",), fused=("attn.c_attn", "concatenated")),
    "gpt_neox": Attention(outputs=("attention.dense",), fused=("attention.query_key_value", "interleaved")),
    "bloom": Attention(outputs=("self_attention.dense",), fused=("self_attention.query_key_value", "interleaved")),
    "falcon": Attention(outputs=("self_attention.dense",), fused=("self_attention.query_key_value", "falcon")),
    "phi3": Attention(outputs=("self_attn.o_proj",), fused=("self_attn.qkv_proj", "concatenated")),
    "opt": Attention(("self_attn.q_proj",), ("self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",)),
    "gptj": Attention(("attn.q_proj",), ("attn.k_proj", "attn.v_proj"), ("attn.out_proj",)),
    "bert": BERT,
    "roberta": BERT,
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2"),
            *("gemma", "gemma2", "gemma3_text"),
        ),
        LLAMA,
    ),
}


def heads_of(config: Any, block: str) -> Heads | None:
    """Return the heads of a block, from a model's config; `None` where the family or the block is not in the table.

    Args:
        config: a Hugging Face config (or anything with its attributes).
        block: the block's name.

    Returns:
        The heads.
    """
    family = ATTENTION.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    count = int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or count)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // count)

    def ends(suffixes: tuple[str, ...]) -> bool:
        return any(block == suffix or block.endswith(f".{suffix}") for suffix in suffixes)

    if family.fused and ends(family.fused[:1]):
        order = family.fused[1]
        if order == "falcon":
            order, kv = _falcon(config, count)
        return Heads(count, size, "out", order, kv)
    if ends(family.queries):
        return Heads(count, size)
    if ends(family.keys):
        return Heads(kv, size)
    return Heads(count, size, "in") if ends(family.outputs) else None


def _falcon(config: Any, count: int) -> tuple[str, int]:
    if config.new_decoder_architecture:
        return "grouped", int(config.num_kv_heads)
    return ("concatenated", 1) if config.multi_query else ("interleaved", count)


MASK_READERS = ("bloom", "falcon", "opt")
"""Families which read more than visibility from a padding mask (positions, ALiBi): they get it as it came."""


def masks_plainly(config: Any) -> bool:
    """Whether a ready-made 4-D mask is known to say everything that a family reads from a padding mask."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    family = getattr(config, "model_type", "")
    return family in ATTENTION and family not in MASK_READERS and not windowed
