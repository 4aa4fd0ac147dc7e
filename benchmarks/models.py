"""The models the benchmarks run on: random weights, fixed seeds, nothing to download.

A `Workload` is a frozen model, one batch, the weights to attribute, and the two halves of the forward pass:
`inputs()` (embeddings, or the images) and `losses(model, inputs, labels) -> [n]`. The split is what lets a baseline
stop its backward pass at the inputs.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Workload:
    """One model with one batch.

    Attributes:
        name: What the command line calls it.
        shape: The batch in words, for the table.
        model: In eval mode, every parameter frozen.
        batch: What `influence` is given.
        loss: What `functionalize` is given as its loss.
        targets: Names of the weights to attribute, in the order of the forward pass.
        inputs: The differentiable inputs of the first layer, `[n, ...]`, without a graph.
        labels: What `losses` compares with, `[n, ...]`; a language model's are shifted already.
        losses: `(model, inputs, labels) -> [n]`.
    """

    name: str
    shape: str
    model: nn.Module
    batch: dict[str, Tensor] | tuple[Tensor, Tensor]
    loss: str | Callable
    targets: tuple[str, ...]
    inputs: Callable[[], Tensor]
    labels: Tensor
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]

    @property
    def n(self) -> int:
        """Examples in the batch."""
        return len(self.labels)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The attributed modules by block name: the weight's name without `.weight`."""
        names = (target.removesuffix(".weight") for target in self.targets)
        return {name: self.model.get_submodule(name) for name in names}

    def first(self, count: int) -> dict[str, Tensor] | tuple[Tensor, ...]:
        """The batch's first `count` examples."""
        if isinstance(self.batch, dict):
            return {key: value[:count] for key, value in self.batch.items()}
        return tuple(value[:count] for value in self.batch)


def twin(model: nn.Module, trainable: Collection[str] = ()) -> nn.Module:
    """A second module over the same storage, so that a baseline may hook it or unfreeze it and leave the first alone.

    Args:
        model: The module to mirror.
        trainable: Names of the parameters that require a gradient in the twin.
    """
    memo: dict[int, Tensor] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=name in trainable)
        for name, parameter in model.named_parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def neox(quick: bool = False) -> Workload:
    """GPT-NeoX: 6 layers, 512 wide, 8 heads, MLP 2048, vocabulary 8192; 8 × 256 tokens; 24 linear blocks."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=2 if quick else 6,
        hidden_size=128 if quick else 512,
        num_attention_heads=8,
        intermediate_size=512 if quick else 2048,
        vocab_size=512 if quick else 8192,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return _language_model("neox", GPTNeoXForCausalLM, config, examples=8, tokens=32 if quick else 256)


def llama(quick: bool = False) -> Workload:
    """Llama-shaped: 6 layers, 512 wide, 8 query heads over 2 key-value heads, MLP 1408; 8 × 256 tokens; 42 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2 if quick else 6,
        hidden_size=128 if quick else 512,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=352 if quick else 1408,
        vocab_size=512 if quick else 8192,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return _language_model("llama", LlamaForCausalLM, config, examples=8, tokens=32 if quick else 256)


def conv(quick: bool = False) -> Workload:
    """A residual network with GroupNorm on 3 × 32 × 32 images: 11 convolutions, strided and 1 × 1 ones among them."""
    examples, width = (4, 32) if quick else (32, 64)
    model = build(lambda: ResidualNet(width))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(examples, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (examples,), generator=generator)

    def losses(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), labels, reduction="none")

    return Workload(
        name="conv",
        shape=f"{examples} × 3 × 32 × 32",
        model=model,
        batch=(images, labels),
        loss=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
        targets=_targets(model, nn.Conv2d),
        inputs=images.detach,
        labels=labels,
        losses=losses,
    )


def plain(quick: bool = False) -> Workload:
    """A transformer of separate `nn.Linear`s (all that kronfluence can see): 4 layers, 256 wide, 4 heads, MLP 1024.

    Vocabulary 1024, 64 × 128 tokens; 24 linear blocks with biases, the head left out. Queries, keys and values are fed
    one tensor. Labels are given position by position, already shifted.
    """
    layers, width, vocabulary, examples, tokens = (2, 64, 128, 8, 32) if quick else (4, 256, 1024, 64, 128)
    model = build(lambda: PlainTransformer(layers, width, vocabulary))
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, vocabulary, (2, examples, tokens), generator=draw)
    embedding = model.embedding.weight
    return Workload(
        name="plain",
        shape=f"{examples} × {tokens} tokens",
        model=model,
        batch={"input_ids": ids, "labels": labels, "index": torch.arange(examples)},
        loss="cross_entropy",
        targets=_targets(model.layers, nn.Linear, prefix="layers."),
        inputs=lambda: F.embedding(ids, embedding),
        labels=labels,
        losses=position_losses,
    )


def position_losses(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Each example's cross-entropy summed over positions, from embeddings `[n, t, d]`."""
    logits = net(inputs_embeds=inputs)
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(len(inputs), -1).sum(1)


MODELS: dict[str, Callable[[bool], Workload]] = {"neox": neox, "llama": llama, "conv": conv}


class ResidualNet(nn.Module):
    """A stem and four residual blocks; every second one halves the image and doubles the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        strides = (1, 2, 1, 2)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, stride) for a, b, stride in zip(widths, widths[1:], strides, strict=False))
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 3, h, w]` to logits `[n, 10]`."""
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class ResidualBlock(nn.Module):
    """`x + conv(norm(conv(norm(x))))`, with a 1 × 1 convolution on the short way where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        changes = stride > 1 or inside != outside
        self.short = nn.Conv2d(inside, outside, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inside, h, w]` to `[n, outside, h / stride, w / stride]`."""
        y = self.conv1(F.relu(self.norm1(x)))
        return self.short(x) + self.conv2(F.relu(self.norm2(y)))


class PlainTransformer(nn.Module):
    """A decoder without positions (causal attention sees order by itself), before-norm, with an untied head."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(PlainLayer(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens `[n, t]`, or their embeddings, to logits `[n, t, v]`."""
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return self.head(self.norm(self.layers(x)))


class PlainLayer(nn.Module):
    """Four heads of attention and an MLP of four times the width, each a linear map of its own."""

    heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, t, d]` to the same."""
        y = self.norm1(x)
        q, k, v = (map_(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for map_ in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _language_model(name: str, family: type[nn.Module], config: object, *, examples: int, tokens: int) -> Workload:
    model = build(lambda: family(config))
    ids = torch.randint(0, config.vocab_size, (examples, tokens), generator=torch.Generator().manual_seed(1))
    # The labels are shifted, not the logits: slicing the logits copies them, 4 % of the whole step.
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
    embedding = model.get_input_embeddings().weight

    def losses(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = net(inputs_embeds=inputs, use_cache=False).logits
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(len(inputs), -1).sum(1)

    return Workload(
        name=name,
        shape=f"{examples} × {tokens} tokens",
        model=model,
        batch={"input_ids": ids},
        loss="cross_entropy",
        targets=_targets(model.base_model, nn.Linear, prefix=f"{model.base_model_prefix}."),
        inputs=lambda: F.embedding(ids, embedding),
        labels=labels,
        losses=losses,
    )


def build(build: Callable[[], nn.Module]) -> nn.Module:
    """A frozen model in eval mode, initialised from a fixed seed that leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def _targets(model: nn.Module, kind: type[nn.Module], prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}{name}.weight" for name, module in model.named_modules() if isinstance(module, kind))
