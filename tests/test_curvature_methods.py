"""Every method of the table: one contract, which a new line of it meets without being listed again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from influence import as_blocks, chain, functionalize, hessians, per_example_grads, precondition, unit_norm
from influence.pipelines import ekfac, hessian
from influence.pipelines.frame.configs import DataConfig, ModelConfig, TransformConfig
from tests import cases
from tests.oracles import kronecker
from tests.test_curvature import classes, data, error, net

METHODS = {
    **{name: build() for name, build in hessians.METHODS.items()},
    **{
        f"ekfac of {name}": hessians.ekfac.build(build())
        for name, build in hessians.METHODS.items()
        if build().kronecker
    },
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> hessians.Method:
    return METHODS[request.param]


def small(bias: bool = True) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    model = net(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))
    return *functionalize(model, loss="cross_entropy"), (data(6, 5), classes(6))


def pieces(batch: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


def equal(a: hessians.Factors, b: hessians.Factors) -> None:
    assert a.blocks.keys() == b.blocks.keys()
    assert (a.method, a.documents, a.positions, a.under, a.labels) == (
        b.method,
        b.documents,
        b.positions,
        b.under,
        b.labels,
    )
    for name, curvature in a.blocks.items():
        assert error(curvature.dense(), b.blocks[name].dense()) <= 1e-12, name


@pytest.mark.parametrize("bias", [True, False])
def test_defaults_meet_defaults(method: hessians.Method, bias: bool) -> None:
    loss_fn, params, batch = small(bias)
    factors = hessians.fit(loss_fn, params, [batch], method)
    assert factors.labels.source == method.default_labels
    plain = per_example_grads(loss_fn, params, batch, transform=as_blocks())
    rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), precondition(factors)))
    for name, curvature in factors.blocks.items():
        h = curvature.dense()
        damped = h + 0.1 * h.trace() / len(h) * torch.eye(len(h), dtype=h.dtype)
        expected = torch.linalg.solve(damped, plain[name].flatten(1).mT).mT
        assert error(rows[name].flatten(1), expected) <= 1e-9, name


def test_batches_merge_and_fold_to_the_whole(method: hessians.Method) -> None:
    loss_fn, params, batch = small()
    whole = hessians.fit(loss_fn, params, [batch], method)
    equal(hessians.fit(loss_fn, params, pieces(batch, 1, 3, 2), method), whole)
    factors = None
    for number in range(len(method.passes)):
        index, parts = torch.arange(6).split([2, 4]), pieces(batch, 2, 4)
        step = hessians.step(loss_fn, params, parts[0], method, number=number, factors=factors)
        sink = step.sink()
        states = [sink.update(sink.init(), i, step(part, i)) for i, part in zip(index, parts, strict=True)]
        factors = sink.finalize(sink.merge(sink.merge(sink.init(), states[1]), states[0]))
    assert factors is not None
    equal(factors, whole)


def test_one_datum_is_exact(method: hessians.Method) -> None:
    # one document of one position: G = g x^T, so every method is the Fisher (of data labels), or its diagonal
    loss_fn, params, batch = small(bias=False)
    one = tuple(part[:1] for part in batch)
    factors = hessians.fit(loss_fn, params, [one], method, labels="data")
    for name, row in per_example_grads(loss_fn, params, one, transform=as_blocks()).items():
        truth = row.flatten(1).mT @ row.flatten(1)
        truth = truth.diagonal().diag() if factors.blocks[name].kind == "diagonal" else truth
        assert error(factors.blocks[name].dense(), truth) <= 1e-12, name


def test_factors_are_saved_and_loaded(method: hessians.Method, tmp_path: Path) -> None:
    loss_fn, params, batch = small()
    factors = hessians.fit(loss_fn, params, [batch], method)
    factors.save(tmp_path)
    for path in (tmp_path, tmp_path / "factors.h5", str(tmp_path)):
        loaded = hessians.load(path)
        assert (repr(loaded), str(loaded), loaded.digest) == (repr(factors), str(factors), factors.digest)
    assert method.name in repr(factors) or factors.method.startswith("e")


def test_the_size_is_what_the_factors_hold(method: hessians.Method) -> None:
    loss_fn, params, batch = small()
    factors = hessians.fit(loss_fn, params, [batch], method)
    for name, c in factors.blocks.items():
        held = sum(b.values.numel() + (0 if b.vectors is None else b.vectors.numel()) for b in c.bases)
        assert method.entries(c.shape) == held + (0 if c.corrected is None else c.corrected.numel()), name


def test_the_room_and_the_command_line_follow_from_the_table() -> None:
    for name in hessians.METHODS:
        assert name in hessians.__all__
        assert callable(getattr(hessians, name).fit)
    assert get_args(hessian.MethodName) == (*hessians.METHODS,)
    assert {*get_args(hessian.BaseName)} == {"kfac", "tkfac", "shampoo"}


def test_the_methods_fit_is_fit_of_its_value() -> None:
    loss_fn, params, batch = small()
    for name, build in hessians.METHODS.items():
        equal(getattr(hessians, name).fit(loss_fn, params, [batch]), hessians.fit(loss_fn, params, [batch], build()))


def test_corrections_of_any_base_are_the_best_diagonal_in_its_basis() -> None:
    loss_fn, params, batch = small()
    transform = as_blocks(bias=True)
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    of = {"input": batch[0], "labels": batch[1]}
    seen = kronecker.watch(model, of, {"0": "0", "2": "2"}, "data", "class", "sum", bias=True)
    for base in ("kfac", "tkfac", "shampoo"):
        method = hessians.build("ekfac", base=base)
        factors = hessians.fit(loss_fn, params, [batch], method, labels="data", transform=transform)
        assert factors.method == f"e{base}"
        for name, c in factors.blocks.items():
            basis = torch.kron(*(b.vectors for b in c.bases))
            expected = torch.diag(basis.mT @ kronecker.fisher(seen, name) @ basis)
            assert error(c.corrected.flatten(), expected) <= 1e-11


# Options


def test_an_option_that_a_method_does_not_have_is_refused() -> None:
    there = ModelConfig("model"), DataConfig("data")
    with pytest.raises(ValueError, match="max_side is no option of autocorrelation, it has none"):
        hessians.build("autocorrelation", max_side=4)
    with pytest.raises(ValueError, match="base is no option of kfac, its options are max_side"):
        hessians.build("kfac", base="tkfac")
    with pytest.raises(ValueError, match=r"base=autocorrelation\(\) has no Kronecker factors"):
        hessians.build("ekfac", base="autocorrelation")
    with pytest.raises(ValueError, match="method must be one of kfac, ekfac"):
        hessians.build("kfacs")
    with pytest.raises(ValueError, match="max_side must be a finite number of at least 0"):
        hessians.kfac.build(-1)
    with pytest.raises(ValueError, match="max_side is no option of autocorrelation"):
        hessian.HessianConfig("run", *there, "autocorrelation", max_side=64)
    with pytest.raises(ValueError, match="whiten='kfac' is no option of this recipe"):
        ekfac.EkfacConfig("run", *there, there[1], transform=TransformConfig(whiten="kfac"))
    assert repr(hessians.build("ekfac", base="tkfac", max_side=3)) == "ekfac(base='tkfac', max_side=3)"


def test_methods_of_other_transforms_refuse_them() -> None:
    loss_fn, params, batch = small()
    with pytest.raises(ValueError, match=r"ekfac.* sees the batches twice"):
        hessians.fit(loss_fn, params, iter([batch]), hessians.ekfac.build())
    with pytest.raises(ValueError, match="tkfac needs a separable transform"):
        hessians.fit(loss_fn, params, [batch], hessians.tkfac.build(), transform=chain(as_blocks(), unit_norm()))


# Rows are numbered


def test_batches_without_an_index_are_counted() -> None:
    loss_fn, params, batch = small()
    named = {"input": batch[0], "labels": batch[1]}
    loader = DataLoader(TensorDataset(*batch), batch_size=4)
    method = hessians.ekfac.build()
    expected = hessians.fit(loss_fn, params, [named | {"index": torch.arange(6)}], method)
    for batches in ([batch], pieces(batch, 1, 5), [named], loader):
        equal(hessians.fit(loss_fn, params, batches, method), expected)
    other = hessians.fit(loss_fn, params, [named | {"index": torch.arange(6) + 1}], method)
    assert other.trace != expected.trace


class Cycle(torch.utils.data.Sampler):
    """An order that nobody knows."""

    def __iter__(self) -> Iterator[int]:
        return iter([2, 0, 1])

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("how", [{"shuffle": True}, {"sampler": Cycle()}, {"shuffle": True, "batch_size": None}])
def test_a_loader_that_shuffles_is_not_counted(how: dict[str, Any]) -> None:
    loss_fn, params, batch = small()
    sampler = type(DataLoader(TensorDataset(*batch), **how).sampler).__name__
    loader = DataLoader(TensorDataset(*batch), **({"batch_size": 2} | how))
    if how.get("batch_size", 2) is None:
        loader = DataLoader(TensorDataset(*(part[:, None] for part in batch)), **how)
    with pytest.raises(ValueError, match=f"have no 'index', and the {sampler} of their DataLoader may give another"):
        hessians.kfac.fit(loss_fn, params, loader)
    assert hessians.kfac.fit(loss_fn, params, DataLoader(TensorDataset(*batch), shuffle=True), labels="data").trace > 0


def test_a_loader_that_shuffles_and_says_its_rows_is_fine() -> None:
    loss_fn, params, batch = small()
    rows = [{"input": x, "labels": y, "index": i} for i, (x, y) in enumerate(zip(*batch, strict=True))]
    factors = hessians.ekfac.fit(loss_fn, params, DataLoader(rows, batch_size=2, shuffle=True))  # type: ignore[arg-type]
    assert factors.trace == pytest.approx(hessians.ekfac.fit(loss_fn, params, [batch]).trace, rel=1e-12)


# Blocks whose gradients cancel


@pytest.mark.parametrize("case", ["gpt2", "bert_classifier", "opt"])
def test_a_key_bias_does_not_stop_the_defaults(case: str) -> None:
    found = next(c for c in cases.CASES if c.name == case)
    loss_fn, params = functionalize(found.make().float(), targets="*0.*att*")
    batch = found.batch(3, 5, False)
    for method in (hessians.kfac.build(), hessians.ekfac.build()):
        factors = hessians.fit(loss_fn, params, [batch], method)
        rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), precondition(factors)))
        largest = max(float(row.norm()) for row in rows.values())
        keys = [row for name, row in rows.items() if name.endswith(("key.bias", "k_proj.bias"))]
        assert len(keys) == (0 if case == "gpt2" else 1)
        assert all(float(row.norm()) < 1e-4 * largest for row in keys)
