"""Files of a model or a tokenizer that are damaged: the folder is named, in a paragraph."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from influence.pipelines.frame.configs import ModelConfig
from influence.pipelines.frame.loading import load_model, load_tokenizer
from tests.pipeline_world import world

DAMAGE: dict[str, Any] = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "garbage": lambda whole: b"hello",
    "a list": lambda whole: b"[1, 2]",
    "zeros": lambda whole: whole[:50] + bytes(100) + whole[150:],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_names_its_folder(name: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world() / "model", folder)
    (folder / name).write_bytes(DAMAGE[how]((folder / name).read_bytes()))
    load = load_tokenizer if "tokenizer" in name else load_model
    with pytest.raises((ValueError, OSError)) as refused:
        load(ModelConfig(str(folder)))
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_kwargs": "{nonsense: 5}"},
        {"model_kwargs": "{attn_implementation: 5}"},
        {"peft_init_kwargs": "{r: x, target_modules: [q_proj]}"},
    ],
    ids=str,
)
def test_arguments_that_are_not_for_a_model_are_named(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"cannot be loaded .*{next(iter(settings))}"):
        load_model(ModelConfig(str(world() / "model"), **settings))  # type: ignore[arg-type]
