"""Samplers and the LLC against closed forms, at fixed seeds, with error bars from theory.

`python -m tests.sampling_oracles` prints what is compared here.
"""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import sgmcmc
from influence.sgmcmc import leimkuhler_matthews, mala, sghmc, sgld, sgnht, theory
from tests.agreement import FAR, Group, check, drawn, exact, worst

F64 = torch.float64
H = torch.tensor([1, 2, 0.5, 0.1], dtype=F64)


def bowl(w: dict[str, Tensor], _: Any) -> Tensor:
    """½ Σ h w², summed over copies: each column is a chain of its own."""
    h = H if w["w"].ndim == 1 else H[:, None]
    return (h * w["w"].square()).sum() / 2


def along(sampler: sgmcmc.Sampler, start: Tensor, steps: int, every: int = 1, seed: int = 0) -> Tensor:
    """States before each step, [steps, *shape]."""
    state, found = sampler.init({"w": start}, sampler.noise(seed, 0, 0)), []
    for t in range(1, steps + 1):
        if t % every == 0:
            found.append(state.params["w"])
        state, _ = sampler.step(state, None, sampler.noise(seed, 0, t))
    return torch.stack(found)


def quadratic_forms() -> Group:
    """Closed forms against what they were computed to be elsewhere."""
    llc = functools.partial(theory.sgld_llc, H, 10.0, 1.0, 0.05)
    rows = [
        exact("LLC of 200 steps, computed before", 1.848563, llc(steps=200), 6e-7),
        exact("LLC of 200 steps after 50, computed before", 1.879474, llc(steps=200, burn_in=50), 6e-7),
        exact("LLC, stationary, computed before", 1.879552, llc(), 6e-7),
        exact("LLC, ε → 0, computed before", 1.597403, llc(leimkuhler_matthews=True), 6e-7),
    ]
    P = 10 * H + 1
    for name, expected, found in (
        ("SGLD", (0.1054, 0.0646, 0.1802, 0.5128), theory.sgld_variance(P, 0.05)),
        ("1/P", (0.0909, 0.0476, 0.1667, 0.5), 1 / P),
    ):
        pairs = zip(expected, found.tolist(), strict=True)
        rows += [exact(f"Var w{i}, {name}, computed before", *pair, 6e-5) for i, pair in enumerate(pairs)]
    return Group(rows)


def test_closed_forms_of_the_quadratic_have_their_known_values() -> None:
    check(quadratic_forms())


def finite_run(burn_in: int) -> Group:
    chains = 150
    run = sgmcmc.sample(
        bowl,
        {"w": torch.zeros(4, dtype=F64)},
        None,
        lr=0.05,
        n_beta=10.0,
        localization=1.0,
        num_chains=chains,
        num_draws=200,
        num_burnin_steps=burn_in,
        seed=3 + burn_in,
        progress=False,
    )
    oracle = theory.sgld_llc(H, 10.0, 1.0, 0.05, steps=200, burn_in=burn_in)
    error = theory.sgld_llc_deviation(H, 10.0, 1.0, 0.05, 200, burn_in) / chains**0.5
    return Group([drawn(f"LLC of 200 steps after {burn_in}", oracle, sgmcmc.llc.estimate(run).mean, error)])


@pytest.mark.parametrize("burn_in", [0, 50])
def test_finite_chains_have_the_expected_llc(burn_in: int) -> None:
    """An off-by-one in what is recorded, or burn-in that is not removed, is 1 to 2 % here: 8 standard errors."""
    found = finite_run(burn_in)
    assert found.rows[0].error < 0.022
    check(found)


SETTINGS = ((0.05, 1.0), (0.05, 0.0), (0.01, 5.0), (2 / 21, 1.0))


def stationary_variances() -> Group:
    """Of SGLD at each of `SETTINGS`, drawn apart, and the LLC that those of the first amount to."""
    rows, copies, steps = [], 1000, 120
    for seed, (lr, gamma) in enumerate(SETTINGS):
        target = sgmcmc.local_posterior(bowl, {"w": torch.zeros(4, copies, dtype=F64)}, 10.0, gamma)
        precision = 10 * H + gamma
        a2 = (1 - lr * precision / 2).square()
        oracle = theory.sgld_variance(precision, lr)
        source = torch.Generator().manual_seed(1 + seed)
        start = oracle.sqrt()[:, None] * torch.randn(4, copies, generator=source, dtype=F64)  # stationary at once
        found = along(sgld.build(target, lr), start, steps, seed=seed).square().mean((0, 2))
        error = oracle * (2 * (1 + a2) / (1 - a2) / (steps * copies)).sqrt()  # w² is correlated as a^{2k}
        each = zip(oracle.tolist(), found.tolist(), error.tolist(), strict=True)
        rows += [drawn(f"Var w{i}, ε={lr:.3g} γ={gamma:g}", *numbers) for i, numbers in enumerate(each)]
        if seed == 0:
            stationary = theory.sgld_llc(H, 10.0, gamma, lr)
            llc = drawn("LLC, stationary", stationary, 5 * H @ found, (5 * H * error).norm(), counted=False)
    return Group([*rows, llc])


def test_stationary_variance_is_that_of_the_discretised_chain() -> None:
    """1/(P(1 - εP/4)); the last setting has εP = 2 in one coordinate: every draw is independent there."""
    check(stationary_variances())


def spread(sampler: sgmcmc.Sampler, steps: int, copies: int, seed: int) -> Tensor:
    """Variances over copies at the last step, of samplers whose coordinates are independent, times P.

    They start with variance 1/P.
    """
    source = torch.Generator().manual_seed(2 + seed)
    start = torch.randn(4, copies, generator=source, dtype=F64) / (10 * H + 1).sqrt()[:, None]
    return along(sampler, start, steps, steps, seed).square().mean((0, 2)) * (10 * H + 1)


def other_variances() -> Group:
    """Of other samplers, times P: the error is that of a variance over copies."""
    copies = 20_000
    target = sgmcmc.local_posterior(bowl, {"w": torch.zeros(4, copies, dtype=F64)}, 10.0, 1.0)
    precision = 10 * H + 1
    inertial = torch.tensor([theory.sghmc_variance(float(p), 0.02, 0.3) for p in precision], dtype=F64) * precision
    assert float((inertial - 1).abs().max()) > 0.1
    one = torch.ones(4, dtype=F64)
    rows = []
    for seed, (name, sampler, steps, oracle) in enumerate(
        (
            ("Leimkuhler-Matthews", leimkuhler_matthews.build(target, 0.05), 100, one),
            ("SGHMC", sghmc.build(target, 0.02, friction=0.3), 200, inertial),
            ("SGNHT", sgnht.build(target, 1e-3, diffusion=0.04), 300, 1.02 * one),  # 1 + A/2
        )
    ):
        found = spread(sampler, steps, copies, seed)
        about = name == "SGNHT"  # its oracle is of first order
        for i, (o, m) in enumerate(zip(oracle.tolist(), found.tolist(), strict=True)):
            rows.append(drawn(f"P Var w{i}, {name}", o, m, o * (2 / copies) ** 0.5, counted=not about))
    return Group(rows)


def test_other_integrators_have_their_own_variances() -> None:
    """Leimkuhler-Matthews: 1/P at any step. SGHMC: the Lyapunov equation. SGNHT: about (1 + A/2)/P."""
    check(other_variances())


def metropolis() -> Group:
    """MALA's LLC: of ε → 0, at any step."""
    run = sgmcmc.sample(
        bowl,
        {"w": torch.zeros(4, dtype=F64)},
        None,
        lr=0.09,
        n_beta=10.0,
        localization=1.0,
        sampler=mala.build,
        num_chains=40,
        num_draws=400,
        num_burnin_steps=50,
        progress=False,
    )
    found = sgmcmc.llc.estimate(run)
    oracle = theory.sgld_llc(H, 10.0, 1.0, 0.09, leimkuhler_matthews=True)
    assert 4 * found.stderr < 0.1
    assert 0.5 < found.acceptance < 0.95
    return Group([drawn("LLC, ε → 0, by MALA", oracle, found.mean, found.stderr)])


def test_mala_is_exact_at_any_step() -> None:
    """SGLD would be off by a factor 1/(1 - εP/4) = 1.9 in the steepest coordinate."""
    check(metropolis())


def powers(w: dict[str, Tensor], _: Any) -> Tensor:
    return (w["two"].square().sum() + w["four"].pow(4).sum() + w["eight"].pow(8).sum()) / 2


def even_powers() -> Group:
    copies = 400
    start = {name: torch.zeros(copies, dtype=F64) for name in ("two", "four", "eight")}
    run = sgmcmc.sample(
        powers,
        start,
        None,
        lr=2e-3,
        n_beta=100.0,
        sampler=leimkuhler_matthews.build,
        num_chains=1,
        num_draws=900,
        num_burnin_steps=500,
        progress=False,
    )
    found = sgmcmc.llc.estimate(run)
    oracle = theory.even_powers([2, 4, 8])
    assert found.stderr / copies / oracle < 0.01
    return Group([exact("LLC of ½ (w² + w⁴ + w⁸), 3 %", oracle, found.mean / copies, 0.03 * oracle)])


def test_even_powers_have_their_coefficient_at_every_temperature() -> None:
    check(even_powers())


def crossing(w: dict[str, Tensor], _: Any) -> Tensor:
    return (w["w"][0].square() * w["w"][1].square()).sum()


def normal_crossing() -> Group:
    copies = 300
    rows = [
        exact(f"nβ E[K], k={k}, nβ={n_beta:g}", value, theory.normal_crossing_energy(k, n_beta), 6e-5)
        for k, values in {
            (1, 1): (0.2903, 0.3614, 0.3903),
            (1, 2): (0.1734, 0.2095, 0.2248),
            (2, 2): (0.1225, 0.1505, 0.1652),
        }.items()
        for n_beta, value in zip((10.0, 145.0, 1e3), values, strict=True)
    ]
    run = sgmcmc.sample(
        crossing,
        {"w": torch.zeros(2, copies, dtype=F64)},
        None,
        lr=6e-4,
        n_beta=145.0,
        localization=1.0,
        sampler=leimkuhler_matthews.build,
        num_chains=1,
        num_draws=2000,
        num_burnin_steps=800,
        init_noise=0.5,
        progress=False,
    )
    found = sgmcmc.llc.estimate(run)
    oracle = theory.normal_crossing_energy([1, 1], 145.0)
    slack = 0.03 * oracle + FAR * found.stderr / copies
    assert oracle + slack < 0.42
    return Group([*rows, exact("LLC of w₁² w₂² at nβ=145, 3 % + 4 s.e.", oracle, found.mean / copies, slack)])


def test_normal_crossing_has_its_energy_at_this_temperature_not_at_infinity() -> None:
    """The coefficient is 1/2 with multiplicity 2; at nβ = 145 the energy is 0.36."""
    check(normal_crossing())


def test_coefficients_have_their_published_values() -> None:
    for widths, rank, expected in (
        ([5, 3, 5], 0, (6.5, 2)),
        ([5, 3, 5], 3, (10.5, 1)),
        ([5, 4, 5], 4, (12, 1)),
        ([4, 3, 8], 3, (13.5, 1)),
        ([8, 3, 4], 3, (13.5, 1)),
        ([3, 8, 4], 3, (6, 1)),
        ([10] * 3, 0, (37.5, 1)),
        ([10] * 4, 0, (33.5, 3)),
        ([10] * 5, 0, (31.5, 5)),
        ([8, 4, 8], 2, (19.5, 1)),
        ([6, 5, 4, 7], 2, (14, 2)),
        ([20] * 11, 10, (177.5, 1)),
    ):
        assert tuple(theory.deep_linear(widths, rank)) == expected
    for m in range(1, 7):
        for h in range(1, 7):
            for n in range(1, 7):
                for r in range(min(m, h, n) + 1):
                    assert theory.deep_linear([m, h, n], r) == theory.reduced_rank(m, h, n, r)
    assert theory.deep_linear([7, 4], 2).llc == 14  # one layer is regular: d/2


def scale_identity() -> Group:
    settings: dict[str, Any] = {"lr": 0.01, "localization": 1.0, "num_draws": 20, "progress": False}
    start = {"w": torch.ones(4, dtype=F64)}
    once = sgmcmc.llc.estimate(sgmcmc.sample(bowl, start, None, n_beta=8.0, **settings))
    twice = sgmcmc.llc.estimate(sgmcmc.sample(lambda w, b: 2 * bowl(w, b), start, None, n_beta=4.0, **settings))
    return Group([exact("LLC of twice the loss at half the temperature", once.mean, twice.mean, 0.0)])


def test_twice_the_loss_at_half_the_temperature_is_the_same_llc() -> None:
    check(scale_identity())


def frozen_coordinate() -> Group:
    """Worst losses of runs that should be the same."""

    def of(power: int) -> Any:
        return lambda w, _: w["w"][0].square() + w["w"][1].pow(4) + w["w"][2].pow(power)

    settings: dict[str, Any] = {"lr": 0.01, "n_beta": 20.0, "num_draws": 30, "progress": False}
    mask = {"w": torch.tensor([True, True, False])}
    start = {"w": torch.zeros(3, dtype=F64)}
    two, six = (sgmcmc.sample(of(power), start, None, restriction=mask, **settings) for power in (2, 6))
    rows = [worst("loss with another power of a frozen coordinate", two.loss, six.loss, 0, 1e-14)]
    whole = sgmcmc.sample(of(2), start, None, **settings)
    assert sgmcmc.llc.estimate(whole).mean > sgmcmc.llc.estimate(two).mean + 0.05

    def small(w: dict[str, Tensor], _: Any) -> Tensor:
        return w["w"][0].square() + w["w"][1].pow(4)

    def noise(base: Any, width: int) -> Any:
        shared = torch.randn(5, 31, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        return lambda key, chain, step: {"w": shared[chain, step, :width]}

    def build(width: int) -> Any:
        def made(target: Any, lr: Any) -> sgmcmc.Sampler:
            sampler = sgld.build(target, lr)
            return sampler._replace(noise=noise(sampler, width))

        return made

    big = sgmcmc.sample(of(2), start, None, restriction=mask, sampler=build(3), **settings)
    little = sgmcmc.sample(small, {"w": torch.zeros(2, dtype=F64)}, None, sampler=build(2), **settings)
    rows += [worst("loss of two dimensions, and of three with one masked", little.loss, big.loss, 1e-12, 1e-14)]
    return Group(rows)


def test_a_frozen_coordinate_does_not_matter_and_a_masked_run_is_the_smaller_one() -> None:
    """Restricted: the power of a frozen coordinate is irrelevant, and 3 dimensions with one masked are 2."""
    check(frozen_coordinate())


def energy(around: tuple[float, float], n_beta: float, localization: float) -> float:
    """E[nβ w₁² w₂²] under exp(-nβ K - γ/2 |w - w*|²), by quadrature."""
    u, v = (centre + torch.linspace(-7, 7, 1201, dtype=F64) / localization**0.5 for centre in around)
    value = n_beta * u[:, None].square() * v.square()
    prior = localization / 2 * ((u - around[0]).square()[:, None] + (v - around[1]).square())
    weight = (-value - prior).exp()
    return float((weight * value).sum() / weight.sum())


def order_of_points() -> Group:
    """K = w₁² w₂²: the origin against (1, 0), where the first coordinate cannot vanish; per copy, within 3 %."""
    copies = 200
    rows, errors = [], []
    for point in ((0.0, 0.0), (1.0, 0.0)):
        run = sgmcmc.sample(
            crossing,
            {"w": torch.tensor(point, dtype=F64)[:, None].expand(2, copies).clone()},
            None,
            lr=1e-3,
            n_beta=145.0,
            localization=20.0,
            sampler=leimkuhler_matthews.build,
            num_chains=1,
            num_draws=400,
            num_burnin_steps=200,
            progress=False,
        )
        found, oracle = sgmcmc.llc.estimate(run), energy(point, 145.0, 20.0)
        errors.append(found.stderr / copies)
        slack = 0.03 * oracle + FAR * errors[-1]
        rows.append(exact(f"LLC of w₁² w₂² around {point}, 3 % + 4 s.e.", oracle, found.mean / copies, slack))
    assert rows[0].measured + FAR * errors[0] < rows[1].measured
    return Group(rows)


def test_a_more_singular_point_has_the_lower_coefficient() -> None:
    check(order_of_points())


class Net:
    """A deep linear network and its teacher: K = ‖W_L … W_1 - T‖² / 2, without data."""

    def __init__(self, widths: list[int], rank: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.start = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            w = torch.zeros(outputs, inputs, dtype=F64)
            q = [torch.linalg.qr(torch.randn(n, rank, generator=source, dtype=F64))[0] for n in (outputs, inputs)]
            first, last = layer == 0, layer == len(widths) - 2
            left = q[0] if last else torch.eye(outputs, rank, dtype=F64)
            right = q[1] if first else torch.eye(inputs, rank, dtype=F64)
            scale = 1 + torch.rand(rank, generator=source, dtype=F64) / 2
            w += left @ torch.diag(scale) @ right.T
            self.start[f"w{layer}"] = w
        self.teacher = self.product(self.start)

    def product(self, w: dict[str, Tensor]) -> Tensor:
        return functools.reduce(lambda x, layer: layer @ x, w.values())

    def loss(self, w: dict[str, Tensor], _: Any) -> Tensor:
        return (self.product(w) - self.teacher).square().sum() / 2

    def curvature(self) -> Tensor:
        """Non-zero eigenvalues of the Hessian at the start."""
        names = list(self.start)
        flat = torch.cat([self.start[name].flatten() for name in names])
        sizes = [self.start[name].numel() for name in names]

        def loss(x: Tensor) -> Tensor:
            parts = zip(names, x.split(sizes), strict=True)
            return self.loss({name: part.view_as(self.start[name]) for name, part in parts}, None)

        values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
        return values[values > 1e-9]


TEACHERS = (([5, 3, 5], 3), ([4, 3, 8], 3), ([6, 5, 4, 7], 4))


def planted_teacher(widths: list[int], rank: int) -> Group:
    """The number of non-zero curvatures, and the energy of that quadratic."""
    net = Net(widths, rank, seed=1)
    h = net.curvature()
    lr, n_beta = 0.4 / (3000 * float(h.max())), 3000.0
    run = sgmcmc.sample(
        net.loss,
        net.start,
        None,
        lr=lr,
        n_beta=n_beta,
        localization=30.0,
        num_chains=8,
        num_draws=500,
        num_burnin_steps=200,
        progress=False,
    )
    found = sgmcmc.llc.estimate(run)
    oracle = theory.sgld_llc(h, n_beta, 30.0, lr)
    assert found.stderr < 0.02 * oracle
    shape = "-".join(map(str, widths))
    return Group(
        [
            exact(f"{shape}, rank {rank}: non-zero curvatures", 2 * theory.deep_linear(widths, rank).llc, len(h), 0.0),
            exact(f"{shape}, rank {rank}: LLC, 2 % + 4 s.e.", oracle, found.mean, 0.02 * oracle + FAR * found.stderr),
        ]
    )


@pytest.mark.parametrize(("widths", "rank"), TEACHERS)
def test_full_rank_teachers_lie_on_a_manifold_of_half_dimension_llc(widths: list[int], rank: int) -> None:
    """The number of non-zero curvatures is 2λ, and the chain has the energy of that quadratic."""
    check(planted_teacher(widths, rank))
