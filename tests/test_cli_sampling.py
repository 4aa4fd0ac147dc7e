"""The commands of sampling, in this process: what they print, write, read again and refuse."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from influence import sgmcmc
from influence.cli import main
from influence.index import Fingerprint, start
from influence.pipelines.chains import settings
from tests.pipeline_world import world
from tests.test_cli import refused, run
from tests.test_sgmcmc_runs import same

SMALL = [
    *("--num-draws", "8", "--num-burnin-steps", "2", "--batch-size", "4", "--num-chains", "3"),
    *("--localization", "1000", "--progress", "False"),
]


def made(command: str, place: Path, *more: str, data: str = "corpus.jsonl") -> list[str]:
    model = ["--model", str(world() / "model"), "--dataset", str(world() / data)]
    return [command, str(place), *model, *SMALL, *more]


OBSERVED = [
    *("--observables", f"questions={world() / 'questions.jsonl'}", "data"),
    *("--observed", "4"),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains under three restrictions, with what tokens do."""
    place = tmp_path_factory.mktemp("sampling") / "s"
    flags = [*OBSERVED, "--keep", "tokens", "--restrictions", "full", "l0 mlp", "l0h0+l0h1"]
    assert main(made("sample", place, *flags)) == 0
    return place


def test_every_field_is_documented() -> None:
    import dataclasses

    for kind in (settings.ChainConfig, settings.FeltConfig, settings.PaceConfig, settings.Sampling):
        for field in dataclasses.fields(kind):
            assert f"\n        {field.name}: " in str(kind.__doc__), (kind, field.name)


def test_llc_says_its_plan_its_number_and_its_verdict(tmp_path: Path, capsys: Any) -> None:
    flags = made("llc", tmp_path / "a", "--plot", str(tmp_path / "llc.png"))
    status, out, err = run(capsys, *flags)
    assert (status, err) == (0, "")
    first, *rest = out.splitlines()
    assert first.startswith(f"plan: llc → {tmp_path / 'a'}: about ")
    assert any("n_beta 7.76" in line and "n / log n of the 25 examples" in line for line in rest)
    assert any("3 chains of" in line and "10 steps: 2 of burn-in" in line for line in rest)
    assert any(line.startswith("LLC ") and " ± " in line for line in rest)
    assert (tmp_path / "llc.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "config.yaml", "run.h5", "run.json"]
    again = json.loads(run(capsys, "llc", tmp_path / "a", "--json")[1])  # no model: it is read
    stored = sgmcmc.load(tmp_path / "a")
    assert isinstance(stored, dict)
    assert again["llc"]["full"]["mean"] == sgmcmc.llc.estimate(stored["full"]).mean
    assert again["llc"]["full"]["acceptance"] is None
    assert run(capsys, *flags)[0] == 0  # the same again reads it too
    refused(capsys, made("llc", tmp_path / "a", "--lr", "2e-4"), "another lr of full: it has 0.0001, this one 0.0002")
    assert run(capsys, *made("llc", tmp_path / "a", "--lr", "2e-4", "--overwrite"))[0] == 0


def test_a_dry_run_stops_at_the_plan(tmp_path: Path, capsys: Any) -> None:
    status, out, _ = run(capsys, *made("llc", tmp_path / "a", "--dry-run"))
    assert (status, out.count("plan: ")) == (0, 1)
    assert not (tmp_path / "a").exists()
    facts = json.loads(run(capsys, *made("sample", tmp_path / "a", "--dry-run", "--json"))[1])
    assert (facts["chains"], facts["steps"]) == (3, 10)


def test_a_run_replays_by_its_configuration(samples: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, "sample", tmp_path / "again", "--config", samples / "config.yaml")[0] == 0
    first, second = sgmcmc.load(samples), sgmcmc.load(tmp_path / "again")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert list(first) == list(second) == ["full", "l0 mlp", "l0h0+l0h1"]
    for name in first:
        same(first[name], second[name])
    said = run(capsys, "inspect", samples, "--verify")[1]
    assert f"influence sample ANOTHER_RUN --config {samples / 'config.yaml'}" in said
    assert "3 chains" in said


def test_samples_are_read_by_all_the_others(samples: Path, tmp_path: Path, capsys: Any) -> None:
    status, out, _ = run(capsys, "llc", samples, "--plot", tmp_path / "l.svg")
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()[:4]] == ["restriction", "full", "l0 mlp", "l0h0+l0h1"]
    bif = ["bif", samples, "--rows", "questions", "--columns", "data", "--top-k", "2"]
    status, out, _ = run(capsys, *bif, "--plot", tmp_path / "b.png", "--save", tmp_path / "b.npy")
    assert (status, out.count("moves with"), out.count("± ")) == (0, 3, 12)
    stored = sgmcmc.load(samples)
    assert isinstance(stored, dict)
    expected = sgmcmc.bif.estimate(stored["full"], "questions", "data").influences
    torch.testing.assert_close(torch.from_numpy(numpy.load(tmp_path / "b.npy")), expected)
    facts = json.loads(run(capsys, *bif, "--query", "1", "--json", "--restriction", "l0 mlp")[1])
    query = facts["queries"][0]
    row = sgmcmc.bif.estimate(stored["l0 mlp"], "questions", "data").influences[1]
    assert [hit["influence"] for hit in query["most"]] == pytest.approx(row.sort(descending=True).values[:2].tolist())
    assert query["query"]["text"].startswith("w")  # a question, in words
    assert run(capsys, *bif, "--level", "token", "--plot", tmp_path / "t.pdf", "--pair", "0", "3")[0] == 0
    assert run(capsys, *bif, "--level", "token", "--save", tmp_path / "t.npy")[0] == 0
    assert numpy.load(tmp_path / "t.npy").ndim == 4
    chi = ["susceptibilities", samples, "--sampling-task", "data", "--probes", "questions"]
    status, out, _ = run(capsys, *chi, "--save", tmp_path / "chi.csv", "--plot", tmp_path / "chi.png")
    assert status == 0
    found = sgmcmc.susceptibility.estimate(stored, "data", ["questions"])["questions"]
    with open(tmp_path / "chi.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == int(found.labelled.sum())
    torch.testing.assert_close(
        torch.tensor([float(row["l0h0+l0h1"]) for row in rows], dtype=torch.float64), found.matrix()[:, 2]
    )
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("l.svg", "b.png", "t.pdf", "chi.png"))


def test_chains_of_the_command_are_those_of_the_library(samples: Path) -> None:
    """The same numbers from Python: nothing is decided twice."""
    from influence import data, functionalize, models

    model = models.load(str(world() / "model"))
    loss_fn, params = functionalize(model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world() / "model")
    tokens = data.tokenize(data.load(str(world() / "corpus.jsonl")), tokenizer)
    batch = data.collate(tokens, torch.arange(len(tokens)))
    alone = sgmcmc.sample(
        loss_fn, params, batch, lr=1e-4, n_beta=sgmcmc.default_n_beta(25), localization=1000.0, batch_size=4,
        num_chains=3, num_draws=8, num_burnin_steps=2, progress=False,
    )  # fmt: skip
    stored = sgmcmc.load(samples)
    assert isinstance(stored, dict)
    torch.testing.assert_close(stored["full"].loss, alone.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stored["full"].baseline, alone.baseline, rtol=1e-10, atol=1e-10)


def test_a_grid_shows_its_plateau(tmp_path: Path, capsys: Any) -> None:
    flags = ["--lrs", "1e-5", "1e-4", "50", "--localizations", "100", "1000", "--plot", str(tmp_path / "g.png")]
    status, out, _ = run(capsys, *made("llc", tmp_path / "g", *flags))
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("1e-05", "0.0001", "50 "))]
    assert [row[-1] == "diverged" for row in rows] == [False, False, True]
    assert (tmp_path / "g.png").stat().st_size > 5000
    facts = json.loads(run(capsys, "llc", tmp_path / "g", "--json")[1])
    assert len(facts["llc"]) == 4
    again = run(capsys, "llc", tmp_path / "g")[1]  # points that diverged were forgotten
    assert [line.split()[-1] == "diverged" for line in again.splitlines()[1:]] == [False, False, True]


def test_influences_of_nothing_are_no_empty_page(tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, *made("sample", tmp_path / "s"))[0] == 0
    refused(capsys, ["bif", str(tmp_path / "s")], "has no observables", "sample with --observables")
    said = run(capsys, *made("bif", tmp_path / "b", "--observed", "1"))[1]
    assert "moves with none: there is no other example" in said


def test_what_finished_chains_cannot_heed_is_refused(samples: Path, capsys: Any) -> None:
    """It was ignored, and the table shown was of other chains than those asked for."""
    for command, flags in (
        ("llc", ["--lrs", "1e-3"]),
        ("llc", ["--restrictions", "l0h0"]),
        ("bif", ["--num-draws", "9"]),
        ("bif", ["--observed", "2"]),
        ("bif", ["--dataset", "corpus.jsonl"]),
        ("susceptibilities", ["--label-smoothing", "0.1"]),
    ):
        refused(capsys, [command, str(samples), *flags], f"{flags[0]} is of chains that are yet to run")


def an_error(output: Any, batch: Any) -> torch.Tensor:
    return output.logits.square().mean((1, 2))


def test_a_loss_per_example_is_named_by_its_text(tmp_path: Path, capsys: Any) -> None:
    """Every example was called '0', and its text ended in one padding."""
    flags = ["--loss", "tests.test_cli_sampling:an_error", "--restrictions", "l0 mlp", "l0 attn", "--observed", "6"]
    flags += ["--save", str(tmp_path / "chi.csv"), "--plot", str(tmp_path / "chi.svg")]
    status, out, err = run(capsys, *made("susceptibilities", tmp_path / "a", *flags))
    assert status == 0, err
    assert "<!-- susceptibilities of 6 examples -->" in (tmp_path / "chi.svg").read_text()
    assert "6 examples, the loss on 'data'" in out
    with open(tmp_path / "chi.csv") as file:
        found = list(csv.DictReader(file))
    said = [json.loads(line)["text"] for line in (world() / "corpus.jsonl").read_text().splitlines()[:6]]
    assert [row["token"].replace(" ", "") for row in found] == [text.replace(" ", "") for text in said]


def test_all_data_at_every_step_and_another_sampler(tmp_path: Path, capsys: Any) -> None:
    flags = ["--batch-size", "0", "--sampler", "mala", "--chain-chunk", "1", "--n-beta", "20"]
    status, out, err = run(capsys, *made("llc", tmp_path / "a", *flags))
    assert status == 0, err
    assert "acceptance 0." in out or "acceptance 1." in out
    flags = ["--sampler", "rmsprop_sgld", "--sampler-kwargs", "{eps: 1e-1}"]  # which is text in YAML
    assert run(capsys, *made("llc", tmp_path / "b", *flags))[0] == 0


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("llc", ["--batch-size", "26"], ["25 examples that predict something", "--batch-size 0"]),
        ("llc", ["--restrictions", "l0 atn"], ["'l0 atn'", "Near: l0 attn"]),
        ("llc", ["--restrictions", "l0h9"], ["out of range", "counted from 0"]),
        ("llc", ["--num-draws", "1", "--num-burnin-steps", "0"], ["at least two steps", "raise --num-draws"]),
        ("llc", ["--lr", "-1"], ["lr must be a finite number above 0", "-1"]),
        ("llc", ["--lr", "1e6"], ["diverged", "Lower lr", "pass --on-divergence drop"]),
        ("llc", ["--plot", "a.docx"], ["a.docx", "choose .png, .pdf or .svg"]),
        ("llc", ["--batch-size", "-1"], ["--batch-size must be at least 1"]),
        ("llc", ["--sampler-kwargs", "{bounding_box: wide}"], ["bounding_box must be a number", "'wide'"]),
        ("llc", ["--sampler-kwargs", "{fricton: 1}"], ["'fricton'", "sgld takes bounding_box"]),
        ("llc", ["--lrs", "1e-4", "1e-4"], ["each once"]),
        ("sample", ["--observables", "a b=x.jsonl"], ["x.jsonl"]),
        ("sample", ["--observables", "data", "data"], ["two observables are called 'data'"]),
        ("sample", ["--restrictions", "full", "full"], ["'full' twice"]),
        ("bif", ["--level", "token", "--keep", "moments"], ["--keep moments keeps no losses of tokens"]),
        ("bif", ["--average"], ["pass --level token"]),
        ("bif", ["--columns", "code", "--lr", "1e6"], ["no observable 'code'", "has data"]),  # before chains diverge
        ("bif", ["--query", "0", "25", "--lr", "1e6"], ["no example 25 for --query: rows have 25"]),
        ("bif", ["--pair", "0", "25", "--lr", "1e6"], ["no example 25 for --pair: columns have 25"]),
        ("bif", ["--query", "-1", "--observed", "3", "--lr", "1e6"], ["no example -1 for --query: rows have 3"]),
        ("bif", ["--save", "a.csv"], [".npy"]),
        ("susceptibilities", [], ["there is no component to probe", "--restrictions"]),
        ("susceptibilities", ["--restrictions", "l0", "--sampling-task", "code"], ["no observable 'code'", "data"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_cannot_be_is_refused_in_a_paragraph(
    command: str, flags: list[str], words: list[str], tmp_path: Path, capsys: Any
) -> None:
    refused(capsys, made(command, tmp_path / "a", *flags), *words)


def test_runs_that_are_not_there_or_of_another_kind(samples: Path, tmp_path: Path, capsys: Any) -> None:
    refused(capsys, ["bif", str(samples), "--rows", "code"], "no observable 'code'; it has questions, data")
    refused(capsys, ["llc", str(tmp_path / "no")], "no finished chains", "--model and --dataset")
    refused(capsys, ["llc", str(tmp_path / "no"), "--model", "x"], "no dataset", "--dataset")
    start(tmp_path / "index", "index", {}, ["influence", "build"], {"shards": []}, Fingerprint()).close()
    refused(capsys, made("llc", tmp_path / "index"), "another kind", "name another run")
    refused(capsys, ["bif", samples, "--restriction", "l9"], "no chains of the restriction 'l9'", "l0 mlp")
    refused(capsys, ["bif", samples, "--query", "77"], "no example 77", "rows have 7")
    refused(capsys, ["bif", samples, "--rows", "code"], "no observable 'code'", "questions, data")
    from influence.store.lock import Lock

    (tmp_path / "held").mkdir()
    with Lock(tmp_path / "held"):
        refused(capsys, made("llc", tmp_path / "held"), "is being written by")
