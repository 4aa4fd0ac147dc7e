"""Runs that are run again: overwritten, resumed after something changed, or written by two."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import hessians, store
from influence.hessians import load as load_factors
from influence.index import open_index
from influence.models import load
from influence.pipelines import build, hessian, reduce, score, trackstar
from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig, TransformConfig
from influence.store.lock import Lock
from tests.pipeline_world import FAST, build_config, corpus, lines, model_config, questions, world

WHOLE = TransformConfig(projection_dim=0)
OVER = replace(FAST, overwrite=True)


def reduced(run: Path, execution: RunConfig = FAST, method: Any = "mean") -> torch.Tensor:
    reduce.run(reduce.ReduceConfig(str(run), model_config(), questions(), method, transform=WHOLE, execution=execution))
    return open_index(run).matrix()


def scored(run: Path, query: Path, execution: RunConfig = FAST, **changes: Any) -> None:
    known: dict[str, Any] = {"transform": WHOLE, "execution": execution} | changes
    score.run(score.ScoreConfig(str(run), model_config(), corpus(), (str(query),), **known))


def fitted(
    run: Path, data: DataConfig, execution: RunConfig = FAST, model: ModelConfig | None = None
) -> hessian.Factors:
    config = hessian.HessianConfig(str(run), model or model_config(), data, "ekfac", execution=execution)
    hessian.run(config)
    return load_factors(run)


def full_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let writing one file fail, once for every pass that comes to it."""
    write = store.write

    def full(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == name:
            raise OSError(28, f"no space left for {name}")
        write(path, *args, **kwargs)

    monkeypatch.setattr(store, "write", full)


def other_weights(folder: Path) -> ModelConfig:
    shutil.copytree(world() / "model", folder)
    model = load(folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    return ModelConfig(str(folder))


def test_finished_runs_of_every_kind_are_overwritten_when_told(tmp_path: Path) -> None:
    mean = reduced(tmp_path / "mean")
    torch.testing.assert_close(reduced(tmp_path / "mean", OVER, "sum"), 3 * mean)
    for changes in ({}, {"top_k": 2}, {}):  # from all scores to a heap and back
        scored(tmp_path / "scores", tmp_path / "mean", OVER, **changes)
        there = {name for name in ("index.h5", "best.h5") if (tmp_path / "scores" / name).exists()}
        assert there == ({"best.h5"} if changes else {"index.h5"})
    fitted(tmp_path / "factors", corpus())
    assert fitted(tmp_path / "factors", questions(), OVER).documents == 3


def test_an_overwritten_ekfac_takes_nothing_of_the_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = hessians.step

    def killed(*args: Any, **kwargs: Any) -> Any:
        if kwargs["number"] == 1:
            raise RuntimeError("killed")
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(hessians, "step", killed)  # after the first pass, whose basis is kept in kfac.h5
        with pytest.raises(RuntimeError, match="killed"):
            fitted(tmp_path / "a", corpus())
    assert (tmp_path / "a" / "kfac.h5").exists()
    again, alone = fitted(tmp_path / "a", questions(), OVER), fitted(tmp_path / "b", questions())
    assert again.digest == alone.digest


def trackstar_config(run: Path, execution: RunConfig = FAST, **changes: Any) -> trackstar.TrackstarConfig:
    known: dict[str, Any] = {"components": 2, "transform": TransformConfig(projection_dim=3)} | changes
    return trackstar.TrackstarConfig(str(run), model_config(), corpus(), questions(), execution=execution, **known)


def test_overwriting_a_recipe_deletes_nothing_that_it_may_not_write(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "scores"  # a folder of the user's that is called like a step
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no run"):
        trackstar.run(trackstar_config(tmp_path / "mine", OVER))
    assert (mine / "notes.txt").exists()
    trackstar.run(trackstar_config(tmp_path / "a"))
    with Lock(tmp_path / "a"), pytest.raises(BlockingIOError, match="being written"):  # another is at it
        trackstar.run(trackstar_config(tmp_path / "a", OVER))
    assert (tmp_path / "a" / "scores" / "index.h5").exists()
    trackstar.run(trackstar_config(tmp_path / "a", OVER, transform=TransformConfig(projection_dim=2)))
    assert open_index(tmp_path / "a" / "query").dim == 28


def test_scores_do_not_resume_with_another_query_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced(tmp_path / "mean")
    with monkeypatch.context() as patch:
        full_at(patch, "shard-00002.h5")
        with pytest.raises(OSError, match="no space"):
            scored(tmp_path / "scores", tmp_path / "mean")
    reduced(tmp_path / "mean", OVER, "sum")  # the same fingerprint, other rows
    with pytest.raises(ValueError, match="Its plan has queries"):
        scored(tmp_path / "scores", tmp_path / "mean")


def test_an_append_does_not_resume_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.run(build_config(tmp_path / "a"))
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in lines("corpus.jsonl")))
    append = replace(build_config(tmp_path / "a"), data=DataConfig(str(more)), append=True)
    with monkeypatch.context() as patch:
        full_at(patch, "shard-00006.h5")
        with pytest.raises(OSError, match="no space"):
            build.run(append)
    more.write_text("".join(json.dumps(row) + "\n" for row in reversed(lines("corpus.jsonl"))))
    with pytest.raises(ValueError, match="data"):
        build.run(append)


def test_curvature_of_other_weights_is_refused_before_the_pass(tmp_path: Path) -> None:
    fitted(tmp_path / "factors", corpus(), model=other_weights(tmp_path / "other"))
    inverse = replace(WHOLE, hessian=str(tmp_path / "factors"), power=-1.0)
    with pytest.raises(ValueError, match=r"fitted at other weights \(hash [0-9a-f]{12}…, this model has [0-9a-f]{12}…"):
        build.run(build_config(tmp_path / "rows", transform=inverse))
    assert not (tmp_path / "rows").exists()
