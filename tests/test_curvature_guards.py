"""What a hostile reviewer found in the curvature fits: each row is a wrong number or a crash that was."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence import (
    as_blocks,
    chain,
    eigen_whiten,
    functionalize,
    hessians,
    kept_energy,
    one_sided,
    per_example_grads,
    precondition,
    project,
    similarity,
    two_sided,
)
from influence.func.transform.curvature import Basis, Curvature, decompose, inverse_weights
from tests import cases
from tests.test_curvature import BLOCKS, FITS, classes, data, error, functions, mlp, net, with_index


class Branches(nn.Module):
    """Convolutions of one input: other strides, dilations and paddings see other patches of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
        self.c, self.d = nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.tanh(self.a(input) + self.b(input) + self.d(input)).mean((2, 3))
        return self.head(wide + self.c(input).mean((2, 3)))


def test_convolutions_of_one_input_share_nothing() -> None:
    model = Branches().double()
    batch = with_index({"input": data(3, 3, 6, 6), "labels": classes(3)})
    factors = hessians.kfac.fit(
        *functionalize(model, targets=["a.*", "b.*", "c.*", "d.*"]), [batch], labels="data", transform=BLOCKS
    )
    for name, conv in (("a", model.a), ("b", model.b), ("c", model.c), ("d", model.d)):
        patches = F.unfold(batch["input"], conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        x = F.pad(patches.mT.flatten(0, 1), (0, 1), value=1.0)
        basis = factors.blocks[name].bases[1]
        got = basis.vectors @ torch.diag(basis.values) @ basis.vectors.mT
        assert error(got, x.mT @ x / len(x)) <= 1e-12, name
        assert factors.positions[name] == len(x)


def test_embeddings_of_the_same_tokens_share_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.a(ids) + self.b(ids)).mean(1))

    ids = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 1, 1]])
    loss_fn, params = functionalize(Two().double(), targets=["a.*", "b.*"], loss="cross_entropy")
    factors = hessians.kfac.fit(
        loss_fn, params, [with_index({"ids": ids, "labels": classes(3)})], labels="data", transform=BLOCKS
    )
    counts = torch.bincount(ids.flatten(), minlength=5).double()
    a, b = (factors.blocks[name].bases[0].values for name in ("a", "b"))
    torch.testing.assert_close(b, counts / 3)
    torch.testing.assert_close(a, counts.index_fill(0, torch.tensor([0]), 0.0) / 3)


class Optional(nn.Module):
    """A second input that some batches lack; a layer whose result goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.lost, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        self.lost(input)
        x = torch.tanh(self.a(input))
        return self.head(x if other is None else x + torch.tanh(self.b(other)))


@pytest.mark.parametrize("method", [*FITS, "ekfac"])
def test_a_block_that_a_batch_does_not_use_keeps_what_other_batches_give_it(method: str) -> None:
    loss_fn, params = functionalize(Optional().double(), loss="cross_entropy")
    without = {"input": data(3, 4), "labels": classes(3), "index": torch.arange(3)}
    beside = {
        "input": data(3, 4, seed=5),
        "other": data(3, 4, seed=6),
        "labels": classes(3),
        "index": torch.arange(3, 6),
    }
    fit = getattr(hessians, method).fit
    first, last = (
        fit(loss_fn, params, batches, labels="data", transform=BLOCKS)
        for batches in ([without, beside], [beside, without])
    )
    assert first.blocks["b"].moment(1) > 0
    for name, curvature in first.blocks.items():
        if name != "lost":
            assert error(curvature.dense(), last.blocks[name].dense()) <= 1e-12, name
    # what runs but does not reach the loss has no curvature, and says so
    assert first.blocks["lost"].moment(1) == 0
    assert "no gradient reached it" in first.notes["lost"]
    with pytest.raises(ValueError, match=r"the curvature of 1 blocks is zero \(lost\)"):
        per_example_grads(loss_fn, params, beside, transform=chain(BLOCKS, precondition(first)))
    rows = per_example_grads(loss_fn, params, beside, transform=chain(BLOCKS, precondition(first, missing="identity")))
    assert (rows["lost"] == 0).all()
    assert kept_energy(first, 2)["lost"] == 0.0


@pytest.mark.parametrize("method", ["kfac", "tkfac"])
def test_ranks_that_saw_other_blocks_merge(method: str) -> None:
    loss_fn, params = functionalize(Optional().double(), loss="cross_entropy")
    without = {"input": data(3, 4), "labels": classes(3)}
    beside = without | {"other": data(3, 4, seed=6)}
    module = getattr(hessians, method)
    steps = [
        hessians.step(loss_fn, params, batch, module.build(), transform=BLOCKS, labels="data")
        for batch in (without, beside)
    ]
    sinks = [step.sink() for step in steps]
    index = torch.arange(3)
    states = [
        sink.update(sink.init(), index, step(batch))
        for sink, step, batch in zip(sinks, steps, (without, beside), strict=True)
    ]
    merged = sinks[0].finalize(sinks[0].merge(*states))
    whole = module.fit(loss_fn, params, [beside, without], labels="data", transform=BLOCKS)
    for name, curvature in whole.blocks.items():
        assert error(merged.blocks[name].dense(), curvature.dense()) <= 1e-12 or name == "lost"


@pytest.mark.parametrize("method", [*FITS, "ekfac"])
def test_exact_labels_of_a_batch_without_labels_bring_nothing(method: str) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    none = batch | {"labels": torch.full((6,), -100)}
    fit = getattr(hessians, method).fit
    assert fit(loss_fn, params, [none], labels="exact", transform=BLOCKS).trace == 0
    both = fit(loss_fn, params, [batch, none], labels="exact", transform=BLOCKS)
    alone = fit(loss_fn, params, [batch], labels="exact", transform=BLOCKS)
    assert both.trace == pytest.approx(alone.trace / 2)


def test_weights_of_examples_weigh_their_curvature() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    factors = hessians.autocorrelation.fit(
        loss_fn, params, [batch | {"weight": weight}], transform=BLOCKS, labels="exact"
    )
    each = [
        hessians.autocorrelation.fit(
            loss_fn, params, [{k: x[i : i + 1] for k, x in batch.items()}], transform=BLOCKS, labels="exact"
        )
        for i in range(6)
    ]
    for block, curvature in factors.blocks.items():
        expected = sum(w * one.blocks[block].dense() for w, one in zip(weight, each, strict=True)) / 6
        assert error(curvature.dense(), expected) <= 1e-10
    with pytest.raises(ValueError, match="a negative weight turns a likelihood upside down"):
        hessians.kfac.fit(loss_fn, params, [batch | {"weight": -weight}], transform=BLOCKS)


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert_classifier"])
def test_padding_may_come_with_a_later_batch(case: str) -> None:
    found = next(c for c in cases.CASES if c.name == case)
    targets = {"gpt2": "*mlp*", "llama": "*mlp*", "bert_classifier": "*output.dense*"}[case]
    loss_fn, params = functionalize(found.make(), targets=targets)
    plain, padded = with_index(found.batch(3, 5, False)), with_index(found.batch(3, 5, True))
    masked = plain | {"attention_mask": torch.ones_like(plain["input_ids"])}
    one = hessians.kfac.fit(loss_fn, params, [plain, padded], labels="data", transform=BLOCKS)
    for batches in ([padded, plain], [masked, padded], [padded, masked]):
        other = hessians.kfac.fit(loss_fn, params, batches, labels="data", transform=BLOCKS)
        for name, curvature in one.blocks.items():
            assert error(curvature.dense(), other.blocks[name].dense()) <= 1e-10, name
        assert one.positions == other.positions


def test_padding_of_an_encoder_and_a_decoder_is_refused_and_without_it_both_fit() -> None:
    found = next(c for c in cases.CASES if c.name == "t5")
    loss_fn, params = functionalize(found.make(), targets="*SelfAttention.q*")
    with pytest.raises(ValueError, match="an encoder and a decoder have positions of their own"):
        hessians.kfac.fit(loss_fn, params, [found.batch(3, 5, True)], labels="data", transform=BLOCKS)
    batch = found.batch(3, 5, False)
    whole = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS)
    pieces = [{key: x[i : i + 1] for key, x in batch.items()} for i in range(3)]
    split = hessians.kfac.fit(loss_fn, params, pieces, labels="data", transform=BLOCKS)
    for name, curvature in whole.blocks.items():
        assert error(curvature.dense(), split.blocks[name].dense()) <= 1e-10, name
    assert hessians.shampoo.fit(loss_fn, params, [found.batch(3, 5, True)], labels="data", transform=BLOCKS).trace > 0


# Inverses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pseudoinverse_without_damping_inverts_no_rounding(dtype: torch.dtype) -> None:
    x = data(10, 30).to(dtype)
    h = x.mT @ x / 10
    curvature = Curvature((30,), (decompose(h, "h"),))
    weights = inverse_weights(curvature, -1.0, 0.0, "pseudoinverse").grid
    q = curvature.bases[0].vectors.double()
    expected = torch.linalg.pinv(h.double(), hermitian=True, rtol=1e-5)
    assert error((q * weights) @ q.mT, expected) <= (1e-9 if dtype == torch.float64 else 1e-3)
    with pytest.raises(ValueError, match="no inverse without damping"):
        inverse_weights(curvature, -1.0, 0.0, "tikhonov")
    assert torch.equal(inverse_weights(curvature, 0.0, 0.0, "damped").grid, torch.ones(30, dtype=torch.float64))


def test_blocks_without_a_gradient_in_theory_are_not_whitened_to_full_size() -> None:
    # a key's bias under softmax: its rows are rounding, and so is its curvature
    found = next(c for c in cases.CASES if c.name == "bert_classifier")
    loss_fn, params = functionalize(found.make(), targets="*layer.0.attention.self*")
    batch = with_index(found.batch(4, 4, False))
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks())
    query = per_example_grads(loss_fn, params, batch, transform=one_sided(factors).query)
    name = next(block for block in query if block.endswith("key.bias"))
    assert float(query[name].norm()) < 1e-10


def test_a_covariance_may_be_negative_by_rounding_and_no_more() -> None:
    with pytest.raises(ValueError, match="no covariance"):
        decompose(torch.tensor([-1.0, *[1.0] * 1_000_000]), "x")
    h = torch.eye(200, dtype=torch.float32)
    h[0, 0] = -1e-6
    assert float(decompose(h, "x").values.min()) == 0.0
    h[0, 0] = -1e-3
    with pytest.raises(ValueError, match="no covariance"):
        decompose(h, "x")


# Provenance and messages


def test_frozen_weights_and_the_reduction_are_part_of_the_model() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = with_index({"input": data(6, 5), "labels": classes(6)})
    factors = hessians.kfac.fit(*functionalize(model, loss="cross_entropy", targets="2.*"), [batch], transform=BLOCKS)
    with pytest.raises(ValueError, match="reduction='sum'; this one has 'mean'"):
        hessians.ekfac.correct(
            factors, *functionalize(model, loss="cross_entropy", targets="2.*", reduction="mean"), [batch]
        )
    with torch.no_grad():
        model[0].weight.mul_(5)
    with pytest.raises(ValueError, match="fitted at other weights"):
        hessians.ekfac.correct(factors, *functionalize(model, loss="cross_entropy", targets="2.*"), [batch])


def test_short_sides_and_vectors_are_told() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", max_side=4, transform=BLOCKS)
    assert factors.notes["0"] == "its right side is a diagonal"
    assert "note: 0: its right side is a diagonal" in str(factors)
    shampoo = hessians.shampoo.fit(loss_fn, params, [batch], labels="data", transform=as_blocks())
    assert shampoo.notes["0.bias"] == "diagonal: a vector"
    with pytest.raises(ValueError, match="adds all blocks into one vector"):
        hessians.shampoo.fit(loss_fn, params, [batch], transform=chain(BLOCKS, project(7, target="global")))


def test_one_batch_is_no_list_of_batches() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    for one in (batch, (batch["input"], batch["labels"])):
        with pytest.raises(
            ValueError, match=r"batches is one batch, a (dict|tuple); pass a list of batches, \[batch\]"
        ):
            hessians.ekfac.fit(loss_fn, params, one, transform=BLOCKS)


@pytest.mark.parametrize(("index", "fits"), [(torch.arange(6, dtype=torch.int32), True), (torch.ones(6) > 0, False)])
def test_rows_of_the_dataset_are_whole_numbers(index: Tensor, fits: bool) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    if fits:
        expected = hessians.kfac.fit(loss_fn, params, [batch | {"index": index.long()}], transform=BLOCKS)
        assert hessians.kfac.fit(loss_fn, params, [batch | {"index": index}], transform=BLOCKS).trace == expected.trace
    else:
        with pytest.raises(ValueError, match="'index', int64"):
            hessians.kfac.fit(loss_fn, params, [batch | {"index": index}], transform=BLOCKS)


def test_a_long_diagonal_side_is_cut_without_a_square_matrix() -> None:
    spectrum = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) + 0.1
    curvature = Curvature((50_000, 3), (Basis(None, spectrum), decompose(torch.eye(3), "a")))
    from influence.func.transform.whiten import _rows_of, strongest

    (kept, _) = strongest(curvature, 0.1, "damped", 4)
    rows = _rows_of(None, kept, spectrum)
    assert rows.shape == (4, 50_000)
    assert torch.equal(rows.argmax(1), kept)


def test_written_files_obey_the_umask(tmp_path: Any) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    factors = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS)
    before = os.umask(0o027)
    try:
        factors.save(tmp_path / "factors.h5")
    finally:
        os.umask(before)
    assert (tmp_path / "factors.h5").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["factors.h5"]


def test_the_inverse_is_applied_once_in_any_product() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    factors = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS)
    inverse = per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, precondition(factors)))
    half = per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, precondition(factors, power=-0.5)))
    plain = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    for pair in ((inverse, inverse), (inverse, half), (half, inverse)):
        with pytest.raises(ValueError, match="would apply an inverse more than once"):
            similarity.dot(*pair)
    for pair in ((inverse, plain), (half, half), (plain, plain)):
        assert similarity.dot(*pair).shape == (6, 6)


def test_sides_take_loaded_factors_partial_coverage_and_slices(tmp_path: Any) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    under = chain(BLOCKS, project(3))
    hessians.kfac.fit(loss_fn, params, [batch], transform=under).save(tmp_path / "factors.h5")
    loaded = hessians.load(tmp_path / "factors.h5")
    with pytest.raises(ValueError, match="cannot be restored from it: pass transform="):
        two_sided(loaded)
    with pytest.raises(ValueError, match="fitted under chain"):
        two_sided(loaded, transform=BLOCKS)
    sides = two_sided(loaded, transform=under)
    rows = per_example_grads(loss_fn, params, batch, transform=sides.query)
    some = {name: row[:2] for name, row in rows.items()}
    with pytest.raises(ValueError, match="unchecked=True"):
        sides.scores(some, rows)
    torch.testing.assert_close(sides.scores(some, rows, unchecked=True), sides.scores(rows, rows)[:2])
    # the eigenbasis of projected rows
    cut = chain(under, eigen_whiten(loaded, 2))
    assert per_example_grads(loss_fn, params, batch, transform=cut)["0"].shape == (6, 2, 2)
