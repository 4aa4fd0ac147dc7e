"""The one table of model families: where their layers, attention, MLP and embeddings live, where heads and experts are.

Imports no transformers. Parts are found by the names of parameters alone, so models of unknown families have them too;
heads need the family, `config.model_type`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from influence.func.transform.layout import Heads

LAYERS = ("h", "layers", "layer", "block", "blocks")
"""Names of lists of repeated layers. A list of another name is known by its items: they have parameters in common."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": (
        *("attn", "attention", "self_attn", "self_attention", "crossattention"),
        *("SelfAttention", "EncDecAttention"),
    ),
    "mlp": ("mlp", "fc1", "fc2", "intermediate", "output", "DenseReluDense", "feed_forward", "ffn"),
}
"""Names of the modules of a layer which are its attention, and those which are its MLP; the first that matches."""
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "unembedding": ("lm_head", "cls", "classifier", "score", "qa_outputs"),
    "embedding": (
        *("wte", "wpe", "embed_in", "embed_tokens", "embed_positions", "word_embeddings", "embeddings", "shared"),
    ),
}
"""Names of the modules outside the layers which read tokens or images in, and those which read the answer out."""


class Place(NamedTuple):
    """Where a parameter is in its model.

    Attributes:
        part: `attention`, `mlp`, `embedding`, `unembedding` or `other`.
        stack: path of the list of repeated layers that holds it, if any does.
        layer: its layer in that list.
        within: its name inside the layer, or its whole name.
    """

    part: str
    stack: str | None
    layer: int | None
    within: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return where every parameter of a model is.

    A repeated layer is an item of the outermost numbered list whose items hold modules and have parameters in common,
    or which has a usual name.

    Args:
        names: names of all its parameters.

    Returns:
        The places, by name.

    Example:
        >>> places(["wte.weight", "h.0.attn.c_attn.weight", "h.0.ln_1.weight"])["h.0.attn.c_attn.weight"]
        Place(part='attention', stack='h', layer=0, within='attn.c_attn.weight')
    """
    names = list(names)
    owners: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        for stack, layer, within in _numbered(name):
            owners[stack, within].add(layer)
    stacks = {stack for (stack, _), layers in owners.items() if len(layers) > 1 or stack.split(".")[-1] in LAYERS}
    found = {}
    for name in names:
        held = next((at for at in _numbered(name) if at[0] in stacks), None)
        found[name] = Place(_part(held[2], PARTS), *held) if held else Place(_part(name, OUTSIDE), None, None, name)
    return found


def _part(name: str, vocabulary: Mapping[str, tuple[str, ...]]) -> str:
    modules = {*name.split(".")[:-1]}
    return next((part for part, usual in vocabulary.items() if modules & {*usual}), "other")


def _numbered(name: str) -> Iterator[tuple[str, int, str]]:
    """Yield every `(list, number, name within the item)` of a name, outermost first; items without modules are none."""
    path = name.split(".")
    for at, component in enumerate(path[:-2]):
        if component.isdecimal():
            yield ".".join(path[:at]), int(component), ".".join(path[at + 1 :])


class Attention(NamedTuple):
    """How a family's attention weights hold their heads.

    Weights are matched by the end of their parameter's name.

    Attributes:
        queries: suffixes of query weights.
        keys: suffixes of key weights.
        values: suffixes of value weights.
        outputs: suffixes of output projections (heads on the input axis).
        fused: suffix of a fused query-key-value weight, and its order.
    """

    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    fused: tuple[str, str] | None = None


LLAMA = Attention(("self_attn.q_proj",), ("self_attn.k_proj",), ("self_attn.v_proj",), ("self_attn.o_proj",))
BERT = Attention(
    ("attention.self.query",), ("attention.self.key",), ("attention.self.value",), ("attention.output.dense",)
)


def _t5(which: str) -> tuple[str, ...]:
    return (f"SelfAttention.{which}", f"EncDecAttention.{which}")


ATTENTION: Mapping[str, Attention] = {
    "gpt2": Attention(outputs=("attn.c_proj",), fused=("attn.c_attn", "concatenated")),
    "gpt_neox": Attention(outputs=("attention.dense",), fused=("attention.query_key_value", "interleaved")),
    "bloom": Attention(outputs=("self_attention.dense",), fused=("self_attention.query_key_value", "interleaved")),
    "falcon": Attention(outputs=("self_attention.dense",), fused=("self_attention.query_key_value", "falcon")),
    "phi3": Attention(outputs=("self_attn.o_proj",), fused=("self_attn.qkv_proj", "concatenated")),
    "opt": Attention(("self_attn.q_proj",), ("self_attn.k_proj",), ("self_attn.v_proj",), ("self_attn.out_proj",)),
    "gptj": Attention(("attn.q_proj",), ("attn.k_proj",), ("attn.v_proj",), ("attn.out_proj",)),
    "bert": BERT,
    "roberta": BERT,
    "vit": Attention(("attention.q_proj",), ("attention.k_proj",), ("attention.v_proj",), ("attention.o_proj",)),
    "t5": Attention(_t5("q"), _t5("k"), _t5("v"), _t5("o")),
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2"),
            *("gemma", "gemma2", "gemma3_text"),
        ),
        LLAMA,
    ),
}


TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
"""Classes of experts that store `[i, o]` without saying so; the others have `is_transposed`, or store `[o, i]`."""


class Experts(NamedTuple):
    """A parameter of a module that holds the matrices of all its experts, `[experts, o, i]` or `[experts, i, o]`.

    Attributes:
        matrix: name of the parameter.
        bias: name of the parameter with their biases, `[experts, o]`, if there is one.
        transposed: whether a matrix is stored `[i, o]`.
        number: how many experts.
    """

    matrix: str
    bias: str | None
    transposed: bool
    number: int


def experts_of(module: Any) -> list[Experts]:
    """Return the parameters of a module's own that hold the matrices of its experts; none for most modules.

    Args:
        module: a module; it holds experts if its class is named so.

    Returns:
        One entry for each parameter.
    """
    kind = type(module).__name__
    if "Experts" not in kind:
        return []
    own = dict(module.named_parameters(recurse=False))
    transposed = getattr(module, "is_transposed", kind in TRANSPOSED_EXPERTS)
    return [
        Experts(name, f"{name}_bias" if f"{name}_bias" in own else None, transposed, p.shape[0])
        for name, p in own.items()
        if p.ndim == 3
    ]


def heads_of(config: Any, block: str) -> Heads | None:
    """Return the heads of a block, from a model's config; `None` where the family or the block is not in the table.

    Args:
        config: a Hugging Face config (or anything with its attributes).
        block: the block's name.

    Returns:
        The heads.
    """
    if "language_model." in block:  # of a model that also sees
        config = getattr(config, "text_config", config)
    family = ATTENTION.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    count = int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or count)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // count)
    if family.fused and _ends(block, family.fused[:1]):
        order = family.fused[1]
        if order == "falcon":
            order, kv = _falcon(config, count)
        return Heads(count, size, "out", order, kv)
    if _ends(block, family.queries):
        return Heads(count, size)
    if _ends(block, family.keys + family.values):
        return Heads(kv, size)
    return Heads(count, size, "in") if _ends(block, family.outputs) else None


def kind_of(family: str | None, block: str) -> str | None:
    """Return what a block of a family's attention makes: `q`, `k`, `v` or `o`; `None` where the table does not say.

    Args:
        family: the `model_type`.
        block: the block's name.
    """
    known = ATTENTION.get(family or "", Attention())
    kinds = {"q": known.queries, "k": known.keys, "v": known.values, "o": known.outputs}
    return next((kind for kind, suffixes in kinds.items() if _ends(block, suffixes)), None)


def _ends(block: str, suffixes: tuple[str, ...]) -> bool:
    return any(block == suffix or block.endswith(f".{suffix}") for suffix in suffixes)


def _falcon(config: Any, count: int) -> tuple[str, int]:
    if config.new_decoder_architecture:
        return "grouped", int(config.num_kv_heads)
    return ("concatenated", 1) if config.multi_query else ("interleaved", count)


KEY_BIAS_CANCELS = ("gpt2", "bloom", "opt", "bert", "roberta", "vit")
"""Families without rotary positions: a key bias adds the same to all of a query's scores, and softmax cancels it."""

MASK_READERS = ("bloom", "falcon", "opt", "t5")
"""Families which read more than visibility from a padding mask (positions, ALiBi): they get it as it came."""


def masks_plainly(config: Any) -> bool:
    """Whether a ready-made 4-D mask is known to say everything that a family reads from a padding mask."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    family = getattr(config, "model_type", "")
    return family in ATTENTION and family not in MASK_READERS and not windowed
