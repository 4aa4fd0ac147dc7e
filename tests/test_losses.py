"""Losses: values, signs and directions against torch's own; labels, weights, padding; nothing in half precision."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence import functionalize, per_example_grads
from influence.func.loss.losses import cross_entropy, kl_divergence, log_odds, reduce_positions
from tests.cases import BERT, GPT2, LLAMA, hf, lora
from tests.oracles import error

ENGINES = ("loop", "vmap", "batched")
Batch = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = 3 * normal(4, 5, 7)
LABELS = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
LABELS[0, 2:], LABELS[2] = -100, -100
LABELLED = LABELS >= 0


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.2 * normal(*p.shape, seed=100 * seed + i))
    return model


def slope(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of the sum with respect to the logits."""
    leaf = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


# Values and gradients at the logits


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    """Smoothing over the other classes only, or over V - 1; a −100 that is clamped to class 0 and counted."""

    def theirs(logits: Tensor) -> Tensor:
        found = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none", label_smoothing=smoothing)
        return found.view(4, 5)

    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, smoothing), theirs(LOGITS))
    torch.testing.assert_close(slope(lambda z: cross_entropy(z, LABELS, smoothing)), slope(theirs))


def test_log_odds_have_the_sign_of_a_loss() -> None:
    """TRAK's output function grows with the label's probability; a loss must fall. −log(p / (1 − p))."""
    p = LOGITS.softmax(-1).gather(-1, LABELS.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(LABELLED, -(p / (1 - p)).log(), 0.0)
    torch.testing.assert_close(log_odds(LOGITS, LABELS), expected)
    by_hand = [-(z[y] - torch.cat([z[:y], z[y + 1 :]]).logsumexp(0)) for z, y in zip(LOGITS[1], LABELS[1], strict=True)]
    torch.testing.assert_close(log_odds(LOGITS, LABELS)[1], torch.stack(by_hand))
    grads = slope(lambda z: log_odds(z, LABELS))
    assert torch.isfinite(grads).all()
    assert (grads.gather(-1, LABELS.clamp(min=0)[..., None])[LABELLED] < 0).all()


def test_log_odds_of_a_sure_model_are_finite() -> None:
    """log(1 − p) is −∞ as soon as p rounds to one: the odds must come from the logits."""
    z = torch.zeros(1, 1, 3, requires_grad=True) + torch.tensor([200.0, 0.0, 0.0])
    torch.testing.assert_close(log_odds(z, torch.tensor([[0]])), torch.tensor([[-200.0]]) + torch.tensor(2.0).log())


def test_kl_is_from_the_model_to_the_reference() -> None:
    """KL(reference ‖ model) has the same zero, and other gradients."""
    reference = 2 * normal(4, 5, 7, seed=5)

    def theirs(logits: Tensor) -> Tensor:
        p, r = (torch.distributions.Categorical(logits=z) for z in (logits, reference))
        return torch.where(LABELLED, torch.distributions.kl_divergence(p, r), 0.0)

    torch.testing.assert_close(kl_divergence(LOGITS, reference, LABELLED), theirs(LOGITS))
    torch.testing.assert_close(slope(lambda z: kl_divergence(z, reference, LABELLED)), slope(theirs))


def test_kl_of_impossible_tokens_is_finite() -> None:
    """Tokens that both models rule out (a padded vocabulary at −∞): 0 · (−∞ − −∞) is not zero."""
    mask = torch.tensor([0.0, 0.0, float("-inf")])
    z = torch.tensor([[[1.0, 2.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[[0.5, 0.0, 0.0]]]) + mask
    loss = kl_divergence(z + mask, reference, torch.tensor([[True]]))
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x[..., :2]) for x in (z, reference))
    )
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss.sum(), z)[0]).all()


def test_reductions_are_over_an_examples_own_positions() -> None:
    """A mean over the batch's labels, or over the padded length; 0 / 0 for an example without any."""
    losses = torch.where(LABELLED, LOGITS[..., 0], 0.0)
    torch.testing.assert_close(reduce_positions(losses, LABELLED, "sum"), losses.sum(1))
    expected = [
        row[kept].mean() if kept.any() else torch.zeros(()).double() for row, kept in zip(losses, LABELLED, strict=True)
    ]
    torch.testing.assert_close(reduce_positions(losses, LABELLED, "mean"), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised(dtype: torch.dtype) -> None:
    """A loss of 300.3 is 300 in float16 and 300 or 302 in bfloat16."""
    z = torch.tensor([[[0.0, 300.25, 250.0]]]).to(dtype)
    labels = torch.tensor([[0]])
    for loss in (cross_entropy(z, labels), log_odds(z, labels), kl_divergence(z, z.flip(-1), labels == 0)):
        assert loss.dtype == torch.float32
    torch.testing.assert_close(cross_entropy(z, labels), z.float()[..., 1])
    assert cross_entropy(z.double(), labels).dtype == torch.float64
    model = nn.Linear(3, 4, dtype=dtype)
    loss_fn, params = functionalize(model)
    batch = torch.ones(2, 3, dtype=dtype), torch.tensor([0, 1])
    assert loss_fn(params, batch).dtype == torch.float32
    assert per_example_grads(loss_fn, params, batch)["weight"].dtype == dtype


# From a model


def causal_batch(n: int = 3, s: int = 6) -> Batch:
    ids = torch.rand(n, 40, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :s]
    mask = torch.arange(s) < torch.tensor([[s], [4], [5]])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def classified(n: int = 3, s: int = 6) -> Batch:
    batch = causal_batch(n, s)
    return {**batch, "labels": torch.tensor([2, 0, 1])}


def masked(n: int = 3, s: int = 6) -> Batch:
    batch = causal_batch(n, s)
    return {**batch, "labels": batch["labels"].roll(1, 1).where(batch["attention_mask"].bool(), -100)}


ONE = {"num_hidden_layers": 1}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "causal": (hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1}), causal_batch),
    "sequence": (hf("BertForSequenceClassification", "BertConfig", **{**BERT, **ONE}), classified),
    "causal sequence": (
        hf("LlamaForSequenceClassification", "LlamaConfig", **{**LLAMA, **ONE, "num_labels": 3}),
        classified,
    ),
    "masked": (hf("BertForMaskedLM", "BertConfig", **{**BERT, **ONE}), masked),
    "token": (hf("BertForTokenClassification", "BertConfig", **{**BERT, **ONE}), lambda: tokens()),
}  # fmt: skip


def tokens() -> Batch:
    batch = causal_batch()
    return {**batch, "labels": (batch["input_ids"] % 3).where(batch["attention_mask"].bool(), -100)}


@pytest.mark.parametrize("task", MODELS)
def test_the_models_own_loss_agrees(task: str) -> None:
    """Labels shifted twice or not at all. Hugging Face's loss is a mean, so one example at a time."""
    build, batch_of = MODELS[task]
    model, batch = seeded(build), batch_of()
    loss_fn, params = functionalize(model, reduction="mean")
    theirs = [model(**{key: x[i : i + 1] for key, x in batch.items()}).loss for i in range(3)]
    torch.testing.assert_close(loss_fn(params, batch), torch.stack(theirs).double(), rtol=1e-6, atol=1e-9)


def test_labels_of_a_causal_model_default_to_its_tokens() -> None:
    """Padding that is predicted, or a model asked to compute a loss of its own."""
    model, batch = seeded(MODELS["causal"][0]), causal_batch()
    loss_fn, params = functionalize(model)
    without = {key: x for key, x in batch.items() if key != "labels"}
    torch.testing.assert_close(loss_fn(params, without), loss_fn(params, batch))
    whole = {"input_ids": batch["input_ids"]}
    torch.testing.assert_close(loss_fn(params, whole), loss_fn(params, {**whole, "labels": batch["input_ids"]}))


def test_positions_are_those_of_the_predicted_tokens() -> None:
    """A token's loss sits at the token it predicts; the first token is predicted by nothing."""
    model, batch = seeded(MODELS["causal"][0]), causal_batch()
    loss_fn, params = functionalize(model)
    losses, mask = loss_fn.positions(params, batch)
    assert mask.tolist() == [[t > 0 and bool(x) for t, x in enumerate(row)] for row in batch["attention_mask"]]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert losses[0, 2].item() == pytest.approx(-logits[0, 1].log_softmax(-1)[batch["input_ids"][0, 2]].item())
    torch.testing.assert_close(losses.sum(1), loss_fn(params, batch))
    assert not losses[~mask].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "log_odds"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weights_multiply_the_reduced_loss(loss: str, reduction: str) -> None:
    """Advantages: negative, zero and integer ones too; a weight inside a mean would cancel."""
    loss_fn, params = functionalize(seeded(MODELS["causal"][0]), loss=loss, reduction=reduction)
    batch = causal_batch()
    plain, rows = loss_fn(params, batch), per_example_grads(loss_fn, params, batch)
    for weight in (torch.tensor([-0.5, 2.0, 0.0]), torch.tensor([1, -3, 0])):
        weighted = {**batch, "weight": weight}
        torch.testing.assert_close(loss_fn(params, weighted), plain * weight)
        expected = {name: row * weight.double().view(-1, *[1] * (row.ndim - 1)) for name, row in rows.items()}
        assert error(dict(per_example_grads(loss_fn, params, weighted)), expected).value <= 1e-9


def test_label_smoothing_reaches_the_model() -> None:
    """An option that is accepted and forgotten."""
    model = seeded(lambda: nn.Linear(3, 4))
    loss_fn, params = functionalize(model, label_smoothing=0.2)
    x, y = normal(5, 3), torch.tensor([0, 1, 2, 3, 0])
    expected = F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(loss_fn(params, (x, y)), expected.detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", ["cross_entropy", "log_odds", "kl"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_example_without_a_label_has_loss_zero_and_a_zero_row(loss: str, engine: str, reduction: str) -> None:
    """0 / 0, or 0 · ∞ behind a mask: NaN in a row that has nothing to say. Padding from end to end, too."""
    options = {"reference": seeded(MODELS["causal"][0], 1)} if loss == "kl" else {}
    loss_fn, params = functionalize(seeded(MODELS["causal"][0]), loss=loss, reduction=reduction, **options)
    batch = causal_batch()
    batch["labels"][0] = -100
    batch["labels"][2], batch["attention_mask"][2] = -100, 0
    losses, rows = loss_fn(params, batch), per_example_grads(loss_fn, params, batch, engine=engine)
    assert losses[0] == losses[2] == 0
    assert losses[1] != 0
    assert all(not row[[0, 2]].any() and row[1].any() for row in rows.values())


# KL between models


def test_kl_to_a_reference_is_between_two_models() -> None:
    """The reference evaluated at the model's own parameters, or differentiated."""
    model, reference = (seeded(MODELS["causal"][0], seed) for seed in (0, 1))
    loss_fn, params = functionalize(model, loss="kl", reference=reference)
    batch = causal_batch()
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    p, r = (torch.distributions.Categorical(logits=m(**inputs).logits[:, :-1]) for m in (model, reference))
    kept = batch["labels"][:, 1:] >= 0
    expected = (torch.distributions.kl_divergence(p, r) * kept).sum(1)
    torch.testing.assert_close(loss_fn(params, batch), expected.detach())
    grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    rows = per_example_grads(loss_fn, params, batch)
    found = {name: row.sum(0, keepdim=True) for name, row in rows.items()}
    assert error(found, {name: g[None] for name, g in zip(rows, grads, strict=True)}).value <= 1e-9
    own = functionalize(model, loss="kl", reference=model)[0]
    torch.testing.assert_close(own(params, batch), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_kl_to_adapters_off_is_kl_to_the_base_model() -> None:
    """Adapters switched off in the user's model, in both models, or in neither."""
    model, batch = seeded(lora), causal_batch()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            inputs = {key: x for key, x in batch.items() if key != "labels"}
            base = model(**inputs).logits[:, :-1]
        adapted = model(**inputs).logits[:, :-1]
    p, r = (torch.distributions.Categorical(logits=z) for z in (adapted, base))
    expected = (torch.distributions.kl_divergence(p, r) * (batch["labels"][:, 1:] >= 0)).sum(1)
    assert (expected > 1e-3).all()
    loss_fn, params = functionalize(model, loss="kl", targets="*lora_*")
    torch.testing.assert_close(loss_fn(params, batch), expected, rtol=1e-6, atol=1e-9)
    rows = [per_example_grads(loss_fn, params, batch, engine=engine) for engine in ("loop", "batched")]
    assert error(dict(rows[1]), dict(rows[0])).value <= 1e-6
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


def test_kl_holds_the_base_still_while_the_base_is_differentiated() -> None:
    """With the base among the targets, a reference that moves along would leave the loss nearly flat."""
    model, batch = seeded(lora), causal_batch()
    loss_fn, params = functionalize(model, loss="kl", targets="*q_proj.base_layer*")
    moved = {name: p + 0.3 * normal(*p.shape) for name, p in params.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(moved, strict=False)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        with model.disable_adapter():
            base = model(**inputs).logits[:, :-1]
        adapted = other(**inputs).logits[:, :-1]
    p, r = (torch.distributions.Categorical(logits=z) for z in (adapted, base))
    expected = (torch.distributions.kl_divergence(p, r) * (batch["labels"][:, 1:] >= 0)).sum(1)
    torch.testing.assert_close(loss_fn(moved, batch), expected, rtol=1e-6, atol=1e-9)


# A loss of the user's own


def test_a_loss_of_ones_own_sees_the_whole_batch() -> None:
    """Labels and the rest taken off before the user's function sees them; a weight that it applies, applied again."""
    model = seeded(lambda: nn.Linear(3, 2))

    def loss(output: Any, batch: Any) -> Tensor:
        assert set(batch) == {"input", "target", "weight", "index"}
        return (output - batch["target"]).square().sum(1) * batch["weight"]

    loss_fn, params = functionalize(Named(model), loss=loss)
    batch: Batch = {
        "input": normal(4, 3),
        "target": normal(4, 2, seed=1),
        "weight": torch.tensor([1.0, 0.0, -1.0, 2.0]),
        "index": torch.arange(4),
    }
    expected = (model(batch["input"]) - batch["target"]).square().sum(1) * batch["weight"]
    torch.testing.assert_close(loss_fn(params, batch), expected.detach())


class Named(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.model(input)


def test_positions_of_a_loss_of_ones_own_are_refused_by_name() -> None:
    """Positions of a loss that only the user understands."""
    loss_fn, params = functionalize(nn.Linear(3, 2), loss=lambda output, batch: output.sum(1))
    with pytest.raises(ValueError, match="positions need loss='cross_entropy'"):
        loss_fn.positions(params, (torch.ones(1, 3), torch.zeros(1)))


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (nn.Linear(3, 2), (torch.ones(2, 3), torch.zeros(2)), ["float32", "no classification", "loss=your own"]),
        (nn.Linear(3, 2), torch.ones(2, 3), ["no labels", "(x, y)"]),
        (nn.LSTM(3, 2), (torch.ones(2, 3), torch.zeros(2).long()), ["tuple without logits", "loss=your own"]),
        (hf("BertForTokenClassification", "BertConfig", **{**BERT, **ONE})(), {"input_ids": torch.ones(2, 3).long()},
         ["no 'labels'", "input_ids"]),
    ],
    ids=["regression", "no labels", "no logits", "no labels in a dictionary"],
)  # fmt: skip
def test_batches_that_fit_no_loss_are_refused(model: nn.Module, batch: Any, words: list[str]) -> None:
    """A regression target taken for a class, or a KeyError from the depths."""
    loss_fn, params = functionalize(model)
    with pytest.raises(ValueError, match=r"\w") as refusal:
        loss_fn(params, batch)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 0.1, "loss": "log_odds"}, "label_smoothing is for"),
        ({"reference": nn.Linear(2, 2)}, "reference is for loss='kl'"),
        ({"mode": "training"}, "'eval' or 'train'; got 'training'"),
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], words: str) -> None:
    """An option which does nothing is a mistake of the caller's that nobody sees."""
    with pytest.raises(ValueError, match=words):
        functionalize(nn.Linear(2, 2), **options)


def test_default_labels_never_predict_from_padding() -> None:
    """The first token behind left padding would be predicted from a pad: a loss that the document does not have."""
    loss_fn, params = functionalize(hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)())
    ids = torch.tensor([[3, 7, 2, 9]])
    for before, after in ((2, 0), (0, 2)):
        padded = {
            "input_ids": F.pad(ids, (before, after), value=5),
            "attention_mask": F.pad(torch.ones_like(ids), (before, after)),
        }
        # rotary positions are relative, so the document's loss does not know where it begins; its norms are float32
        torch.testing.assert_close(loss_fn(params, padded), loss_fn(params, {"input_ids": ids}), rtol=1e-6, atol=1e-6)
