"""Rows collected while a Trainer trains, against rows of an autograd loop at the very weights of each step."""

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from influence import (
    Moments,
    as_blocks,
    chain,
    functionalize,
    per_example_grads,
    project,
    scale_by_adafactor,
    scale_by_adam,
)
from influence.index import open_index
from influence.train import (
    GradientCollectorCallback,
    load_from_optimizer,
    prepare_for_gradient_collection,
    read_order,
    sum_epochs,
)
from influence.train.sharing import Shared, count_of
from tests.cases import hf
from tests.ranks import in_two_ranks

GPT2 = {"vocab_size": 40, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TARGETS = ["*c_attn.weight", "*c_fc.*"]
TRANSFORM = chain(as_blocks(bias=True), project(3))


def gpt2(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, **QUIET, **settings})().to(dtype)


def dataset(n: int = 10) -> list[dict[str, Tensor]]:
    """Documents of one length, some of whose labels are masked, no two as many."""
    draw = torch.Generator().manual_seed(0)
    items = []
    for i in range(n):
        ids = torch.randint(40, (7,), generator=draw)
        items.append({"input_ids": ids, "labels": torch.where(torch.arange(7) < i % 4, -100, ids)})
    return items


def exact_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """A mean over all labels of an update, in the model's own precision: transformers' own is in float32."""
    flat = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return flat / num_items_in_batch


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9)),
    "Adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


class Snapshots(transformers.TrainerCallback):
    """The weights before each update, and the moments that it will divide by."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.moments: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}
        if state.global_step and not isinstance(kwargs["optimizer"].optimizer, torch.optim.SGD):
            self.moments[state.global_step] = load_from_optimizer(model, kwargs["optimizer"], bias_correction=True)


def trainer_of(
    path: Path,
    callback: GradientCollectorCallback | None,
    model: nn.Module | None = None,
    optimizer: str = "AdamW",
    data: Any = None,
    exact: bool = True,
    warm: float | None = None,
    eval_data: Any = None,
    collator: Any = None,
    **settings: Any,
) -> tuple[transformers.Trainer, Snapshots]:
    model = gpt2() if model is None else model
    made = OPTIMIZERS[optimizer](p for p in model.parameters() if p.requires_grad)
    rate = (lambda step: 1.0) if warm is None else (lambda step: 0.0 if step == 0 else warm)
    snapshots = Snapshots()
    arguments = {"per_device_train_batch_size": 3, "num_train_epochs": 2, "save_strategy": "no", **settings}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(path / "trainer"), report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", **arguments
        ),
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_data,
        data_collator=collator,
        compute_loss_func=exact_loss if exact else None,
        optimizers=(made, torch.optim.lr_scheduler.LambdaLR(made, rate)),
        callbacks=[snapshots] if callback is None else [snapshots, callback],
    )
    return (trainer if callback is None else prepare_for_gradient_collection(trainer)), snapshots


def offline(snapshot: dict[str, Tensor], items: list[int], transform: Any = TRANSFORM, **settings: Any) -> Any:
    """Rows by the autograd loop, of a fresh model with the snapshot's weights, one example at a time."""
    model = gpt2(next(iter(snapshot.values())).dtype)
    model.load_state_dict(snapshot, strict=False)
    loss_fn, params = functionalize(model, targets=TARGETS, **settings)
    some = [dataset()[i] for i in items]
    batch = {key: torch.stack([item[key] for item in some]) for key in some[0]}
    return per_example_grads(loss_fn, params, batch, transform=transform, engine="loop"), loss_fn(params, batch)


def compare(path: Path, snapshots: Snapshots, tolerance: float, scaler: Any = None, **settings: Any) -> float:
    """Every row of every epoch is the one of its example, at the weights of its step; return the largest error."""
    order, worst = read_order(path), 0.0
    for epoch in order.epoch.unique().tolist():
        index = open_index(path / f"epoch-{epoch}")
        visits = order.where(order.epoch == epoch).first()
        assert index.index.tolist() == visits.example.tolist() == list(range(10))
        assert torch.equal(index.loss, visits.loss)
        for step in visits.step.unique().tolist():
            scaled = scaler is not None and step in snapshots.moments
            scale = [scaler(snapshots.moments[step])] if scaled else []
            some = visits.where(visits.step == step)
            assert set(some.scaled.tolist()) == {int(scaled)}
            items = some.example
            expected, losses = offline(
                snapshots.weights[step], items.tolist(), chain(as_blocks(bias=True), *scale, project(3)), **settings
            )
            found = index.rows()
            for name, rows in expected.items():
                size = rows.double().flatten(1).norm(dim=1)
                errors = (found[name][items].double() - rows.double()).flatten(1).norm(dim=1) / size.clamp_min(1e-6)
                worst = max(worst, float(errors.max()))
                assert worst <= tolerance, (epoch, step, name, errors)
            torch.testing.assert_close(some.loss, losses.double(), rtol=max(tolerance, 1e-5), atol=0)
    return worst


@pytest.mark.parametrize("share", [True, False], ids=["shared", "again"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_are_those_of_an_autograd_loop_at_the_weights_of_their_step(
    tmp_path: Path, optimizer: str, accumulation: int, share: bool
) -> None:
    """Two shuffled epochs in float64, ten documents in threes (the last micro-batch is smaller)."""
    scale = None if optimizer == "SGD" else "optimizer"
    callback = GradientCollectorCallback(
        tmp_path / "rows", TRANSFORM, share=share, scale=scale, targets=TARGETS, dtype="float64", shard_size=4
    )
    trainer, snapshots = trainer_of(tmp_path, callback, optimizer=optimizer, gradient_accumulation_steps=accumulation)
    trainer.train()
    scaler = {"SGD": None, "AdamW": scale_by_adam, "Adafactor": scale_by_adafactor}[optimizer]
    print("worst", compare(tmp_path / "rows", snapshots, 1e-10, scaler))
    order = read_order(tmp_path / "rows")
    assert len(order.example) == 20
    assert order.step.max() == (7 if accumulation == 1 else 1)
    assert order.micro.max() == (0 if accumulation == 1 else 3)
    if accumulation == 1:
        assert order.example[:10].tolist() != order.example[10:].tolist(), "the epochs are shuffled"
    assert not list((tmp_path / "rows").glob("*.bin"))
    assert callback.seconds > 0


@pytest.mark.parametrize("share", [True, False], ids=["shared", "again"])
def test_transformers_own_loss_in_float32(tmp_path: Path, share: bool) -> None:
    """A mean over an update's tokens, in float32 whatever the model; rows of the mean over an example's tokens."""
    callback = GradientCollectorCallback(
        tmp_path / "rows", TRANSFORM, share=share, targets=TARGETS, reduction="mean", dtype="float32"
    )
    trainer, snapshots = trainer_of(tmp_path, callback, gpt2(torch.float32), exact=False, gradient_accumulation_steps=2)
    trainer.train()
    print("worst", compare(tmp_path / "rows", snapshots, 2e-5, reduction="mean"))


def test_training_goes_as_without_collection(tmp_path: Path) -> None:
    """The same weights to the bit, with dropout on; no hook stays; evaluation is not collected."""
    states = []
    for share in (True, None):
        callback = None if share is None else GradientCollectorCallback(tmp_path / "rows", TRANSFORM, targets=TARGETS)
        model = gpt2(torch.float32, resid_pdrop=0.3, attn_pdrop=0.2)
        trainer, _ = trainer_of(
            tmp_path, callback, model, exact=False, eval_strategy="steps", eval_steps=1, eval_data=dataset(4)
        )
        trainer.train()
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(read_order(tmp_path / "rows").example) == 20


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator that pads on the right, and knows nothing of numbers."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([item[key] for item in items], True, fill)
        for key, fill in (("input_ids", 3), ("labels", -100))
    )
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def test_padding_adds_nothing(tmp_path: Path) -> None:
    """Documents of unequal length, padded by the collator: the rows of each alone, without its padding."""
    data = [{key: value[: 3 + i % 5] for key, value in item.items()} for i, item in enumerate(dataset())]
    callback = GradientCollectorCallback(tmp_path / "rows", TRANSFORM, targets=TARGETS, dtype="float64")
    trainer, snapshots = trainer_of(tmp_path, callback, data=data, collator=padded, num_train_epochs=1)
    trainer.train()
    index, order = open_index(tmp_path / "rows/epoch-0").rows(), read_order(tmp_path / "rows")
    for i, step in zip(order.example.tolist(), order.step.tolist(), strict=True):
        model = gpt2()
        model.load_state_dict(snapshots.weights[step], strict=False)
        loss_fn, params = functionalize(model, targets=TARGETS)
        alone = {key: value[None] for key, value in data[i].items()}
        expected = per_example_grads(loss_fn, params, alone, transform=TRANSFORM, engine="loop")
        for name, row in expected.items():
            torch.testing.assert_close(index[name][i], row[0], rtol=1e-10, atol=1e-10 * float(row.abs().max()))


def test_two_epochs_added(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    callback = GradientCollectorCallback(path, TRANSFORM, targets=TARGETS, dtype="float64", shard_size=3)
    trainer_of(tmp_path, callback)[0].train()
    total = sum_epochs(path)
    parts = [open_index(path / f"epoch-{e}") for e in (0, 1)]
    torch.testing.assert_close(total.matrix(), parts[0].matrix() + parts[1].matrix(), rtol=1e-12, atol=1e-12)
    assert total.index.tolist() == list(range(10))
    assert total.fingerprint.weights == "those of each step of a training run"


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "bf16 autocast"])
def test_bfloat16(tmp_path: Path, autocast: bool) -> None:
    """A model in bfloat16, and one in float32 that computes in bfloat16: near the rows of the float32 computation."""
    dtype = torch.float32 if autocast else torch.bfloat16
    callback = GradientCollectorCallback(tmp_path / "rows", TRANSFORM, targets=TARGETS)
    trainer, snapshots = trainer_of(tmp_path, callback, gpt2(dtype), exact=False, bf16=autocast, num_train_epochs=1)
    trainer.train()
    snapshots.weights = {step: {n: p.float() for n, p in w.items()} for step, w in snapshots.weights.items()}
    print("worst", compare(tmp_path / "rows", snapshots, 0.15))


def test_a_learning_rate_of_zero_scales_nothing_away(tmp_path: Path) -> None:
    """Warm-up begins at zero: the moments move all the same, and rows are scaled from the second step on."""
    callback = GradientCollectorCallback(
        tmp_path / "rows", TRANSFORM, scale="optimizer", targets=TARGETS, dtype="float64"
    )
    trainer, snapshots = trainer_of(tmp_path, callback, warm=1.0, num_train_epochs=1)
    trainer.train()
    compare(tmp_path / "rows", snapshots, 1e-10, scale_by_adam)
    order = read_order(tmp_path / "rows")
    assert order.rate[:3].tolist() == [0.0] * 3
    assert order.rate[-1] == 1e-2


class Crash(transformers.TrainerCallback):
    """A run that ends at a step, as a machine does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("crash", [3, 6], ids=["in its epoch", "an epoch later"])
def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(tmp_path: Path, crash: int) -> None:
    """From a checkpoint in the middle of the first epoch, whose index is there already or not."""

    def run(name: str, at: str) -> transformers.Trainer:
        callback = GradientCollectorCallback(
            tmp_path / name, TRANSFORM, targets=TARGETS, scale="optimizer", dtype="float64", shard_size=4
        )
        return trainer_of(tmp_path / at, callback, save_strategy="steps", save_steps=2)[0]

    run("whole", "whole-trainer").train()
    trainer = run("part", "part-trainer")
    trainer.add_callback(Crash(crash))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run("part", "part-trainer").train(resume_from_checkpoint=str(tmp_path / "part-trainer/trainer/checkpoint-2"))
    for epoch in (0, 1):
        a, b = (open_index(tmp_path / name / f"epoch-{epoch}") for name in ("whole", "part"))
        assert torch.equal(a.index, b.index)
        torch.testing.assert_close(a.matrix(), b.matrix(), rtol=1e-12, atol=1e-15)
    for a, b in zip(read_order(tmp_path / "whole"), read_order(tmp_path / "part"), strict=True):
        torch.testing.assert_close(a, b)


def test_a_dataset_of_transformers_kind_and_adapters_by_default(tmp_path: Path) -> None:
    """Columns that the model does not know are dropped, numbers are not; default targets are the adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(gpt2(torch.float32), config)
    items = [{**{k: v.tolist() for k, v in item.items()}, "text": "hello"} for item in dataset()]
    callback = GradientCollectorCallback(tmp_path / "rows", chain(as_blocks(), project(4)))
    data = datasets.Dataset.from_list(items)
    trainer_of(tmp_path, callback, model, data=data, exact=False, num_train_epochs=1)[0].train()
    index = open_index(tmp_path / "rows" / "epoch-0")
    block = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    assert list(index.blocks) == [f"{block}{side}.default" for side in ("A", "B")]
    assert index.index.tolist() == list(range(10))
    assert index.matrix().abs().sum(1).min() > 0


def test_items_made_by_a_transform_keep_their_numbers(tmp_path: Path) -> None:
    """As images are: a column that is added is not in what the transform returns."""
    items = [{key: value.tolist() for key, value in item.items()} for item in dataset()]

    def made(rows: dict[str, list[list[int]]]) -> dict[str, list[Tensor]]:
        return {key: [torch.tensor(value) for value in rows[key]] for key in ("input_ids", "labels")}

    data = datasets.Dataset.from_list(items).with_transform(made)
    callback = GradientCollectorCallback(tmp_path / "rows", TRANSFORM, targets=TARGETS, dtype="float64")
    trainer, snapshots = trainer_of(tmp_path, callback, data=data, num_train_epochs=1)
    trainer.train()
    compare(tmp_path / "rows", snapshots, 1e-10)


def test_a_scale_has_the_optimizers_own_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 1e-8 whatever the optimizer's; with tied weights besides."""
    monkeypatch.setitem(OPTIMIZERS, "AdamW", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=1e-2))
    monkeypatch.setitem(globals(), "TARGETS", ["*wte.weight", "*c_fc.*"])
    callback = GradientCollectorCallback(
        tmp_path / "rows", TRANSFORM, targets=TARGETS, scale="optimizer", dtype="float64"
    )
    trainer, snapshots = trainer_of(tmp_path, callback, num_train_epochs=1)
    trainer.train()
    compare(tmp_path / "rows", snapshots, 1e-10, lambda moments: scale_by_adam(moments, eps=1e-2))


def test_the_count_is_the_nearest_of_those_that_are_near() -> None:
    """Labels and what they predict differ by less than the tolerance where documents are long: the rows were off."""
    losses = torch.full((8,), 2047 * 3.0)
    shared = Shared({}, torch.zeros(()), losses.sum() / 16376, losses, torch.full((8,), 2047))
    assert count_of(shared, [16384.0, 16376.0, 8.0, 1.0]) == 16376.0
    with pytest.raises(ValueError, match="their sum over none of 16384, 8"):
        count_of(shared._replace(loss=losses.sum() / 16000), [16384.0, 8.0])


class Classifier(nn.Module):
    """A model without a config, a mean over examples, and a function of the user's as its loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.first(x).tanh())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def own_loss(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output["logits"], batch["labels"], reduction="none")


def test_any_model_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    """Its mean over a micro-batch, accumulated; training ends in the middle of the epoch."""
    draw = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(4, generator=draw), "labels": torch.tensor(i % 3)} for i in range(9)]
    model = Classifier()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = GradientCollectorCallback(tmp_path / "rows", loss=own_loss, targets="*", dtype="float64")
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2}
    trainer_of(tmp_path, callback, model, "SGD", data, exact=False, **settings)[0].train()
    index = open_index(tmp_path / "rows" / "epoch-0")
    loss_fn, _ = functionalize(model, loss=own_loss)
    batch = {key: torch.stack([data[i][key] for i in index.index.tolist()]) for key in data[0]}
    expected = per_example_grads(loss_fn, start, batch, engine="loop")
    assert len(index) == 6
    for name, rows in index.rows().items():
        torch.testing.assert_close(rows.float(), expected[name], rtol=1e-4, atol=1e-6)


# Refusals


def test_a_trainer_that_was_not_prepared(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, None)
    with pytest.raises(ValueError, match="has 0 GradientCollectorCallbacks, and needs one"):
        prepare_for_gradient_collection(trainer)
    trainer.add_callback(GradientCollectorCallback(tmp_path / "rows"))
    with pytest.raises(RuntimeError, match="this Trainer was not prepared: its batches do not say which examples"):
        trainer.train()
    assert not (tmp_path / "rows").exists()


def test_what_cannot_be_collected(tmp_path: Path) -> None:
    def make(**settings: Any) -> GradientCollectorCallback:
        return GradientCollectorCallback(tmp_path / "rows", TRANSFORM, **{"targets": TARGETS, **settings})

    def refused(error: type[Exception], match: str, callback: Any, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            trainer_of(tmp_path, callback, **{"num_train_epochs": 1, **settings})[0].train()

    with pytest.raises(ValueError, match="scale must be 'optimizer' or None; got 'adam'"):
        make(scale="adam")
    refused(ValueError, "SGD keeps nothing of .* after 1 updates", make(scale="optimizer"), optimizer="SGD")
    refused(FileExistsError, "holds rows of a training run, and this one begins anew", make())
    checkpointed = gpt2()
    checkpointed.activation_checkpointing_enable()
    refused(ValueError, "gradient checkpointing runs the forward again", make(), model=checkpointed)
    streamed = torch.utils.data.ChainDataset([])
    refused(ValueError, "this Trainer has a ChainDataset: pass a dataset", make(), data=streamed, max_steps=1)
    named = datasets.Dataset.from_list([{**item, "index": 7} for item in dataset()])
    refused(ValueError, "has a column 'index' of its own: rename it", make(), data=named)
    wrong = make(overwrite=True, loss=lambda output, batch: output.logits.sum((1, 2)))
    refused(ValueError, "the examples' losses sum to .* share=False", wrong)


def test_two_ranks_resume(tmp_path: Path) -> None:
    """Killed in the second of two epochs; from the middle of either, the rows are those of a run that never was."""
    from tests.rank_collect import resume

    in_two_ranks(resume, tmp_path, tmp_path)
    for name in ("early", "late"):
        for epoch in (0, 1):
            whole, part = (open_index(tmp_path / run / f"epoch-{epoch}") for run in ("whole", name))
            assert whole.index.tolist() == part.index.tolist() == list(range(10))
            error = float((whole.matrix() - part.matrix()).norm() / whole.matrix().norm())
            print("worst", error)
            assert error <= 1e-10
        for a, b in zip(read_order(tmp_path / "whole"), read_order(tmp_path / name), strict=True):
            torch.testing.assert_close(a, b)


def test_two_ranks(tmp_path: Path) -> None:
    """DDP on gloo, two micro-batches an update; both write rows, one writes the index; padding comes twice."""
    from tests.rank_collect import collect

    in_two_ranks(collect, tmp_path, tmp_path)
    saved = torch.load(tmp_path / "snapshots.pt", weights_only=True)
    snapshots = Snapshots()
    snapshots.weights = saved["weights"]
    snapshots.moments = {step: Moments(second) for step, second in saved["moments"].items()}
    print("worst", compare(tmp_path / "rows", snapshots, 1e-10, scale_by_adam))
    order = read_order(tmp_path / "rows")
    assert len(order.example) == 24
    assert set(order.rank.tolist()) == {0, 1}
    assert order.step.max() == 1
