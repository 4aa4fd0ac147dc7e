"""TracIn and LESS over checkpoints that a Trainer wrote, and optimizers in every command, beside dense formulas."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from influence import as_blocks, chain, project
from influence.cli import main
from influence.func.transform.layout import bare_layout
from influence.index import open_index
from influence.models import layer_matrices
from influence.pipelines import build, inspect, less, query, reduce, score, tracin, trackstar
from influence.pipelines.frame.config_file import from_mapping
from influence.pipelines.frame.configs import ModelConfig, TransformConfig
from influence.pipelines.recipes.checkpoint_sums import learning_rates
from tests.pipeline_world import DOCUMENTS, FAST, build_config, corpus, lines, model_config, power_of, questions, world
from tests.pipeline_world import sketched as by_block

WHOLE = TransformConfig(projection_dim=0)
Grads = dict[str, Tensor]


class Seen(transformers.TrainerCallback):
    """What an observer of the training knows: each update's rate, and at each save the weights and Adam's moments."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[Grads] = []
        self.moments: list[dict[str, dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.moments.append(
            {n: {k: torch.as_tensor(v).clone() for k, v in inner.state[p].items()} for n, p in named.items()}
        )


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(world() / "model", dtype=torch.float64)


def adapted() -> Any:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(base(), settings, autocast_adapter_dtype=False)


@functools.cache
def ids_of(name: str) -> list[Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(world() / "model")
    return [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in lines(name)]


def train(model: Any, to: Path, **settings: Any) -> tuple[list[str], Seen]:
    """Six updates by AdamW in float64, one document each, saved after the third and the last."""
    seen = Seen()
    arguments: dict[str, Any] = {"logging_steps": 1, "optim": "adamw_torch", "adam_beta2": 0.9, **settings}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(to),
            per_device_train_batch_size=1,
            max_steps=6,
            save_steps=3,
            learning_rate=3e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in ids_of("corpus.jsonl")],
        callbacks=[seen],
    )
    trainer.train()
    return [str(to / f"checkpoint-{step}") for step in (3, 6)], seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Seen]:
    return train(base(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Seen]:
    return train(adapted(), tmp_path_factory.mktemp("lora"))


def gradients(model: Any, weights: Grads, name: str, mean: bool = False) -> Grads:
    """Every document's whole gradient at saved weights by plain autograd, one document at a time."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in weights.items():
            own[key].copy_(value)
    targets = layer_matrices(model)
    found: dict[str, list[Tensor]] = {target: [] for target in targets}
    for ids in ids_of(name):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        loss = losses.mean() if mean else losses.sum()
        for target, grad in zip(targets, torch.autograd.grad(loss, [own[t] for t in targets]), strict=True):
            found[target].append(grad)
    return {target: torch.stack(rows) for target, rows in found.items()}


def adams(moments: dict[str, dict[str, Tensor]], grads: Grads, b1: float = 0.9, b2: float = 0.9) -> Grads:
    """The step that Adam would take next, were each example the whole batch; Kingma & Ba, algorithm 1."""
    out = {}
    for name, g in grads.items():
        t = float(moments[name]["step"]) + 1
        m = (b1 * moments[name]["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
        v = (b2 * moments[name]["exp_avg_sq"] + (1 - b2) * g**2) / (1 - b2**t)
        out[name] = m / (v.sqrt() + 1e-8)
    return out


def flat(grads: Grads) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def sketched(grads: Grads, dim: int) -> Tensor:
    blocks = {name.removesuffix(".weight"): g for name, g in grads.items()}
    made = chain(as_blocks(), project(dim, target="global"))
    return made.apply(blocks, bare_layout({name: g[0] for name, g in blocks.items()}))["global"]


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def means(rates: list[float]) -> list[float]:
    return [sum(rates[:3]) / 3, sum(rates[3:]) / 3]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    error = float((got - expected).norm() / expected.norm())
    print("error", error)
    assert error < tolerance, error


def tracin_config(run: Path, checkpoints: list[str], **changes: Any) -> tracin.TracinConfig:
    known: dict[str, Any] = {"transform": WHOLE, "execution": FAST} | changes
    return tracin.TracinConfig(str(run), model_config(), corpus(), questions(), tuple(checkpoints), **known)


def less_config(run: Path, checkpoints: list[str], **changes: Any) -> less.LessConfig:
    known: dict[str, Any] = {"transform": WHOLE, "execution": FAST, "subtask": "about"} | changes
    return less.LessConfig(str(run), model_config(), corpus(), questions(), tuple(checkpoints), **known)


def scores_of(run: Path) -> Tensor:
    return open_index(run / "scores").rows()["query0"]


def scales(path: Path) -> list[Any]:
    """Return the steps by which a run's rows were scaled as an optimizer does."""
    return [step for step in open_index(path).fingerprint.steps if step.kind == "scale"]


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_tracin_of_whole_models_is_its_formula(tmp_path: Path, whole: Any, cosine: bool) -> None:
    checkpoints, seen = whole
    said: list[str] = []
    config = tracin_config(tmp_path / "t", checkpoints, transform=replace(WHOLE, unit_norm=cosine))
    outcome = tracin.run(config, said.append)
    expected = torch.zeros(DOCUMENTS, len(lines("questions.jsonl")), dtype=torch.float64)
    for weights, rate in zip(seen.weights, means(seen.rates), strict=True):
        g, q = (flat(gradients(base(), weights, name)) for name in ("corpus.jsonl", "questions.jsonl"))
        expected += rate * (unit(g) @ unit(q).mT if cosine else g @ q.mT)
    close(scores_of(tmp_path / "t"), expected)
    assert said[0].startswith("learning rates (logged in trainer_state.json): 0.0025, 0.001")
    best = outcome.facts["queries"][0]["best"]
    assert best["indices"][0][0] == int(expected[:, 0].argmax())
    assert inspect.run(inspect.InspectConfig(str(tmp_path / "t"), verify=True)).facts["finished"]
    index = open_index(tmp_path / "t" / "scores")
    hashes = [open_index(tmp_path / f"t/checkpoint{k}-rows").fingerprint.weights for k in (0, 1)]
    assert index.fingerprint.recorded["checkpoints"] == hashes
    text = inspect.run(inspect.InspectConfig(str(tmp_path / "t/scores"))).text  # it described the rows' run
    assert "made by: influence tracin ANOTHER_RUN --config" in text
    assert index.about.config["run"] == str(tmp_path / "t")
    assert index.about.config["checkpoints"] == list(checkpoints)
    assert index.fingerprint.weights not in hashes
    assert index.fingerprint.recorded["learning_rates"] == pytest.approx(means(seen.rates))


def test_tracin_of_adapters(tmp_path: Path, lora: Any) -> None:
    checkpoints, seen = lora
    tracin.run(tracin_config(tmp_path / "t", checkpoints, learning_rates=(0.3, 0.1)))
    expected = 0.0
    for weights, rate in zip(seen.weights, (0.3, 0.1), strict=True):
        g, q = (flat(gradients(adapted(), weights, name)) for name in ("corpus.jsonl", "questions.jsonl"))
        expected += rate * g @ q.mT
    close(scores_of(tmp_path / "t"), expected)


@pytest.mark.parametrize("dim", [0, 64], ids=["whole", "global"])
@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_less_is_its_formula(tmp_path: Path, kind: str, dim: int, request: pytest.FixtureRequest) -> None:
    """Adam's update with its first moment on the corpus's side alone, means of subtasks, cosines, the best subtask."""
    checkpoints, seen = request.getfixturevalue(kind)
    view = TransformConfig(projection_dim=dim, projection_target="global" if dim else "per_block")
    outcome = less.run(less_config(tmp_path / "l", checkpoints, transform=view))
    about = [row["about"] for row in lines("questions.jsonl")]
    total = 0.0
    for weights, moments, rate in zip(seen.weights, seen.moments, means(seen.rates), strict=True):
        model = adapted() if kind == "lora" else base()
        g, q = (gradients(model, weights, name, mean=True) for name in ("corpus.jsonl", "questions.jsonl"))
        to = functools.partial(sketched, dim=dim) if dim else flat
        train, shown = to(adams(moments, g)), to(q)
        of = torch.stack([shown[[a == name for a in about]].mean(0) for name in dict.fromkeys(about)])
        total += rate * unit(train) @ unit(of).mT
    assert total.shape[1] > 1
    close(scores_of(tmp_path / "l"), total.amax(1, keepdim=True))
    assert outcome.facts["queries"][0]["best"]["indices"][0][0] == int(total.amax(1).argmax())
    sides = [scales(tmp_path / f"l/checkpoint0-{side}") for side in ("query", "rows")]
    assert sides[0] == []
    assert [step.name for step in sides[1]] == ["adam_update"]


def test_less_without_subtasks_is_of_one(tmp_path: Path, lora: Any) -> None:
    checkpoints, seen = lora
    less.run(less_config(tmp_path / "l", checkpoints[:1], subtask=None, learning_rates=(1.0,)))
    g, q = (gradients(adapted(), seen.weights[0], n, mean=True) for n in ("corpus.jsonl", "questions.jsonl"))
    expected = unit(flat(adams(seen.moments[0], g))) @ unit(flat(q).mean(0, keepdim=True)).mT
    close(scores_of(tmp_path / "l"), expected)


def test_a_killed_recipe_goes_on_where_it_was(tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished steps are not run again, shards of the unfinished one stay, and the scores are the same."""
    checkpoints, _ = whole
    tracin.run(tracin_config(tmp_path / "a", checkpoints))
    made, run = [], build.run

    def dies(config: Any, say: Any) -> Any:
        made.append(Path(config.run).name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return run(config, say)

    monkeypatch.setattr(build, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        tracin.run(tracin_config(tmp_path / "b", checkpoints))
    made.append("")
    tracin.run(tracin_config(tmp_path / "b", checkpoints))
    assert made == [
        "checkpoint0-query",
        "checkpoint0-rows",
        "checkpoint1-query",
        "",
        "checkpoint1-query",
        "checkpoint1-rows",
    ]
    assert torch.equal(scores_of(tmp_path / "a"), scores_of(tmp_path / "b"))
    (tmp_path / "b/scores/index.h5").unlink()
    (tmp_path / "b/scores/shard-00001.h5").unlink()
    tracin.run(tracin_config(tmp_path / "b", checkpoints))
    assert torch.equal(scores_of(tmp_path / "a"), scores_of(tmp_path / "b"))
    (tmp_path / "b/scores/index.h5").unlink()
    other = r"Its plan has settings.learning_rates = \[\], and this run's has \[1.0, 1.0\]"
    with pytest.raises(ValueError, match=other):
        tracin.run(tracin_config(tmp_path / "b", checkpoints, learning_rates=(1.0, 1.0)))


# Learning rates


def trainer_state(place: Path, step: int, logged: dict[int, float], saved: float | None = None) -> str:
    place.mkdir()
    log = [{"step": s, "loss": 1.0, "learning_rate": rate} for s, rate in logged.items()] + [
        {"step": step, "eval_loss": 1}
    ]
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    if saved is not None:
        torch.save({"state": {}, "param_groups": [{"lr": saved, "params": []}]}, place / "optimizer.pt")
    return str(place)


def test_a_checkpoints_rate_is_that_of_the_updates_that_led_to_it(tmp_path: Path) -> None:
    """Whatever the order in which a shell lists them; and of a rate that is not logged, the optimizer's."""
    late = trainer_state(tmp_path / "checkpoint-10", 10, {2: 4e-3, 4: 3e-3, 6: 2e-3, 8: 1e-3, 10: 0.5e-3}, 1e-4)
    early = trainer_state(tmp_path / "checkpoint-4", 4, {2: 4e-3, 4: 3e-3}, 2.5e-3)
    rates, source = learning_rates([late, early])
    assert rates == pytest.approx([3.5e-3 / 3, 3.5e-3])
    assert source == "logged in trainer_state.json"
    rare = trainer_state(tmp_path / "checkpoint-6", 6, {2: 4e-3, 4: 3e-3}, 2e-3)
    assert learning_rates([early, rare]) == ([2.5e-3, 2e-3], "of the update after each")
    assert learning_rates([early, rare], (1.0, 0.0)) == ([1.0, 0.0], "given")
    groups = {"model": {"model": "m"}, "data": {"dataset": "d"}, "query": {"dataset": "q"}}
    config = from_mapping(tracin.TracinConfig, {"run": "r", **groups, "learning_rates": ["1e-3", 1]})
    assert config.learning_rates == (1e-3, 1.0)


def test_rates_that_are_not_there(tmp_path: Path) -> None:
    ended = trainer_state(tmp_path / "ended", 6, {}, 0.0)
    bare = trainer_state(tmp_path / "bare", 6, {})
    for checkpoints, given, match in (
        ([], (), "there is no checkpoint: pass --checkpoints"),
        ([bare], (), r"bare does not say its learning rate: .* pass --learning-rates, one for each"),
        ([ended], (), r"the optimizer in .*ended has the learning rate 0.0 for its next update"),
        ([bare, ended], (0.1,), "1 learning rates came for 2 checkpoints"),
        ([bare], (float("nan"),), "learning rates are finite and at least 0; got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            learning_rates(checkpoints, given)


# Refusals


def test_recipes_refuse_before_anything_is_built(tmp_path: Path, lora: Any) -> None:
    checkpoints, _ = lora
    for config, error, match in (
        (
            tracin_config(tmp_path / "r", checkpoints, transform=replace(WHOLE, optimizer="x")),
            ValueError,
            "over several",
        ),
        (less_config(tmp_path / "r", checkpoints, subtask="task"), ValueError, r"no column 'task' .* 'text', 'about'"),
        (less_config(tmp_path / "r", checkpoints, learning_rates=(1.0,)), ValueError, "1 learning rates came for 2"),
        (
            less_config(tmp_path / "r", [str(world() / "model")], learning_rates=(1.0,)),
            FileNotFoundError,
            "holds no opt",
        ),
    ):
        with pytest.raises(error, match=match):
            (tracin if isinstance(config, tracin.TracinConfig) else less).run(config)
    chunked = less_config(tmp_path / "r", checkpoints)
    with pytest.raises(ValueError, match="chunks are of several documents"):
        less.run(replace(chunked, query=replace(chunked.query, chunk_length=8)))
    assert not (tmp_path / "r").exists()


# An optimizer in every command


def with_optimizer(checkpoint: str, **changes: Any) -> TransformConfig:
    return replace(WHOLE, optimizer=checkpoint, **changes)


def denominator(moments: dict[str, dict[str, Tensor]], name: str, b2: float = 0.9, eps: float = 1e-8) -> Tensor:
    return (moments[name]["exp_avg_sq"] / (1 - b2 ** float(moments[name]["step"]))).sqrt() + eps


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_build_reduce_and_score_divide_by_the_optimizers_moments(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    checkpoints, seen = request.getfixturevalue(kind)
    place = checkpoints[1]
    model = ModelConfig(place, tokenizer=model_config().model)
    if kind == "lora":
        model = replace(model_config(), adapter=place)
    fresh = adapted() if kind == "lora" else base()
    g, q = (gradients(fresh, seen.weights[1], name) for name in ("corpus.jsonl", "questions.jsonl"))
    scaled = flat({name: rows / denominator(seen.moments[1], name) for name, rows in g.items()})
    config = replace(build_config(tmp_path / "b", transform=with_optimizer(place)), model=model)
    build.run(config)
    index = open_index(tmp_path / "b")
    close(index.matrix(), scaled)
    (scale,) = scales(tmp_path / "b")
    assert (scale.name, scale.settings["eps"]) == ("scale_by_adam", 1e-8)
    reduced = reduce.ReduceConfig(str(tmp_path / "r"), model, corpus(), transform=with_optimizer(place), execution=FAST)
    reduce.run(reduced)
    close(open_index(tmp_path / "r").matrix(), scaled.mean(0, keepdim=True))
    build.run(replace(config, run=str(tmp_path / "q"), data=questions(), transform=WHOLE))
    scores = score.ScoreConfig(str(tmp_path / "s"), model, corpus(), (str(tmp_path / "q"),), execution=FAST)
    score.run(replace(scores, transform=with_optimizer(place)))
    close(open_index(tmp_path / "s").matrix(), scaled @ flat(q).mT)
    both = replace(scores, run=str(tmp_path / "n"), query=(str(tmp_path / "b"),))
    with pytest.raises(
        ValueError, match=r"the query's scale_by_adam is .* is on both sides, on neither, or on the training"
    ):
        score.run(replace(both, transform=WHOLE))


def test_an_optimizer_in_an_adafactor_and_its_sketch(tmp_path: Path) -> None:
    """Adafactor's rank-one denominator folds into the projection; a nested dim is read as before."""
    checkpoints, seen = train(base(), tmp_path / "train", optim="adafactor")
    model = ModelConfig(checkpoints[1], tokenizer=model_config().model)
    view = with_optimizer(checkpoints[1])
    build.run(replace(build_config(tmp_path / "b", transform=view), model=model))
    g = gradients(base(), seen.weights[1], "corpus.jsonl")
    out = {}
    for name, rows in g.items():
        r, c = (seen.moments[1][name][f"exp_avg_sq_{side}"] for side in ("row", "col"))
        out[name] = rows * (r.mean() / r).sqrt()[:, None] / c.sqrt()
    close(open_index(tmp_path / "b").matrix(), flat(out))
    assert [step.name for step in scales(tmp_path / "b")] == ["scale_by_adafactor"]


def test_a_query_of_scaled_rows(tmp_path: Path, whole: Any) -> None:
    """Scaled on both sides, as the index is; of updates the query sees the plain gradient."""
    checkpoints, seen = whole
    model = ModelConfig(checkpoints[1], tokenizer=model_config().model)
    g, q = (gradients(base(), seen.weights[1], name) for name in ("corpus.jsonl", "questions.jsonl"))
    scaled = [flat({n: rows / denominator(seen.moments[1], n) for n, rows in side.items()}) for side in (g, q)]
    expected = {"scale": scaled[0] @ scaled[1].mT, "update": flat(adams(seen.moments[1], g)) @ flat(q).mT}
    text = lines("questions.jsonl")[0]["text"]
    for view, scores in expected.items():
        transform = with_optimizer(checkpoints[1], optimizer_view=view)
        build.run(replace(build_config(tmp_path / view, transform=transform), model=model))
        asked = query.QueryConfig(str(tmp_path / view), (text,), k=DOCUMENTS)
        (answer,) = query.run(asked).facts["answers"]
        found = torch.zeros(DOCUMENTS, dtype=torch.float64)
        for hit in answer["best"]:
            found[hit["example"]] = hit["score"]
        close(found, scores[:, 0], 1e-9)


def test_trackstar_of_scaled_gradients(tmp_path: Path, whole: Any) -> None:
    """As the paper has it: the optimizer's scale on both sides, curvature of what was scaled and projected."""
    checkpoints, seen = whole
    model = ModelConfig(checkpoints[1], tokenizer=model_config().model)
    view = TransformConfig(projection_dim=3, optimizer=checkpoints[1])
    config = trackstar.TrackstarConfig(str(tmp_path / "t"), model, corpus(), questions(), mix=False, transform=view)
    trackstar.run(replace(config, execution=FAST))
    sides = []
    for name in ("corpus.jsonl", "questions.jsonl"):
        rows = gradients(base(), seen.weights[1], name)
        scaled = {n.removesuffix(".weight"): g / denominator(seen.moments[1], n) for n, g in rows.items()}
        sides.append({n: g.flatten(1) for n, g in by_block(scaled, 3).items()})
    roots = {n: power_of(g.mT @ g / len(g), -0.5, 0.1) for n, g in sides[0].items()}
    g, q = (unit(torch.cat([rows[n] @ root for n, root in roots.items()], 1)) for rows in sides)
    close(scores_of(tmp_path / "t"), g @ q.mT, 1e-8)


def test_an_optimizer_that_does_not_fit(tmp_path: Path, whole: Any, lora: Any) -> None:
    def refused(error: type[Exception], match: str, path: str, **changes: Any) -> None:
        view = replace(WHOLE, **{"optimizer": path, **changes})
        with pytest.raises(error, match=match):
            build.run(build_config(tmp_path / "b", transform=view))

    gone = shutil.copytree(whole[0][0], tmp_path / "gone")
    (Path(gone) / "optimizer.pt").unlink()
    refused(FileNotFoundError, "holds no optimizer: looked for optimizer.pt", str(gone))
    refused(FileNotFoundError, "there is no .*nowhere: give a checkpoint's folder", str(tmp_path / "nowhere"))
    refused(ValueError, "holds 4 parameters in groups of .* it is the optimizer of another model", lora[0][0])
    state = torch.load(Path(whole[0][0]) / "optimizer.pt", weights_only=True)
    del state["state"][3]
    torch.save(state, tmp_path / "some.pt")
    refused(ValueError, r"some.pt has no moment of 1 of 7 parameters: model.layers.0", str(tmp_path / "some.pt"))
    sgd = {
        "state": {n: {"momentum_buffer": torch.ones(2)} for n in state["state"]},
        "param_groups": state["param_groups"],
    }
    torch.save(sgd, tmp_path / "sgd.pt")
    refused(
        ValueError, "the optimizer keeps momentum_buffer for .*expected the state of Adam", str(tmp_path / "sgd.pt")
    )
    view = TransformConfig(optimizer_view="update")
    with pytest.raises(ValueError, match="optimizer_view says how an optimizer is applied: pass --optimizer"):
        build.run(build_config(tmp_path / "b", transform=view))
    assert not (tmp_path / "b").exists()


def test_the_command_line(tmp_path: Path, lora: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [tmp_path / "r", "--model", world() / "model", "--dataset", world() / "corpus.jsonl"]
    flags += ["--query.dataset", world() / "questions.jsonl", "--checkpoints", *lora[0]]
    assert main([*map(str, ["less", *flags]), "--subtask", "about", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "learning rates (logged in trainer_state.json): 0.0025, 0.001"
    assert "checkpoint0-query → checkpoint0-rows → checkpoint1-query" in said[1]
    assert "1 blocks, 8,192 numbers a row" in said[3]
    assert main([*map(str, ["tracin", *flags]), "--learning-rates", "1e-3", "--dry-run"]) == 1
    assert "influence tracin: 1 learning rates came for 2 checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
