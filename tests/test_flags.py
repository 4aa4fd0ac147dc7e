"""Flags and files of settings: a file is typed before the flags, RUN has its place, near names are suggested."""

from pathlib import Path
from typing import Any

import pytest
import tyro

import influence
from influence.cli import COMMANDS, Options, _kind, main, parse
from influence.pipelines.build import BuildConfig
from influence.pipelines.frame.config_file import FieldError, to_mapping, write_config
from influence.pipelines.frame.configs import DataConfig, ModelConfig, TransformConfig
from influence.pipelines.frame.flags import as_flags
from influence.terminal import did_you_mean
from tests.test_numbers import made


@pytest.mark.parametrize("command", COMMANDS)
def test_every_configuration_can_be_typed(command: str) -> None:
    kind = _kind(command)[1]
    config = made(kind)
    assert tyro.cli(kind, args=as_flags(kind, to_mapping(config))) == config


def test_values_are_typed_as_they_are() -> None:
    data = DataConfig("a b\nc=d", prompt_column="", split="train[:10%]+test", end_of_turn=False, max_examples=3)
    view = TransformConfig(targets=("*q_proj*", "x y"), damping=1e-30, power=-1 / 3, unit_norm=True)
    config = BuildConfig("runs/x", ModelConfig("m=1_2"), data, transform=view)
    assert tyro.cli(BuildConfig, args=as_flags(BuildConfig, to_mapping(config))) == config


def test_what_cannot_be_typed_is_refused() -> None:
    with pytest.raises(FieldError, match=r"field data\.split is the text 'None'"):
        as_flags(BuildConfig, {"data": {"split": "None"}})
    with pytest.raises(FieldError, match=r"field transform\.targets has a text that begins with a dash"):
        as_flags(BuildConfig, {"transform": {"targets": ["-x"]}})
    with pytest.raises(FieldError, match=r"field model\.model must be str; got null|field model\.model must be str"):
        as_flags(BuildConfig, {"model": {"model": None}})


def test_flags_win_and_a_run_that_is_typed_is_the_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    view = TransformConfig(targets=("a", "b"), projection_dim=4)
    config = BuildConfig("runs/old", ModelConfig("m"), DataConfig("d", max_examples=9), transform=view)
    write_config(path, config, "build")

    def read(*flags: str) -> Any:
        return parse("build", BuildConfig, flags, Options(str(path), json=False, debug=False))

    assert read() == config
    assert read("runs/new").run == "runs/new"
    found = read("--projection-dim", "8", "--targets", "c", "--max-examples", "None")
    assert (found.run, found.transform.projection_dim, found.transform.targets) == ("runs/old", 8, ("c",))
    assert found.data.max_examples is None


@pytest.mark.parametrize("flag", ["--run", "--index", "-r"])
def test_a_run_has_its_place_alone(flag: str, capsys: Any) -> None:
    assert main(["query", flag, "a", "--text", "b"]) == 2
    assert main(["inspect", flag, "a"]) == 2
    capsys.readouterr()


def test_a_near_name_is_suggested(tmp_path: Path, capsys: Any) -> None:
    assert main(["bild"]) == 2
    assert "did you mean build?" in capsys.readouterr().err
    assert main(["inspect", "a", "--verifi"]) == 2
    assert "--verify" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("data: {datset: d}")
    assert main(["build", "r", "--config", str(tmp_path / "c.yaml")]) == 1
    assert "unknown field data.datset; did you mean dataset?" in capsys.readouterr().err
    assert did_you_mean("colour", ["weights"]) == ""


def test_rooms_and_the_version_are_attributes(capsys: Any) -> None:
    assert influence.data.tokenize
    assert influence.models.load
    assert influence.store.write
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"influence {influence.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        influence.nothing  # noqa: B018
