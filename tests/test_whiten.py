"""Inverse powers and whitening: golden values, laws, dense oracles in float64, and rows of the right provenance."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from influence import (
    Moments,
    as_blocks,
    chain,
    down_project,
    eigen_whiten,
    explain,
    functionalize,
    hessians,
    kept_energy,
    kfac_whiten,
    one_sided,
    per_example_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    similarity,
    two_sided,
    unit_norm,
)
from influence.func.transform.curvature import INVERSIONS, Basis, Curvature, decompose, inverse_weights
from tests.test_curvature import BLOCKS, data, error, functions, mlp, net, with_index

SEPARABLE = ("kronecker", "dense", "diagonal")


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spectrum(*values: float) -> Curvature:
    return Curvature((len(values),), (Basis(None, tensor(*values)),))


# Golden values (reference notes, appendix A)


@pytest.mark.parametrize(
    ("inversion", "expected"),
    [
        ("damped", (0.24, 0.857142857, 6.0)),
        ("tikhonov", (0.24956672, 0.97297297, 0.0)),
        ("pseudoinverse", (0.25, 1.0, 0.0)),
        ("absolute", (1 / 4.1, 1 / 1.1, 10.0)),
    ],
)
def test_golden_inversions(inversion: str, expected: tuple[float, ...]) -> None:
    # λ = [4, 1, 0], c = 0.1, so c λ̄ = 1/6
    got = inverse_weights(spectrum(4.0, 1.0, 0.0), -1.0, 0.1, inversion).grid
    torch.testing.assert_close(got, tensor(*expected), rtol=1e-7, atol=1e-9)
    root = inverse_weights(spectrum(4.0, 1.0, 0.0), -0.5, 0.1, inversion).grid
    torch.testing.assert_close(root, got.sqrt())


def test_golden_factored_inversion() -> None:
    sides = (Basis(None, tensor(2.0, 1.0)), Basis(None, tensor(3.0, 1.0)))
    got = inverse_weights(Curvature((2, 2), sides), -1.0, 0.1, "factored").grid
    torch.testing.assert_close(got, tensor([0.11126025, 0.24757055], [0.18672461, 0.41548993]), rtol=1e-7, atol=1e-9)
    # the pairing of π: the product of the sides is λ + π√δ λ_S + (√δ/π) λ_A + δ
    s, a, delta, pi = tensor(2.0, 1.0)[:, None], tensor(3.0, 1.0)[None], 0.3, (2 / 1.5) ** 0.5
    grid = s * a + pi * delta**0.5 * s + delta**0.5 / pi * a + delta
    torch.testing.assert_close(got, 1 / grid, rtol=1e-12, atol=0.0)


# Laws


def curvatures() -> dict[str, Curvature]:
    generator = torch.Generator().manual_seed(0)

    def covariance(d: int, rank: int) -> Tensor:
        x = torch.randn(rank, d, generator=generator, dtype=torch.float64)
        return x.mT @ x / rank

    kron = Curvature((4, 5), (decompose(covariance(4, 9), "s"), decompose(covariance(5, 3), "a")))
    grid = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    return {
        "kronecker": kron,
        "corrected": Curvature((4, 5), kron.bases, grid),
        "dense": Curvature((4, 3), (decompose(covariance(12, 7), "h"),)),
        "diagonal": Curvature((6,), (Basis(None, torch.rand(6, generator=generator, dtype=torch.float64)),)),
    }


CURVATURES = curvatures()
PAIRS = [(k, i) for k in CURVATURES for i in INVERSIONS if (k, i) != ("corrected", "factored")]


@pytest.mark.parametrize(("kind", "inversion"), PAIRS)
@given(a=st.floats(0.0, 1.0), b=st.floats(0.0, 1.0), damping=st.floats(1e-3, 1.0))
@settings(max_examples=10)
def test_powers_multiply(kind: str, inversion: str, a: float, b: float, damping: float) -> None:
    # H^r H^t = H^{r + t}; with r = t = -1/2 the square root of the inverse
    curvature = CURVATURES[kind]
    r, t = (-a, -b) if a + b <= 1 else (-a / 2, -b / 2)
    rows = data(3, *curvature.shape)
    apply = lambda rows, power: curvature.apply(rows, inverse_weights(curvature, power, damping, inversion).grid)  # noqa: E731
    assert error(apply(apply(rows, r), t), apply(rows, r + t)) <= 1e-10
    assert error(apply(apply(rows, -0.5), -0.5), apply(rows, -1.0)) <= 1e-10


@pytest.mark.parametrize(("kind", "inversion"), PAIRS)
def test_an_inverse_is_that_of_the_dense_matrix(kind: str, inversion: str) -> None:
    curvature, c = CURVATURES[kind], 0.2
    h = curvature.dense()
    mean = float(h.trace()) / len(h)
    eye = torch.eye(len(h), dtype=torch.float64)
    expected = {
        "damped": lambda: torch.linalg.inv(h + c * mean * eye),
        "absolute": lambda: torch.linalg.inv(h + c * eye),
        "tikhonov": lambda: torch.linalg.solve(h @ h + (c * mean) ** 2 * eye, h),
        "pseudoinverse": lambda: torch.linalg.pinv(h, hermitian=True, atol=c * mean, rtol=0.0),
    }
    if inversion == "factored":
        if len(curvature.bases) == 1:
            truth = expected["damped"]()
        else:
            s, a = (b.vectors @ torch.diag(b.values) @ b.vectors.mT for b in curvature.bases)
            delta, pi = c * mean, float((a.trace() / len(a) / (s.trace() / len(s))).sqrt())
            left = torch.linalg.inv(s + delta**0.5 / pi * torch.eye(len(s), dtype=torch.float64))
            right = torch.linalg.inv(a + delta**0.5 * pi * torch.eye(len(a), dtype=torch.float64))
            truth = torch.kron(left, right)
    else:
        truth = expected[inversion]()
    rows = data(3, *curvature.shape)
    got = curvature.apply(rows, inverse_weights(curvature, -1.0, c, inversion).grid)
    assert error(got.flatten(1), rows.flatten(1) @ truth.mT) <= 1e-10


def fitted(labels: str = "data") -> Any:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    kfac = hessians.kfac.fit(loss_fn, params, [batch], labels=labels, transform=BLOCKS)
    return loss_fn, params, batch, kfac, hessians.ekfac.correct(kfac, loss_fn, params, [batch])


@pytest.mark.parametrize("method", ["kfac", "tkfac", "shampoo"])
def test_whitened_inner_products_are_those_of_the_inverse(method: str) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    factors = getattr(hessians, method).fit(loss_fn, params, [batch], transform=BLOCKS)
    collect = lambda *steps: per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, *steps))  # noqa: E731
    inverse = precondition(factors, power=-1.0, damping=0.1, inversion="factored")
    expected = similarity.dot(collect(), collect(inverse))
    white = collect(kfac_whiten(factors, damping=0.1))
    assert error(similarity.dot(white, white), expected) <= 1e-12
    # a side of at most dim entries is kept exact
    exact = collect(kfac_whiten(factors, damping=0.1, dim=6))
    assert error(similarity.dot(exact, exact), expected) <= 1e-12


def test_projected_whitening_is_unbiased_over_seeds() -> None:
    loss_fn, params, batch, factors, _ = fitted()
    rows = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    layout = loss_fn.layout
    exact = similarity.dot(rows, precondition(factors, inversion="factored").apply(rows, layout))
    found = []
    for seed in range(400):
        white = kfac_whiten(factors, dim=2, seed=seed).apply(rows, layout)
        found.append(similarity.dot(white, white))
    samples = torch.stack(found)
    z = (samples.mean(0) - exact) / (samples.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4.5, float(z.abs().max())


TRANSFORMS = {
    "white": lambda kfac, ekfac: kfac_whiten(kfac),
    "white, projected": lambda kfac, ekfac: kfac_whiten(kfac, dim=2),
    "damped": lambda kfac, ekfac: precondition(kfac),
    "factored": lambda kfac, ekfac: precondition(kfac, power=-0.3, inversion="factored"),
    "corrected": lambda kfac, ekfac: precondition(ekfac, power=-0.5),
    "corrected, projected": lambda kfac, ekfac: chain(precondition(ekfac, power=-0.5), project(2)),
    "eigenbasis": lambda kfac, ekfac: eigen_whiten(ekfac),
    "eigenbasis, cut": lambda kfac, ekfac: eigen_whiten(ekfac, 2),
    "then unit norm": lambda kfac, ekfac: chain(kfac_whiten(kfac, dim=2), unit_norm()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_folded_is_unfolded_by_every_engine(name: str) -> None:
    loss_fn, params, batch, kfac, ekfac = fitted()
    transform = TRANSFORMS[name](kfac, ekfac)
    raw = per_example_grads(loss_fn, params, batch)
    expected = chain(BLOCKS, transform).apply(raw, loss_fn.layout)
    for engine in ("batched", "vmap", "loop"):
        got = per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, transform), engine=engine)
        for block, row in got.items():
            assert error(row, expected[block]) <= 1e-12, (engine, block)
    blocks = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    stored = transform.apply(blocks, loss_fn.layout)
    for block, row in stored.items():
        assert error(row, expected[block]) <= 1e-12, block


def test_the_separable_forms_fold_and_the_others_do_not() -> None:
    loss_fn, params, batch, kfac, ekfac = fitted()
    folded = {
        name: {cost.folded for cost in explain(loss_fn, params, batch, chain(BLOCKS, make(kfac, ekfac))).costs}
        for name, make in TRANSFORMS.items()
    }
    assert folded["white"] == folded["white, projected"] == folded["factored"] == {True}
    assert folded["damped"] == folded["corrected"] == folded["corrected, projected"] == {False}


def test_whitened_rows_are_read_at_a_smaller_dim() -> None:
    loss_fn, params, batch, kfac, _ = fitted()
    collect = lambda dim: per_example_grads(  # noqa: E731
        loss_fn, params, batch, transform=chain(BLOCKS, kfac_whiten(kfac, dim=dim))
    )
    small = down_project(collect(3), 2)
    for block, row in collect(2).items():
        assert error(small[block], row) <= 1e-12


def test_the_eigenbasis_gives_the_same_inner_products_and_its_corner_the_strongest_of_them() -> None:
    loss_fn, params, batch, kfac, ekfac = fitted()
    collect = lambda *steps: per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, *steps))  # noqa: E731
    for factors in (kfac, ekfac):
        exact = similarity.dot(collect(), collect(precondition(factors)))
        turned = collect(eigen_whiten(factors))
        assert error(similarity.dot(turned, turned), exact) <= 1e-12
        share = kept_energy(factors, 2)
        cut = collect(eigen_whiten(factors, 2))
        for block, curvature in factors.blocks.items():
            # E |cut|² over the data which the eigenvalues were measured on is the energy kept
            weights = inverse_weights(curvature, -1.0, 0.1, "damped").grid * curvature.eigenvalues
            top = [weights.sum(1 - axis).argsort(descending=True)[:2] for axis in (0, 1)]
            corner = weights[top[0]][:, top[1]].sum()
            assert share[block] == pytest.approx(float(corner / weights.sum()), rel=1e-12)
            if factors is ekfac:
                assert float(cut[block].square().sum() / 6) == pytest.approx(float(corner), rel=1e-9)
        assert all(value == pytest.approx(1.0) for value in kept_energy(factors, 6).values())


# Sides


def test_a_block_with_one_axis_keeps_its_strongest_entries() -> None:
    """A sum over no axes is torch's sum over all of them: biases apart from their matrices raised IndexError."""
    loss_fn, params = functionalize(nn.Linear(3, 4).double(), loss="squared_error")
    batch = {"input": torch.randn(50, 3, dtype=torch.float64), "labels": torch.randn(50, 4, dtype=torch.float64)}
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks(), progress=False)
    energy = factors.blocks["bias"].eigenvalues * inverse_weights(factors.blocks["bias"], -1.0, 0.1, "damped").grid
    kept = float(energy.sort(descending=True).values[:2].sum() / energy.sum())
    assert kept_energy(factors, 2)["bias"] == pytest.approx(kept)
    rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), eigen_whiten(factors, dim=2)))
    whole = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), eigen_whiten(factors)))
    torch.testing.assert_close(rows["bias"], whole["bias"][:, :2])


def test_both_forms_of_a_score_apply_the_inverse_once() -> None:
    loss_fn, params, batch, kfac, _ = fitted()
    rows = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    exact = similarity.dot(rows, precondition(kfac).apply(rows, loss_fn.layout))
    one = one_sided(kfac)
    queries, train = (per_example_grads(loss_fn, params, batch, transform=side) for side in one)
    assert error(one.scores(queries, train), exact) <= 1e-12
    with pytest.raises(ValueError, match=r"the train rows were made by chain\(as_blocks\(bias=True\), precondition"):
        one.scores(queries, queries)
    with pytest.raises(ValueError, match="the query rows do not say how they were made; collect them with"):
        one.scores(dict(queries), train)
    two = two_sided(kfac)
    both = per_example_grads(loss_fn, params, batch, transform=two.query)
    norms = exact.diagonal().sqrt()
    assert error(two.scores(both, both), exact / norms[:, None] / norms[None]) <= 1e-12
    with pytest.raises(ValueError, match="the train rows were made by"):
        two.scores(both, train)


def test_one_side_projected_is_the_sketch_of_the_exact_product() -> None:
    loss_fn, params, batch, kfac, _ = fitted()
    sides = one_sided(kfac, dim=6)  # exact: nothing is longer
    queries, train = (per_example_grads(loss_fn, params, batch, transform=side) for side in sides)
    rows = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    assert (
        error(sides.scores(queries, train), similarity.dot(rows, precondition(kfac).apply(rows, loss_fn.layout)))
        <= 1e-12
    )


# Provenance


def test_factors_belong_to_the_rows_they_were_fitted_on() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    moments = Moments({name: torch.rand_like(p) + 0.1 for name, p in params.items()})
    scaled = chain(as_blocks(), scale_by_adafactor(moments))
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=scaled)
    rows = per_example_grads(loss_fn, params, batch, transform=scaled)
    white = per_example_grads(loss_fn, params, batch, transform=chain(scaled, kfac_whiten(factors)))
    inverse = precondition(factors, inversion="factored").apply(rows, loss_fn.layout)
    assert error(similarity.dot(white, white), similarity.dot(rows, inverse)) <= 1e-12
    for other in (as_blocks(), BLOCKS, chain(as_blocks(), scale_by_adam(moments))):
        with pytest.raises(ValueError, match=r"fitted under chain\(as_blocks\(bias=False\), scale_by_adafactor"):
            per_example_grads(loss_fn, params, batch, transform=chain(other, kfac_whiten(factors)))
    # rows that remember how they were made are checked too
    with pytest.raises(ValueError, match="fitted under"):
        kfac_whiten(factors).apply(per_example_grads(loss_fn, params, batch, transform=as_blocks()), loss_fn.layout)


def test_kfac_under_a_scale_is_that_of_scaled_factors() -> None:
    # A and S after the sides of the scale, L G R^T
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    moments = Moments({name: torch.rand_like(p) + 0.1 for name, p in params.items()})
    plain = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks()).blocks["0"].dense()
    scaled = chain(as_blocks(), scale_by_adafactor(moments))
    eye = torch.eye(20, dtype=torch.float64).reshape(20, 4, 5)
    rows = {"0.weight": eye, **{n: p.new_zeros(20, *p.shape) for n, p in params.items() if n != "0.weight"}}
    by = scaled.apply(rows, loss_fn.layout)["0"].flatten(1)
    got = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=scaled).blocks["0"].dense()
    assert error(got, by.mT @ plain @ by) <= 1e-12


def test_missing_curvature_is_an_error_or_said_to_be_the_identity() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)

    factors = hessians.kfac.fit(*functionalize(zoo.model, targets="0.*"), [batch], labels="data", transform=BLOCKS)
    with pytest.raises(ValueError, match=r"1 of 2 blocks have no curvature in these factors \(2\)"):
        per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, kfac_whiten(factors)))
    rows = per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, kfac_whiten(factors, missing="identity")))
    plain = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    assert torch.equal(rows["2"], plain["2"])
    assert not torch.equal(rows["0"], plain["0"])


def test_fingerprints_change_with_every_number() -> None:
    loss_fn, params, batch, kfac, ekfac = fitted()
    other = hessians.kfac.fit(loss_fn, params, [batch], labels="sampled", transform=BLOCKS)
    made = [
        precondition(kfac),
        precondition(ekfac),
        precondition(other),
        precondition(kfac, power=-0.5),
        precondition(kfac, damping=0.2),
        precondition(kfac, inversion="tikhonov"),
        precondition(kfac, missing="identity"),
        eigen_whiten(kfac),
        eigen_whiten(kfac, 2),
    ]
    assert len({t.fingerprint for t in made}) == len(made)
    assert precondition(kfac).fingerprint == precondition(kfac).fingerprint


def test_factors_precondition_directions_in_parameter_space() -> None:
    # what conjugate gradients take: the same operator as on rows
    loss_fn, params, batch, kfac, ekfac = fitted()
    raw = per_example_grads(loss_fn, params, batch)
    for factors in (kfac, ekfac):
        solved = factors.solve(raw, loss_fn.layout, damping=0.2)
        expected = chain(BLOCKS, precondition(factors, damping=0.2)).apply(raw, loss_fn.layout)
        got = BLOCKS.apply(solved, loss_fn.layout)
        for block, row in expected.items():
            assert error(got[block], row) <= 1e-12


def test_dense_curvature_of_projected_rows_whitens_them() -> None:
    # the order that loses: project, then precondition; exact for the rows it sees
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    transform = chain(BLOCKS, project(2))
    factors = hessians.autocorrelation.fit(loss_fn, params, [batch], transform=transform)
    rows = per_example_grads(loss_fn, params, batch, transform=transform)
    got = per_example_grads(loss_fn, params, batch, transform=chain(transform, precondition(factors)))
    for block, row in rows.items():
        flat = row.flatten(1)
        h = flat.mT @ flat / len(flat)
        damped = h + 0.1 * float(h.trace()) / len(h) * torch.eye(len(h), dtype=h.dtype)
        assert error(got[block].flatten(1), torch.linalg.solve(damped, flat.mT).mT) <= 1e-10


def test_half_precision_models_have_float32_factors() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(torch.bfloat16)
    loss_fn, params = functionalize(model, loss="cross_entropy")
    batch = with_index({"input": data(6, 5).to(torch.bfloat16), "labels": torch.tensor([0, 1, 2, 0, 1, 2])})
    factors = hessians.ekfac.fit(loss_fn, params, [batch], transform=BLOCKS)
    assert {b.values.dtype for c in factors.blocks.values() for b in c.bases} == {torch.float32}
    rows = per_example_grads(loss_fn, params, batch, transform=chain(BLOCKS, precondition(factors, power=-0.5)))
    assert {row.dtype for row in rows.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(row).all()) for row in rows.values())


def test_curvature_of_unit_rows_whitens_unit_rows_in_every_form() -> None:
    """One form refused where the others are right; or the map of rows, which is not that of blocks, turned wrongly."""
    loss_fn, params, batch, kfac, _ = fitted()
    under = chain(BLOCKS, unit_norm())
    factors = hessians.shampoo.fit(loss_fn, params, [batch], transform=under, labels="data", progress=False)
    unit = per_example_grads(loss_fn, params, batch, transform=under)
    forms = {
        "factored": [kfac_whiten(factors), eigen_whiten(factors, inversion="factored")],
        "damped": [precondition(factors, power=-0.5), eigen_whiten(factors)],
    }
    for inversion, whitenings in forms.items():
        inverse = {
            name: curvature.apply(unit[name], inverse_weights(curvature, -1.0, 0.1, inversion).grid)
            for name, curvature in factors.blocks.items()
        }
        expected = sum(unit[name].flatten(1) @ row.flatten(1).mT for name, row in inverse.items())
        for white in whitenings:
            rows = per_example_grads(loss_fn, params, batch, transform=chain(under, white))
            assert error(similarity.dot(rows, rows), expected) <= 1e-12, (inversion, white)
    whole, cut = (
        per_example_grads(loss_fn, params, batch, transform=chain(under, eigen_whiten(factors, dim)))
        for dim in (None, 2)
    )
    for name, row in cut.items():
        assert row.shape[1:] == tuple(min(2, size) for size in factors.blocks[name].shape)
        assert error(row, whole[name][(slice(None), *[slice(2)] * (row.ndim - 1))]) <= 1e-12
    for white in (kfac_whiten(kfac), eigen_whiten(kfac)):
        with pytest.raises(ValueError, match=r"fitted under .*these rows come from .*unit_norm"):
            per_example_grads(loss_fn, params, batch, transform=chain(under, white))
