"""Files of version 1, kept in `tests/fixtures`, are read for ever; files of another version are refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from influence import hessians, open_index, sgmcmc, store
from influence.index import root
from influence.store import folder
from tests.fixtures.write import HERE, factor_values, index_values, run_values

VALUES = json.loads((HERE / "values.json").read_text())
PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()


def test_the_index_is_read() -> None:
    index = open_index(HERE / "index")
    index.verify()
    assert index_values(index) == VALUES["index"]
    assert len(index.about.shards) == 2


def test_the_factors_are_read() -> None:
    assert factor_values(hessians.load(HERE / "factors.h5")) == VALUES["factors"]


def test_the_sampling_run_is_read() -> None:
    assert run_values(sgmcmc.load(HERE / "run")) == VALUES["run"]


def alone() -> dict[str, Any]:
    """Return the functions of docs/formats.md, which import nothing of ours."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1:])
    assert "influence." not in re.sub(r"influence store", "", code)
    names: dict[str, Any] = {}
    exec(re.sub(r"^(losses|found) = .*$", "", code, flags=re.MULTILINE), names)
    return names


def test_numpy_alone_reads_all_of_them() -> None:
    """By the code of docs/formats.md."""
    page = alone()
    rows, losses = [], []
    for number in range(2):
        path = HERE / "index" / f"shard-0000{number}.h5"
        rows.append(page["tensor_of"](path, "rows").astype("f4") * page["tensor_of"](path, "scale"))
        losses += page["tensor_of"](path, "loss").tolist()
    assert losses == VALUES["index"]["loss"]
    first = page["head_of"](HERE / "index" / "index.h5")["about"]["blocks"][0]
    block = numpy.concatenate(rows)[:, first["first"] : first["last"] + 1].reshape(-1, *first["shape"])
    assert block.tolist() == VALUES["index"]["rows"][first["name"]]
    for name, said in VALUES["factors"]["blocks"].items():
        got = page["curvature"](HERE / "factors.h5", name)
        vectors = [torch.tensor(each, dtype=torch.float64) for each in said["vectors"] if each is not None]
        basis = torch.kron(*vectors) if len(vectors) == 2 else None
        if basis is not None:
            spectrum = torch.tensor(said["corrected"], dtype=torch.float64).flatten()
            expected = basis @ spectrum.diag() @ basis.mT
            torch.testing.assert_close(torch.from_numpy(got).double(), expected, rtol=1e-5, atol=1e-7)
    assert page["tensor_of"](HERE / "run" / "run.h5", "0/sampling_loss").tolist() == VALUES["run"]["loss"]
    ones = numpy.ones(len(rows[0][0]))
    assert page["scores"](HERE / "index", first["name"], ones[: numpy.prod(first["shape"])]).shape == (6,)


@pytest.mark.parametrize(("version", "words"), [(0, "an older version .*make it again"), (2, "use the version that")])
@pytest.mark.parametrize("what", ["index", "factors", "run", "manifest", "store"])
def test_another_version_is_refused_by_name(what: str, version: int, words: str, tmp_path: Path) -> None:
    for name in ("index", "run"):
        shutil.copytree(HERE / name, tmp_path / name)
    shutil.copy(HERE / "factors.h5", tmp_path)
    path = {"manifest": tmp_path / "run/run.json", "run": tmp_path / "run/run.h5", "index": tmp_path / "index/index.h5"}
    path = path.get(what, tmp_path / "factors.h5")
    if what == "manifest":
        text = path.read_text()
        path.write_text(text.replace(f'"schema": {folder.SCHEMA}', f'"schema": {version}'))
        words = f"run.json is of .*schema {version}, this version reads 1.*{words.rpartition('.*')[2]}"
    elif what == "store":
        path.write_bytes(path.read_bytes().replace(b"influence store 1", b"influence store %d" % version, 1))
        words = f"of format {version}, and this version reads 1 .*use the version that wrote it, or make it again"
    else:
        head = store.any_head(path)
        store.write(path, {}, head.about, kind=head.kind, schema=version, run=head.run)
        words = f"{path.name} is of .*{words}"
    read = {"index": lambda: open_index(tmp_path / "index"), "run": lambda: sgmcmc.load(tmp_path / "run")}
    read |= {"manifest": read["run"], "factors": lambda: hessians.load(path), "store": lambda: hessians.load(path)}
    with pytest.raises(store.BadFileError, match=words):
        read[what]()
    assert root.SCHEMA == 1
