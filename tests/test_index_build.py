"""`build`: any data and any loss; in memory, on disk and streamed are one thing; against the dense float64 oracle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import influence
from influence import as_blocks, chain, fold, functionalize, per_example_grads_fn, per_token_grads, project, sinks
from influence.func.engine.per_token import per_token_grads_fn
from influence.index import Columns, Index, build, memory_sink, open_index, root, step_of
from tests.cases import CASES
from tests.oracles import loop

CASE = {case.name: case for case in CASES}
SMALL = chain(as_blocks(bias=True), project(3))


def setup(name: str, reduction: str = "sum", padded: bool = False) -> tuple[Any, dict[str, Tensor], Any, loop.Truth]:
    case = CASE[name]
    loss_fn, params = functionalize(
        case.make(), loss=case.user_loss(reduction), reduction=reduction, targets=case.targets
    )
    batch = case.batch(4, 6, padded)
    return loss_fn, params, batch, loop.per_example(case.exact(), batch, case.oracle_loss(reduction), reduction)


def split(batch: Any, sizes: list[int]) -> Iterator[Any]:
    begin = 0
    for size in sizes:
        chosen = slice(begin, begin + size)
        yield {k: v[chosen] for k, v in batch.items()} if isinstance(batch, dict) else tuple(x[chosen] for x in batch)
        begin += size


def same(one: Index, other: Index) -> None:
    assert torch.equal(one.matrix(), other.matrix())
    for name in ("loss", "length", "index", "offsets", "document"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.blocks == other.blocks
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("engine", ["batched", "vmap", "loop"])
@pytest.mark.parametrize("name", ["gpt2", "conv2d", "bert_tokens", "bare"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_come_from_the_same_forward_in_every_engine(name: str, engine: str, reduction: str) -> None:
    """The loss of a chunk; a loss before its reduction; the losses of another order than the rows'."""
    loss_fn, params, batch, truth = setup(name, reduction)
    calls: list[int] = []

    def counted(params: dict[str, Tensor], batch: Any) -> Tensor:
        calls.append(1)
        return loss_fn(params, batch)

    for chunk_size in (None, 3):
        rows_of = per_example_grads_fn(counted, params, batch, engine=engine, chunk_size=chunk_size)
        rows_of(params, batch)
        calls.clear()
        rows, losses = rows_of.with_losses(params, batch)
        assert loop.error(rows, {k: truth.rows[k] for k in rows}).value <= 1e-9
        torch.testing.assert_close(losses, truth.losses.to(losses), rtol=1e-10, atol=1e-12)
        assert losses.dtype == torch.float64
        assert not losses.requires_grad
        assert all(torch.equal(row, rows[key]) for key, row in rows_of(params, batch).items())


@pytest.mark.parametrize("name", ["gpt2", "llama_left", "resnet_groupnorm", "bert_classifier", "lora"])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
def test_an_index_holds_the_oracles_rows_and_losses(tmp_path: Path, name: str, sizes: list[int]) -> None:
    """Images in tuples without `index`, padded text, adapters; scores are `G G^T` of the dense gradients."""
    loss_fn, params, batch, truth = setup(name, padded=bool(CASE[name].pads))
    if CASE[name].strip is False:
        truth = loop.per_example(CASE[name].exact(), batch, CASE[name].oracle_loss("sum"))
    index = build(loss_fn, params, split(batch, sizes), dtype="float64")
    assert loop.error(index.rows(), {key: truth.rows[key] for key in params}).value <= 1e-9
    torch.testing.assert_close(index.loss, truth.losses, rtol=1e-10, atol=1e-12)
    dense = torch.cat([truth.rows[key].flatten(1) for key in params], 1)
    torch.testing.assert_close(index.matrix() @ index.matrix().mT, dense @ dense.mT, rtol=1e-9, atol=1e-9)
    if isinstance(batch, dict) and "attention_mask" in batch:
        assert torch.equal(index.length, batch["attention_mask"].sum(1))
    stored = build(loss_fn, params, split(batch, sizes), tmp_path / "run", dtype="float64", shard_size=2)
    same(index, stored)
    assert index.fingerprint.recorded["reduction"] == "sum"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("per_token", [None, "use", "loss"])
def test_in_memory_is_on_disk_is_streamed(tmp_path: Path, dtype: str, per_token: str | None) -> None:
    """Another rounding, or another order of documents, on the way to the disk."""
    case = CASE["gpt2"]
    loss_fn, params = functionalize(case.make(), targets="transformer.h.*weight", exclude="*ln*")
    batch = case.batch(7, 6, padded=True)
    how: Any = {"transform": SMALL, "dtype": dtype, "per_token": per_token}
    memory = build(loss_fn, params, split(batch, [3, 3, 1]), **how)
    disk = build(loss_fn, params, list(split(batch, [3, 3, 1])), tmp_path / "one", **how)
    streamed = build(loss_fn, params, split(batch, [3, 3, 1]), tmp_path / "many", shard_size=1, **how)
    assert len(streamed.about.shards) == 3
    same(memory, disk)
    same(memory, streamed)
    streamed.verify()
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    shuffled = {**{k: v[order] for k, v in batch.items()}, "index": order}
    again = build(loss_fn, params, split(shuffled, [2, 5]), **how)
    assert torch.equal(again.index, memory.index)
    torch.testing.assert_close(
        again.matrix(),
        memory.matrix(),
        rtol=2e-2,
        atol=1e-6 * float(memory.matrix().abs().max()) + 1e-2 * (dtype == "int8"),
    )


@pytest.mark.parametrize("position", ["use", "loss"])
def test_token_rows_and_losses_planned_once(position: str) -> None:
    """A plan for every batch; token rows that are not those of `per_token_grads`, or do not sum to the example's."""
    case = CASE["gpt2"]
    targets = "transformer.h.*.weight"
    loss_fn, params = functionalize(case.make(), targets=targets, exclude="*ln*", reduction="mean")
    batch = case.batch(4, 6, padded=True)
    truth = loop.per_example(case.exact(), batch, "causal", "mean")
    tokens_of = per_token_grads_fn(loss_fn, params, case.batch(3, 5), position=position)
    found, losses = tokens_of.with_losses(params, batch)
    expected = per_token_grads(loss_fn, params, batch, position=position)
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.positions, expected.positions)
    assert all(torch.equal(row, expected.rows[key]) for key, row in found.rows.items())
    torch.testing.assert_close(losses, truth.losses, rtol=1e-10, atol=1e-12)
    index = build(loss_fn, params, split(batch, [2, 2]), dtype="float64", per_token=position)
    for i in range(4):
        summed = {key: row.sum(0, keepdim=True) for key, row in index.tokens(i).items()}
        assert loop.error(summed, {key: truth.rows[key][i : i + 1] for key in params}).value <= 1e-9
    place = index.place(torch.arange(len(index)))
    assert torch.equal(place.document, index.index.repeat_interleave(index.offsets.diff()))
    assert torch.equal(place.position, expected.positions)


def test_an_empty_document_is_a_zero_row(tmp_path: Path) -> None:
    """NaN from a mean of nothing; an offset that shifts the next document's tokens."""
    case = CASE["gpt2"]
    batch = case.batch(4, 6, padded=True)
    batch["attention_mask"][1] = 0
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    for reduction in ("sum", "mean"):
        loss_fn, params = functionalize(case.make(), targets="*mlp*weight", reduction=reduction)
        for per_token in (None, "use", "loss"):
            index = build(loss_fn, params, [batch], dtype="float16", per_token=per_token)
            assert index.loss[1] == 0
            assert index.length[1] == 0
            begin, end = (int(x) for x in index.offsets[1:3])
            assert not index.matrix(begin, end).any()
            assert (end - begin) == (1 if per_token is None else 0)
            assert bool(torch.isfinite(index.matrix()).all())
            assert "1 empty examples" in str(index)


def test_one_pass_feeds_several_sinks_with_one_forward_per_batch() -> None:
    """A second forward for the losses, or for the second sink."""
    loss_fn, params, batch, _ = setup("mlp")
    batches = list(split(batch, [3, 1]))
    calls: list[int] = []

    def counted(params: dict[str, Tensor], batch: Any) -> Tensor:
        calls.append(1)
        return loss_fn(params, batch)

    step, plan = step_of(counted, params, batches[0], transform=SMALL, engine="vmap")
    columns = Columns(plan.folded.row_shapes)
    seeing = {
        name: sinks.taking(sink(), lambda value: value.rows)
        for name, sink in {"mean": sinks.mean, "gram": sinks.gram}.items()
    }
    calls.clear()
    found = fold(lambda batch: step(params, batch), batches, {"index": memory_sink(columns, "float64"), **seeing})
    assert len(calls) == 2
    rows = build(loss_fn, params, batches, dtype="float64", transform=SMALL, engine="vmap").rows()
    assert torch.equal(columns.split(found["index"]["rows"])["0"], rows["0"])
    torch.testing.assert_close(found["mean"]["0"], rows["0"].mean(0), rtol=1e-12, atol=1e-12)
    flat = rows["2"].flatten(1)
    torch.testing.assert_close(found["gram"]["2"], flat.mT @ flat / 4, rtol=1e-12, atol=1e-12)


def test_appending_counts_on(tmp_path: Path) -> None:
    loss_fn, params, batch, _ = setup("mlp")
    path = tmp_path / "run"
    build(loss_fn, params, split(batch, [1, 1]), path, dtype="float16", transform=SMALL)
    (rest,) = split({str(i): x[2:] for i, x in enumerate(batch)}, [2])
    index = build(loss_fn, params, [tuple(rest.values())], path, dtype="float16", transform=SMALL, append=True)
    same(index, build(loss_fn, params, split(batch, [1, 1, 2]), dtype="float16", transform=SMALL))
    tuples = {"x": batch[0], "y": batch[1], "index": torch.arange(4)}
    pair = lambda batch: (batch["x"], batch["y"]) if isinstance(batch, dict) else batch  # noqa: E731
    named = lambda params, batch: loss_fn(params, pair(batch))  # noqa: E731
    named.layout = loss_fn.layout  # type: ignore[attr-defined]
    for known in ("reduction", "name", "settings", "function"):
        setattr(named, known, getattr(loss_fn, known))
    with pytest.raises(ValueError, match=r"a batch holds row 0 of the dataset, and .* has rows up to 3: count on"):
        build(named, params, [tuples], path, dtype="float16", transform=SMALL, append=True, weights=weights_of(path))
    with pytest.raises(ValueError, match=r"Its project.dim is 3, and this run's is 2"):
        build(loss_fn, params, [batch], path, transform=chain(as_blocks(bias=True), project(2)), append=True)
    with pytest.raises(ValueError, match=r"has dtype = \"float16\"; appended rows must have it too, got \"float32\""):
        build(loss_fn, params, [batch], path, transform=SMALL, append=True, dtype="float32")
    assert len(open_index(path)) == 4
    open_index(path).verify()


def test_an_append_that_was_killed_before_its_root_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that names shards which the root does not: they were counted twice, or never."""
    loss_fn, params, batch, _ = setup("mlp")
    parts, path = list(split(batch, [1, 1, 1, 1])), tmp_path / "run"
    build(loss_fn, params, parts[:1], path, transform=SMALL)
    written = root.write_root

    def killed(directory: Path, about: Any, run: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(root, "write_root", killed)
    with pytest.raises(KeyboardInterrupt):
        build(loss_fn, params, parts[1:3], path, transform=SMALL, append=True, shard_size=1)
    monkeypatch.setattr(root, "write_root", written)
    assert len(open_index(path)) == 1
    index = build(loss_fn, params, parts[3:], path, transform=SMALL, append=True)
    same(index, build(loss_fn, params, parts, transform=SMALL))


def weights_of(path: Path) -> str:
    return open_index(path).fingerprint.weights


def test_what_build_refuses(tmp_path: Path) -> None:
    loss_fn, params, batch, _ = setup("mlp")
    with pytest.raises(ValueError, match="there is no batch"):
        build(loss_fn, params, [])
    with pytest.raises(ValueError, match=r"one of float32, float64, .*; got dtype='float8'"):
        build(loss_fn, params, [batch], dtype="float8")
    with pytest.raises(ValueError, match="pass path="):
        build(loss_fn, params, [batch], overwrite=True)
    with pytest.raises(ValueError, match="per-token rows need the batched engine"):
        build(loss_fn, params, [batch], per_token="use", engine="loop")
    repeated = {"x": batch[0], "index": torch.tensor([0, 1, 1, 2])}
    with pytest.raises(ValueError, match="row 1 of the dataset came more than once"):
        build(lambda p, b: (b["x"].flatten(1) ** 2 * p["w"]).sum(1), {"w": torch.ones(4).double()}, [repeated])
    path = tmp_path / "run"
    build(loss_fn, params, [batch], path, command=["make", "index"])
    with pytest.raises(FileExistsError, match=r"finished; 1 of 1 shards, .*made by: make index"):
        build(loss_fn, params, [batch], path)
    build(loss_fn, params, [batch], path, overwrite=True)


def test_a_build_that_fails_leaves_a_run_that_says_so(tmp_path: Path) -> None:
    loss_fn, params, batch, _ = setup("mlp")

    def failing() -> Iterator[Any]:
        yield from split(batch, [1, 1])
        raise RuntimeError("the stream broke")

    with pytest.raises(RuntimeError, match="the stream broke"):
        build(loss_fn, params, failing(), tmp_path / "run", shard_size=1)
    with pytest.raises(ValueError, match=r"\(unfinished; 2 shards, .*begin again with overwrite=True"):
        open_index(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"so it cannot be resumed: pass overwrite=True"):
        build(loss_fn, params, [batch], tmp_path / "run")
    build(loss_fn, params, [batch], tmp_path / "run", overwrite=True).verify()


def test_a_bar_is_shown_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    """`progress=True` was called as a function: `'bool' object is not callable`."""
    loss_fn, params, batch, _ = setup("gpt2")
    build(loss_fn, params, [*split(batch, [1, 3])], progress=True)
    shown = capsys.readouterr().err
    assert "build: 100%" in shown
    assert "2/2" in shown
    assert "tokens=24" in shown
    build(loss_fn, params, [*split(batch, [1, 3])], progress=False)
    assert capsys.readouterr().err == ""


def test_the_surface_is_to_be_had_from_the_package() -> None:
    assert influence.build is build
    assert influence.open_index is open_index
