"""Data files that are damaged, cut off or something else: one paragraph that names the file and the line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from influence.cli import main
from influence.data import load, tokenize
from influence.data.sources import column_names, slices

GOOD = [{"text": f"hi ok {n}"} for n in range(20)]


def lines(change: Callable[[str], str] = lambda line: line, at: int = 7) -> bytes:
    whole = [json.dumps(row) for row in GOOD]
    whole[at] = change(whole[at])
    return "".join(line + "\n" for line in whole).encode()


def parquet(path: Path) -> bytes:
    datasets.Dataset.from_list(GOOD * 50).to_parquet(path)
    return path.read_bytes()


def zeroed(whole: bytes, at: int = 60, number: int = 200) -> bytes:
    return whole[:at] + bytes(number) + whole[at + number :]


FILES: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "cut off in a line": ("a.jsonl", lambda p: lines()[:-9], ", line 20, .*Unterminated string"),
    "a broken line": ("a.jsonl", lambda p: lines(lambda x: x[:-2]), ", line 8, "),
    "a first line that is broken": ("a.jsonl", lambda p: lines(lambda x: x[:-2], 0), ", line 1, "),
    "a line that is a list": ("a.jsonl", lambda p: lines(lambda x: "[1]"), ", line 8, .*object, one row; it is a list"),
    "a line that is a number": ("a.jsonl", lambda p: lines(lambda x: "7"), ", line 8, .*it is a int"),
    "no UTF-8 in JSON": ("a.jsonl", lambda p: lines().replace(b"ok 7", b"\xffk 7"), ", line 8, .*byte 14 is 0xff"),
    "a block of zeros": ("a.jsonl", lambda p: zeroed(lines()), ", line 4, "),
    "nested too deeply": ("a.jsonl", lambda p: lines(lambda x: "[" * 99999), ", line 8, .*nested too deeply"),
    "a mark before the bytes": ("a.jsonl", lambda p: b"\xef\xbb\xbf" + lines()[:-5], ", line 20, "),
    "a document cut off": ("a.json", lambda p: json.dumps(GOOD, indent=1).encode()[:200], ", line 24, "),
    "a document of a number": ("a.json", lambda p: b"7", "objects, one a row; row 0 is a int"),
    "fields too many": ("a.csv", lambda p: b"text,x\na,1\nb,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
    "a quote without an end": ("a.csv", lambda p: b'text,x\n"a,1\nb,2\n', "EOF inside string"),
    "no UTF-8 in CSV": ("a.csv", lambda p: b"text\na\xff\n", ", line 2, .*byte 2 is 0xff"),
    "no UTF-8 in text": ("a.txt", lambda p: b"abc\n\xff\xfe\nb\n", ", line 2, .*byte 1 is 0xff"),
    "parquet of another kind": ("a.parquet", lambda p: b"PAR1 nonsense", "cannot be read as parquet"),
    "parquet cut off": ("a.parquet", lambda p: parquet(p)[:-20], "cannot be read as parquet"),
    "a block of parquet": ("a.parquet", lambda p: zeroed(parquet(p)), "cannot be read as parquet"),
    "arrow of another kind": ("a.arrow", lambda p: b"ARROW1 nonsense", "cannot be read as arrow"),
}


def read(path: Path, streaming: bool) -> list[dict[str, Any]]:
    found = load(path, streaming=streaming, data_kwargs={} if streaming else {"cache_dir": str(path.parent / "cache")})
    column_names(found)
    return [row for _, rows in slices(found, 6) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", FILES)
def test_a_damaged_file_is_named_with_its_line(how: str, streaming: bool, tmp_path: Path) -> None:
    name, made, words = FILES[how]
    path = tmp_path / name
    path.write_bytes(made(tmp_path / "scratch"))
    with pytest.raises(ValueError, match=f"^{path}{'' if words[:1] == ',' else '.*'}{words}") as refused:
        read(path, streaming)
    said = str(refused.value)
    assert "mend it, write it again, or leave it out" in said
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_many_files_is_named(tmp_path: Path, streaming: bool) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines()[: -9 if number == 1 else None])
    with pytest.raises(ValueError, match=f"^{tmp_path / '1.jsonl'}, line 20, "):
        read(tmp_path / "*.jsonl", streaming)


@pytest.mark.parametrize("how", ["cut", "another", "gone"])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_saved_dataset_that_is_damaged_is_named(tmp_path: Path, name: str, how: str) -> None:
    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40] if how == "cut" else b"{}")
    if (name, how) in (("state.json", "gone"), ("dataset_info.json", "another")):  # an arrow file alone is a dataset
        assert list(load(tmp_path / "saved")) == GOOD
        return
    with pytest.raises(
        ValueError, match=f"^the dataset saved in {tmp_path / 'saved'} cannot be read: .*save it again$"
    ):
        load(tmp_path / "saved")


def test_what_the_arguments_are_wrong_of_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    with pytest.raises(ValueError, match=r"data_kwargs is not for .*'colour'"):
        load(tmp_path / "a.jsonl", data_kwargs={"colour": "red"})


BAD_TOKENS = {
    "a negative id": ({"input_ids": [1, -2, 3]}, "row 1: input_ids has -2, .*0 or more"),
    "a negative label": ({"input_ids": [1, 2], "labels": [1, -2]}, "row 1: labels has -2, .*0 or more, or -100"),
    "a mask of weights": ({"input_ids": [1, 2], "attention_mask": [1, -1]}, "row 1: attention_mask has -1, .*0 or 1"),
}


@pytest.mark.parametrize("how", BAD_TOKENS)
def test_ids_that_no_tokenizer_gives_are_refused(how: str) -> None:
    row, words = BAD_TOKENS[how]
    good = {name: [1] * len(values) for name, values in row.items()}
    with pytest.raises(ValueError, match=words):
        tokenize(load([good, row]))
    kept = tokenize(load([{**good, "labels": [-100] * len(good["input_ids"])}]))
    assert kept.ids.tolist() == good["input_ids"]


def test_the_command_line_says_it_in_a_paragraph(tmp_path: Path, capsys: Any) -> None:
    from tests.pipeline_world import world

    path, model = tmp_path / "corpus.jsonl", world() / "model"
    capsys.readouterr()
    for whole, words in (
        (lines()[:-9], f"{path}, line 20, cannot be read as json"),
        (b'{"input_ids": [1, -2]}\n', "row 0: input_ids has -2"),
        (b'{"input_ids": [1, 2], "labels": [1, 99999]}\n', "the data have the label 99999"),
    ):
        path.write_bytes(whole)
        flags = ["build", tmp_path / "run", "--model", model, "--dataset", path]
        assert main([*map(str, flags), "--data-kwargs", f"{{cache_dir: {tmp_path / 'cache'}}}"]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert "unexpected" not in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_a_folder_or_of_a_builder_is_named_too(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "train.jsonl").write_bytes(lines()[:-9])
    (tmp_path / "some" / "README.md").write_text("some")
    path = tmp_path / "some" / "train.jsonl"
    cache = {} if streaming else {"cache_dir": str(tmp_path / "cache")}
    for source, kwargs in ((str(path.parent), {}), ("json", {"data_files": str(path)})):
        with pytest.raises(ValueError, match=f"^{path}, line 20, "):
            [*slices(load(source, streaming=streaming, data_kwargs={**kwargs, **cache}), 6)]
