import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_docs import run

ROOT = Path(__file__).parent.parent


def test_readme_examples_run_and_have_the_shapes_they_say():
    names = run("README.md")
    assert names["rows"]["0.weight"].shape == (100, 32, 8)
    assert {block: rows.shape for block, rows in names["train"].items()} == {"0": (100, 4, 4), "2": (100, 3, 4)}
    assert names["cosines"].shape == (2, 100)


def test_curvature_examples_run_and_a_score_is_largest_for_the_example_itself():
    names = run("docs/curvature.md")
    scores = names["scores"]
    assert scores.shape == (100, 100)
    assert bool((scores.diagonal() > 0).all())
    torch.testing.assert_close(scores, scores.mT, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    assert {block: rows.shape for block, rows in names["rows"].items()} == {"0": (100, 16, 9), "2": (100, 3, 16)}


def test_training_examples_run_and_say_who_was_seen_when():
    names = run("docs/training.md")
    assert names["rows"].index.tolist() == list(range(12))
    assert names["order"].example.shape == (24,)
    assert names["order"].scaled.tolist() == [0] * 8 + [1] * 16
    assert names["effect"].shape == names["scores"].shape == (3,)


def test_index_examples_run_and_h5py_alone_finds_the_same_scores():
    names = run("docs/index-format.md")
    assert names["rows"]["0"].shape == (10, 8, 8)
    expected = names["index"].matrix(blocks=["0"]).double().sum(1)
    torch.testing.assert_close(torch.from_numpy(names["found"]), expected, rtol=1e-6, atol=1e-6)


def test_search_examples_run_and_find_what_they_say():
    names = run("docs/search.md")
    assert names["hits"].values.shape == (3, 5)
    assert names["hits"].indices[:, 0].tolist() == [7, 8, 9]
    torch.testing.assert_close(sum(names["parts"].values()), names["scores"], rtol=1e-4, atol=1e-6)
    assert names["near"].indices.equal(names["hits"].indices)
    assert names["alone"].shape == (200,)


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_command_line_runs(page: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from influence.cli import main
    from notebooks.make_corpus import make

    console = re.search(r"```console\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert console is not None
    typed = [line[2:] for line in console[1].splitlines() if line.startswith("$ ")]
    assert typed[0] == "python notebooks/make_corpus.py tiny"
    make(tmp_path / "tiny", documents=60, steps=2, hidden=16, layers=1)
    monkeypatch.chdir(tmp_path)
    for line in typed[1:]:
        program, *flags = shlex.split(line)
        assert program == "influence"
        assert main(flags) == 0, (line, capsys.readouterr().err)
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made >= ({"corpus", "scores.parquet", "again"} if page == "README.md" else {"corpus"})


def test_sampling_examples_run_and_have_the_shapes_they_say():
    names = run("docs/sampling.md")
    assert names["run"].loss.shape == (4, 80)
    assert names["influences"].shape == (10, 10)
    assert names["found"].value.shape == names["found"].stderr.shape == (10, 1, 3)
