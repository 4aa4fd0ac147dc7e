"""Exit statuses: 0 done, 1 refused or failed, 2 not understood, 130 interrupted; in the help, and as processes end."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from influence import cli
from influence.cli import main, overview

ROOT = Path(__file__).parent.parent


def test_the_help_says_them(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert overview() in capsys.readouterr().out
    assert "0 done; 1 refused or failed, as standard error says; 2 not understood; 130 stopped by Ctrl-C." in overview()
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert [line[2:5].strip(" |") for line in page.splitlines() if line[2:3].isdigit()] == ["0", "1", "2", "130"]
    assert not [command for command in cli.COMMANDS if f"`{command}" not in page]


@pytest.mark.parametrize(
    ("typed", "status"),
    [
        (["--version"], 0),
        (["help"], 0),
        (["inspect", "--help"], 0),
        (["inspect", "nowhere"], 1),
        (["build", "--config", "nowhere.yaml"], 1),
        ([], 2),
        (["bild"], 2),
        (["inspect"], 2),
        (["inspect", "a", "--colour", "red"], 2),
        (["build", "a", "--model"], 2),
    ],
)
def test_what_is_typed(typed: list[str], status: int, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed) == status
    said = capsys.readouterr()
    assert said.err if status and typed else said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (KeyboardInterrupt(), 130),
        (ValueError("no"), 1),
        (KeyError("no"), 1),
        (MemoryError(), 1),
        (OSError(28, "No space left on device", "x"), 1),
        (SystemExit(2), 2),
        (SystemExit("what"), 2),
    ],
    ids=str,
)
def test_what_is_raised(raised: BaseException, status: int, capsys: Any, monkeypatch: Any) -> None:
    def fails(*typed: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "run", fails)
    assert main(["inspect", "a"]) == status
    if not isinstance(raised, SystemExit):
        assert capsys.readouterr().err.startswith("influence inspect: ")


def test_a_process_that_is_interrupted_ends_with_130() -> None:
    heeds = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    waits = "cli.run = lambda *typed: (print('up', flush=True), time.sleep(60))"
    ends = "sys.exit(cli.main(['inspect', 'a']))"
    code = f"import signal, sys, time; {heeds}; from influence import cli; {waits}; {ends}"
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings
    ) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == b"up\n"
        p.send_signal(signal.SIGINT)
        said = p.communicate(timeout=60)[1].decode()
        assert p.returncode == 130
    assert said == "influence inspect: stopped; an unfinished run goes on when the same is typed again\n"
