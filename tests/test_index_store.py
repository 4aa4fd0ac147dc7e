"""The files of an index: readable with h5py alone, mapped without a copy, and nothing damaged goes unnamed."""

import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from influence import store
from influence.func.fold import Sink
from influence.index import (
    Collected,
    Columns,
    Fingerprint,
    Index,
    done,
    finish,
    memory_sink,
    open_index,
    shard_sink,
    start,
)
from influence.index.columns import DTYPES, Encoded, decode
from influence.index.root import About, Shard, write_root
from influence.store.folder import read_manifest
from influence.store.hdf5 import sha256

COLUMNS = Columns({"a": (3, 4), "b": (5,)})
PRINT = Fingerprint("abc", recorded={"data": "none"})
PLAN = {"shards": [[0, 7], [7, 12], [12, 12]]}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = normal(12, COLUMNS.dim)
LOSS = normal(12, seed=1)
COUNTS = torch.tensor([2, 0, 1, 3, 1, 0, 0, 4, 1, 1, 2, 0])
TOKENS = normal(int(COUNTS.sum()), COLUMNS.dim, seed=2)
OFFSETS = torch.cat([torch.zeros(1, dtype=torch.int64), COUNTS.cumsum(0)])


def value(index: Tensor, per_token: bool = False) -> Collected:
    length = COUNTS[index]
    if not per_token:
        return Collected(COLUMNS.split(ROWS[index]), LOSS[index], length, document=index // 2)
    rows = torch.cat([torch.arange(int(OFFSETS[i]), int(OFFSETS[i + 1])) for i in index])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    positions = rows - OFFSETS[index].repeat_interleave(length)
    return Collected(COLUMNS.split(TOKENS[rows]), LOSS[index], length, 100 + rows // 2, offsets, positions)


def fill(sink: Sink, begin: int, end: int, order: list[int], size: int, per_token: bool = False) -> Any:
    state = sink.init()
    for index in (torch.tensor(order, dtype=torch.int64) + begin).split(size):
        if len(index):
            state = sink.update(state, index, value(index, per_token))
    return sink.finalize(state)


def write(directory: Path, dtype: str = "float64", per_token: bool = False, seed: int = 0, size: int = 3) -> Index:
    with start(directory, "index", {"lr": 1}, ["influence", "build"], PLAN, PRINT) as run:
        for number in run.todo:
            begin, end = run.shards[number]
            order = torch.randperm(end - begin, generator=torch.Generator().manual_seed(seed)).tolist()
            fill(
                shard_sink(directory, number, (begin, end), COLUMNS, dtype, per_token),
                begin,
                end,
                order,
                size,
                per_token,
            )
        finish(directory)
    return open_index(directory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_what_went_in_comes_out(tmp_path: Path, dtype: str, per_token: bool) -> None:
    """Rows in the order of their batches; token rows beside another document's loss; an empty document that shifts."""
    index = write(tmp_path, dtype, per_token)
    rows = TOKENS if per_token else ROWS
    limit = {"float64": 0.0, "float32": 1e-7, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1e-2}[dtype]
    assert (index.matrix().double() - rows).abs().max() <= limit * rows.abs().max()
    assert index.matrix().dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(index.loss, LOSS)
    assert torch.equal(index.length, COUNTS)
    assert torch.equal(index.index, torch.arange(12))
    assert (len(index), index.examples, index.dim, index.dtype) == (len(rows), 12, 17, dtype)
    assert index.blocks == {"a": (3, 4), "b": (5,)}
    assert index.about.config == {"lr": 1}
    assert index.about.command == ["influence", "build"]
    assert index.fingerprint == PRINT
    index.verify()
    if per_token:
        assert torch.equal(index.offsets, OFFSETS)
        found = index.place(torch.tensor([[0, 2], [3, 13]]))
        assert found.document.tolist() == [[0, 2], [3, 10]]
        assert found.position.tolist() == [[0, 0], [0, 0]]
        assert index.place(torch.tensor(5)).position == 2
        assert torch.equal(index.tokens(3)["b"], index.rows(["b"], 3, 6)["b"])
        assert index.tokens(1)["a"].shape == (0, 3, 4)
        assert torch.equal(index.document, 100 + torch.arange(len(TOKENS)) // 2)  # chunks: each token's own
    else:
        assert torch.equal(index.document, torch.arange(12) // 2)
        with pytest.raises(ValueError, match="row for every example"):
            index.tokens(0)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_same_bytes_whatever_the_batches(tmp_path: Path, per_token: bool) -> None:
    """A file with a time in it, or rows in the order in which they came."""
    write(tmp_path / "a", "float16", per_token, seed=0, size=3)
    write(tmp_path / "b", "float16", per_token, seed=5, size=12)
    for name in ("shard-00000.h5", "shard-00001.h5", "shard-00002.h5"):
        one, other = (h5py.File(tmp_path / d / name) for d in "ab")
        with one, other:
            assert all((one[key][()] == other[key][()]).all() for key in one)
            facts = [{**json.loads(f.attrs["about"]), "run": ""} for f in (one, other)]
            assert facts[0] == facts[1]
        assert (tmp_path / "a" / name).stat().st_size == (tmp_path / "b" / name).stat().st_size


def test_merges_of_the_sink_are_associative() -> None:
    """Ranks and resumed runs, in any bracketing."""
    sink = memory_sink(COLUMNS, "float16")
    a, b, c = (sink.update(sink.init(), i, value(i)) for i in torch.tensor([3, 9, 1, 4, 0, 2]).split(2))
    left, right = sink.merge(sink.merge(a, b), c), sink.merge(a, sink.merge(b, c))
    for state in (right, sink.merge(c, sink.merge(b, a)), sink.merge(sink.init(), left)):
        found, expected = sink.finalize(state), sink.finalize(left)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_pieces_are_views_of_the_map(tmp_path: Path) -> None:
    """A scan that copies the index."""
    index = write(tmp_path, "bfloat16")
    pieces = list(index.pieces(3))
    assert [(p.begin, len(p.values)) for p in pieces] == [(0, 3), (3, 3), (6, 1), (7, 3), (10, 2)]
    assert pieces[0].values.dtype == torch.bfloat16
    storage = {p.values.untyped_storage().data_ptr() for p in pieces}
    assert len(storage) == 2
    got = torch.cat([decode(Encoded(p.values, p.scale), COLUMNS) for p in pieces])
    assert torch.equal(got, index.matrix())
    assert torch.equal(index.matrix(5, 9, ["b"]), index.matrix()[5:9, 12:])
    assert index.matrix(20, 30).shape == (0, 17)


def test_datasets_are_aligned_and_contiguous(tmp_path: Path) -> None:
    """A memory map at an odd offset."""
    write(tmp_path, "float16", per_token=True)
    with h5py.File(tmp_path / "shard-00000.h5") as file:
        for key in file:
            assert file[key].chunks is None
            assert file[key].id.get_offset() % 64 == 0


PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
(ALONE,) = re.findall(r"```python\n(import json\n.*?)\n\nfound = .*?```", PAGE, flags=re.DOTALL)
PRINTED = """
import sys
with h5py.File(sys.argv[1] + "/index.h5") as root:
    print(json.dumps({
        "scores": [scores(sys.argv[1], name, numpy.arange(n)).tolist() for name, n in (("a", 12.0), ("b", 5.0))],
        "weights": json.loads(root.attrs["about"])["fingerprint"]["weights"],
        **{name: root[name][()].tolist() for name in root if name not in ("rows", "scale")},
    }))
"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_h5py_alone_computes_a_score(tmp_path: Path, dtype: str, per_token: bool) -> None:
    """The code of docs/formats.md, without anything of ours; the root's paths hold wherever it is moved."""
    write(tmp_path / "made", dtype, per_token)
    shutil.move(tmp_path / "made", tmp_path / "moved")
    nodes = [node for node in ast.walk(ast.parse(ALONE + PRINTED)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.name for node in nodes for name in node.names} == {"json", "sys", "h5py", "numpy"}
    out = subprocess.run(
        [sys.executable, "-c", ALONE + PRINTED, str(tmp_path / "moved")],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    found = json.loads(out.stdout)
    index = open_index(tmp_path / "moved")
    for got, (name, count) in zip(found["scores"], (("a", 12.0), ("b", 5.0)), strict=True):
        expected = index.matrix(blocks=[name]).double() @ torch.arange(count, dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert found["loss"] == LOSS.tolist()
    assert found["index"] == list(range(12))
    assert found["length"] == COUNTS.tolist()
    assert found["weights"] == "abc"
    if per_token:
        assert found["offsets"] == OFFSETS.tolist()
        assert found["position"] == index.position.tolist()
    else:
        assert found["document"] == index.document.tolist()


def test_a_shard_that_is_gone_shows_as_no_number(tmp_path: Path) -> None:
    """HDF5 shows zeros for a missing file, to whoever reads the root with h5py alone."""
    write(tmp_path, "bfloat16")
    (tmp_path / "shard-00001.h5").unlink()
    with h5py.File(tmp_path / "index.h5") as root:
        assert (root["rows"][8] == 0x7FC0).all()
        assert (root["loss"][7:] != root["loss"][7:]).all()


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_missing_and_truncated_shards_are_named_on_opening(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00001.h5"
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.h5 is cut off: it has [\d,]+ bytes, and [\d,]+ were written"):
        open_index(tmp_path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=r"shard-00001.h5 is too long"):
        open_index(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.h5 is missing \(5 rows\)"):
        open_index(tmp_path)
    path.write_bytes(data)
    open_index(tmp_path).verify()


@pytest.mark.parametrize("name", ["rows", "loss", "index", "scale"])
def test_a_flipped_bit_is_found_on_the_first_read_and_by_verify(tmp_path: Path, name: str) -> None:
    write(tmp_path, "float16")
    path = tmp_path / "shard-00001.h5"
    place = store.locate(path)[name]
    flip(path, place.offset + place.bytes - 1)
    index = open_index(tmp_path)
    said = rf"shard-00001.h5 is damaged: the checksum of its dataset '{name}' differs"
    with pytest.raises(ValueError, match=said):
        index.verify()
    with pytest.raises(ValueError, match=said):
        list(open_index(tmp_path).pieces()) if name in ("rows", "scale") else getattr(open_index(tmp_path), name)
    if name in ("rows", "scale"):
        assert index.matrix(0, 7).shape == (7, 17)  # another shard's rows are whole
        with pytest.raises(ValueError, match=said):
            index.matrix(6, 8)
    assert len(open_index(tmp_path, verify=False).matrix()) == 12  # told not to look


def test_every_flipped_byte_outside_the_rows_is_found_by_verify(tmp_path: Path) -> None:
    """A flip in HDF5's own tables, which h5py might misread: every 16th byte of a shard."""
    write(tmp_path, "float16")
    path = tmp_path / "shard-00000.h5"
    index = open_index(tmp_path)
    expected = index.matrix()
    for at in range(0, path.stat().st_size, 16):
        flip(path, at)
        with pytest.raises(ValueError, match=r"shard-00000.h5 is damaged"):
            open_index(tmp_path).verify()
        flip(path, at)
    open_index(tmp_path).verify()
    assert torch.equal(open_index(tmp_path).matrix(), expected)


def test_a_damaged_root_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    root = tmp_path / "index.h5"
    data = root.read_bytes()
    at = data.index(b'"weights": "abc"')
    root.write_bytes(data.replace(b'"weights": "abc"', b'"weights": "abd"'))
    with pytest.raises(ValueError, match=r"index.h5 is damaged: the checksum of its facts differs"):
        open_index(tmp_path)
    root.write_bytes(data[: at // 2])
    with pytest.raises(ValueError, match=r"index.h5 is damaged"):
        open_index(tmp_path)


def test_no_index_and_an_unfinished_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        open_index(tmp_path / "nothing")
    with start(tmp_path, "index", {}, ["influence", "build"], PLAN, PRINT):
        fill(shard_sink(tmp_path, 1, (7, 12), COLUMNS), 7, 12, list(range(5)), 5)
        with pytest.raises(ValueError, match=r"2 of 3 shards are missing, the first of them shard-00000.h5"):
            finish(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished; 1 of 3 shards, [\d,]+ bytes\), made by: influence build. It is"):
        open_index(tmp_path)
    assert done(tmp_path) == {1}


def test_shards_hold_what_was_planned_once(tmp_path: Path) -> None:
    sink = shard_sink(tmp_path, 0, (0, 5), COLUMNS)
    with pytest.raises(ValueError, match=r"holds rows 0 to 4 of the dataset; 2 did not come, the first of them 1"):
        fill(sink, 0, 5, [0, 2, 4], 2)
    with pytest.raises(ValueError, match=r"1 do not belong here, the first of them 7"):
        fill(sink, 0, 5, [0, 1, 2, 3, 4, 7], 2)
    with pytest.raises(ValueError, match=r"row 2 of the dataset came more than once"):
        fill(sink, 0, 5, [0, 2, 1, 2, 3, 4], 2)
    assert not list(tmp_path.iterdir())
    broken = value(torch.tensor([3, 8]))
    broken.rows["a"][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"example 8 of the dataset: .*nonfinite='zero'"):
        sink.update(sink.init(), torch.tensor([3, 8]), broken)
    tokens = shard_sink(tmp_path, 0, None, COLUMNS, per_token=True)
    with pytest.raises(ValueError, match=r"row for every token, and the batch has no offsets"):
        tokens.update(tokens.init(), torch.tensor([3]), value(torch.tensor([3])))


def test_an_index_of_nothing(tmp_path: Path) -> None:
    """Zero rows: no map of an empty file, no virtual dataset of length 0."""
    for per_token in (False, True):
        directory = tmp_path / str(per_token)
        with start(directory, "index", {}, [], {"shards": [[0, 0]]}, PRINT):
            fill(shard_sink(directory, 0, (0, 0), COLUMNS, "float16", per_token), 0, 0, [], 1, per_token)
            finish(directory)
        index = open_index(directory)
        index.verify()
        assert (len(index), index.examples, list(index.pieces())) == (0, 0, [])
        assert index.matrix().shape == (0, 17)
        assert "0 rows" in str(index)
        assert len(index.dataset()) == 0
        assert index.rows()["a"].shape == (0, 3, 4)
        with h5py.File(directory / "index.h5") as root:
            assert root["rows"].shape == (0, 17)


def test_more_columns_than_an_int_counts_bytes(tmp_path: Path) -> None:
    """Rows of over 2^29 columns and 2^31 bytes, where a structured dtype overflows: in a sparse file."""
    big = 2**29 + 64
    columns = Columns({"big": (2**14, 2**15), "last": (64,)})
    assert columns.spans["last"] == (2**29, big)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    path = tmp_path / "shard-00000.h5"
    with h5py.File(path, "x", alignment_threshold=1, alignment_interval=64) as file:
        rows = file.create_dataset("rows", (3, big), "<f4", dcpl=settings)
        rows.attrs["sha256"] = "not taken"
        offset = rows.id.get_offset()
    with open(path, "r+b") as file:
        for row in range(3):
            file.seek(offset + 4 * ((row + 1) * big - 64))
            file.write(torch.arange(64.0).add(row).numpy().tobytes())
    if os.stat(path).st_blocks * 512 > 2**20:
        # three rows of gigabytes lie in holes; without holes they would fill the disk
        pytest.skip("this file system does not keep sparse files")
    places = {"rows": store.Place(offset, (3, big), "float32", "not taken")}
    places |= {name: store.Place(0, (3,), "int64", "not taken") for name in ("loss", "length", "index")}
    shard = Shard(path.name, path.stat().st_size, 0, 3, 3, 3, "", places)
    write_root(tmp_path, About("index", "float32", False, columns, PRINT, {}, [], {}, (shard,)))
    index = open_index(tmp_path, verify=False)
    assert index.dim == big
    assert torch.equal(index.rows(["last"], 2)["last"], torch.arange(64.0).add(2)[None])
    (piece, *_) = index.pieces(1)
    assert piece.values[0, -64:].tolist() == list(range(64))


def test_many_shards_fit_into_the_root(tmp_path: Path) -> None:
    """HDF5's limit of 64 kB for an attribute."""
    write(tmp_path)
    index = open_index(tmp_path)
    shards = index.about.shards[:1] * 5000
    write_root(tmp_path, index.about._replace(shards=shards), read_manifest(tmp_path).id)
    assert len(open_index(tmp_path)) == 5000 * 7


def test_store_writes_the_same_bytes_twice_and_names_what_is_damaged(tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(9.0),
        "y": normal(3, 5).bfloat16(),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }
    for name in "ab":
        store.write(tmp_path / name, tensors, {"lr": 1}, kind="thing", schema=3)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    found, facts = store.read(tmp_path / "a", kind="thing", schema=3)
    assert facts == {"lr": 1}
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    place = store.locate(tmp_path / "a")["x"]
    whole = hashlib.sha256(tensors["x"].numpy().tobytes())
    assert place.sha256 == hashlib.sha256(whole.digest()).hexdigest()
    flip(tmp_path / "a", place.offset)
    with pytest.raises(ValueError, match="checksum of 'x' differs"):
        store.read(tmp_path / "a", kind="thing", schema=3)
    (tmp_path / "b").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="b is damaged"):
        store.read(tmp_path / "b", kind="thing", schema=3)


@pytest.mark.parametrize("megabytes", [0, 4, 11.5])
def test_a_checksum_does_not_depend_on_the_pieces(megabytes: float) -> None:
    data = np.random.default_rng(0).bytes(int(megabytes * 2**20))
    digests = [hashlib.sha256(data[i : i + 2**22]).digest() for i in range(0, len(data), 2**22)]
    expected = hashlib.sha256(b"".join(digests)).hexdigest()
    cuts = [0, 5, 2**20, 2**22, 2**22 + 1, len(data)]
    assert sha256([data]) == expected
    assert sha256([data[a:b] for a, b in itertools.pairwise(cuts)]) == expected


def test_printing_says_all_of_it(tmp_path: Path) -> None:
    write(tmp_path, "float16")
    text = str(open_index(tmp_path))
    for part in ("12 rows", "17 columns", "float16", "influence build", '"abc"', "3×4", "shard-00001.h5", '{"lr": 1}'):
        assert part in text


def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    index = write(tmp_path, "bfloat16", per_token=True)
    dataset = index.dataset().with_format("torch")
    assert dataset.column_names == ["index", "loss", "length", "position", "gradients"]
    assert torch.equal(torch.stack(list(dataset["gradients"])), index.matrix())
    assert torch.equal(torch.stack(list(dataset["position"])), index.position)
