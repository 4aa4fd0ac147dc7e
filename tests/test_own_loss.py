"""A loss of the user's that fails is said to be theirs, with its file and line; it never ends a command as if done."""

from pathlib import Path
from typing import Any

import pytest

from influence.cli import main
from tests.pipeline_world import world

RAISED = {
    "key": ("def f(o, b):\n    raise KeyError('mine')\n", "KeyError: 'mine' ({path}, line 2)"),
    "value": ("def f(o, b):\n    raise ValueError('mine')\n", "ValueError: mine ({path}, line 2)"),
    "tensors": ("def f(o, b):\n\n    return o.logits + 'x'\n", "({path}, line 3)"),
    "the end": ("def f(o, b):\n    raise SystemExit\n", "SystemExit:  ({path}, line 2)"),
}
IMPORTED = {
    "the end at once": ("import sys\nsys.exit(0)\n", "SystemExit: 0 ({path}, line 2)"),
    "a name": ("x = 1\ny = z\n", "NameError: name 'z' is not defined ({path}, line 2)"),
    "no Python": ("def f(:\n", "SyntaxError: invalid syntax (own_no_Python.py, line 1)"),
}


def build(folder: Path, module: str) -> int:
    model, corpus = (str(world() / name) for name in ("model", "corpus.jsonl"))
    typed = ["build", str(folder / "run"), "--model", model, "--dataset", corpus, "--projection-dim", "4"]
    return main([*typed, "--loss", f"{module}:f", "--progress", "False"])


@pytest.mark.parametrize("how", RAISED)
def test_what_it_raises(how: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    code, said = RAISED[how]
    module = f"own_{how.replace(' ', '_')}"
    path = tmp_path / f"{module}.py"
    path.write_text(code)
    monkeypatch.chdir(tmp_path)
    assert build(tmp_path, module) == 1
    error = capsys.readouterr().err
    assert f"your own loss {module}:f raised " in error
    assert " ".join(said.format(path=path).split()) in error
    assert "unexpected" not in error


@pytest.mark.parametrize("how", IMPORTED)
def test_what_its_module_raises(how: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    code, said = IMPORTED[how]
    module = f"own_{how.replace(' ', '_')}"
    path = tmp_path / f"{module}.py"
    path.write_text(code)
    monkeypatch.chdir(tmp_path)
    assert build(tmp_path, module) == 1
    assert f"--loss {module}:f cannot be imported from {tmp_path}: {said.format(path=path)}" in capsys.readouterr().err
