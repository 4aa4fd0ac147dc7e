"""Per-token gradients in both notions, against loops that share nothing with the probes.

"use": give every position its own copy of a weight and differentiate each copy. "loss": differentiate one position's
own loss. In either notion the rows of an example add up to its row.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence import as_blocks, chain, functionalize, per_example_grads, per_token_grads, project, unit_norm
from influence.func.engine.per_token import TokenRows
from tests.cases import GPT2, LLAMA, VOCAB, hf
from tests.oracles import error

Rows = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def model_of(name: str) -> nn.Module:
    build = {
        "gpt2": hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1}),
        "llama": hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1}),
        "qwen3": hf("Qwen3ForCausalLM", "Qwen3Config", **{**LLAMA, "num_hidden_layers": 1, "head_dim": 6}),
    }[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.2 * normal(*p.shape, seed=i))
    return model


def padded_batch(s: int = 6) -> dict[str, Tensor]:
    """Three examples of 6, 3 and 5 tokens; a prompt without labels in the first."""
    ids = torch.rand(3, VOCAB, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :s]
    mask = torch.arange(s) < torch.tensor([[s], [3], [s - 1]])
    labels = ids.where(mask, -100)
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def sums(tokens: TokenRows) -> Rows:
    n = len(tokens.offsets) - 1
    return {k: torch.stack([tokens.example(i)[k].sum(0) for i in range(n)]) for k in tokens.rows}


# The notion of loss


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("name", "tolerance"), [("gpt2", 1e-9), ("llama", 1e-6)])  # Llama's norms are in float32
def test_loss_rows_are_those_of_each_tokens_own_loss(name: str, tolerance: float, reduction: str) -> None:
    """A loss that sits at the token before the one it predicts; a mean over the padded length; a weight forgotten."""
    model, batch = model_of(name), {**padded_batch(), "weight": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
    loss_fn, params = functionalize(model, reduction=reduction)
    tokens = per_token_grads(loss_fn, params, batch, position="loss")
    names, leaves = zip(*model.named_parameters(), strict=True)
    expected, places = [], []
    for i in range(3):
        ids, labels, kept = (batch[key][i] for key in ("input_ids", "labels", "attention_mask"))
        length = int(kept.sum())
        logits = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        labelled = [t for t in range(1, length) if labels[t] != -100]
        for t in labelled:
            loss = -logits[t - 1, labels[t]] * batch["weight"][i] / (len(labelled) if reduction == "mean" else 1)
            expected.append(torch.autograd.grad(loss, leaves, retain_graph=True))
            places.append(t)
    truth = {k: torch.stack(each) for k, each in zip(names, zip(*expected, strict=True), strict=True)}
    assert tokens.positions.tolist() == places
    assert tokens.offsets.tolist() == [0, 3, 5, 9]
    assert error(tokens.rows, truth).value <= tolerance
    assert error(sums(tokens), dict(per_example_grads(loss_fn, params, batch))).value <= tolerance


def test_loss_rows_of_a_classifier_are_its_rows() -> None:
    """One loss per example is one position; an integer weight is a weight too."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    loss_fn, params = functionalize(model)
    batch = {"input": normal(2, 4), "labels": torch.tensor([0, 2]), "weight": torch.tensor([2, 3])}
    tokens = per_token_grads(loss_fn, params, batch, position="loss")
    assert tokens.offsets.tolist() == [0, 1, 2]
    assert error(tokens.rows, dict(per_example_grads(loss_fn, params, batch))).value <= 1e-12


# The notion of use


def copies(loss: Callable[[Rows, Tensor], Tensor], params: Rows, x: Tensor, name: str) -> Tensor:
    """Gradient of each position's own copy of a parameter, `[n · s, *shape]`; `loss` takes it as `[s, *shape]`."""
    found = []
    for i in range(len(x)):
        own = params[name].expand(x.shape[1], *params[name].shape).clone().requires_grad_()
        found.append(torch.autograd.grad(loss({**params, name: own}, x[i : i + 1]).sum(), own)[0])
    return torch.cat(found)


def mixing(params: Rows, x: Tensor) -> Tensor:
    """Positions meet after every parameter, so that a token's use touches the losses of later tokens."""
    x = x @ params["w"] + params["b"]
    x = F.layer_norm(x.cumsum(1).tanh(), (4,), params["scale"], params["shift"])
    return F.linear(x.cumsum(1), params["v"], params["c"]).sin().sum((1, 2))


def mixing_apart(params: Rows, x: Tensor) -> Tensor:
    """The same with any parameter given per position, `[s, *shape]`."""
    at = lambda name, ndim: params[name] if params[name].ndim > ndim else params[name].expand(5, *params[name].shape)  # noqa: E731
    x = torch.einsum("nsi,sio->nso", x, at("w", 2)) + at("b", 1)
    x = F.layer_norm(x.cumsum(1).tanh(), (4,)) * at("scale", 1) + at("shift", 1)
    return (torch.einsum("nsi,soi->nso", x.cumsum(1), at("v", 2)) + at("c", 1)).sin().sum((1, 2))


MIXING = {
    "w": normal(3, 4),
    "b": normal(4, seed=1),
    "scale": normal(4, seed=2),
    "shift": normal(4, seed=3),
    "v": normal(2, 4, seed=4),
    "c": normal(2, seed=5),
}


def test_use_rows_are_those_of_a_copy_per_position() -> None:
    """Rows of the wrong position, or of the position whose loss it is instead of the one where the weight was used."""
    x = normal(3, 5, 3, seed=9)
    tokens = per_token_grads(mixing, MIXING, x)
    truth = {name: copies(mixing_apart, MIXING, x, name) for name in MIXING}
    assert error(tokens.rows, truth).value <= 1e-12
    assert error(sums(tokens), dict(per_example_grads(mixing, MIXING, x))).value <= 1e-12


def test_use_row_is_what_a_nudge_at_that_position_does() -> None:
    """By hand, for one linear layer: W is W + εE at position t alone."""
    x, eps, nudge = normal(2, 5, 3, seed=9), 1e-6, normal(2, 4, seed=3)
    rows = per_token_grads(mixing, MIXING, x).rows["v"].unflatten(0, (2, 5))
    for t in range(5):
        moved = MIXING["v"].repeat(5, 1, 1)
        moved[t] += eps * nudge
        slope = (mixing_apart({**MIXING, "v": moved}, x) - mixing_apart(MIXING, x)) / eps
        torch.testing.assert_close(slope, (rows[:, t] * nudge).sum((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_use_rows_of_padded_tokens_are_ragged_and_add_up(name: str) -> None:
    """Tied embedding, Conv1D on [n·s, d], positions without an example axis, norms; no row for padding."""
    loss_fn, params = functionalize(model_of(name))
    batch = padded_batch()
    tokens = per_token_grads(loss_fn, params, batch)
    assert tokens.offsets.tolist() == [0, 6, 9, 14]
    assert tokens.positions.tolist() == [*range(6), *range(3), *range(5)]
    assert error(sums(tokens), dict(per_example_grads(loss_fn, params, batch))).value <= 1e-9


def test_use_rows_of_embeddings_are_at_their_token() -> None:
    """A lookup table's row of position t is one line: that of the token, or of the position itself.

    The last token of an example predicts nothing, so it has no line at all.
    """
    batch = padded_batch()
    loss_fn, params = functionalize(model_of("gpt2"), targets="*wpe*")
    tokens = per_token_grads(loss_fn, params, batch)
    last = {int(end) - 1 for end in tokens.offsets[1:]}
    for i, (row, t) in enumerate(zip(tokens.rows["transformer.wpe.weight"], tokens.positions, strict=True)):
        assert row.any(1).nonzero().flatten().tolist() == ([] if i in last else [int(t)])
    loss_fn, params = functionalize(model_of("llama"), targets="*embed_tokens*")
    tokens = per_token_grads(loss_fn, params, batch)
    used = batch["input_ids"][batch["attention_mask"].bool()]
    for i, (row, token) in enumerate(zip(tokens.rows["model.embed_tokens.weight"], used, strict=True)):
        padding = token == 1  # the table's padding_idx, which torch gives no gradient, even as a real token
        assert row.any(1).nonzero().flatten().tolist() == ([] if i in last or padding else [int(token)])


def test_use_rows_of_a_conv1d_are_an_outer_product() -> None:
    """Hugging Face's Conv1D flattens [n, s] before it multiplies; a use at one position has rank one."""
    loss_fn, params = functionalize(model_of("gpt2"), targets="*c_fc.weight")
    (rows,) = per_token_grads(loss_fn, params, padded_batch()).rows.values()
    assert (torch.linalg.matrix_rank(rows, rtol=1e-9) <= 1).all()


HEADED = {"w": normal(3).abs() + 0.5, "a": normal(3, 3, seed=1)}
SIGNS = normal(4, 4, 3, seed=2)


def headed(params: Rows, x: Tensor) -> Tensor:
    """A norm and a linear per head, on [n, heads, s, d]: as in Qwen3 and Gemma3."""
    y = x.unflatten(-1, (4, 3)).transpose(1, 2)
    w = params["w"]
    y = F.rms_norm(y, (3,), w, 1e-6) if w.ndim == 1 else F.rms_norm(y, (3,), None, 1e-6) * w
    y = torch.einsum("nhsi,sio->nhso", y, params["a"]) if params["a"].ndim > 2 else y @ params["a"]
    return (y * SIGNS[:, : x.shape[1]]).sin().sum((1, 2, 3))


@pytest.mark.parametrize("s", [3, 4])
def test_heads_are_not_taken_for_positions(s: int) -> None:
    """As many heads as tokens: the head axis comes first, has the right length, and adds up too. Right or refused."""
    x = normal(2, s, 12, seed=4)
    try:
        tokens = per_token_grads(headed, HEADED, x)
    except ValueError as refusal:
        assert s == 4
        assert "position" in str(refusal)  # noqa: PT017
        return
    assert error(tokens.rows, {name: copies(headed, HEADED, x, name) for name in HEADED}).value <= 1e-12


@pytest.mark.parametrize("s", [3, 5])
def test_features_are_not_taken_for_positions(s: int) -> None:
    """A bias or a norm on pooled [n, d] with d = s tokens: no use has a position, and it must be refused as ever."""
    b, x = {"b": normal(5)}, normal(2, s, 5, seed=1)
    for pooled in (
        lambda params, x: (x.mean(1) + params["b"]).sin().sum(1),
        lambda params, x: (x.mean(1) * params["b"]).sin().sum(1),
        lambda params, x: F.layer_norm(x.mean(1), (5,), params["b"]).sin().sum(1),
    ):
        with pytest.raises(ValueError, match="position"):
            per_token_grads(pooled, b, x)


# Transforms


@pytest.mark.parametrize("position", ["use", "loss"])
def test_transform_of_token_rows_is_that_of_the_rows(position: str) -> None:
    """A side folded over positions that were already summed, or a norm over all the tokens of an example."""
    loss_fn, params = functionalize(model_of("llama"), targets="*proj.weight")
    batch = padded_batch()
    plain = per_token_grads(loss_fn, params, batch, position=position)
    for transform in (chain(as_blocks(), project(4)), chain(as_blocks(), project(8, target="global"), unit_norm())):
        got = per_token_grads(loss_fn, params, batch, position=position, transform=transform)
        assert error(got.rows, transform.apply(plain.rows, loss_fn.layout)).value <= 1e-9
        assert got.offsets.tolist() == plain.offsets.tolist()


# Refusals


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh().mean(1))


def summed(output: Any, batch: Any) -> Tensor:
    return output.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("build", "x", "words"),
    [
        (Pooled, normal(2, 5, 3), ["no axis of 5 token positions", "exclude"]),
        (lambda: nn.Conv1d(5, 2, 3), normal(2, 5, 7), ["0.weight", "convolution", "exclude"]),
        (lambda: nn.Conv2d(3, 2, 3), normal(2, 3, 5, 5), ["0.weight", "convolution", "exclude"]),
    ],
    ids=["pooled head", "conv1d", "conv2d"],
)
def test_uses_without_positions_are_refused(build: Callable[[], nn.Module], x: Tensor, words: list[str]) -> None:
    """A pooled head has no position of its own: rows invented for it would look like any other."""
    loss_fn, params = functionalize(nn.Sequential(build()).double(), loss=summed)
    with pytest.raises(ValueError, match="position='use'") as refusal:
        per_token_grads(loss_fn, params, (x, torch.zeros(2)))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_excluding_what_has_no_position_helps() -> None:
    """The way out that the refusal names must be one."""
    loss_fn, params = functionalize(nn.Sequential(Pooled()).double(), loss=summed, exclude="*head*")
    x = normal(2, 5, 3), torch.zeros(2)
    tokens = per_token_grads(loss_fn, params, x)
    assert error(sums(tokens), dict(per_example_grads(loss_fn, params, x))).value <= 1e-12


@pytest.mark.parametrize(
    ("position", "loss_fn", "batch", "words"),
    [
        ("both", mixing, normal(2, 5, 3), "'use' or 'loss'"),
        ("loss", mixing, normal(2, 5, 3), "loss_fn.positions"),
        ("use", lambda params, x: (x[:, None] * params["b"]).sum(1), normal(2), "no axis of positions"),
    ],
    ids=["unknown", "no position losses", "no positions"],
)
def test_what_cannot_be_told_apart_is_refused(position: str, loss_fn: Any, batch: Tensor, words: str) -> None:
    """A request that means nothing for this function."""
    with pytest.raises(ValueError, match=words):
        per_token_grads(loss_fn, MIXING, batch, position=position)
