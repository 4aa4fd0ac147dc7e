"""Mixed curvature against dense sums, the automatic weight against hand-worked ones, and what cannot be mixed."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import as_blocks, chain, functionalize, hessians, project
from influence.func.transform.curvature import Basis, Curvature
from influence.hessians.factors import Factors
from influence.hessians.labels import Labels
from influence.hessians.mixing import mix, mixing_weight, pooled

QUERY, INDEX = torch.tensor([5.0, 2.0, 1.0, 0.5]), torch.tensor([9.0, 4.0, 1.0, 0.1])
BLOCKS = as_blocks(bias=True)


def data(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fitted(seed: int, n: int = 40, dtype: torch.dtype = torch.float64, **settings: Any) -> Factors:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    model = model.to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(data(1, p.numel(), k, dtype).reshape(p.shape))
    loss_fn, params = functionalize(model, loss="squared_error", reduction=settings.pop("reduction", "sum"))
    batch = {"input": data(n, 4, seed, dtype), "labels": data(n, 2, seed + 100, dtype), "index": torch.arange(n)}
    method = settings.pop("method", hessians.autocorrelation)
    return method.fit(loss_fn, params, [batch], **{"transform": BLOCKS, "labels": "data"} | settings)


def spectrum(values: list[float] | Tensor, documents: int = 1, **changes: Any) -> Factors:
    basis = Basis(None, torch.as_tensor(values, dtype=torch.float64))
    block = Curvature((len(values),), (basis,))
    labels, transform = Labels("data"), as_blocks()
    about = ("sum", labels, transform.fingerprint, repr(transform), transform, "w" * 64)
    return replace(Factors("autocorrelation", {"b": block}, documents, {}, *about), **changes)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def same(got: Factors, expected: Factors, tolerance: float = 1e-13) -> None:
    assert got.blocks.keys() == expected.blocks.keys()
    for name, block in expected.blocks.items():
        assert error(got.blocks[name].dense(), block.dense()) <= tolerance, name


# The automatic weight


@pytest.mark.parametrize(
    ("components", "weight"),
    [
        (1, 9 / 14),  # the largest of each side
        (2, 2 / 3),
        (4, 1 / 6),  # the last
        (9, 1 / 6),  # beyond the last: clamped to it
        (0, 1.0),  # nothing to play down: the query's alone
        (-3, 1.0),
    ],
)
def test_the_weight_is_the_one_worked_by_hand(components: int, weight: float) -> None:
    assert mixing_weight(QUERY, INDEX, components) == pytest.approx(weight, rel=1e-6)


def test_the_weight_sorts_and_clamps_each_side_by_itself() -> None:
    order = torch.tensor([2, 0, 3, 1])
    assert mixing_weight(QUERY[order], INDEX, 2) == pytest.approx(2 / 3)
    assert mixing_weight(QUERY, INDEX[order], 2) == pytest.approx(2 / 3)
    # negative by rounding: zero, not a weight above one
    assert mixing_weight(torch.tensor([1.0, -1e-9]), torch.tensor([1.0, 0.5]), 2) == 1.0


def test_at_the_weight_the_curvatures_meet_at_the_component() -> None:
    query, index = fitted(1), fitted(2)
    for components in (1, 5, 20):
        w = mixing_weight(pooled(query.blocks), pooled(index.blocks), components)
        at = [
            torch.cat(list(f.spectra().values())).sort(descending=True).values[components - 1] for f in (query, index)
        ]
        assert w * float(at[0]) == pytest.approx((1 - w) * float(at[1]), rel=1e-12)
        assert (
            error(mix(query, index, components=components).blocks["0"].dense(), weighted(query, index, w, "0")) < 1e-13
        )


def weighted(query: Factors, index: Factors, w: float, name: str) -> Tensor:
    return w * query.blocks[name].dense() + (1 - w) * index.blocks[name].dense()


def test_no_weight_is_made_of_rounding() -> None:
    # 3 documents, 23 directions: the others are zero, but eigh says 1e-17 on one side and 3e-17 on the other
    few, fewer = fitted(1, n=3), fitted(2, n=2)
    assert float(pooled(few.blocks).gt(0).sum()) == 3 * len(few.blocks)
    with pytest.raises(ValueError, match=r"rank 6 and the index's 4, so both are zero at component 20"):
        mix(few, fewer, components=20)
    assert mix(few, fewer, components=4).notes["mix"].startswith("0.")
    # singular on one side alone: the formula says all or nothing, and the note says so
    note = mix(few, fitted(2), components=20).notes["mix"]
    rank = int((pooled(few.blocks) > 0).sum())
    assert note.endswith(f"components=20, of which the query's curvature has {rank}, and leaves the index out")
    assert 0 < rank < 20
    assert mix(fitted(2), few, components=20).notes["mix"].endswith("leaves the query out")


def test_both_zero_is_refused_for_any_weight_would_do() -> None:
    zeros = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match=r"components=2: .* rank 1 .* 1, .* Lower components to at most 1"):
        mixing_weight(zeros, zeros, 2)


@pytest.mark.parametrize(("other", "like"), [(torch.ones(3), torch.ones(2)), (torch.ones(0), torch.ones(0))])
def test_spectra_of_other_lengths_are_refused(other: Tensor, like: Tensor) -> None:
    with pytest.raises(ValueError, match=f"got {len(other)} of the query and {len(like)} of the index"):
        inspect.unwrap(mixing_weight)(other, like, 1)  # the type hook refuses them first here; users have no hook


# The mix


@pytest.mark.parametrize("w", [0.25, 0.6666])
def test_a_mix_is_the_sum_of_the_matrices(w: float) -> None:
    query, index = fitted(1), fitted(2)
    mixed = mix(query, index, w)
    for name, block in mixed.blocks.items():
        assert error(block.dense(), weighted(query, index, w, name)) <= 1e-13
        basis = block.bases[0]
        assert basis.vectors is not None
        torch.testing.assert_close(basis.vectors.mT @ basis.vectors, torch.eye(len(basis.values), dtype=torch.float64))
        assert bool((basis.values.diff() >= 0).all())
        assert bool((basis.values >= 0).all())


def test_float32_is_mixed_in_float64() -> None:
    # two large matrices that nearly cancel nothing, but whose small eigenvalues float32 sums would lose
    query, index = fitted(1, dtype=torch.float32), fitted(2, dtype=torch.float32)
    mixed = mix(query, index, 0.3)
    for name, block in mixed.blocks.items():
        assert block.bases[0].values.dtype == torch.float32
        assert error(block.dense(), weighted(query, index, 0.3, name)) <= 2e-7


def test_diagonals_mix_as_diagonals_and_with_dense_ones_as_dense() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 0.0, 1.0])
    mixed = mix(spectrum(a), spectrum(b), 0.25).blocks["b"]
    assert mixed.kind == "diagonal"
    torch.testing.assert_close(mixed.eigenvalues, (0.25 * a + 0.75 * b).double())
    turn = torch.linalg.qr(data(3, 3, 0)).Q
    dense = Curvature((3,), (Basis(turn, b.double()),))
    index = replace(spectrum(b), blocks={"b": dense}, method="autocorrelation")
    mixed = mix(replace(spectrum(a), method="kfac"), index, 0.25)
    assert mixed.blocks["b"].kind == "dense"
    assert mixed.method == "mixed autocorrelation and kfac"
    expected = 0.25 * torch.diag(a.double()) + 0.75 * turn @ torch.diag(b.double()) @ turn.mT
    assert error(mixed.blocks["b"].dense(), expected) <= 1e-14


def test_all_of_one_side_is_that_side() -> None:
    query, index = fitted(1), fitted(2)
    same(mix(query, index, 1.0), query)
    same(mix(query, index, 0.0), index)
    same(mix(query, index, components=0), query)


def test_a_thing_mixed_with_itself_is_itself() -> None:
    query = fitted(1)
    for w in (0.0, 0.4, None):
        same(mix(query, query, w), query)
    assert mixing_weight(pooled(query.blocks), pooled(query.blocks), 7) == 0.5
    assert mix(mix(query, query), query).method == "mixed autocorrelation"


def test_a_mix_of_both_halves_by_their_sizes_is_the_fit_on_both() -> None:
    model = torch.nn.Linear(4, 2).double()
    loss_fn, params = functionalize(model, loss="squared_error")
    batches = [{"input": data(n, 4, n), "labels": data(n, 2, n + 50)} for n in (10, 30)]
    settings = {"transform": chain(BLOCKS, project(2)), "labels": "data"}
    parts = [hessians.autocorrelation.fit(loss_fn, params, [batch], **settings) for batch in batches]
    whole = hessians.autocorrelation.fit(loss_fn, params, batches, **settings)
    mixed = mix(*parts, 0.25)
    same(mixed, whole)
    assert mixed.documents == whole.documents == 40


def test_a_mix_says_what_it_is_and_serves_like_any_factors(tmp_path: Any) -> None:
    query, index = fitted(1, n=30), fitted(2, n=50)
    mixed = mix(query, index, 0.4)
    assert mixed.documents == 80
    assert mixed.method == "mixed autocorrelation"
    assert mixed.transform is query.transform
    assert (mixed.under, mixed.weights, mixed.labels, mixed.reduction) == (
        query.under,
        query.weights,
        query.labels,
        query.reduction,
    )
    note = "0.4 of autocorrelation of 30 documents (query) and 0.6 of autocorrelation of 50 documents (index)"
    assert mixed.notes["mix"] == f"{note}; the weight is as given"
    assert note in str(mixed)
    assert "automatic, components=3" in mix(query, index, components=3).notes["mix"]
    path = tmp_path / "mixed.h5"
    mixed.save(path)
    loaded = hessians.load(path)
    assert loaded.digest == mixed.digest
    assert loaded.notes == mixed.notes
    assert mix(replace(query, transform=None), index).transform is index.transform


# What cannot be mixed


@pytest.mark.parametrize("side", ["query", "index"])
@pytest.mark.parametrize(("method", "kind"), [(hessians.kfac, "kronecker"), (hessians.ekfac, "corrected")])
def test_kronecker_factors_are_refused_with_what_to_do(side: str, method: Any, kind: str) -> None:
    both = {"query": fitted(1), "index": fitted(2)} | {side: fitted(3, method=method)}
    with pytest.raises(ValueError, match=rf"the {side}'s {both[side].method} .*'0' is {kind}.* Fit one set of factors"):
        mix(**both)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_the_unit_interval_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"weight must lie in \[0, 1\].*got {weight}"):
        mix(spectrum([1.0]), spectrum([2.0]), weight)


SKETCH = chain(as_blocks(), project(8))
TWO, THREE = spectrum([1.0, 1.0]).blocks, spectrum([1.0, 1.0, 1.0]).blocks
REFUSED = [
    # (what differs, what the index has, what the message says)
    (
        "under",
        {"under": SKETCH.fingerprint, "description": repr(SKETCH)},
        ["under", "as_blocks(bias=False)", "project"],
    ),
    ("weights", {"weights": "v" * 64}, ["weights", "w" * 12, "v" * 12]),
    ("reduction", {"reduction": "mean"}, ["reduction", "'sum'", "'mean'"]),
    ("labels", {"labels": Labels("sampled")}, ["labels", "'data'", "'sampled'"]),
    ("blocks", {"blocks": {"c": TWO["b"]}}, ["blocks", "query alone: b", "index alone: c"]),
    ("missing", {"blocks": {**TWO, "c": TWO["b"]}}, ["blocks", "the index 2", "query alone: none"]),
    ("shape", {"blocks": THREE}, ["shape of block 'b'", "[2] in the query", "[3] in the index"]),
]


@pytest.mark.parametrize(("changes", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_curvature_of_other_rows_is_refused_with_both_values(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        mix(spectrum([1.0, 2.0]), spectrum([2.0, 1.0], **changes))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_seeds_and_draws_may_differ() -> None:
    a, b = (spectrum([1.0, 2.0], labels=Labels("sampled", seed, draws)) for seed, draws in ((0, 1), (5, 3)))
    assert mix(a, b, 0.5).labels == a.labels
