"""Sources: every one gives the same rows, and what cannot be loaded says why."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from influence.data import batches, context_length, load, shards, stream, tokenize
from influence.data.sources import mapping_of
from tests import tokenizers_zoo as zoo

ROWS = [{"text": text, "n": k} for k, text in enumerate(["hi ok", "yes", "a, b = c", "ok", "hi", "yes ok", "b"])]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    data = datasets.Dataset.from_list(ROWS)
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.txt").write_text("".join(row["text"] + "\n" for row in ROWS))
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    datasets.DatasetDict({"train": data, "test": data.select([0, 1])}).save_to_disk(tmp_path / "dict")
    return tmp_path


def texts(dataset: Any) -> list[str]:
    return [row["text"] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt", "parquet", "arrow"])
def test_local_files(files: Path, suffix: str, streaming: bool) -> None:
    cache = {} if streaming else {"cache_dir": str(files / "cache")}
    got = load(files / f"rows.{suffix}", data_kwargs=cache, streaming=streaming)
    assert texts(got) == [row["text"] for row in ROWS]
    assert isinstance(got, datasets.IterableDataset) == streaming


@pytest.mark.parametrize("name", ["rows[1].jsonl", "rows.JSONL"])
def test_any_name_of_a_file(files: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # brackets are a pattern too, which does not match itself
    (files / "rows.jsonl").rename(files / name)
    monkeypatch.setenv("HOME", str(files))
    kwargs = {"cache_dir": str(files / "cache")}
    assert texts(load(files / name, data_kwargs=kwargs)) == [row["text"] for row in ROWS]
    assert texts(load(f"~/{name}", streaming=True)) == [row["text"] for row in ROWS]


def test_a_pattern_of_files_and_a_folder_of_them(files: Path) -> None:
    # a folder that nobody saved a dataset in goes the way of a Hub id
    cache = {"cache_dir": str(files / "cache")}
    (files / "plain").mkdir()
    for name, rows in (("train-0", ROWS[:3]), ("train-1", ROWS[3:])):
        (files / "plain" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "plain" / "test-0.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert texts(load(files / "plain" / "train-*.jsonl", data_kwargs=cache)) == [row["text"] for row in ROWS]
    assert texts(load(files / "plain", data_kwargs=cache)) == [row["text"] for row in ROWS]
    assert texts(load(files / "plain", split="test+train[:1]", data_kwargs=cache)) == ["hi ok", "hi ok"]
    assert texts(load(files / "plain", split="test", streaming=True)) == ["hi ok"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["saved", "dict"])
def test_saved_datasets(files: Path, name: str, streaming: bool) -> None:
    assert texts(load(files / name, streaming=streaming)) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", [0, 1, 2, 3, 4, 5, 6]),
        ("test", [0, 1]),
        ("train[2:4]", [2, 3]),
        ("train[-2:]", [5, 6]),
        ("test+train[:1]", [0, 1, 0]),
        ("train[:50%]", [0, 1, 2, 3]),
    ],
)
def test_slices_of_splits_of_saved_datasets(files: Path, split: str, rows: list[int]) -> None:
    assert load(files / "dict", split=split)["n"][:] == rows


def test_slices_of_what_is_in_memory() -> None:
    assert texts(load(ROWS, split="train[1:3]")) == ["yes", "a, b = c"]
    assert texts(load(datasets.Dataset.from_list(ROWS), split="train[:1]")) == ["hi ok"]


def test_rows_may_lack_keys() -> None:
    # the first row decided the columns, and the others' were gone without a word
    assert load([{"text": "a"}, {"text": "b", "r": 1.0}])["r"][:] == [None, 1.0]


def test_rows_of_a_stream_may_lack_keys() -> None:
    data = datasets.IterableDataset.from_generator(lambda: iter([{"text": "hi"}, {"body": "b"}, {"text": "ok"}]))
    assert [shard.lengths.tolist() for shard in stream(data, zoo.bpe(), shard_size=2)] == [[1, 0], [1]]


def test_the_arguments_of_load_dataset_may_hold_commas_and_equal_signs(files: Path) -> None:
    (files / "other.csv").write_text("a, b = c;1\n")
    kwargs = '{"delimiter": ";", "column_names": ["x=y,z", "n"], "cache_dir": "%s"}' % (files / "cache")
    assert load(files / "other.csv", data_kwargs=kwargs)[0] == {"x=y,z": "a, b = c", "n": 1}
    assert mapping_of("delimiter: ','\nnames: [a, 'b=c']") == {"delimiter": ",", "names": ["a", "b=c"]}


@pytest.mark.parametrize("source", ["saved", "rows.jsonl", "rows.parquet"])
def test_every_source_gives_the_batches_of_the_rows_in_memory(files: Path, source: str) -> None:
    tokenizer = zoo.bpe(bos=True)
    memory = list(batches(shards(tokenize(load(ROWS), tokenizer), 3), 20))
    kwargs = {"cache_dir": str(files / "cache")} if source.startswith("rows") else None
    disk = list(batches(shards(tokenize(load(files / source, data_kwargs=kwargs), tokenizer), 3), 20))
    streamed = list(batches(stream(load(files / source, streaming=True), tokenizer, shard_size=3), 20))
    assert len(memory) == len(disk) == len(streamed) > 1
    for a, b, c in zip(memory, disk, streamed, strict=True):
        assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in a)


def test_a_format_of_the_datasets_own_is_no_matter() -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}).with_format("torch")
    assert tokenize(load(data)).ids.tolist() == [1, 2, 3]


def test_the_context_of_a_model() -> None:
    from transformers import BloomConfig, GPT2Config, RobertaConfig

    assert context_length(zoo.bpe()) is None
    assert context_length(zoo.bpe(model_max_length=100), GPT2Config(n_positions=64)) == 64
    assert context_length(zoo.bpe(), BloomConfig()) is None
    # RoBERTa counts from behind its padding id: 514 embeddings, 512 tokens
    assert context_length(None, RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
