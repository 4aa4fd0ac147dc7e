"""LLC of deep linear networks and reduced-rank regressions with planted teachers, against their closed forms.

Shapes, seeds and every setting below were fixed before the first run that counts, one setting per family, tuned on
seeds 1000 and above. `K = ‖W_L … W_1 - T‖² / 2`, without data, so that only the sampler and its settings err.
Where the teacher's rank is below the narrowest width its unused units are zero on both sides, and the oracle is
`λ - (m - 1) / log nβ`; where it is full, the minimum is a manifold and the oracle the energy of its Hessian's spectrum.
"""

import itertools
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure, report


class Family(NamedTuple):
    """Nets of one kind, and the setting of them all."""

    nets: tuple[tuple[tuple[int, ...], int], ...]
    n_beta: float
    lr_times_top: float
    localization: float
    chains: int
    burn_in: int
    draws: int


DEEP = (
    ((4, 3, 3, 4), 1),
    ((5, 4, 4, 5), 2),
    ((6, 5, 4, 7), 2),
    ((4, 4, 4, 4), 1),
    ((5, 3, 4, 3, 5), 1),
    ((6, 4, 5, 6), 3),
    ((5, 3, 5, 4), 3),
    ((6, 4, 4, 5), 4),
    ((4, 3, 4, 3, 4), 3),
    ((7, 5, 5, 6), 5),
)
REDUCED = (((5, 3, 5), 1), ((6, 4, 5), 2), ((5, 4, 6), 1), ((4, 3, 8), 3), ((5, 4, 5), 4))
FAMILIES = {
    "deep linear": Family(DEEP, 1e4, 1.0, 1.0, 8, 4000, 4000),
    "reduced rank": Family(REDUCED, 1e4, 1.0, 1.0, 8, 3000, 3000),
}


def planted(widths: tuple[int, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """Weights whose product has the rank, with all other units zero on both sides."""
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        left, right = (
            torch.linalg.qr(torch.randn(n, rank, generator=source, dtype=torch.float64))[0] for n in (outputs, inputs)
        )
        left = left if layer == len(widths) - 2 else torch.eye(outputs, rank, dtype=torch.float64)
        right = right if layer == 0 else torch.eye(inputs, rank, dtype=torch.float64)
        scale = 1 + torch.rand(rank, generator=source, dtype=torch.float64) / 2
        weights[f"w{layer}"] = left @ torch.diag(scale) @ right.T
    return weights


def product(weights: dict[str, Tensor]) -> Tensor:
    """The net's one matrix."""
    first, *rest = weights.values()
    for w in rest:
        first = w @ first
    return first


def curvature(weights: dict[str, Tensor]) -> Tensor:
    """Non-zero eigenvalues of the Hessian."""
    teacher, sizes = product(weights), [w.numel() for w in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(weights, flat.split(sizes), strict=True)
        return (product({name: p.view_as(weights[name]) for name, p in parts}) - teacher).square().sum() / 2

    values = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights.values()]))
    )
    return values[values > 1e-9]


def measured(family: Family, widths: tuple[int, ...], rank: int, seed: int) -> dict:
    """One net: its oracle, its estimate, its error."""
    from influence import sgmcmc
    from influence.sgmcmc import llc, theory

    weights = planted(widths, rank, seed)
    teacher, h = product(weights), curvature(weights)
    lr = family.lr_times_top / (family.n_beta * float(h.max()))
    run = sgmcmc.sample(
        lambda w, _: (product(w) - teacher).square().sum() / 2,
        weights,
        None,
        lr=lr,
        n_beta=family.n_beta,
        localization=family.localization,
        sampler=sgmcmc.leimkuhler_matthews.build,
        num_chains=family.chains,
        num_burnin_steps=family.burn_in,
        num_draws=family.draws,
        seed=seed,
        progress=False,
    )
    found = llc.estimate(run)
    singular = rank < min(widths[1:-1])
    coefficient = theory.deep_linear(list(widths), rank)
    oracle = coefficient.at(family.n_beta) if singular else theory.sgld_llc(
        h, family.n_beta, family.localization, lr, leimkuhler_matthews=True
    )  # fmt: skip
    return {
        "widths": widths, "rank": rank, "seed": seed, "singular": singular, "llc": coefficient.llc, "oracle": oracle,
        "estimate": found.mean, "stderr": found.stderr, "error": found.mean / oracle - 1, "rhat": found.rhat,
        "verdict": found.verdict,
    }  # fmt: skip


def run(*, threads: int, quick: bool) -> dict:
    """Measure every net, and print the table."""
    torch.set_num_threads(threads)
    found: dict[str, list[dict]] = {}
    for name, family in FAMILIES.items():
        family = family._replace(nets=family.nets[:1], burn_in=100, draws=100) if quick else family
        found[name] = [measured(family, widths, rank, seed) for seed, (widths, rank) in enumerate(family.nets)]
        lines = [
            [
                "-".join(map(str, net["widths"])), str(net["rank"]), "singular" if net["singular"] else "manifold",
                f"{net['llc']:.3f}", f"{net['oracle']:.3f}", f"{net['estimate']:.3f}", f"{net['stderr']:.3f}",
                f"{100 * net['error']:+.1f} %", net["verdict"],
            ]
            for net in found[name]
        ]  # fmt: skip
        print(f"\n{name}: {family._replace(nets=())}")
        print(report.table(["widths", "rank", "kind", "λ", "oracle", "LLC", "s.e.", "error", ""], lines))
    settings = {"threads": threads, "quick": quick}
    return {"benchmark": "coefficients", "settings": settings, "machine": measure.machine(), "families": found}


def targets(found: dict) -> list[report.Check]:
    """Median error of at most 5 % in each group."""
    checks = []
    for name, nets in found["families"].items():
        for kind in (True, False):
            errors = [abs(net["error"]) for net in nets if net["singular"] == kind]
            label = "singular" if kind else "manifold"
            checks.append(
                report.at_most(f"{name}, {label}: median error of {len(errors)}", statistics.median(errors), 0.05)
            )
    return checks
