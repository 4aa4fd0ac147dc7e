"""TracIn and LESS: against sums by hand, the loss decrease they trace, and a task whose helpful examples are known."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from influence import as_blocks, chain, functionalize, per_example_grads, project
from influence.index import build, open_index
from influence.pipelines import less as recipe
from influence.pipelines.frame.configs import DataConfig, ModelConfig, TransformConfig
from influence.train import (
    Checkpoint,
    GradientCollectorCallback,
    adam_update,
    epoch_rates,
    less,
    prepare_for_gradient_collection,
    read_optimizer,
    read_order,
    subtask_means,
    tracin,
)
from tests.cases import hf
from tests.shard_optimizer import adam, small


def loss_of(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).square().sum(-1) / 2


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, size, generator=draw, dtype=torch.float64) for size in (3, 2))  # type: ignore[return-value]


def test_tracin_of_every_step_is_the_loss_decrease_to_first_order() -> None:
    """SGD on one example a step: scores of all visits add up to the decrease, with an error that falls as η."""
    coarse, fine = untraced(0.02), untraced(0.01)
    assert coarse < 0.25
    assert fine < 0.6 * coarse


def untraced(rate: float) -> float:
    """The share of the loss decrease that TracIn does not explain."""
    loss_fn, params = functionalize(small().double(), loss=loss_of)
    train, query = data(12, 0), data(3, 1)
    before = loss_fn(params, query)
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(12):
        one = tuple(x[i : i + 1] for x in train)
        rows, queries = (per_example_grads(loss_fn, params, batch, engine="loop") for batch in (one, query))
        total += tracin([Checkpoint(rows, queries, rate)])[0]
        params = {name: p - rate * rows[name][0] for name, p in params.items()}
    decrease = before - loss_fn(params, query)
    return float((total - decrease).norm() / decrease.norm())


def test_over_indexes_as_over_rows(tmp_path: Path) -> None:
    """A sum over checkpoints by hand, with rates; on disk and at hand; the dot and the cosine."""
    model = small().double()
    loss_fn, params = functionalize(model, loss=loss_of)
    states = [{name: p + 0.3 * k * torch.ones_like(p) for name, p in params.items()} for k in range(3)]
    rates = [0.3, 0.2, 0.1]
    train, query = data(7, 0), data(2, 1)
    rows = [[per_example_grads(loss_fn, state, batch, engine="loop") for batch in (train, query)] for state in states]
    indexes = [build(loss_fn, state, [train], tmp_path / f"{k}", dtype="float64") for k, state in enumerate(states)]
    vectors = [[torch.cat([row.flatten(1) for row in side.values()], 1) for side in pair] for pair in rows]
    dots = sum(rate * a @ b.T for rate, (a, b) in zip(rates, vectors, strict=True))
    cosines = sum(
        rate * nn.functional.normalize(a) @ nn.functional.normalize(b).T
        for rate, (a, b) in zip(rates, vectors, strict=True)
    )
    for trains in ([pair[0] for pair in rows], indexes):
        checkpoints = [Checkpoint(one, pair[1], rate) for one, pair, rate in zip(trains, rows, rates, strict=True)]
        torch.testing.assert_close(tracin(checkpoints), dots, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(less(checkpoints), cosines.amax(1), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="checkpoint 0: the queries' rows have other blocks than the training rows"):
        tracin([Checkpoint(rows[0][0], {"other": torch.ones(1, 2)}, 1.0)])
    with pytest.raises(ValueError, match=r"checkpoint 1 has \[7, 7\] training examples and queries"):
        tracin([Checkpoint(rows[0][0], rows[0][1], 1.0), Checkpoint(rows[0][0], rows[0][0], 1.0)])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        less([])


def test_adam_update_is_the_step_that_adam_takes_next() -> None:
    """An optimizer that is given one example as its next batch moves the weights by -η Γ; blocks with biases too."""
    model = small()
    loss_fn, _ = functionalize(model, loss=loss_of)
    optimizer = adam(model.parameters(), weight_decay=0.0)
    train = tuple(x.float() for x in data(5, 0))
    for i in range(3):
        loss_of(model(train[0]), train)[i].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = read_optimizer(model, optimizer)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = tuple(x[4:] for x in train)
    rows = per_example_grads(loss_fn, params, one, transform=chain(as_blocks(bias=True), adam_update(state)))
    loss_of(model(one[0]), one).sum().backward()
    optimizer.step()
    for layer in ("0", "2"):
        after = dict(model.named_parameters())
        step = [-(after[f"{layer}.{part}"] - params[f"{layer}.{part}"]) / 1e-2 for part in ("weight", "bias")]
        expected = torch.cat([step[0], step[1][:, None]], 1)
        torch.testing.assert_close(rows[layer][0], expected.detach(), rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match=r"adam_update\(.*cannot follow project"):
        chain(as_blocks(), project(2), adam_update(state))
    amsgrad = adam(model.parameters(), amsgrad=True)
    amsgrad.step()
    with pytest.raises(ValueError, match=r"adam_update: 0.weight, 0.bias, 2.weight is trained with amsgrad"):
        adam_update(read_optimizer(model, amsgrad))
    few = read_optimizer(model, optimizer, "2.*")
    with pytest.raises(ValueError, match=r"adam_update: no moments of 0.bias, 0.weight: read them too"):
        per_example_grads(loss_fn, params, one, transform=chain(as_blocks(), adam_update(few)))


# LESS end to end

WORDS, LENGTH = 24, 8
TASKS = {"helpful": 3, "by five": 5, "by seven": 7, "still": 0, "noise": None}


def pool(each: int, seed: int, tasks: Any = TASKS) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Sequences that go up by a task's step modulo the number of words, or by chance."""
    draw = torch.Generator().manual_seed(seed)
    items, names = [], []
    for i in range(each * len(tasks)):
        name = list(tasks)[i % len(tasks)]
        start = torch.randint(WORDS, (1,), generator=draw)
        noise = torch.randint(WORDS, (LENGTH,), generator=draw)
        ids = noise if TASKS[name] is None else (start + TASKS[name] * torch.arange(LENGTH)) % WORDS
        items.append({"input_ids": ids, "labels": ids})
        names.append(name)
    return items, names


def stacked(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def same_by_the_recipe(path: Path, items: Any, wanted: Any, rates: list[float], scores: Tensor) -> float:
    """How far the scores of the command line are from those of the library, over the same checkpoints."""
    halves = [int(item["input_ids"][0] >= WORDS // 2) for item in wanted]
    for name, some, subtasks in (("pool", items, [0] * len(items)), ("task", wanted, halves)):
        rows = [{"input_ids": x["input_ids"].tolist(), "half": h} for x, h in zip(some, subtasks, strict=True)]
        (path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pool, task = (DataConfig(str(path / f"{name}.jsonl")) for name in ("pool", "task"))
    config = recipe.LessConfig(
        str(path / "less"),
        ModelConfig(str(path / "base")),
        pool,
        task,
        tuple(str(place) for place in sorted((path / "warmup").glob("checkpoint-*"))),
        tuple(rates),
        subtask="half",
        transform=TransformConfig(projection_dim=512, projection_target="global"),
    )
    recipe.run(config)
    found = open_index(path / "less" / "scores").rows()["query0"][:, 0]
    return float((found - scores).norm() / scores.norm())


def test_less_recovers_the_helpful_examples(tmp_path: Path) -> None:
    """A warm-up of adapters on a quarter of the pool, its checkpoints with Adam's state, and two subtasks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        base = hf("LlamaForCausalLM", "LlamaConfig", **settings, num_attention_heads=2)().float()
        base.save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(base, config)
    items, names = pool(40, 0)
    warm = [items[i] for i in range(0, len(items), 4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "warmup"),
        per_device_train_batch_size=5,
        num_train_epochs=3,
        learning_rate=5e-3,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    callback = GradientCollectorCallback(tmp_path / "rows", chain(as_blocks(), project(4)))
    trainer = transformers.Trainer(model, arguments, train_dataset=warm, callbacks=[callback])
    prepare_for_gradient_collection(trainer).train()
    rates = epoch_rates(read_order(tmp_path / "rows"))
    assert rates == sorted(rates, reverse=True)
    wanted, _ = pool(8, 1, ["helpful"])
    subtask = torch.tensor([int(item["input_ids"][0] >= WORDS // 2) for item in wanted])
    sketch = project(512, target="global")
    checkpoints = []
    for place, rate in zip(sorted((tmp_path / "warmup").glob("checkpoint-*")), rates, strict=True):
        state = peft.utils.load_peft_weights(str(place), device="cpu")
        peft.set_peft_model_state_dict(model, state)
        update = adam_update(read_optimizer(model, place))
        loss_fn, params = functionalize(model, reduction="mean", targets="*lora_*")
        train = build(
            loss_fn, params, [stacked(items)], tmp_path / place.name, transform=chain(as_blocks(), update, sketch)
        )
        queries = per_example_grads(loss_fn, params, stacked(wanted), transform=chain(as_blocks(), sketch))
        checkpoints.append(Checkpoint(train, subtask_means(queries, subtask), rate))
    scores = less(checkpoints)
    losses = open_index(tmp_path / place.name).loss

    def recovered(order: Tensor) -> float:
        return sum(names[i] == "helpful" for i in order[:40].tolist()) / 40

    shares = {
        "LESS": recovered(scores.argsort(descending=True)),
        "random": recovered(torch.randperm(len(items), generator=torch.Generator().manual_seed(0))),
        "smallest loss": recovered(losses.argsort()),
        "largest loss": recovered(losses.argsort(descending=True)),
    }
    assert same_by_the_recipe(tmp_path, items, wanted, rates, scores) < 1e-4
    print(shares)
    assert shares["LESS"] >= 0.8
    assert max(share for name, share in shares.items() if name != "LESS") <= 0.5
