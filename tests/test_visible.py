"""What data, file names and runs say is shown in a terminal, and never obeyed by it."""

import ast
import json
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from influence.cli import main
from influence.pipelines.frame.config_file import read_config, write_config
from influence.pipelines.frame.texts import short
from influence.store.folder import read_manifest, write_manifest
from influence.terminal import table
from influence.visible import CODES, visible
from notebooks.make_corpus import make

ROOT = Path(__file__).parent.parent
EVIL = "\x1b]0;owned\x07\x1b[2J\r\u202egnp.exe\x9b31m\x00\x08\u2066x\U000e0041"
"""A title for the window, a cleared screen, a line that is begun again, text turned round, and what is not seen."""


def test_every_code_that_a_terminal_obeys_is_spelt_out() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        obeyed = unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(
            character
        ) in ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        if obeyed and character not in "\n\t":
            shown = visible(character)
            assert shown != character
            assert shown.isascii()
            assert shown.isprintable()
            assert json.loads(f'"{shown}"') == character if shown.startswith("\\u") else True


@pytest.mark.parametrize("text", ["naïve ∇ℓ", "می‌روم", "👩‍👩‍👧", "日本語", "a\tb\nc", "\\x1b", "'quoted'"])
def test_texts_of_every_script_stay(text: str) -> None:
    assert visible(text) == text


def test_of_one_line_a_newline_is_spelt_out_too() -> None:
    assert visible("a\nb\tc", lines=False) == r"a\nb\tc"
    assert table(["name"], [["a\nb\x1b[2J"]]) == "name\na b\\x1b[2J"
    assert short("a\r\nb \x1b", 20) == r"a\r b \x1b"


def clean(said: str) -> str:
    """Return what was printed, in which there is no code to obey."""
    found = CODES.search(said)
    assert found is None, ascii(said[max(0, found.start() - 80) : found.end() + 20])
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of which every document and every file name has codes in it, with an index, scores and factors."""
    folder = tmp_path_factory.mktemp("evil")
    make(folder, 12, steps=0, hidden=16, layers=1)
    for name in ("corpus", "questions"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["text"] = f"{EVIL}\nsecond line {number} {row['text']}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").rename(folder / f"corpus{EVIL.replace(chr(0), '')}.jsonl".replace("/", ""))
    run(folder, "build", folder / "index")
    run(folder, "reduce", folder / "mean")
    run(folder, "score", folder / "scores", "--query", folder / "mean")
    run(folder, "hessian", folder / "factors")
    return folder


def data(folder: Path) -> Path:
    return next(folder.glob("corpus*.jsonl"))


def run(folder: Path, command: str, place: Path, *flags: Any) -> None:
    given = ["--model", folder / "model", "--dataset", data(folder), "--projection-dim", 4]
    assert main([command, *map(str, (place, *given, *flags))]) == 0


def told(capsys: Any, *flags: Any, status: int = 0) -> str:
    capsys.readouterr()
    assert main([str(flag) for flag in flags]) == status
    said = capsys.readouterr()
    return clean(said.out + said.err)


def test_commands_show_codes_and_obey_none(world: Path, tmp_path: Path, capsys: Any) -> None:
    ask = ["query", world / "index", "--k", 2, "--width", 200]
    name = EVIL.replace("\x00", "")  # which no file name has
    new = ["build", tmp_path / "run", "--model", world / "model"]
    assert r"\x1b]0;owned\x07" in told(capsys, *ask, "--text", f"{EVIL} where does babo live ?")
    told(capsys, *ask, "--text", "where does babo live ?", "--blocks", EVIL, status=1)
    told(capsys, "inspect", world / "index", "--verify")
    told(capsys, "inspect", world / "factors")
    told(capsys, "inspect", world / "scores")
    assert r"\x9b31m" in told(capsys, "recall", world / "scores", "--gold", world / name, status=1)
    told(capsys, "explore", world / "index", "--to", tmp_path / "page.html")
    told(capsys, *new, "--dataset", f"{data(world)}x", status=1)
    told(capsys, "build", tmp_path / "run", "--model", EVIL, "--dataset", "d", status=1)
    told(capsys, EVIL, status=2)
    (tmp_path / "broken.jsonl").write_text('{"text": "' + EVIL)
    told(capsys, *new, "--dataset", tmp_path / "broken.jsonl", status=1)
    chains = ["--num-draws", 4, "--num-chains", 2, "--num-burnin-steps", 0, "--batch-size", 4, "--lr", 1e-6]
    flags = ["--model", world / "model", "--dataset", data(world), "--observed", 4]
    assert "data[3]" in told(capsys, "bif", tmp_path / "chains", *flags, *chains)


def test_a_conversation(world: Path, capsys: Any, monkeypatch: Any) -> None:
    typed = iter([f"{EVIL} babo lives in", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert r"\x1b[2J" in told(capsys, "query", world / "index", "--k", 2)


def test_what_a_run_says_of_itself_is_one_line(world: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("index", "factors"):
        shutil.copytree(world / name, tmp_path / name)
        known = read_manifest(tmp_path / name)
        known.config["query"] = [f"q\nverified: every checksum holds {EVIL}"]
        command = ["influence", f"build\nverified: every checksum holds {EVIL}"]
        write_manifest(tmp_path / name, known._replace(command=command))
        said = told(capsys, "inspect", tmp_path / name)
        assert "\nverified" not in said
    (tmp_path / "factors" / "factors.h5").unlink()
    assert "\nverified" not in told(capsys, "inspect", tmp_path / "factors")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\rb", "\u202eb"])
def test_a_path_to_write_has_no_codes(name: str, world: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model", world / "model", "--dataset", data(world)]
    for command, words, said_of in (
        ("build", [name, *given], "RUN"),
        ("sample", [name, *given], "RUN"),
        ("export", [world / "index", "--to", name], "--to"),
        ("query", [world / "index", "--text", "a b", "--record", name], "--record"),
    ):
        said = told(capsys, command, *words, status=1)
        assert f"{said_of} {visible(name, lines=False)} has a control code in it" in said
    assert not list(tmp_path.iterdir())


def test_a_config_in_a_folder_with_a_newline_replays(tmp_path: Path) -> None:
    from influence.pipelines.frame.configs import DataConfig

    folder = tmp_path / "a\nsplit: b\x85\u2028"
    folder.mkdir()
    write_config(folder / "config.yaml", DataConfig("d"), "build")
    assert read_config(folder / "config.yaml")["dataset"] == "d"
    assert read_config(folder / "config.yaml")["split"] is None


def test_help_does_not_obey_a_file_of_settings(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"run": EVIL, "model": {"model": EVIL}, "data": {"dataset": EVIL}}))
    assert "owned" not in told(capsys, "build", "--config", path, "--help")
    path.write_text(json.dumps({"run": "r", EVIL: 1}))
    told(capsys, "build", "--config", path, status=1)


def test_everything_that_is_printed_goes_through_one_function() -> None:
    for path in (ROOT / "influence").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                said = ast.unparse(node.args[0])
                assert path.name == "cli.py", path
                assert said in PRINTED or said.startswith("visible("), said


PRINTED = (
    "overview()",
    "f'influence {__version__}'",
    "json.dumps(outcome.facts, default=_plain)",  # which spells all but ASCII itself
    "f\"influence: note: {' '.join(visible(str(message)).split())}\"",
)
"""What is printed and is ours alone, or is spelt out in a part."""
