import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import page
from influence import as_blocks, per_example_grads
from tests.test_docs import run

ROOT = Path(__file__).parent.parent


def test_readme_examples_run_and_have_the_shapes_they_say():
    names = run("README.md")
    assert {block: rows.shape for block, rows in names["train"].items()} == {"0": (100, 8, 8), "2": (100, 3, 8)}
    whole = per_example_grads(names["loss_fn"], names["params"], (names["x"], names["y"]), transform=as_blocks())
    assert {block: rows.shape for block, rows in whole.items() if rows.ndim == 3} == {
        "0": (100, 32, 8),
        "2": (100, 3, 32),
    }


def test_readme_quotes_what_the_kept_runs_say():
    """A figure without a run of that day behind it is an invention."""
    text = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n## ")[0]
    said = re.search(r"On (\d{4}-\d\d-\d\d), 2 cores of an AMD EPYC", text)
    assert said is not None
    runs = [each for _, each in page.kept() if each["machine"]["date"].startswith(said[1])]
    assert {each["machine"]["processor"] for each in runs} == {"AMD EPYC"}

    def measured(kind: str, figure: Callable[[Any], str]) -> None:
        assert any(figure(each) in text for each in runs if each["benchmark"] == kind), [
            figure(each) for each in runs if each["benchmark"] == kind
        ]

    def over_floor(each: Any, *names: str) -> str:
        found = {v["name"]: v["over_floor"]["median"] for v in each["models"][0]["variants"]}
        return "| " + "; ".join(f"{found[name]:.3f}" for name in names) + " |"

    measured("collect", lambda each: over_floor(each, "batched", "compiled"))
    measured("collect", lambda each: over_floor(each, "bergson", "hooks"))
    measured("collect", lambda each: over_floor(each, "vmap_then_project"))
    measured(
        "collect",
        lambda each: "; it is {:.4g} eager, {:.4g} compiled".format(*(c["value"] for c in each["checks"][-2:])),
    )
    measured("training", lambda each: f"| {each['variants']['p = 16']['over_plain'][0]:.3f} |")
    measured("sgmcmc", lambda each: "| {influences:.2f}; {peer:.2f} |".format(**each["influences"]))
    measured("coefficients", lambda each: f"| {100 * max(c['value'] for c in each['checks']):.1f} % |")
    measured("index", lambda each: f"| {each['beside bergson']['lines'][0]['over']:.2f} |")
    scans = {f"scan, {queries}" for queries in (1, 32)}
    measured(
        "index", lambda each: "| " + "; ".join(f"{f['over']:.3f}" for f in each["lines"] if f["name"] in scans) + " |"
    )


def test_curvature_examples_run_and_a_score_is_largest_for_the_example_itself():
    names = run("docs/curvature.md")
    scores = names["scores"]
    assert scores.shape == (100, 100)
    assert bool((scores.diagonal() > 0).all())
    torch.testing.assert_close(scores, scores.mT, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    assert {block: rows.shape for block, rows in names["rows"].items()} == {
        "0": (100, 16, 8),
        "0.bias": (100, 16),
        "2": (100, 3, 16),
        "2.bias": (100, 3),
    }


def test_training_examples_run_and_say_who_was_seen_when():
    names = run("docs/training.md")
    assert names["rows"].index.tolist() == list(range(12))
    assert names["order"].example.shape == (24,)
    assert names["order"].scaled.tolist() == [0] * 8 + [1] * 16
    assert names["effect"].shape == names["scores"].shape == (3,)


def test_index_examples_run_and_h5py_alone_finds_the_same_scores():
    names = run("docs/formats.md")
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


@pytest.mark.parametrize("where", ["README.md", "docs/start.md", "docs/commands.md"])
def test_the_command_line_runs(where: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from influence.cli import main
    from notebooks.make_corpus import make

    console = re.search(r"```console\n(.*?)```", (ROOT / where).read_text(), flags=re.DOTALL)
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
    assert made >= ({"corpus", "scores.parquet", "again"} if where == "docs/commands.md" else {"corpus"})


def test_make_corpus_says_how_many_questions_it_wrote(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from notebooks import make_corpus

    monkeypatch.setattr("sys.argv", ["make_corpus.py", str(tmp_path), "--documents", "200", "--steps", "1"])
    make_corpus.main()
    written = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert len(written) == 5
    assert "200 documents, 5 questions, in" in capsys.readouterr().out


def test_sampling_examples_run_and_have_the_shapes_they_say():
    names = run("docs/sampling.md")
    assert names["run"].loss.shape == (4, 80)
    assert names["influences"].shape == (10, 10)
    assert names["found"].value.shape == names["found"].stderr.shape == (10, 1, 3)
