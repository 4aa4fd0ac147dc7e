"""Mistakes on the command line: each is one clear paragraph, a non-zero exit and no traceback; --debug has it."""

from pathlib import Path
from typing import Any

import pytest

from influence.cli import main
from tests.cli_messages import MISTAKES, Mistake, conditions, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mistakes")
    prepare(place)
    return place


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_paragraph(mistake: Mistake, folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    with conditions(mistake, folder) as held:
        if not held:
            # a full disk is a real one of tmpfs, which only root may mount
            pytest.skip("this user may not mount a small disk")
        flags = [str(flag) for flag in mistake.typed(folder)]
        capsys.readouterr()
        status = main(flags)
    said = capsys.readouterr().err
    assert status == mistake.status, said
    assert "Traceback" not in said
    for part in mistake.words:
        assert part in said
    if status == 1:
        assert said.count("\n") == 1, said
        assert said.startswith(f"influence {flags[0]}: ")


def test_debug_shows_where(folder: Path) -> None:
    for mistake in MISTAKES:
        if mistake.name in ("the run is a file", "no such column"):
            with pytest.raises((ValueError, OSError), match=r"is a file|no column"):
                main([*map(str, mistake.typed(folder)), "--debug"])
