"""The command line in this process: what it prints, what it refuses, and how."""

import csv
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from influence import store
from influence.cli import COMMANDS, CONFIGS, main, paragraph
from influence.index import open_index
from tests.pipeline_world import DOCUMENTS, world

SMALL = ["--shard-size", "8", "--token-budget", "256", "--projection-dim", "4"]


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Return the exit status, and what was printed on both streams."""
    capsys.readouterr()
    status = main([str(flag) for flag in flags])
    return status, *capsys.readouterr()


def made(run_directory: Path, command: str = "build", *more: str) -> list[str]:
    data = ["--dataset", str(world() / "corpus.jsonl")]
    return [command, str(run_directory), "--model", str(world() / "model"), *data, *SMALL, *more]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the corpus."""
    place = tmp_path_factory.mktemp("cli") / "corpus"
    assert main(made(place)) == 0
    return place


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions' mean row."""
    place = tmp_path_factory.mktemp("cli") / "mean"
    flags = made(place, "reduce")
    flags[flags.index("--dataset") + 1] = str(world() / "questions.jsonl")
    assert main(flags) == 0
    return place


def test_the_help_of_all_and_of_each_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in (*COMMANDS, "--config", "--json", "--debug", "torchrun"))
    assert run(capsys)[0] == 2
    for name in COMMANDS:
        status, out, err = run(capsys, name, "--help")
        assert (status, err) == (0, ""), name
        undocumented = [line for line in out.splitlines() if line.strip().startswith("│ --") and line.count(".") == 0]
        assert not undocumented, undocumented
    assert "16 × 16" in run(capsys, "build", "--help")[1]


def test_every_field_of_every_configuration_is_documented() -> None:
    import dataclasses
    import importlib

    from influence.pipelines.frame import configs

    kinds: list[Any] = [getattr(importlib.import_module(f"influence.pipelines.{n}"), CONFIGS[n]) for n in COMMANDS]
    kinds += [configs.ModelConfig, configs.DataConfig, configs.LossConfig, configs.TransformConfig, configs.RunConfig]
    for kind in kinds:
        for field in dataclasses.fields(kind):
            said = [str(each.__doc__) for each in kind.__mro__]  # a base may say it for all of its kinds
            assert any(f"\n        {field.name}: " in doc for doc in said), (kind, field.name)


def test_build_prints_its_plan_first_and_inspect_says_all(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    status, out, err = run(capsys, *made(tmp_path / "a"))
    assert (status, err) == (0, "")
    first, *_, last = out.splitlines()
    assert first.startswith("plan: index of 7 blocks, 112 numbers a row as float32")
    for part in ("25 examples", "4 shards", "tokens/s", "memory about", "disk"):
        assert part in first
    assert last.startswith("25 rows of 112 numbers")
    status, out, _ = run(capsys, "inspect", corpus, "--verify")
    assert status == 0
    assert "every checksum holds" in out
    assert f"influence build ANOTHER_RUN --config {corpus / 'config.yaml'}" in out
    facts = json.loads(run(capsys, "inspect", corpus, "--json")[1])
    assert (facts["rows"], facts["dim"], facts["kind"]) == (DOCUMENTS, 112, "index")


def test_a_dry_run_stops_at_the_plan(tmp_path: Path, capsys: Any) -> None:
    status, out, _ = run(capsys, *made(tmp_path / "a", "build", "--dry-run"))
    assert (status, len(out.splitlines())) == (0, 2)
    assert not (tmp_path / "a").exists()
    status, out, err = run(capsys, *made(tmp_path / "a", "build", "--dry-run", "--json"))
    assert json.loads(out)["examples"] == DOCUMENTS
    assert err.startswith("plan: ")


def test_a_run_replays_by_its_configuration(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    status, *_ = run(capsys, "build", tmp_path / "again", "--config", corpus / "config.yaml")
    assert status == 0
    first, second = open_index(corpus), open_index(tmp_path / "again")
    places = [[{n: p.sha256 for n, p in s.places.items()} for s in index.about.shards] for index in (first, second)]
    assert places[0] == places[1]
    flags = [tmp_path / "other", "--config", corpus / "config.yaml", "--projection-dim", "2"]
    assert run(capsys, "build", *flags)[0] == 0
    assert open_index(tmp_path / "other").dim == 28


def test_score_for_machines_and_for_people(corpus: Path, mean: Path, tmp_path: Path, capsys: Any) -> None:
    flags = made(tmp_path / "s", "score", "--query", str(mean), "--json")
    status, out, _ = run(capsys, *flags)
    assert status == 0
    facts = json.loads(out)
    assert facts["queries"][0]["query"] == str(mean)
    status, out, _ = run(capsys, *made(tmp_path / "t", "score", "--query", str(mean)))
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert int(rows[2][3]) == facts["queries"][0]["best"]["indices"][0][0]
    assert run(capsys, "export", tmp_path / "s", "--to", tmp_path / "s.npy")[0] == 0


def test_query_once_and_as_a_prompt(corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    record = tmp_path / "out.csv"
    flags = ["query", corpus, "--k", "2", "--record", record]
    status, out, _ = run(capsys, *flags, "--text", "the home of babo")
    assert status == 0
    assert "helps" in out
    with open(record) as rows:
        worst = [float(row["score"]) for row in csv.DictReader(rows) if row["direction"] == "worst"]
    assert ("hurts" in out) == (worst[0] < 0)
    assert ("helps least" in out) == (worst[0] >= 0)
    file = tmp_path / "texts"
    file.write_text("babo lives in\n\nwhat does babo eat ?\n")
    answers = json.loads(run(capsys, *flags, "--file", file, "--json")[1])["answers"]
    assert [answer["query"] for answer in answers] == ["babo lives in", "what does babo eat ?"]
    assert len(record.read_text().splitlines()) == 1 + 3 * 4
    typed = iter(["", "babo", "babo lives in", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    status, out, _ = run(capsys, *flags)
    assert status == 0
    assert "a loss needs one more to predict" in out
    assert "helps" in out
    assert len(record.read_text().splitlines()) == 1 + 4 * 4


def refused(capsys: Any, flags: list[Any], *parts: str) -> None:
    """Check that a command fails with one paragraph that has these parts, and no traceback."""
    status, _, err = run(capsys, *flags)
    said = [line for line in err.splitlines() if line and not line.startswith(("Loading", "Generating"))]
    assert status == 1, err
    assert len(said) == 1, err
    assert said[0].startswith(f"influence {flags[0]}: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in said[0], said[0]


def test_no_such_model_dataset_or_column(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = made(tmp_path / "a")
    flags[flags.index("--model") + 1] = str(tmp_path / "nothing")
    refused(capsys, flags, "there is no folder", "nothing")
    flags[flags.index("--model") + 1] = "nobody/nothing-at-all"
    refused(capsys, flags, "no model 'nobody/nothing-at-all'", "save_pretrained")
    flags = made(tmp_path / "a")
    flags[flags.index("--dataset") + 1] = str(tmp_path / "no.jsonl")
    refused(capsys, flags, "no file", "no.jsonl")
    refused(capsys, made(tmp_path / "a", "build", "--prompt-column", "body"), "no column 'body'", "'text', 'about'")
    refused(capsys, made(tmp_path / "a", "build", "--targets", "*.nothing"), "matches none", "near misses")
    (tmp_path / "mute.jsonl").write_text('{"text": ""}\n{"text": "babo"}\n')
    flags[flags.index("--dataset") + 1] = str(tmp_path / "mute.jsonl")
    refused(capsys, flags, "none of the 2 documents", "has a token to predict", "1 empty; 1 of one token")
    assert not (tmp_path / "a").exists()


def test_a_run_that_exists_is_not_overwritten_unless_told(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(corpus, tmp_path / "c")
    refused(capsys, made(tmp_path / "c"), "holds a run of kind 'index' (finished; 4 of 4 shards", "--overwrite")
    assert run(capsys, *made(tmp_path / "c", "build", "--overwrite", "--projection-dim", "3"))[0] == 0
    assert open_index(tmp_path / "c").dim == 63
    (tmp_path / "c" / "index.h5").unlink()
    refused(capsys, made(tmp_path / "c"), "dim is 3, and this run's is 4", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(capsys, made(tmp_path / "mine", "build", "--overwrite"), "notes.txt", "another directory")
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_a_second_writer_is_refused(tmp_path: Path, capsys: Any) -> None:
    from influence.store.lock import Lock

    (tmp_path / "a").mkdir()
    with Lock(tmp_path / "a"):
        refused(capsys, made(tmp_path / "a"), "is being written by")


def test_fingerprints_that_do_not_fit(corpus: Path, mean: Path, tmp_path: Path, capsys: Any) -> None:
    for flags, parts in (
        (["--projection-seed", "1"], ("seed", "0", "1")),
        (["--unit-norm"], ("unit_norm", "on both sides or on neither")),
        (["--bias"], ("the query's as_blocks.bias is False, and the stored rows' is True",)),
        (["--heads"], ("the query's split_heads is None, and the stored rows' is",)),
        (
            ["--projection-target", "global", "--projection-kind", "rademacher"],
            ("the query's project.target is 'per_block'",),
        ),
    ):
        refused(capsys, made(tmp_path / "s", "score", "--query", str(mean), *flags), *parts)
    assert not (tmp_path / "s").exists()
    other = tmp_path / "other"
    shutil.copytree(world() / "model", other)
    from influence.models import load

    model = load(other)
    next(iter(model.parameters())).data.mul_(2)
    model.save_pretrained(other)
    ask = ["query", str(corpus), "--text", "babo lives in"]
    refused(capsys, [*ask, "--model", str(other)], "weights")
    status, _, err = run(capsys, *ask, "--model", other, "--force")
    assert status == 0
    assert "influence: note: forced past 1 differences: 'weights'" in err


def test_a_query_in_another_vocabulary_is_refused(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"  # the same weights, and a tokenizer that calls the words by other numbers
    shutil.copytree(world() / "model", other)
    said = json.loads((other / "tokenizer.json").read_text())
    words = [word for word in said["model"]["vocab"] if not word.startswith("<")]
    numbers = [said["model"]["vocab"][word] for word in words]
    said["model"]["vocab"] |= dict(zip(words, reversed(numbers), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(said))
    refused(
        capsys,
        ["query", corpus, "--text", "babo lives in", "--model", other],
        "the query's vocabulary is '",
        "and the stored rows' is '",
    )
    rows = made(tmp_path / "q", "reduce", "--tokenizer", str(other))
    assert run(capsys, *rows)[0] == 0
    refused(capsys, made(tmp_path / "s", "score", "--query", str(tmp_path / "q")), "vocabulary")
    assert run(capsys, *made(tmp_path / "s", "score", "--query", str(tmp_path / "q"), "--force"))[0] == 0


def test_scores_are_no_gradients(mean: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, *made(tmp_path / "s", "score", "--query", str(mean)))[0] == 0
    refused(capsys, ["query", tmp_path / "s", "--text", "babo lives in"], "holds scores, and no gradients")
    refused(capsys, made(tmp_path / "t", "score", "--query", str(tmp_path / "s")), "holds scores, and no gradients")


def test_corrupt_and_missing_shards_are_named(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    run_directory = tmp_path / "c"
    shutil.copytree(corpus, run_directory)
    shard = run_directory / "shard-00002.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(capsys, ["inspect", run_directory], "shard-00002.h5 is cut off", "bytes")
    place = open_index(corpus).about.shards[2].places["rows"].offset
    shard.write_bytes(whole[: place + 5] + bytes([whole[place + 5] ^ 1]) + whole[place + 6 :])
    refused(capsys, ["inspect", run_directory, "--verify"], "shard-00002.h5 is damaged", "'rows'")
    refused(capsys, ["query", run_directory, "--text", "babo lives in"], "shard-00002.h5 is damaged")
    shard.unlink()
    refused(capsys, ["export", run_directory, "--to", tmp_path / "x.npy"], "shard-00002.h5", "missing")
    refused(capsys, ["inspect", tmp_path / "nothing"], "there is no run directory")


def test_no_space(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from influence import store

    write = store.write

    def full(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "shard-00002.h5":
            raise OSError(errno.ENOSPC, "no space left for shard-00002.h5")
        write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", full)
        refused(capsys, made(tmp_path / "a"), "no space left for shard-00002.h5")
    assert "not finished, 2 of 4 shards" in run(capsys, "inspect", tmp_path / "a")[1]
    left = shutil.disk_usage(tmp_path)._replace(free=8_000)  # enough for the two shards that are missing alone
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: left)
        status, out, err = run(capsys, *made(tmp_path / "a"))
        assert status == 0, err
        assert "2 of 4 shards are there already" in out
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(capsys, made(tmp_path / "b"), "no space", "100 B free")


def test_verify_reads_the_steps_of_a_recipe_and_the_shards_of_an_unfinished_run(
    corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = made(tmp_path / "t", "trackstar", "--query.dataset", str(world() / "questions.jsonl"), "--components", "2")
    assert run(capsys, *flags)[0] == 0
    assert "every checksum holds" in run(capsys, "inspect", tmp_path / "t", "--verify")[1]
    mixed = run(capsys, "inspect", tmp_path / "t" / "mixed")[1]
    assert f"replay: influence mix ANOTHER_RUN --config {tmp_path / 't' / 'mixed' / 'config.yaml'}" in mixed
    flip(tmp_path / "t" / "scores" / "shard-00001.h5")
    refused(capsys, ["inspect", tmp_path / "t", "--verify"], "shard-00001.h5 is damaged")
    shutil.copytree(corpus, tmp_path / "c")
    (tmp_path / "c" / "index.h5").unlink()
    flip(tmp_path / "c" / "shard-00002.h5")
    refused(capsys, ["inspect", tmp_path / "c", "--verify"], "shard-00002.h5", "damaged")


def flip(shard: Path) -> None:
    """Change one bit of a shard's rows."""
    whole, at = bytearray(shard.read_bytes()), store.locate(shard)["rows"].offset + 5
    whole[at] ^= 1
    shard.write_bytes(whole)


def test_commands_that_are_shown_can_be_typed_again(tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "a run"
    assert run(capsys, *made(place))[0] == 0
    quoted = f"influence build ANOTHER_RUN --config '{place}/config.yaml'"
    assert run(capsys, "inspect", place)[1].count(quoted) == 2
    assert (place / "config.yaml").read_text().startswith(f"# {quoted}")
    refused(capsys, made(place), quoted)


def test_what_stands_in_the_way_is_named(mean: Path, tmp_path: Path, capsys: Any) -> None:
    score = made(mean, "score", "--query", str(mean))
    refused(capsys, score, "holds a finished run of influence reduce (index.h5)")
    refused(capsys, made(tmp_path / "a", "build", "--device", "nowhere"), "the device 'nowhere' cannot be used here")
    refused(capsys, made(tmp_path / "a", "build", "--model-kwargs", "{a"), "--model-kwargs is no JSON or YAML")
    assert run(capsys, *made(tmp_path / "s", "score", "--query", str(mean), "--top-k", "2"))[0] == 0
    export = ["export", tmp_path / "s", "--to"]
    refused(capsys, [*export, tmp_path / "x.npy"], "keeps the best and worst of its scores alone")
    refused(capsys, [*export, tmp_path, "--format", "npy", "--overwrite"], "is a directory")
    text = (mean / "config.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("damping: 0.1", "damping: 1e-3"))
    assert run(capsys, "reduce", tmp_path / "m", "--config", tmp_path / "c.yaml")[0] == 0


def test_k_too_large_and_nothing_asked(corpus: Path, mean: Path, tmp_path: Path, capsys: Any) -> None:
    ask = ["query", str(corpus)]
    refused(capsys, [*ask, "--text", "babo lives in", "--k", "26"], "--k must be between 1 and the number of rows, 25")
    refused(capsys, [*ask, "--text", "  "], "the query is empty")
    refused(capsys, [*ask, "--text", "babo"], "1 token", "longer text")
    flags = made(tmp_path / "s", "score", "--query", str(mean), "--top-k", "26")
    refused(capsys, flags, "--top-k must be between 1 and the number of examples, 25; got 26")
    refused(capsys, [*ask, "--text", "babo lives in", "--blocks", "nothing"], "'nothing' matches none")


def test_what_is_not_understood(tmp_path: Path, capsys: Any) -> None:
    status, _, err = run(capsys, "bild")
    assert status == 2
    assert "no such command" in err
    status, _, err = run(capsys, *made(tmp_path / "a", "build", "--projektion", "3"))
    assert status == 2
    assert "--projektion" in err
    file = tmp_path / "c.yaml"
    file.write_text("run: a\nmodel: {model: m}\ndata: {dataset: d, colour: red}\n")
    refused(capsys, ["build", "--config", str(file)], "unknown field data.colour")
    refused(capsys, ["build", "--config", str(tmp_path / "none.yaml")], "no configuration file")
    file.write_text("run: [")
    refused(capsys, ["build", "--config", str(file)], "is no YAML")


def test_faiss_answers_from_the_command_line(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(corpus, tmp_path / "c")
    ask = ["query", tmp_path / "c", "--text", "babo lives in", "--json"]
    exact = run(capsys, *ask)[1]
    for flags in (["Flat"], ["Flat", "--faiss.num-shards", "2"], ["IVF2,Flat", "--faiss.nprobe", "2"]):
        status, out, err = run(capsys, *ask, "--faiss.index-factory", *flags)
        assert (status, err) == (0, "")
        found, expected = (json.loads(text)["answers"][0] for text in (out, exact))
        for end in ("best", "worst"):
            assert [hit["example"] for hit in found[end]] == [hit["example"] for hit in expected[end]]
    assert len(list((tmp_path / "c" / "faiss").glob("[!.]*"))) == 3


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """It was tried for a minute, file by file, without a word of ours."""
    import time

    import datasets.config
    import huggingface_hub.constants

    from influence.pipelines.frame import loading

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    loading.reachable.cache_clear()
    for flag, what in (("--model", "no model"), ("--dataset", "the dataset")):
        flags = made(tmp_path / "a")
        flags[flags.index(flag) + 1] = "nobody/nothing-at-all"
        began = time.monotonic()
        status, _, err = run(capsys, *flags)
        assert time.monotonic() - began < 10
        note, said = [line for line in err.splitlines() if line]
        assert status == 1
        assert note.startswith(
            "influence: note: the Hub cannot be reached: 'nobody/nothing-at-all' is looked for among"
        )
        assert f"{what} 'nobody/nothing-at-all'" in said
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
    loading.reachable.cache_clear()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run directory"):
        main(["inspect", str(tmp_path / "nothing"), "--debug"])


def test_errors_are_one_paragraph_in_the_words_of_the_command_line() -> None:
    assert paragraph(ValueError("a\n  b; pass overwrite=True")) == "a b; pass --overwrite"
    assert paragraph(OSError(28, "No space left on device", "x")) == "No space left on device: x"
    assert paragraph(KeyError("x")) == "unexpected KeyError: no 'x'. --debug shows where"
    assert "no message" in paragraph(ValueError())
    names = {"unit_norm": "--unit-norm", "k": "--k", "index_factory": "--faiss.index-factory", "bias": "--bias"}
    for text, said in (
        ("put unit_norm() on both sides", "put --unit-norm on both sides"),
        ("k must be at least 1; got 0", "--k must be at least 1; got 0"),
        ("index_factory='Flut' is none", "--faiss.index-factory Flut is none"),
        (
            "made by chain(as_blocks(bias=True), unit_norm()): fit",
            "made by chain(as_blocks(bias=True), unit_norm()): fit",
        ),
        ("there is no /data/unit_norm/x", "there is no /data/unit_norm/x"),
        ("column 'unit_norm' is gone", "column 'unit_norm' is gone"),
    ):
        assert paragraph(ValueError(text), names) == said
