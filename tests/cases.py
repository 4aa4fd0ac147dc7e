"""The model zoo: tiny random models with every kind of parameter, and batches that make mistakes visible.

Each case says which bug it is there for. Models are float64, in eval mode, with every parameter moved off its
initial value (so that no bias is zero and no norm weight is one), and the same on every call.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = Any
VOCAB = 40

FLOAT32_PARTS = "its norm, state or mask is computed in float32 whatever the dtype"


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    build: Callable[[], nn.Module]
    batch_of: Callable[[int, int, str, Generator], Batch]
    loss: str | Callable[[str], Callable]  # what the model is for ("causal", "tokens", "class"), or reduction -> loss
    guards: str
    pads: str = ""  # "right", "left", or no padded batches
    strip: bool = True  # a padded example must give the rows of the same example without its padding
    sizes: tuple[tuple[int, int], ...] = ((3, 5), (4, 4))  # (n, s); the second is the coincidence
    targets: str | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    reason: str = ""
    reference: Callable[[], nn.Module] | None = None  # same weights, where the model's own kernels refuse float64
    refuses: dict[str, str] = field(default_factory=dict)  # engine: "always" or "padded"

    def make(self) -> nn.Module:
        return _moved(self.build, self.dtype)

    def exact(self) -> nn.Module:
        """The model that the oracle differentiates."""
        return _moved(self.reference or self.build, self.dtype)

    def batch(self, n: int, s: int, padded: bool = False) -> Batch:
        generator = torch.Generator().manual_seed(1000 * n + 10 * s + padded)
        batch = self.batch_of(n, s, self.pads if padded else "", generator)
        cast = lambda x: x.to(self.dtype) if x.is_floating_point() else x  # noqa: E731
        return {k: cast(x) for k, x in batch.items()} if isinstance(batch, dict) else tuple(cast(x) for x in batch)

    def user_loss(self, reduction: str) -> str | Callable:
        """What ``functionalize`` is given."""
        return self.loss(reduction) if callable(self.loss) else "cross_entropy"

    def oracle_loss(self, reduction: str) -> str | Callable:
        return self.loss(reduction) if callable(self.loss) else self.loss

    def combos(self) -> list[tuple[str, bool, int, int]]:
        """Every (reduction, padded, n, s)."""
        paddings = (False, True) if self.pads else (False,)
        return [(r, p, n, s) for r in ("sum", "mean") for p in paddings for n, s in self.sizes]


def _moved(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval()


# Batches


def token_batch(n: int, s: int, pads: str, generator: Generator, shift: int) -> dict[str, Tensor]:
    """Token ids over the whole vocabulary (a padding id may be a real token too), of unequal lengths if padded.

    They are distinct, or the first attention layer has nothing to choose from and its gradient is rounding; but
    one comes twice in the first example.
    """
    ids = torch.rand((n, VOCAB), generator=generator).argsort(1)[:, :s]
    ids[0, -1] = ids[0, 1]
    if not pads:
        return {"input_ids": ids}
    lengths = torch.tensor([max(s - i, 3) for i in range(n)]).unsqueeze(1)
    place = torch.arange(s).expand(n, s)
    mask = place < lengths if pads == "right" else place >= s - lengths
    labels = ids.where(mask, -100)
    if shift and pads == "left":  # nothing predicts the first real token
        labels = labels.where(place > s - lengths, -100)
    labels[0, : 1 + shift] = -100  # a prompt
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long(), "labels": labels}


def causal_batch(n: int, s: int, pads: str, generator: Generator) -> Batch:
    return token_batch(n, s, pads, generator, shift=1)


def labelled_tokens(n: int, s: int, pads: str, generator: Generator) -> Batch:
    batch = token_batch(n, s, pads, generator, shift=0)
    labels = torch.randint(3, (n, s), generator=generator)
    return {**batch, "labels": labels.where(batch["labels"] >= 0, -100) if pads else labels}


def masked_tokens(n: int, s: int, pads: str, generator: Generator) -> Batch:
    batch = token_batch(n, s, pads, generator, shift=0)
    truth = torch.randint(VOCAB, (n, s), generator=generator)
    asked = torch.rand((n, s), generator=generator) < 0.5
    asked[:, 0] = True
    return {**batch, "labels": truth.where(asked & (batch["labels"] >= 0) if pads else asked, -100)}


def classified_tokens(n: int, s: int, pads: str, generator: Generator) -> Batch:
    batch = token_batch(n, s, pads, generator, shift=0)
    kinds = torch.randint(2, (n, s), generator=generator)
    return {**batch, "token_type_ids": kinds, "labels": torch.randint(3, (n,), generator=generator)}


def translated_tokens(n: int, s: int, pads: str, generator: Generator) -> Batch:
    """The answer is longer than the question, and padded by its labels alone."""
    batch = token_batch(n, s, pads, generator, shift=0)
    answer = torch.randint(VOCAB, (n, s + 1), generator=generator)
    labels = torch.randint(VOCAB, (n, s + 1), generator=generator)
    if pads:
        labels[1:, -2:] = -100
    return {**batch, "decoder_input_ids": answer, "labels": labels}


def bag_of_tokens(n: int, s: int, pads: str, generator: Generator) -> Batch:
    return torch.randint(VOCAB, (n, s), generator=generator), torch.randint(3, (n,), generator=generator)


def images(*shape: int) -> Callable[[int, int, str, Generator], Batch]:
    def batch(n: int, s: int, pads: str, generator: Generator) -> Batch:
        return torch.randn((n, *shape), generator=generator), torch.randint(3, (n,), generator=generator)

    return batch


def pixels(n: int, s: int, pads: str, generator: Generator) -> Batch:
    x, y = images(3, 8, 8)(n, s, pads, generator)
    return {"pixel_values": x, "labels": y}


def sequences(width: int) -> Callable[[int, int, str, Generator], Batch]:
    def batch(n: int, s: int, pads: str, generator: Generator) -> Batch:
        return torch.randn((n, s, width), generator=generator), torch.randint(3, (n, s), generator=generator)

    return batch


def labels_nll(reduction: str) -> Callable[[Any, Batch], Tensor]:
    """A user's loss: negative log-likelihood of ``labels`` (or of the second entry), −100 ignored, per example."""

    def loss(output: Any, batch: Batch) -> Tensor:
        logits = output if isinstance(output, Tensor) else output.logits
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        terms = ((logits.logsumexp(-1) - picked) * (labels >= 0)).reshape(len(labels), -1)
        return terms.sum(1) / (labels >= 0).reshape(len(labels), -1).sum(1) if reduction == "mean" else terms.sum(1)

    return loss


# Models of our own


class Residual(nn.Module):
    """Convolution, norm, in-place activation, in-place residual sum."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return self.act(y)


def resnet(norm: Callable[[int], nn.Module]) -> nn.Module:
    body = Residual(4, norm(4)), nn.Conv2d(4, 8, 3, stride=2), Residual(8, norm(8))
    return nn.Sequential(nn.Conv2d(3, 4, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def batch_norm(width: int) -> nn.Module:
    norm = nn.BatchNorm2d(width)
    norm.running_mean.copy_(torch.linspace(-1, 1, width))
    norm.running_var.copy_(torch.linspace(0.5, 2, width))
    return norm


class Encoder(nn.Module):
    """Token labels from ``nn.TransformerEncoderLayer``, batch-first or sequence-first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCAB, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        ignored = None if attention_mask is None else attention_mask == 0
        x = self.embed(input_ids if self.batch_first else input_ids.T)
        x = self.head(self.layer(x, src_key_padding_mask=ignored))
        return x if self.batch_first else x.transpose(0, 1)


class CrossAttention(nn.Module):
    """Keys and values of other widths (three separate weights) and learned bias_k, bias_v; sequence-first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 12)
        self.attend = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mixed, _ = self.attend(self.query(x), self.key(x), self.value(x))
        return self.head(mixed).transpose(0, 1)


class Reused(nn.Module):
    """One linear and one norm, called on positions, again on positions, and on the pooled example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.mix(x).tanh())
        x = self.norm(x + self.mix(x).tanh())
        return self.head(x + self.mix(x.mean(1)).unsqueeze(1))


class SharedPaths(nn.Module):
    """The same submodule under two names (torch issue 164759)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = nn.ModuleDict({"again": self.first, "last": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.second["last"](self.second["again"](self.first(x)))


class Bare(nn.Module):
    """Parameters without a module: ``x @ W``, einsum, mul, expand, index, softmax, a scalar, a zero-use one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix = nn.Parameter(torch.eye(6, 8)), nn.Parameter(torch.zeros(8, 2, 4))
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(1, 1, 8))
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(9, 8))
        self.weights, self.temperature = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
        self.leave, self.unused = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), (x @ self.enter) * self.gain], 1) + self.shift
        x = x + self.place[: x.shape[1]]
        mixed = torch.einsum("nsd,dhe->nshe", x, self.mix).tanh()
        a, b = self.weights.softmax(0)
        x = a * x + b * mixed.flatten(-2)
        return ((x + x[:, :1]) @ self.leave.T * self.temperature.exp())[:, 1:]


class Mixer(nn.Module):
    """Linears over positions: the features of one look like the positions of the other."""

    def __init__(self, s: int) -> None:
        super().__init__()
        self.places, self.features, self.head = nn.Linear(s, s), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(x.transpose(1, 2)).transpose(1, 2).tanh()
        return self.head(x + self.features(x.tanh()))


class OwnBag(nn.Module):
    """A sum of embeddings by hand: a lookup by indexing, a scale per token, a product with one-hot vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.zeros(VOCAB, 4)), nn.Parameter(torch.ones(VOCAB))
        self.counts, self.head = nn.Parameter(torch.zeros(VOCAB, 4)), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        looked_up = (self.table[ids] * self.scale[ids].unsqueeze(-1)).sum(1)
        counted = (ids.unsqueeze(-1) == torch.arange(VOCAB)).sum(1).to(self.counts.dtype) @ self.counts
        return self.head((looked_up + counted).tanh())


class TorchBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCAB, 4, mode="mean", padding_idx=1), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids).tanh())


class Derived(nn.Module):
    """Weights computed from parameters before any example is seen: weight norm, a low-rank product, ``1 + w``."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        self.down, self.up = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(4, 2))
        self.gain, self.head = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.normed(x).tanh(), self.up @ self.down)
        return self.head(x / x.norm(dim=-1, keepdim=True) * (1 + self.gain))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def mlp() -> nn.Module:
    hidden = nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), nn.PReLU(4)
    return nn.Sequential(*hidden, nn.Linear(4, 3))


def conv1d() -> nn.Module:
    body = nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=4), nn.Tanh(), nn.Conv1d(8, 4, 2, dilation=2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 3))


def conv2d() -> nn.Module:
    first = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
    body = nn.GELU(), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
    last = nn.Conv2d(8, 4, (1, 3), padding=(0, 1), padding_mode="circular"), nn.Flatten()
    return nn.Sequential(first, *body, *last, nn.Linear(36, 3))


def conv3d() -> nn.Module:
    body = (
        nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1, groups=2),
        nn.Tanh(),
        nn.Conv3d(4, 4, (3, 1, 1), padding="same"),
    )
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(48, 3))


def conv_transpose() -> nn.Module:
    body = (
        nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1),
        nn.Tanh(),
        nn.InstanceNorm2d(4, affine=True),
    )
    return nn.Sequential(*body, nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(18, 3))


# Hugging Face models

TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {**TINY, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 16}


def hf(architecture: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, architecture)(getattr(transformers, config)(**SMALL_IDS, **settings))

    return build


def moe(family: str, implementation: str | None) -> Callable[[], nn.Module]:
    sizes = (
        {"num_experts_per_tok": 2, "experts_implementation": implementation}
        if implementation
        else {"num_experts_per_tok": 2}
    )
    if family == "Mixtral":
        return hf("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4, **sizes)
    shared = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 4}
    return hf("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **LLAMA, **shared, **sizes)


def lora() -> nn.Module:
    import peft

    base = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)()
    adapters = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renamed
        return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **adapters))


BERT = {**TINY, "intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 3}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
GEMMA = {**LLAMA, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3, "attn_implementation": "eager"}
GEMMA["layer_types"] = ["sliding_attention", "full_attention"]
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 1, "num_heads": 4}

CASES = [
    Case("mlp", mlp, images(4), labels_nll, "n equal to every width: an example axis guessed by size"),
    Case("conv1d", conv1d, images(4, 8), labels_nll, "groups in one dimension; channels equal to n"),
    Case("conv2d", conv2d, images(4, 6, 6), labels_nll, "groups, dilation, stride, circular padding, no bias"),
    Case("conv3d", conv3d, images(2, 3, 4, 4), labels_nll, "three dimensions, padding given as 'same'"),
    Case("conv_transpose", conv_transpose, images(4, 3, 3), labels_nll, "[i, o/groups] layout; instance norm folds n"),
    Case("resnet_groupnorm", lambda: resnet(lambda w: nn.GroupNorm(2, w)), images(3, 8, 8), labels_nll,
         "GroupNorm's weight; in-place activation and residual on a probed output"),
    Case("resnet_batchnorm", lambda: resnet(batch_norm), images(3, 8, 8), labels_nll,
         "BatchNorm in eval mode is a scale, not a mixing of examples"),
    Case("vit", hf("ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2,
                   num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4, num_labels=3),
         pixels, "class", "patch convolution, class token expanded to n, key biases with zero gradient"),
]  # fmt: skip
CASES += [
    Case("gpt2", hf("GPT2LMHeadModel", "GPT2Config", **GPT2), causal_batch, "causal",
         "tied head: one gradient, two uses; Conv1D's transposed [n·s, d]; positions without an example axis",
         pads="right"),
    Case("gpt2_left", hf("GPT2LMHeadModel", "GPT2Config", **GPT2), causal_batch, "causal",
         "left padding: without the mask the pads are attended to", pads="left", strip=False),
    Case("gpt_neox", hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **TINY, intermediate_size=24,
                        max_position_embeddings=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                                     "partial_rotary_factor": 0.5}),
         causal_batch, "causal", "fused, interleaved QKV; parallel residual", pads="right"),
    Case("llama", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA), causal_batch, "causal",
         "grouped-query attention: fused kernels must keep their grouping", pads="right"),
    Case("llama_left", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA), causal_batch, "causal",
         "left padding with grouped queries: rows of the mask that admit nothing", pads="left", strip=False),
    Case("qwen2", hf("Qwen2ForCausalLM", "Qwen2Config", **LLAMA), causal_batch, "causal",
         "biases on some linears only", pads="right"),
    Case("gemma2", hf("Gemma2ForCausalLM", "Gemma2Config", **GEMMA), causal_batch, "causal",
         "its own head_dim, soft-capped logits, sliding window; 1 + w is a derived parameter", pads="right",
         tolerance=2e-6, reason=FLOAT32_PARTS),
    Case("gemma3", hf("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA), causal_batch, "causal",
         "norm weights on [n, h, s, d]: the example axis is not next to the features", pads="right",
         tolerance=2e-6, reason=FLOAT32_PARTS),
    Case("bert_classifier", hf("BertForSequenceClassification", "BertConfig", **BERT), classified_tokens, "class",
         "an attention mask that must arrive; token types; a pooler that sees one position", pads="right"),
    Case("bert_mlm", hf("BertForMaskedLM", "BertConfig", **BERT), masked_tokens, "tokens",
         "no shift; tied decoder with its own bias; an embedding whose padding row has no gradient", pads="right"),
    Case("bert_tokens", hf("BertForTokenClassification", "BertConfig", **BERT), labelled_tokens, "tokens",
         "no shift; mean over an example's own labelled positions", pads="right"),
    Case("mha_batch_first", lambda: Encoder(True), labelled_tokens, labels_nll,
         "fused in_proj; the inference fast path of nn.TransformerEncoderLayer has no gradient", pads="right"),
    Case("mha_sequence_first", lambda: Encoder(False), labelled_tokens, labels_nll,
         "the example axis is the second one, and equal to the first when n = s", pads="right"),
    Case("mha_cross", CrossAttention, sequences(6), labels_nll, "three separate projections, bias_k repeated over n"),
    Case("lora", lora, causal_batch, "causal", "adapters over frozen weights; A and B both with gradient",
         pads="right", targets="*lora_*"),
    Case("reused", Reused, sequences(6), labels_nll, "uses add up, and one use has no position axis"),
    Case("shared_paths", SharedPaths, images(4), labels_nll, "functional_call corrupting the user's parameters"),
    Case("bare", Bare, sequences(6), labels_nll, "parameters no module owns; a scalar; one that is never used"),
    Case("mixer", lambda: Mixer(4), sequences(4), labels_nll, "a linear over positions, s divisible by n",
         sizes=((2, 4), (4, 4))),
    Case("own_bag", OwnBag, bag_of_tokens, labels_nll, "lookup by indexing; a product without an example axis"),
    Case("embedding_bag", TorchBag, bag_of_tokens, labels_nll, "nn.EmbeddingBag: a mean that skips the padding row"),
    Case("derived", Derived, images(4), labels_nll, "weights made of parameters: their base value counted twice"),
    Case("lstm", Recurrent, sequences(6), labels_nll, "fused recurrent weights with gradients through time",
         refuses={"vmap": "always"}),
]  # fmt: skip
CASES += [
    Case("opt", hf("OPTForCausalLM", "OPTConfig", **TINY, ffn_dim=24, max_position_embeddings=16,
                   word_embed_proj_dim=16), causal_batch, "causal",
         "layer norm on [n·s, d]; positions looked up by a cumulative mask", pads="right",
         tolerance=1e-9, reason=FLOAT32_PARTS, refuses={"vmap": "padded"}),
    Case("falcon", hf("FalconForCausalLM", "FalconConfig", **TINY), causal_batch, "causal",
         "x @ W.T; one key head for all queries", pads="right"),
    Case("olmo2", hf("Olmo2ForCausalLM", "Olmo2Config", **LLAMA), causal_batch, "causal",
         "norms over all heads of queries and keys, after the block", pads="right"),
    Case("phi3", hf("Phi3ForCausalLM", "Phi3Config", **LLAMA), causal_batch, "causal",
         "fused QKV and gate-up, cut by slices", pads="right"),
    Case("mamba", hf("MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1,
                     state_size=4), causal_batch, "causal",
         "exp of a parameter, a causal convolution cut to length, a scan", pads="right",
         tolerance=2e-6, reason=FLOAT32_PARTS),
    Case("t5", hf("T5ForConditionalGeneration", "T5Config", **T5, relative_attention_num_buckets=8),
         translated_tokens, labels_nll,
         "a relative bias [s, s, h] without an example axis, equal in shape to one with it when n = s", pads="right",
         refuses={"vmap": "padded"}),
    Case("bloom", hf("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4),
         causal_batch, "causal", "an old-style autograd.Function that every torch.func transform refuses", pads="right",
         refuses={"vmap": "always"}),
    Case("mixtral", moe("Mixtral", None), causal_batch, "causal",
         "routed tokens: rows of [tokens, d] belong to examples in no order", pads="right", dtype=torch.float32,
         tolerance=5e-5, reason="a float32 model, because the grouped product refuses float64",
         reference=moe("Mixtral", "eager"), refuses={"batched": "always"}),
    Case("qwen2_moe", moe("Qwen2Moe", "eager"), causal_batch, "causal",
         "routed tokens, expert by expert in a Python loop, beside a shared expert with its own gate", pads="right",
         refuses={"vmap": "always", "batched": "always"}),
]  # fmt: skip
