"""Recipes that are run again, planned, or cut down: what their steps read, keep and predict."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import store
from influence.hessians import load as load_factors
from influence.index import open_index
from influence.pipelines import build, ekfac, hessian, inspect, mix, reduce, score, trackstar, trak
from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig, TransformConfig
from influence.pipelines.passes import collect
from influence.store.lock import Lock
from tests.pipeline_world import DOCUMENTS, FAST, build_config, corpus, lines, model_config, questions, world

DRY = replace(FAST, dry_run=True)


def trackstar_config(run: Path, execution: RunConfig = FAST, **changes: Any) -> trackstar.TrackstarConfig:
    known: dict[str, Any] = {"components": 2, "transform": TransformConfig(projection_dim=3)} | changes
    return trackstar.TrackstarConfig(
        str(run), model_config(), known.pop("data", corpus()), questions(), execution=execution, **known
    )


def ekfac_config(run: Path, execution: RunConfig = FAST, **changes: Any) -> ekfac.EkfacConfig:
    known: dict[str, Any] = {"method": "kfac", "labels": "data"} | changes
    return ekfac.EkfacConfig(str(run), model_config(), corpus(), questions(), execution=execution, **known)


def stopped_before(monkeypatch: pytest.MonkeyPatch, room: Any, call: Any) -> None:
    """Run a recipe up to a step, which fails."""

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(room, "run", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            call()


def test_finished_steps_are_not_kept_when_what_they_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curvature of the old file stayed, and the scores of the new one came from it without a word."""
    file, model = tmp_path / "corpus.jsonl", tmp_path / "model"
    shutil.copy(world() / "corpus.jsonl", file)
    shutil.copytree(world() / "model", model)
    config = replace(trackstar_config(tmp_path / "t", data=DataConfig(str(file))), model=ModelConfig(str(model)))
    stopped_before(monkeypatch, score, lambda: trackstar.run(config))
    whole = file.read_text()
    file.write_text("".join(reversed(whole.splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"Its plan has contents of .*corpus\.jsonl = \"\w{64}\", and this run's has"):
        trackstar.run(config)
    file.write_text(whole)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Its plan has contents of .*model = "):
        trackstar.run(config)
    shutil.copy(world() / "model" / "generation_config.json", model)
    assert trackstar.run(config).facts["queries"]


def test_every_step_is_planned_before_any_is_run(tmp_path: Path) -> None:
    cases: list[tuple[Any, Any, list[str]]] = [
        (
            trackstar,
            trackstar_config(tmp_path / "t", DRY),
            ["autocorrelation", "autocorrelation", "mix", "index", "sco"],
        ),
        (ekfac, ekfac_config(tmp_path / "e", DRY), ["kfac factors", "mean of rows", "scores of 1 queries"]),
        (ekfac, ekfac_config(tmp_path / "c", DRY, compress=3), ["kfac factors", "mean of rows of 7", "scores of 1"]),
        (ekfac, ekfac_config(tmp_path / "i", DRY, query_rows="individual"), ["kfac", "index of 7", "scores of 3"]),
        (
            trak,
            trak.TrakConfig(str(tmp_path / "k"), model_config(), corpus(), questions(), execution=DRY),
            ["autocorrelation", "index of 1", "scores of 3 queries", "mean of the scores of 1"],
        ),
    ]
    for room, config, steps in cases:
        said: list[str] = []
        outcome = room.run(config, say=said.append)
        plans = [line.removeprefix("plan: ") for line in said if line.startswith("plan: ")][1:]
        assert [plan[: len(step)] for plan, step in zip(plans, steps, strict=True)] == steps, plans
        parts = [part for part in outcome.facts.values() if isinstance(part, dict)]
        assert outcome.facts["seconds"] == pytest.approx(sum(part.get("seconds", 0) for part in parts))
        assert outcome.text.startswith("all steps together: about ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("components", "stats", "warned"), [(3, None, ""), (4, None, "fewer than 2 blocks"), (3, 2, "fewer than 2 blocks")]
)
def test_more_components_than_queries_are_said_in_the_plan(
    tmp_path: Path, components: int, stats: int | None, warned: str
) -> None:
    """The default of 1,000 with three queries: the corpus's curvature was left out, and a note at the end said so."""
    said: list[str] = []
    config = trackstar_config(tmp_path / "t", DRY, components=components, stats_examples=stats)
    assert len(lines("questions.jsonl")) == 3
    trackstar.run(config, say=said.append)
    assert warned in said[0]
    assert ("--components" in said[0]) == bool(warned)
    trackstar.run(replace(config, mix=False), say=said.append)
    assert sum("--components" in line for line in said) == bool(warned)


def test_a_dry_run_wants_room_for_all_steps_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step was held against the free space alone, and the last one filled the disk."""
    config = ekfac_config(tmp_path / "e", DRY)
    whole = ekfac.run(config).facts
    disks = [part["disk"] for part in whole.values() if isinstance(part, dict)]
    assert len(disks) > 1
    assert max(disks) < whole["disk"] == sum(disks)
    usage = shutil.disk_usage(tmp_path)
    for free in (max(disks), whole["disk"] - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(OSError, match=r"all steps in .* together will take"):
            ekfac.run(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=whole["disk"]))
    assert ekfac.run(config).facts["disk"] == whole["disk"]


def test_statistics_stay_within_max_examples(tmp_path: Path) -> None:
    """`--max-examples 5 --stats-examples 20` fitted the curvature on fifteen examples that the scores never saw."""
    few = replace(corpus(), max_examples=5)
    ekfac.run(replace(ekfac_config(tmp_path / "a", stats_examples=20), data=few))
    assert load_factors(tmp_path / "a" / "hessian").documents == 5
    ekfac.run(replace(ekfac_config(tmp_path / "b", stats_examples=3), data=few))
    assert load_factors(tmp_path / "b" / "hessian").documents == 3


def test_a_mean_over_checkpoints_is_of_the_same_documents(tmp_path: Path) -> None:
    """Two corpora of one length were averaged document by document."""
    query = tmp_path / "q"
    reduce.run(reduce.ReduceConfig(str(query), model_config(), questions(), execution=FAST))
    lines_ = (world() / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines_)))
    (tmp_path / "short.jsonl").write_text("".join(lines_[:20]))
    for name in ("corpus", "turned", "short"):
        data = DataConfig(str((world() if name == "corpus" else tmp_path) / f"{name}.jsonl"))
        config = score.ScoreConfig(str(tmp_path / name), model_config(), data, (str(query),), execution=FAST)
        score.run(config)
    for name, part in (("turned", "their data differ"), ("short", "their examples differ, 25 and 20")):
        with pytest.raises(ValueError, match=rf"corpus and .*{name} cannot be averaged: {part}"):
            trak.average([str(tmp_path / "corpus"), str(tmp_path / name)], str(tmp_path / "mean"))
    assert not (tmp_path / "mean").exists()
    from influence.pipelines.trak import _check_alike

    more = replace(build_config(tmp_path / "shifted"), data=questions())
    build.run(build_config(tmp_path / "shifted", execution=replace(FAST, shard_size=100)))
    build.run(replace(more, append=True))
    one, other = open_index(tmp_path / "corpus"), open_index(tmp_path / "shifted")
    with pytest.raises(ValueError, match="their scores a row differ"):
        _check_alike("one", one, "other", other)


def test_a_mix_is_a_run_like_any_other(tmp_path: Path) -> None:
    for name, data in (("q", questions()), ("i", corpus())):
        config = hessian.HessianConfig(str(tmp_path / name), model_config(), data, "autocorrelation")
        hessian.run(replace(config, transform=TransformConfig(projection_dim=3), execution=FAST))
    config = mix.MixConfig(str(tmp_path / "m"), str(tmp_path / "q"), str(tmp_path / "i"), components=5)
    (tmp_path / "m").mkdir()
    with Lock(tmp_path / "m"), pytest.raises(BlockingIOError, match="is being written by"):
        mix.run(config)
    mix.run(config)
    there = {path.name for path in (tmp_path / "m").iterdir()}
    assert there == {".lock", "run.json", "config.yaml", "factors.h5"}
    about = json.loads((tmp_path / "m" / "run.json").read_text())
    assert about["kind"] == "mix"
    assert about["plan"]["query"] == load_factors(tmp_path / "q").digest
    mix.run(replace(config, components=3, overwrite=True))
    assert "overwrite: false" in (tmp_path / "m" / "config.yaml").read_text()
    facts = inspect.run(inspect.InspectConfig(str(tmp_path / "m"))).facts
    assert (facts["kind"], facts["finished"]) == ("mix", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no run"):
        mix.run(replace(config, run=str(tmp_path / "mine")))


def test_running_sums_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large state was written after every shard."""
    config = hessian.HessianConfig(str(tmp_path / "a"), model_config(), corpus(), "autocorrelation", execution=FAST)
    config = replace(config, transform=TransformConfig(projection_dim=3))
    written: list[str] = []
    write = store.write

    def counted(path: Any, *args: Any, **kwargs: Any) -> None:
        written.append(Path(path).name)
        write(path, *args, **kwargs)

    monkeypatch.setattr(store, "write", counted)
    factors = []
    for run, every, count in (("a", 1e9, 1), ("b", 0.0, 4)):
        monkeypatch.setattr(collect, "SAVE_EVERY", every)
        written.clear()
        hessian.run(replace(config, run=str(tmp_path / run)))
        assert sum(name.startswith("partial-") for name in written) == count
        factors.append(load_factors(tmp_path / run))
    assert factors[0].digest == factors[1].digest
    assert factors[0].documents == DOCUMENTS


def test_norms_are_over_all_blocks_so_queries_of_more_blocks_are_refused(tmp_path: Path) -> None:
    """They were cut to the corpus's blocks, and what was called a cosine was one of neither."""
    view, few = TransformConfig(projection_dim=4), ("*q_proj.weight", "*k_proj.weight")
    for name, unit in (("plain", False), ("unit", True)):
        made = build_config(tmp_path / name, transform=replace(view, unit_norm=unit))
        build.run(replace(made, data=questions()))

    def scored(run: str, query: str, **changes: Any) -> torch.Tensor:
        how = replace(view, unit_norm=query == "unit", **changes)
        config = score.ScoreConfig(str(tmp_path / run), model_config(), corpus(), (str(tmp_path / query),))
        score.run(replace(config, transform=how, execution=FAST))
        return open_index(tmp_path / run).rows(["query0"])["query0"]

    assert scored("s", "plain", targets=few).shape == (DOCUMENTS, len(lines("questions.jsonl")))
    with pytest.raises(ValueError, match=r"the query's shapes is .*, and the stored rows' is .*\(field 'shapes'\)"):
        scored("t", "unit", targets=few)
    assert not (tmp_path / "t").exists()
    assert scored("u", "unit").abs().max() <= 1
    # some blocks of one cosine are a part of it, over whole norms on both sides
    config = score.ScoreConfig(str(tmp_path / "v"), model_config(), corpus(), (str(tmp_path / "unit"),), blocks=few)
    config = replace(config, blocks=("*q_proj", "*k_proj"), transform=replace(view, unit_norm=True), execution=FAST)
    score.run(config)


@pytest.mark.parametrize("notion", ["use", "loss"])
def test_scores_of_tokens_sum_to_the_documents(tmp_path: Path, notion: Any) -> None:
    view = TransformConfig(projection_dim=4)
    build.run(replace(build_config(tmp_path / "q", transform=view), data=questions()))
    config = score.ScoreConfig(str(tmp_path / "whole"), model_config(), corpus(), (str(tmp_path / "q"),))
    config = replace(config, transform=view, execution=FAST)
    score.run(config)
    outcome = score.run(replace(config, run=str(tmp_path / "tokens"), per_token=notion, per_block=True))
    whole, tokens = (open_index(tmp_path / name) for name in ("whole", "tokens"))
    assert tokens.per_token
    scores = tokens.rows(["query0"])["query0"]
    summed = torch.stack([scores[a:b].sum(0) for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)])
    torch.testing.assert_close(summed, whole.rows(["query0"])["query0"])
    best = outcome.facts["queries"][0]["best"]
    row = int(scores[:, 0].argmax())
    assert (best["indices"][0][0], best["positions"][0][0]) == tuple(map(int, tokens.place(torch.tensor(row))))
    assert "token" in outcome.text
    with pytest.raises(ValueError, match="top_k keeps examples, and per_token scores their tokens"):
        score.run(replace(config, run=str(tmp_path / "k"), per_token=notion, top_k=2))


@pytest.mark.parametrize("kind", [ekfac.EkfacConfig, trackstar.TrackstarConfig, trak.TrakConfig])
@pytest.mark.parametrize(("option", "value"), [("hessian", "runs/h"), ("power", -1.0), ("unit_norm", True)])
def test_options_that_a_recipe_decides_are_refused(kind: Any, option: str, value: Any) -> None:
    view = TransformConfig(projection_dim=0, **{option: value})
    with pytest.raises(ValueError, match=rf"{option}={value!r} is decided by influence \w+ itself: leave it out"):
        kind("run", model_config(), corpus(), questions(), transform=view)
