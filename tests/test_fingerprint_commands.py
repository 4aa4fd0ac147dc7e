"""The command line's runs are of one function and one loss: an edited module, a config, a reference's folder.

`tests/test_fingerprint_function.py` has every change; this file has the commands, on a build that is killed.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from influence.index import FingerprintError
from influence.pipelines import build, hessian, score
from influence.pipelines.frame.configs import LossConfig, ModelConfig, TransformConfig
from influence.pipelines.frame.loading import load_model
from influence.pipelines.frame.prepare import measure
from tests.pipeline_world import FAST, build_config, corpus, model_config, questions, world

OWN = """
def loss(output, batch):
    logits = output.logits * batch["attention_mask"][..., None]
    return logits.square().mean((1, 2)) + {constant} * logits[..., 0].sum(1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], LossConfig]:
    """Return what writes a module with a loss, as a user edits one between two commands."""
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(constant: float) -> LossConfig:
        Path("edited_loss.py").write_text(OWN.format(constant=constant))
        monkeypatch.delitem(sys.modules, "edited_loss", raising=False)
        return LossConfig("edited_loss:loss")

    return write


def killed(config: build.BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build until all shards are there and the root is not."""

    def kill(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "finish", kill)
        with pytest.raises(KeyboardInterrupt):
            build.run(config)


def copied(place: Path, **changes: Any) -> ModelConfig:
    """Return the world's model in another folder, with another config."""
    shutil.copytree(world() / "model", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig(str(place))


def scored(run: Path, asked: Path, model: ModelConfig, loss: LossConfig) -> None:
    view = TransformConfig(projection_dim=4)
    score.run(score.ScoreConfig(str(run), model, corpus(), (str(asked),), loss=loss, transform=view, execution=FAST))


def asked(run: Path, **changes: Any) -> Path:
    build.run(replace(build_config(run, **changes), data=questions()))
    return run


def test_an_edited_loss_is_another(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same dotted name all along."""
    queries = asked(tmp_path / "asked", loss=own(1.0))
    killed(build_config(tmp_path / "run", loss=own(1.0)), monkeypatch)
    edited = own(1.2)
    with pytest.raises(ValueError, match=r"Its loss is \{losses of a trial: \[.*, and this run's is \{losses of"):
        build.run(build_config(tmp_path / "run", loss=edited))
    with pytest.raises(FingerprintError, match=r"the query's loss is \{losses of a trial: .*\(field 'loss'\)"):
        scored(tmp_path / "scores", queries, model_config(), edited)
    build.run(build_config(tmp_path / "run", loss=own(1.0)))
    scored(tmp_path / "scores", queries, model_config(), own(1.0))
    scored(tmp_path / "declared", queries, model_config(), LossConfig())


def test_an_edited_config_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder of the same weights; and a copy of it elsewhere is the same model."""
    queries = asked(tmp_path / "asked")
    config = replace(build_config(tmp_path / "run"), model=copied(tmp_path / "model"))
    killed(config, monkeypatch)
    there, other = copied(tmp_path / "moved"), copied(tmp_path / "other", rms_norm_eps=1e-3)
    shutil.copy(tmp_path / "other/config.json", tmp_path / "model/config.json")
    said = r"config.rms_norm_eps: 1e-06.*, and this run's is \{config.rms_norm_eps: 0.001"
    with pytest.raises(ValueError, match=rf"Its function is \{{{said}"):
        build.run(config)
    with pytest.raises(FingerprintError, match=r"rms_norm_eps: 1e-06.*rms_norm_eps: 0.001.*\(field 'function'\)"):
        scored(tmp_path / "scores", queries, other, LossConfig())
    scored(tmp_path / "scores", queries, there, LossConfig())


def test_a_kls_reference_is_part_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose weights, or whose config, were replaced."""
    reference = copied(tmp_path / "reference").model
    loss = LossConfig("kl", reference=reference)
    queries = asked(tmp_path / "asked", loss=loss)
    killed(build_config(tmp_path / "run", loss=loss), monkeypatch)
    model = load_model(model_config())
    next(iter(model.parameters())).data.mul_(1.5)
    model.save_pretrained(reference)
    with pytest.raises(ValueError, match=r"Its reference is \{weights: .*, and this run's is \{weights: "):
        build.run(build_config(tmp_path / "run", loss=loss))
    with pytest.raises(FingerprintError, match=r"\(field 'reference'\)"):
        scored(tmp_path / "scores", queries, model_config(), loss)


def test_factors_of_another_config_are_refused(tmp_path: Path) -> None:
    run = str(tmp_path / "factors")
    hessian.run(hessian.HessianConfig(run, model_config(), corpus(), "kfac", "data", execution=FAST))
    view = TransformConfig(projection_dim=0, hessian=run)
    measure(copied(tmp_path / "same"), LossConfig(), view)
    with pytest.raises(ValueError, match=r"fitted with another function of the same weights: theirs has .*1e-06"):
        measure(copied(tmp_path / "other", rms_norm_eps=1e-3), LossConfig(), view)
