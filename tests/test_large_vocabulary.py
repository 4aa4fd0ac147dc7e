"""A large vocabulary: losses a few positions at a time against the plain ones, values, rows and curvature."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence import as_blocks, chain, explain, functionalize, hessians, per_example_grads, per_token_grads, project
from influence.func.loss import unembedding
from influence.func.loss.losses import IGNORED, cross_entropy, kl_divergence, log_odds
from influence.func.loss.unembedding import by_chunks
from tests.oracles import error, per_example

V = unembedding.LARGE


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def language_model(kind: str = "llama", seed: int = 0, **settings: Any) -> nn.Module:
    """A model of one small layer and `LARGE` words."""
    import transformers as t

    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    makes: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=V, num_key_value_heads=1, **small, **settings)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(vocab_size=V, num_key_value_heads=1, head_dim=4, **small, **settings)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
        "granite": lambda: t.GraniteForCausalLM(
            t.GraniteConfig(vocab_size=V, num_key_value_heads=1, logits_scaling=4.0, **small)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=V, **small, **settings)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = makes[kind]().double().eval()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.3 * normal(*p.shape, seed=100 * seed + i))
    return model


def batch_of(n: int = 3, s: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(V, (n, s), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[1, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weight": torch.tensor([1.0, -0.5, 2.0][:n])}


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let only a few positions' logits exist at a time."""
    import influence.func.loss.module_loss as module_loss

    def set_positions(count: int) -> None:
        monkeypatch.setattr(unembedding, "ENTRIES", count * V)
        monkeypatch.setattr(module_loss, "ENTRIES", count * V)

    return set_positions


# The function by itself


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
@pytest.mark.parametrize("loss", ["cross_entropy", "smoothed", "log_odds", "kl"])
def test_in_pieces_it_is_the_plain_loss(loss: str, size: int) -> None:
    """Values, first and second derivatives; pieces that do not divide the positions."""
    h, w, r = normal(2, 5, 4), normal(7, 4, seed=1), normal(2, 5, 7, seed=2)
    y = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(4))
    y[0, 1], y[1, 3:] = IGNORED, IGNORED

    def loss_of(x: Tensor, labels: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        z = 3 * torch.tanh(F.linear(x, weight) / 3)
        if loss == "kl":
            return kl_divergence(z, other, labels != IGNORED)
        return log_odds(z, labels) if loss == "log_odds" else cross_entropy(z, labels, 0.2 * (loss == "smoothed"))

    def pieces(x: Tensor) -> Tensor:
        return by_chunks(loss_of, x, [y, r], [w], size)

    def plain(x: Tensor) -> Tensor:
        return loss_of(x, y, r, w)

    torch.testing.assert_close(pieces(h), plain(h), rtol=1e-12, atol=1e-12)
    c = normal(2, 5, seed=5)
    first = [torch.func.grad(lambda x, f=f: (c * f(x)).sum())(h) for f in (pieces, plain)]
    torch.testing.assert_close(*first, rtol=1e-12, atol=1e-12)
    mapped = [torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sum()))(h[None]) for f in (pieces, plain)]
    torch.testing.assert_close(*mapped, rtol=1e-12, atol=1e-12)
    leaf = h.clone().requires_grad_()
    (once,) = torch.autograd.grad((c * pieces(leaf)).sum(), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((once * normal(2, 5, 4, seed=6)).sum(), leaf)
    slope = torch.func.grad(lambda x: (c * plain(x)).sum())
    _, pull = torch.func.vjp(slope, h)
    torch.testing.assert_close(twice, pull(normal(2, 5, 4, seed=6))[0], rtol=1e-11, atol=1e-11)


def test_without_a_gradient_no_slope_is_made() -> None:
    calls = []

    def loss_of(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return x.sum(-1)

    assert by_chunks(loss_of, normal(2, 4, 3).requires_grad_().detach(), [], [], 3).shape == (2, 4)
    assert calls == [False] * 3


# In a model


KINDS = ("llama", "gemma2", "gpt2", "granite", "bert")


LAYERS = {"gpt2": "*.h.*", "bert": "*.layer.*"}


@pytest.mark.parametrize("loss", ["cross_entropy", "log_odds"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_in_pieces(kind: str, loss: str, in_pieces: Callable[[int], None]) -> None:
    """Tied (GPT-2), capped (Gemma 2), with a bias (BERT), scaled (Granite, which is not cut): losses and rows."""
    model, batch = language_model(kind), batch_of()
    loss_fn, params = functionalize(model, loss=loss, reduction="mean", targets=LAYERS.get(kind, "*.layers.*"))
    assert (loss_fn._model.unembedding is None) == (kind == "granite")
    transform = chain(as_blocks(), project(2, seed=0))
    want, rows = loss_fn(params, batch), per_example_grads(loss_fn, params, batch, engine="loop")
    small = per_example_grads(loss_fn, params, batch, transform=transform, engine="loop")
    tokens = per_token_grads(loss_fn, params, batch, transform=transform)
    in_pieces(4)
    assert explain(loss_fn, params, batch, transform).engine == "batched"
    torch.testing.assert_close(loss_fn(params, batch), want, rtol=1e-12, atol=1e-12)
    for engine in ("batched", "loop") if kind == "granite" else ("batched", "vmap", "loop"):
        assert error(per_example_grads(loss_fn, params, batch, engine=engine), rows).value < 1e-10
        assert error(per_example_grads(loss_fn, params, batch, transform=transform, engine=engine), small).value < 1e-10
    assert error(per_token_grads(loss_fn, params, batch, transform=transform).rows, tokens.rows).value < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_oracle(kind: str, in_pieces: Callable[[int], None]) -> None:
    """By the module itself and plain autograd."""
    model, batch = language_model(kind), batch_of()
    del batch["weight"]
    truth = per_example(model, batch, "causal")
    in_pieces(5)
    loss_fn, params = functionalize(model, targets=LAYERS.get(kind, "*.layers.*"))
    torch.testing.assert_close(loss_fn(params, batch), truth.losses, rtol=1e-12, atol=1e-12)
    rows = per_example_grads(loss_fn, params, batch)
    assert error(rows, {name: truth.rows[name] for name in params}).value < 1e-10


def test_targets_may_hold_the_unembedding(in_pieces: Callable[[int], None]) -> None:
    """Then logits exist, once: their rows are gradients of what would be cut off."""
    model, batch = language_model("gpt2"), batch_of()
    loss_fn, params = functionalize(model, targets=["*wte.weight", "*.h.*"])
    rows = per_example_grads(loss_fn, params, batch, engine="loop")
    in_pieces(4)
    assert error(per_example_grads(loss_fn, params, batch), rows).value < 1e-10
    sketch = chain(as_blocks(), project(2, seed=0))
    found = per_example_grads(loss_fn, params, batch, transform=sketch)
    assert error(found, sketch.apply(rows, loss_fn.layout)).value < 1e-10


@pytest.mark.parametrize("cut", ["both", "one"])
def test_kl_in_pieces(cut: str, in_pieces: Callable[[int], None]) -> None:
    """Against a reference that is cut too, and one that cannot be."""
    model, batch = language_model("llama"), batch_of()
    reference = language_model("gpt2" if cut == "both" else "granite", seed=1)
    loss_fn, params = functionalize(model, loss="kl", reference=reference, targets="*.layers.*")
    want, rows = loss_fn(params, batch), per_example_grads(loss_fn, params, batch, engine="loop")
    in_pieces(4)
    torch.testing.assert_close(loss_fn(params, batch), want, rtol=1e-12, atol=1e-12)
    assert error(per_example_grads(loss_fn, params, batch), rows).value < 1e-10


def test_curvature_in_pieces(in_pieces: Callable[[int], None]) -> None:
    """A Hessian product needs the second derivative of what is computed in pieces."""
    model, batch = language_model("llama"), batch_of()
    loss_fn, params = functionalize(model, targets="*.mlp.*")
    v = {name: normal(1, *p.shape, seed=i) for i, (name, p) in enumerate(params.items())}
    want = hessians.products.hessian_product(loss_fn, params, [batch])(v)
    in_pieces(4)
    found = hessians.products.hessian_product(loss_fn, params, [batch])(v)
    assert error(found, want).value < 1e-9


def test_half_precision(in_pieces: Callable[[int], None]) -> None:
    """In bfloat16 as far from the truth as the plain loss, and losses in float32."""
    model, batch = language_model("llama"), batch_of()
    truth = per_example(model, batch, "causal") if batch.pop("weight") is not None else None
    assert truth is not None
    loss_fn, params = functionalize(copy.deepcopy(model).bfloat16(), targets="*.mlp.*")
    exact = {name: truth.rows[name] for name in params}
    plain = error(per_example_grads(loss_fn, params, batch), exact).value
    in_pieces(4)
    assert loss_fn(params, batch).dtype == torch.float32
    assert error(per_example_grads(loss_fn, params, batch), exact).value < 1.5 * plain


def test_small_vocabularies_are_left_alone() -> None:
    """No second run of the model where nothing is gained."""
    import transformers as t

    loss_fn, _ = functionalize(t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=V - 1)))
    assert loss_fn._model.unembedding is None


def test_the_plan_says_so(in_pieces: Callable[[int], None]) -> None:
    """And says nothing where logits exist whole."""
    model, batch = language_model("llama"), batch_of()
    loss_fn, params = functionalize(model, targets="*.mlp.*")
    assert "positions at a time" not in str(explain(loss_fn, params, batch))
    in_pieces(4)
    assert f"logits of 18 × {V:,} are computed 4 positions at a time" in str(explain(loss_fn, params, batch))
