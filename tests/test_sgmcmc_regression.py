"""BIF, susceptibilities and the LLC of a Gaussian regression, three examples and two weights, in closed form."""

import functools
from typing import Any

import torch
from torch import Tensor

from influence import sgmcmc
from influence.sgmcmc import bif, leimkuhler_matthews, llc, susceptibility, theory
from tests.agreement import Group, check, drawn, exact, worst

F64 = torch.float64
X = torch.tensor([[1, 0], [1, 1], [0, 2]], dtype=F64)
Y = torch.tensor([1, 0, 2], dtype=F64)
ANCHOR = torch.tensor([1 / 9, 7 / 9], dtype=F64)
N_BETA, GAMMA, LR = 6.0, 0.5, 0.05
DATA = {"x": X, "y": Y}


def squared(w: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (batch["x"] @ w["w"] - batch["y"]).square() / 2


CHAINS: dict[str, Any] = {
    "lr": LR,
    "n_beta": N_BETA,
    "localization": GAMMA,
    "batch_size": None,
    "num_chains": 60,
    "num_draws": 400,
    "num_burnin_steps": 40,
    "keep": "sequences",
    "progress": False,
}
PAIRS = [(i, j) for i in range(3) for j in range(i, 3)]


@functools.cache
def regression() -> dict[str, sgmcmc.Run]:
    """SGLD, all weights and the first alone."""
    words = {"full": None, "first": {"w": torch.tensor([True, False])}}
    return sgmcmc.sample_restrictions(squared, {"w": ANCHOR}, DATA, {"all": DATA}, **CHAINS, restrictions=words, seed=2)


@functools.cache
def posterior() -> sgmcmc.Run:
    """A sampler without the discretisation's error in variances."""
    settings = {**CHAINS, "num_chains": 50, "sampler": leimkuhler_matthews.build, "seed": 3}
    return sgmcmc.sample(squared, {"w": ANCHOR}, DATA, {"all": DATA}, **settings)


def law() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, Hessians, SGLD's covariances of the full and of the restricted chain, and the exact posterior's."""
    gradients, hessians = (X @ ANCHOR - Y)[:, None] * X, X[:, :, None] * X[:, None, :]
    P = N_BETA * hessians.mean(0) + GAMMA * torch.eye(2, dtype=F64)
    full = torch.linalg.inv(P - LR * P @ P / 4)
    first = torch.linalg.inv(P[:1, :1] - LR * P[:1, :1] ** 2 / 4)
    return gradients, hessians, full, first, torch.linalg.inv(P)


def closed_forms() -> Group:
    """Theory against direct Gaussian samples, computed elsewhere."""
    g, A, full, first, posterior_sigma = law()
    rows = []
    for name, sigma, published, correlation, llc_there in (
        ("posterior", posterior_sigma, (0.2213, -0.1360, -0.0323, 0.2333, -0.0390, 0.1688), -0.5984, 0.9133),
        ("SGLD", full, (0.2351, -0.1440, -0.0320, 0.2634, -0.0468, 0.2058), -0.5786, 1.0126),
    ):
        found = theory.gaussian_covariance(g, A, sigma)
        entries = zip(PAIRS, published, strict=True)
        rows += [exact(f"Cov(ℓ{i}, ℓ{j}), {name}, computed before", x, found[i, j], 6e-5) for (i, j), x in entries]
        rho = found[0, 1] / (found[0, 0] * found[1, 1]).sqrt()
        rows += [
            exact(f"Corr(ℓ0, ℓ1), {name}, computed before", correlation, rho, 6e-5),
            exact(f"LLC, {name}, computed before", llc_there, energy(A, sigma), 6e-5),
        ]
    terms = theory.gaussian_susceptibility(g, A, full, first, torch.tensor([True, False]))
    for name, published in (
        ("covariance", (-0.0061605, -0.0061605, 0.0123211)),
        ("shift", (-0.0062784, -0.0052297, 0.0115080)),
        ("total", (-0.0124389, -0.0113902, 0.0238291)),
    ):
        each = zip(published, getattr(terms, name), strict=True)
        rows += [exact(f"susceptibility {i}, {name}, computed before", *pair, 6e-8) for i, pair in enumerate(each)]
    return Group(rows)


def energy(hessians: Tensor, sigma: Tensor) -> float:
    return float(N_BETA * torch.trace(hessians.mean(0) @ sigma) / 2)


def test_closed_forms_have_their_known_values() -> None:
    check(closed_forms())


def tied(run: sgmcmc.Run) -> Tensor:
    """Return the correlation of the errors of the covariances of `PAIRS`: that of chains' own."""
    losses = run.observable("all").sequences
    assert losses is not None
    x = losses.double() - losses.double().mean((0, 1))
    return torch.corrcoef(torch.stack([(x[..., i] * x[..., j]).mean(1) for i, j in PAIRS]))


def covariances(run: sgmcmc.Run, oracle: Tensor, pooling: str, of: str) -> Group:
    found = bif.estimate(run, statistic="covariance", pooling=pooling, stderr=True)
    assert found.stderr is not None
    assert float((found.stderr / oracle.diagonal().mean()).max()) < 0.06
    rows = [
        drawn(f"Cov(ℓ{i}, ℓ{j}), {of}, {pooling}", oracle[i, j], found.influences[i, j], found.stderr[i, j])
        for i, j in PAIRS
    ]
    return Group(rows, tied(run))


def influences(pooling: str) -> Group:
    """Under SGLD, against what is expected of chains of this length."""
    return covariances(regression()["full"], covariances_of_finite_chains(60, 400)[pooling], pooling, "SGLD")


def posterior_influences() -> Group:
    """Of the sampler whose law is the posterior: the same six, a correlation and the LLC, which do not count again."""
    g, A, *_, sigma = law()
    run = posterior()
    six = covariances(run, theory.gaussian_covariance(g, A, sigma), "stacked", "posterior")
    coefficient = llc.estimate(run)
    rows = [
        *correlations(run, sigma, "posterior").rows[:1],
        drawn("LLC, posterior", energy(A, sigma), coefficient.mean, coefficient.stderr, counted=False),
    ]
    return Group([*six.rows, *rows], six.correlation)


def correlations(run: sgmcmc.Run, sigma: Tensor, of: str) -> Group:
    g, A, *_ = law()
    oracle = theory.gaussian_covariance(g, A, sigma)
    deviation = oracle.diagonal().sqrt()
    oracle = oracle / deviation[:, None] / deviation
    found = bif.estimate(run, stderr=True)
    assert found.stderr is not None
    assert float(found.influences.abs().max()) <= 1
    assert found.rows == [("all", 0), ("all", 1), ("all", 2)]
    rows = [
        drawn(f"Corr(ℓ{i}, ℓ{j}), {of}", oracle[i, j], found.influences[i, j], found.stderr[i, j], counted=False)
        for i, j in PAIRS
        if i != j
    ]
    ones = worst("normalized influences of examples on themselves", torch.ones(3), found.influences.diagonal(), 0, 0)
    return Group([*rows, ones])


def normalized_influences() -> Group:
    return correlations(regression()["full"], law()[2], "SGLD")


@functools.cache
def covariances_of_finite_chains(chains: int, draws: int) -> dict[str, Tensor]:
    """Expected covariances of the losses of a regression under SGLD, about the means that `draws` draws leave.

    A mean of dependent draws varies by `Σ_k (d - |k|) γ(k) / d²`; what lies about it has so much less variance.
    """
    g, A, full, _, _ = law()
    P = N_BETA * A.mean(0) + GAMMA * torch.eye(2, dtype=F64)
    decay, S = torch.eye(2, dtype=F64) - LR / 2 * P, full
    whole = theory.gaussian_covariance(g, A, full)
    mean = draws * whole
    for lag in range(1, draws):
        S = decay @ S
        AS = A @ S
        linear, quadratic = g @ S @ g.T, torch.einsum("iab,jba->ij", AS, A @ S.mT) / 2
        mean = mean + 2 * (draws - lag) * (linear + linear.T + quadratic + quadratic.T) / 2
    mean = mean / draws**2
    return {
        "within": (whole - mean) * draws / (draws - 1),
        "stacked": (whole - mean / chains) * chains * draws / (chains * draws - 1),
    }


def test_influences_of_a_regression_are_their_closed_form() -> None:
    """Each pooling meets its own finite-sample law; within is 5 % low for slow losses, as it must be."""
    check(influences("within"), influences("stacked"), normalized_influences())
    oracle, expected = theory.gaussian_covariance(*law()[:3]), covariances_of_finite_chains(60, 400)
    assert 0.94 < float((expected["within"] / oracle).diagonal().min()) < 0.96
    torch.testing.assert_close(expected["stacked"], oracle, rtol=2e-3, atol=2e-4)
    default, stacked = (
        bif.estimate(regression()["full"], statistic="covariance", **kept).influences
        for kept in ({}, {"pooling": "stacked"})
    )
    torch.testing.assert_close(default, stacked)


def test_influences_under_the_posterior_are_their_closed_form() -> None:
    check(posterior_influences())


def without_a_chain(runs: dict[str, sgmcmc.Run], name: str) -> tuple[Tensor, Tensor]:
    """Return both terms of susceptibilities, [chains, 3] each, without each chain in turn."""

    def losses(run: sgmcmc.Run) -> Tensor:
        kept = run.observable("all").sequences
        assert kept is not None
        return kept.double()

    def left(x: Tensor) -> Tensor:
        means = x.mean(1)
        return (means.sum(0) - means) / (len(means) - 1)

    part, full = losses(runs[name]), losses(runs["full"])
    phi = part.mean(2, keepdim=True)
    d, d_full = phi - part, full.mean(2, keepdim=True) - full
    covariance = left(phi * d) - left(phi) * left(d)
    return covariance, left(phi) * (left(d) - left(d_full))


def susceptibilities() -> Group:
    """Both terms; of three examples that sum to zero, two count."""
    g, A, full, first, _ = law()
    runs = regression()
    found = susceptibility.estimate(runs, "all")["all"]
    assert found.restrictions == ["full", "first"]
    rows, errors = [], []
    for r, (name, sigma, moving) in enumerate(
        (("full", full, torch.ones(2, dtype=torch.bool)), ("first", first, torch.tensor([True, False])))
    ):
        oracle = theory.gaussian_susceptibility(g, A, full, sigma, moving)
        terms = without_a_chain(runs, name)
        deleted = {"total": terms[0] + terms[1], "covariance": terms[0], "shift": terms[1]}
        errors.append(deleted["total"][:, :2])
        spread = {key: x.std(0, correction=0) * (len(x) - 1) ** 0.5 for key, x in deleted.items()}
        mine = worst(f"s.e. of susceptibilities, {name}", spread["total"], found.stderr[:, 0, r], 1e-3, 1e-9)
        rows += [
            drawn(f"susceptibility {i}, {name}", oracle.total[i], found.value[i, 0, r], found.stderr[i, 0, r], i < 2)
            for i in range(3)
        ]
        rows += [mine]
        if name == "first":  # of the full run the shift is zero
            rows += [
                drawn(f"susceptibility {i}, {name}, {key}", getattr(oracle, key)[i], x[i, 0, r], spread[key][i], False)
                for key, x in (("covariance", found.covariance), ("shift", found.shift))
                for i in range(3)
            ]
    assert float(found.stderr[:, 0, 1].max()) < 0.15 * 0.0238
    rows += [
        worst("shift of the full run's susceptibilities", torch.zeros(3), found.shift[:, 0, 0], 0, 1e-9),
        worst("sum of susceptibilities", torch.zeros(1, 2), found.value.sum(0), 0, 1e-12),
    ]
    return Group(rows, torch.corrcoef(torch.cat(errors, 1).T))


def test_susceptibilities_of_a_regression_are_their_closed_form() -> None:
    check(susceptibilities())


def coefficient() -> Group:
    """The LLC of the regression under SGLD."""
    found = llc.estimate(regression()["full"])
    assert found.stderr < 0.025
    assert "no fault" in found.verdict
    return Group([drawn("LLC, SGLD", energy(law()[1], law()[2]), found.mean, found.stderr)])


def test_llc_of_a_regression_is_its_closed_form_and_paired_with_its_baseline() -> None:
    check(coefficient())
