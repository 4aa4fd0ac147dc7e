"""Files of ours that somebody made to say something else, checksums and all: factors, and the best of scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import as_blocks, chain, functionalize, hessians, per_example_grads, precondition, store
from influence.cli import main
from influence.func.top import Top
from influence.hessians.factors import SCHEMA
from influence.pipelines.passes.best import read_best, write_best
from influence.store import BadFileError
from tests.damage import changes

BATCH = {"input": torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]]), "labels": torch.tensor([0, 1, 1])}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Any]:
    """What a file of K-FAC factors of two blocks holds."""
    net = functionalize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), targets="*weight")
    path = tmp_path_factory.mktemp("factors") / "factors.h5"
    hessians.kfac.fit(*net, [BATCH], labels="exact", progress=False, transform=as_blocks()).save(path)
    return store.read(path, kind="factors", schema=SCHEMA)


def write(path: Path, tensors: dict[str, Tensor], about: Any) -> Path:
    store.write(path, tensors, about, kind="factors", schema=SCHEMA)
    return path


def test_any_fact_of_factors_of_another_type_is_refused_by_the_file(tmp_path: Path, kept: Any) -> None:
    tensors, about = kept
    whole = {**json.loads(json.dumps(about)), "function": None}  # a fingerprint, which may hold anything
    assert len(hessians.load(write(tmp_path / "factors.h5", tensors, whole)).blocks) == 2
    refused, taken = 0, 0
    for change in changes(whole):
        path = write(tmp_path / "factors.h5", tensors, change)
        try:
            factors = hessians.load(path)
        except BadFileError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 -- or what it now says is factors too
            refused += 1
        else:
            assert str(factors)
            assert factors.trace >= 0
            assert precondition(factors).steps
            taken += 1
    assert refused > 10 * taken


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda x: x.index_fill(0, torch.tensor(0), float("nan")),
    "infinite": lambda x: x.index_fill(0, torch.tensor(0), float("inf")),
    "longer": lambda x: torch.cat([x, x]),
    "whole numbers": lambda x: x.long(),
    "truths": lambda x: x.bool(),
    "of another rank": lambda x: x[None],
}


@pytest.mark.parametrize("how", TENSORS)
def test_any_tensor_of_factors_that_is_none_is_refused_by_its_block(tmp_path: Path, kept: Any, how: str) -> None:
    tensors, about = kept
    for name in tensors:
        path = write(tmp_path / "factors.h5", {**tensors, name: TENSORS[how](tensors[name])}, about)
        with pytest.raises(
            BadFileError, match=f"^{path} is not what it says: its block '[02]?.*weight|^{path}.*'[01]'"
        ):
            hessians.load(path)


def test_negative_eigenvalues_and_missing_tensors_are_refused(tmp_path: Path, kept: Any) -> None:
    tensors, about = kept
    values = next(name for name in tensors if "values" in name)
    path = write(tmp_path / "factors.h5", {**tensors, values: -tensors[values] - 1}, about)
    with pytest.raises(BadFileError, match="negative eigenvalues"):
        hessians.load(path)
    write(path, {name: x for name, x in tensors.items() if name != values}, about)
    with pytest.raises(BadFileError, match=f"it has no tensor '{values}'"):
        hessians.load(path)


ODD = ("", "..", "../../x", "a/b", "\n", "\x1b[2J", "\u202egnp", "x" * 5000, "__class__", "0", "#", "a\x00b")


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_blocks_of_odd_names_are_refused_or_not_met(tmp_path: Path, kept: Any, name: str, capsys: Any) -> None:
    tensors, about = kept
    blocks = list(about["blocks"].values())
    path = tmp_path / "factors.h5"
    write(path, tensors, {**about, "positions": {}, "blocks": {name: blocks[0], "1": blocks[1]}})
    loss_fn, params = functionalize(nn.Linear(2, 3), targets="*weight")
    batch = {"input": BATCH["input"], "labels": torch.tensor([0, 1, 2])}
    root = precondition(hessians.load(path))
    with pytest.raises(ValueError, match="weight"):
        per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), root))
    assert main(["inspect", str(tmp_path)]) in (0, 1)
    assert "unexpected" not in capsys.readouterr().err


def heaps(**changed: Tensor) -> dict[str, Top]:
    whole = Top(torch.tensor([[2.0, 1.0]]), torch.tensor([[4, 5]]))
    return {name: whole._replace(**changed) for name in ("query0/best", "query0/worst")}


def test_the_best_of_scores_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.h5"
    write_best(path, "", heaps(), ["q"], "individual")
    assert read_best(path)["query0/best"].indices.tolist() == [[4, 5]]
    bad = [
        heaps(values=torch.tensor([2.0, 1.0])),
        heaps(values=torch.tensor([[2, 1]])),
        heaps(indices=torch.tensor([[4]])),
        heaps(indices=torch.tensor([[4.0, 5.0]])),
        {"query0/best": heaps()["query0/best"]},
        {"query1/best": heaps()["query0/best"], "query1/worst": heaps()["query0/best"]},
        {"x": heaps()["query0/best"], "y": heaps()["query0/best"]},
        {},
    ]
    for found in bad:
        write_best(path, "", found, ["q"], "individual")
        with pytest.raises(BadFileError, match=f"^{path} is not what it says"):
            read_best(path)
