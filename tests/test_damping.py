"""The damping that is selected against exact leave-one-out, and its criterion against dense matrices.

`python -m tests.test_damping` prints the correlation of influence and leave-one-out at every damping.
"""

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from influence import (
    as_blocks,
    chain,
    functionalize,
    hessians,
    per_example_grads,
    project,
    unit_norm,
)
from influence.func.transform.curvature import Basis, Curvature, inverse_weights
from influence.hessians.damping import DampingCurve, implied_regularization, select_damping, stein
from influence.hessians.factors import Factors
from influence.hessians.labels import Labels

BLOCKS = as_blocks(bias=True)
GRID = torch.logspace(-4, 1, 21, dtype=torch.float64)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(x: Tensor, y: Tensor, start: int = 0) -> dict[str, Tensor]:
    return {"input": x, "labels": y, "index": torch.arange(start, start + len(x))}


def net(*layers: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(scale * random(97 * seed + k, *p.shape) / p.shape[-1] ** 0.5)
    return model


# Leave-one-out


class Problem(NamedTuple):
    """A trained model, what it becomes without each document, and what that does to the queries' losses `[q, n]`."""

    loss_fn: Any
    params: dict[str, Tensor]
    start: dict[str, Tensor]
    train: dict[str, Tensor]
    held: dict[str, Tensor]
    queries: dict[str, Tensor]
    changes: Tensor

    def curve(self, factors: Factors) -> Tensor:
        """Correlation of influence with leave-one-out over documents, mean over queries, at every damping."""
        rows = (per_example_grads(self.loss_fn, self.params, b, transform=BLOCKS) for b in (self.queries, self.train))
        query, train = ({n: c.rotate(row[n]).flatten(1) for n, c in factors.blocks.items()} for row in rows)
        found = []
        for damping in GRID.tolist():
            weights = {n: inverse_weights(c, -1.0, damping, "damped").grid.flatten() for n, c in factors.blocks.items()}
            scores = sum(((query[n] * w) @ train[n].mT for n, w in weights.items()), torch.zeros_like(self.changes))
            a, b = (x - x.mean(1, keepdim=True) for x in (scores, self.changes))
            found.append(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
        return torch.stack(found)

    def select(self, factors: Factors, start: bool = False, **settings: Any) -> DampingCurve:
        pulled = self.start if start else None
        settings = {"candidates": GRID, "start": pulled, "progress": False} | settings
        return select_damping(factors, self.loss_fn, self.params, [self.train], **settings)


@cache
def ridge(seed: int, decay: float, alpha: float, n: int = 60, d: int = 30) -> Problem:
    """Correlated features whose standard deviations decay as `k^-decay`; every leave-one-out solved exactly."""
    turn = torch.linalg.qr(random(seed, d, d)).Q
    x = random(seed + 1000, 160, d) * torch.arange(1, d + 1, dtype=torch.float64).pow(-decay) @ turn.mT
    y = (x @ random(seed + 2000, d) + 0.5 * random(seed + 3000, 160))[:, None]
    loss_fn, _ = functionalize(nn.Linear(d, 1, bias=False).double(), loss="squared_error")

    def solve(kept: Tensor) -> dict[str, Tensor]:
        a, b = x[:n][kept], y[:n][kept]
        return {"weight": torch.linalg.solve(a.mT @ a / n + alpha * torch.eye(d, dtype=torch.float64), a.mT @ b / n).mT}

    every = torch.ones(n, dtype=torch.bool)
    found = [solve(every), *(solve(every & (torch.arange(n) != i)) for i in range(n))]
    parts = batch_of(x[:n], y[:n]), batch_of(x[n : 2 * n], y[n : 2 * n], n), batch_of(x[2 * n :], y[2 * n :], 2 * n)
    return problem_of(loss_fn, found, {"weight": torch.zeros(1, d, dtype=torch.float64)}, *parts)


def problem_of(loss_fn: Any, found: list[dict[str, Tensor]], start: dict[str, Tensor], *parts: Any) -> Problem:
    losses = torch.stack([loss_fn(p, parts[2]) for p in found])
    return Problem(loss_fn, found[0], start, *parts, (losses[1:] - losses[0]).mT)


@cache
def mlp(seed: int, alpha: float, steps: int, kind: str = "squared_error", n: int = 50, hidden: int = 6) -> Problem:
    """A network of two layers, retrained without each document from the same start.

    With weight decay to convergence (Adam, then Newton's method); without, by so many steps of gradient descent.
    """
    d, out = 6, 1 if kind == "squared_error" else 3
    x = 1.5 * random(seed + 1000, 2 * n + 30, d) * torch.arange(1, d + 1, dtype=torch.float64).pow(-0.5)
    layers = (partial(nn.Linear, d, hidden), nn.Tanh, partial(nn.Linear, hidden, out))
    model, teacher = (net(*(make() for make in layers), seed=seed + s, scale=c) for s, c in ((0, 0.7), (50, 1.5)))
    with torch.no_grad():
        z = teacher(x) / teacher(x).std()
    noisy = z + 0.4 * random(seed + 2000, *z.shape)
    y = noisy if kind == "squared_error" else (3 * noisy).argmax(-1)
    loss_fn, params = functionalize(model, loss=kind)
    parts = batch_of(x[:n], y[:n]), batch_of(x[n : 2 * n], y[n : 2 * n], n), batch_of(x[2 * n :], y[2 * n :], 2 * n)
    found = retrain(loss_fn, params, parts[0], alpha, steps)
    return problem_of(loss_fn, found, params, *parts)


def retrain(loss_fn: Any, start: dict[str, Tensor], train: Any, alpha: float, steps: int) -> list[dict[str, Tensor]]:
    n, sizes = len(train["input"]), [p.numel() for p in start.values()]
    weights = torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).double()
    theta = torch.cat([p.flatten() for p in start.values()]).expand(n + 1, -1).clone()

    def named(flat: Tensor) -> dict[str, Tensor]:
        pieces = zip(start.items(), flat.split(sizes), strict=True)
        return {name: piece.reshape(p.shape) for (name, p), piece in pieces}

    def objective(flat: Tensor, weight: Tensor) -> Tensor:
        return (loss_fn(named(flat), train) * weight).sum() / n + alpha / 2 * flat.square().sum()

    gradient = torch.func.vmap(torch.func.grad(objective))
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for k in range(steps):
        g = gradient(theta, weights)
        if not alpha:
            theta = theta - 0.1 * g
            continue
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g.square()
        step = (first / (1 - 0.9 ** (k + 1))) / ((second / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8)
        theta = theta - 0.03 * (1 - k / steps) * step
    if alpha:
        theta = newton(objective, gradient, theta, weights)
        assert float(gradient(theta, weights).norm(dim=1).max()) < 1e-6
    return [named(flat) for flat in theta]


def newton(objective: Any, gradient: Any, theta: Tensor, weights: Tensor) -> Tensor:
    value, shift = torch.func.vmap(objective), torch.full((len(theta),), 1e-2, dtype=torch.float64)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.grad(objective)))
    for _ in range(80):
        g = gradient(theta, weights)
        if float(g.norm(dim=1).max()) < 1e-9:
            break
        values, vectors = torch.linalg.eigh(hessian(theta, weights))
        scaled = (vectors.mT @ g[..., None])[..., 0] / (values.abs() + shift[:, None])
        tried = theta - (vectors @ scaled[..., None])[..., 0]
        better = value(tried, weights) <= value(theta, weights)
        theta = torch.where(better[:, None], tried, theta)
        shift = torch.where(better, shift / 5, shift * 5)
    return theta


def fit(problem: Problem, method: str, labels: str, count: int | None = None) -> Factors:
    batch = {key: value[:count] for key, value in problem.train.items()}
    settings = {"transform": BLOCKS, "labels": labels, "progress": False}
    return getattr(hessians, method).fit(problem.loss_fn, problem.params, [batch], **settings)


RIDGES = [(seed, decay, alpha) for seed in range(2) for decay in (0.5, 1.0, 1.5) for alpha in (1e-3, 1e-2, 1e-1)]
DECAYED = [(seed, 1e-2, 400) for seed in range(2)]
STOPPED = [(seed, 0.0, steps) for seed in range(2) for steps in (300, 1000)]
CLASSES = [(seed, 0.0, 500, "cross_entropy") for seed in range(2)]


class Outcome(NamedTuple):
    """Correlations with leave-one-out: at the selected damping, at the best, at 0.1, by held-out likelihood alone."""

    at: float
    selected: float
    best_at: float
    best: float
    tenth: float
    unregularized: float
    curve: Tensor


def outcome(problem: Problem, factors: Factors, start: bool = False) -> Outcome:
    curve = problem.curve(factors)
    chosen = problem.select(factors, start)
    held = [problem.held]
    plain = select_damping(
        factors, problem.loss_fn, problem.params, held, candidates=GRID, regularization=0.0, progress=False
    )
    k, best, alone = (int(x) for x in (chosen.criterion.argmin(), curve.argmax(), plain.criterion.argmin()))
    values = curve.tolist()
    return Outcome(chosen.best, values[k], float(GRID[best]), values[best], values[12], values[alone], curve)


def gaps(outcomes: list[Outcome], which: str = "selected") -> list[float]:
    return [o.best - getattr(o, which) for o in outcomes]


@pytest.mark.parametrize(("labels", "most"), [("exact", 0.01), ("data", 0.06)])
def test_ridge_the_selected_damping_is_as_good_as_the_best(labels: str, most: float) -> None:
    # exact curvature of the documents left out: the answer is known, α / λ̄, and the grid is the only error
    found = [outcome(p, fit(p, "autocorrelation", labels)) for p in (ridge(*case) for case in RIDGES)]
    assert max(gaps(found)) <= most, max(gaps(found))
    # the held-out likelihood of gradients knows nothing of the weight decay, and a constant nothing at all
    assert sum(gaps(found)) < 0.2 * sum(gaps(found, "unregularized"))
    assert sum(gaps(found)) < 0.5 * sum(gaps(found, "tenth"))


def test_ridge_factors_of_a_third_of_the_documents_are_damped_more_and_well() -> None:
    found = []
    for case in RIDGES[:9]:
        problem = ridge(*case)
        whole, part = (fit(problem, "autocorrelation", "exact", count) for count in (None, 20))
        found.append(outcome(problem, part))
        assert found[-1].at >= problem.select(whole).best
    assert max(gaps(found)) <= 0.06
    assert sum(gaps(found)) < 0.1 * sum(gaps(found, "unregularized"))


@pytest.mark.parametrize("case", [*DECAYED, *STOPPED, *CLASSES])
def test_networks_the_selected_damping_is_nearly_as_good_as_the_best(case: tuple[Any, ...]) -> None:
    problem = mlp(*case)
    for method, labels in (("autocorrelation", "exact"), ("ekfac", "exact"), ("ekfac", "sampled")):
        found = outcome(problem, fit(problem, method, labels), start=case[1] == 0)
        assert found.selected >= found.best - 0.08, (labels, method, found)


# The criterion


def test_the_criterion_is_steins_loss_of_dense_matrices() -> None:
    # a vector between the matrices: its diagonal is measured in the same pass as the Kronecker products
    loss_fn, params, batch = small(nn.Linear(4, 3), nn.Tanh(), Scale(), nn.Linear(3, 2))
    rows = per_example_grads(loss_fn, params, batch, transform=BLOCKS)
    alpha, grid = 0.3, torch.tensor([0.02, 0.1, 1.0])
    kfac = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS, labels="data")
    dense = hessians.autocorrelation.fit(loss_fn, params, [half(batch)], transform=BLOCKS, labels="data")
    corrected = hessians.ekfac.correct(kfac, loss_fn, params, [half(batch)])
    assert {c.kind for c in kfac.blocks.values()} == {"kronecker", "diagonal"}
    for factors, inversion in ((kfac, "damped"), (kfac, "absolute"), (corrected, "damped"), (dense, "damped")):
        arguments = {"regularization": alpha, "candidates": grid, "inversion": inversion, "labels": "data"}
        curve = select_damping(factors, loss_fn, params, [batch], **arguments)
        for name, c in factors.blocks.items():
            flat = rows[name].flatten(1)
            eye = torch.eye(flat.shape[1], dtype=torch.float64)
            target = flat.mT @ flat / len(flat) + alpha * eye
            expected = []
            for damping in grid.tolist():
                fitted = c.dense() + damping * (c.mean if inversion == "damped" else 1) * eye
                solved = torch.linalg.solve(fitted, target)
                best = solved.trace() / len(eye) * fitted  # the scale at which the divergence is least
                divergence = torch.linalg.solve(best, target).trace() - len(eye) + best.logdet() - target.logdet()
                expected.append(float(divergence) / 2 / len(eye))
            got = curve.per_block[name]
            wanted = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(got - got[0], wanted - wanted[0], atol=1e-9, rtol=0)
        sizes = torch.tensor([math.prod(c.shape) for c in factors.blocks.values()], dtype=torch.float64)
        whole = (torch.stack(list(curve.per_block.values())) * sizes[:, None]).sum(0) / sizes.sum()
        torch.testing.assert_close(curve.criterion, whole)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by[0]


def small(*layers: nn.Module, loss: str = "squared_error") -> Any:
    loss_fn, params = functionalize(net(*layers), loss=loss)
    y = random(2, 12, 2) if loss == "squared_error" else torch.arange(12) % 2
    return loss_fn, params, batch_of(random(1, 12, 4), y)


def half(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:6] for key, value in batch.items()}


@pytest.mark.parametrize("method", ["autocorrelation", "ekfac"])
def test_exact_factors_are_damped_by_the_regularization(method: str) -> None:
    # H = F in every direction, so that α / λ̄ (absolute: α) is the answer; EK-FAC is exact in its own basis
    loss_fn, params, batch = small(nn.Linear(4, 2))
    module = getattr(hessians, method)
    factors = module.fit(loss_fn, params, [batch], transform=BLOCKS, labels="exact")
    for alpha in (0.01, 1.0):
        for inversion, expected in (("absolute", alpha), ("damped", alpha / factors.mean)):
            grid = [expected * f for f in (0.5, 0.9, 1.0, 1.1, 2.0)]
            settings = {"regularization": alpha, "candidates": grid, "inversion": inversion}
            assert select_damping(factors, loss_fn, params, [batch], **settings).best == pytest.approx(expected)


def test_float32_is_judged_as_float64_is() -> None:
    # softmax leaves a direction without gradient: in float32 its eigenvalue is rounding, of any size below 1e-7
    curves = []
    for dtype in (torch.float64, torch.float32):
        model = net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
        loss_fn, params = functionalize(model, loss="cross_entropy")
        batch = batch_of(random(1, 12, 4).to(dtype), torch.arange(12) % 2)
        factors = hessians.ekfac.fit(loss_fn, params, [half(batch)], transform=BLOCKS, labels="exact")
        curves.append(
            select_damping(factors, loss_fn, params, [batch], regularization=0.0, candidates=[1e-3, 0.1, 1.0])
        )
    assert curves[0].per_block.keys() == curves[1].per_block.keys()
    torch.testing.assert_close(curves[0].criterion, curves[1].criterion, rtol=1e-4, atol=1e-4)


def test_any_split_of_the_batches_is_one_batch() -> None:
    loss_fn, params, batch = small(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    pieces = [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 5), (5, 12))]
    for name in ("kfac", "autocorrelation"):
        factors = getattr(hessians, name).fit(loss_fn, params, [batch], transform=BLOCKS, labels="sampled")
        one, two = (select_damping(factors, loss_fn, params, b, regularization=0.1) for b in ([batch], pieces))
        torch.testing.assert_close(one.criterion, two.criterion, rtol=1e-12, atol=1e-12)


def test_the_factored_inversion_has_a_curve_of_its_own() -> None:
    loss_fn, params, batch = small(nn.Linear(4, 2))
    factors = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS, labels="exact")
    curve = select_damping(factors, loss_fn, params, [batch], regularization=0.1, inversion="factored")
    (c,) = factors.blocks.values()
    weights = inverse_weights(c, -1.0, float(curve.candidates[7]), "factored").grid
    expected = stein(weights.flatten(), c.eigenvalues.flatten() + 0.1)  # one linear layer: K-FAC is exact
    torch.testing.assert_close(curve.criterion[7], expected)


def test_data_labels_are_judged_by_drawn_ones() -> None:
    # an empirical Fisher is small where the residuals are, and α is not: judged by itself, it would be damped too much
    loss_fn, params, batch = small(nn.Linear(4, 2))
    data, drawn = (
        hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS, labels=labels) for labels in ("data", "sampled")
    )
    settings = {"regularization": 0.1}
    default = select_damping(data, loss_fn, params, [batch], **settings)
    assert torch.equal(
        default.criterion, select_damping(data, loss_fn, params, [batch], labels="sampled", **settings).criterion
    )
    own = select_damping(data, loss_fn, params, [batch], labels="data", **settings)
    assert not torch.equal(default.criterion, own.criterion)
    exact = select_damping(drawn, loss_fn, params, [batch], labels="exact", **settings)
    assert not torch.equal(exact.criterion, select_damping(drawn, loss_fn, params, [batch], **settings).criterion)

    def bare(params: dict[str, Tensor], batch: Any) -> Tensor:
        return loss_fn(params, batch)

    # without a likelihood there is nothing to draw
    mine = hessians.autocorrelation.fit(bare, params, [batch], transform=as_blocks(), labels="data")
    assert select_damping(mine, bare, params, [batch], **settings).best > 0


def test_directions_without_gradient_do_not_vote() -> None:
    # the second feature is always zero, and softmax gradients sum to zero over the classes: with α = 0 both would ask
    # for no damping at all, without bound
    loss_fn, params, batch = small(nn.Linear(4, 2), loss="cross_entropy")
    short, shorter = dict(batch), {key: value[:, :3] if value.ndim == 2 else value for key, value in batch.items()}
    short["input"] = torch.cat([batch["input"][:, :3], torch.zeros(12, 1).double()], 1)
    fewer = {"0.weight": params["0.weight"][:, :3].clone(), "0.bias": params["0.bias"]}
    small_fn, _ = functionalize(nn.Sequential(nn.Linear(3, 2)).double(), loss="cross_entropy")
    for method in (hessians.kfac, hessians.autocorrelation):
        with_dead = method.fit(loss_fn, params, [half(short)], transform=BLOCKS, labels="exact")
        without = method.fit(small_fn, fewer, [half(shorter)], transform=BLOCKS, labels="exact")
        curves = [
            select_damping(f, fn, p, [b], regularization=0.0, inversion="absolute", candidates=[1e-6, 1e-3, 1.0])
            for f, fn, p, b in ((with_dead, loss_fn, params, short), (without, small_fn, fewer, shorter))
        ]
        torch.testing.assert_close(curves[0].criterion, curves[1].criterion, rtol=1e-9, atol=1e-9)


# The regularization that parameters imply


def test_weight_decay_is_recovered_at_the_minimum() -> None:
    for case in RIDGES[:6]:
        problem = ridge(*case)
        assert implied_regularization(problem.loss_fn, problem.params, [problem.train]) == pytest.approx(
            case[2], rel=1e-9
        )
    problem = mlp(*DECAYED[0])
    assert implied_regularization(problem.loss_fn, problem.params, [problem.train]) == pytest.approx(1e-2, rel=1e-6)
    # towards the start instead of zero
    target, start, alpha = torch.tensor([3.0]), {"w": torch.tensor([1.0])}, 0.25
    at = {"w": (target + alpha * start["w"]) / (1 + alpha)}
    assert implied_regularization(quadratic, at, [target[None]], start) == pytest.approx(alpha, rel=1e-6)


def quadratic(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return (params["w"] - batch).square().sum(1) / 2


def test_early_stopping_is_a_ridge() -> None:
    # ∫ gradient flow on λ (w - w*)² / 2 for a time t: α = λ / (e^{λt} - 1), which is 1/t while λt is small
    for lam, t in ((1.0, 0.5), (0.01, 3.0), (3.0, 2.0)):
        w = 1 - math.exp(-lam * t)

        def ell(params: dict[str, Tensor], batch: Tensor, lam: float = lam) -> Tensor:
            return lam * quadratic(params, batch)

        params, start = {"w": torch.tensor([w], dtype=torch.float64)}, {"w": torch.zeros(1, dtype=torch.float64)}
        found = implied_regularization(ell, params, [torch.ones(2, 1, dtype=torch.float64)], start)
        assert found == pytest.approx(lam / math.expm1(lam * t), rel=1e-12)
    assert 0.01 / math.expm1(0.03) == pytest.approx(1 / 3, rel=0.02)


def test_parameters_that_a_loss_does_not_see_still_count_as_weight() -> None:
    params = {"w": torch.tensor([2.0]), "unused": torch.tensor([2.0])}
    assert implied_regularization(quadratic, params, [torch.tensor([[2.0], [4.0]])]) == pytest.approx(0.25)


# What it prints, and what it refuses


def curve_of(criterion: list[float]) -> DampingCurve:
    grid, values = torch.tensor([0.1, 0.2, 0.4]).double(), torch.tensor(criterion).double()
    return DampingCurve(grid, values, {"b": values}, float(grid[values.argmin()]), 0.5, "damped")


@pytest.mark.parametrize(
    ("criterion", "warning"),
    [([1.0, 0.5, 2.0], None), ([0.5, 1.0, 2.0], "smallest candidate"), ([3.0, 2.0, 1.0], "largest candidate")],
)
def test_the_table_shows_the_choice_and_warns_at_an_edge(criterion: list[float], warning: str | None) -> None:
    shown = str(curve_of(criterion))
    lines = shown.splitlines()
    assert "regularization 0.5" in lines[0]
    (best,) = (line for line in lines if line.endswith("best") and line.split()[0] != "damping")
    assert best.split() == [f"{curve_of(criterion).best:.3g}", "0.0000", "best"]
    assert ("warning" in shown) == (warning is not None)
    assert warning is None or warning in shown


def fitted(**settings: Any) -> tuple[Any, ...]:
    loss_fn, params, batch = small(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    method = settings.pop("method", hessians.kfac)
    factors = method.fit(loss_fn, params, [batch], **{"transform": BLOCKS, "labels": "data"} | settings)
    return factors, loss_fn, params, [batch]


SKETCHED = chain(BLOCKS, project(2))
REFUSED = [
    # (what, factors' settings, select_damping's, the message)
    ("inversion", {}, {"inversion": "tikhonov"}, r"inversion must be one of damped, absolute, factored.*'tikhonov'"),
    ("zero", {}, {"candidates": [0.0, 1.0]}, r"positive, finite and ascending.*got \[0.0, 1.0\]"),
    ("order", {}, {"candidates": [1.0, 0.1]}, r"ascending, at least one; got \[1.0, 0.1\]"),
    ("none", {}, {"candidates": []}, r"at least one; got \[\]"),
    ("negative", {}, {"regularization": -1.0}, r"regularization must be a finite number, at least 0; got -1.0"),
    ("nan", {}, {"regularization": float("nan")}, r"at least 0; got nan"),
    ("labels", {}, {"labels": "true"}, r"labels must be one of sampled, data, exact; got 'true'"),
    ("projected", {"transform": SKETCHED}, {}, r"project\(…\) makes other coordinates of them: pass regularization="),
    (
        "normalised",
        {"transform": chain(BLOCKS, unit_norm()), "method": hessians.autocorrelation},
        {},
        r"unit_norm\(…\)",
    ),
    ("corrected", {"method": hessians.ekfac}, {"inversion": "factored"}, r"'factored' needs Kronecker factors"),
    ("start", {}, {"start": {"w": torch.zeros(1)}}, r"start and params have other names; they differ in \['0.bias'"),
    ("transform", {}, {"transform": as_blocks()}, r"fitted under as_blocks\(bias=True\); got transform=as_blocks"),
]


@pytest.mark.parametrize(("made", "settings", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_bad_arguments_are_refused(made: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_damping(*fitted(**made), **settings)


def test_other_parameters_and_used_up_batches_are_refused() -> None:
    factors, loss_fn, params, batches = fitted()
    moved = {name: p + 1 for name, p in params.items()}
    with pytest.raises(ValueError, match="fitted at other weights"):
        select_damping(factors, loss_fn, moved, batches)
    with pytest.raises(ValueError, match=r"the batches are seen twice.* or regularization="):
        select_damping(factors, loss_fn, params, iter(batches))
    assert select_damping(factors, loss_fn, params, iter(batches), regularization=0.1).best > 0
    with pytest.raises(ValueError, match="batches is empty"):
        select_damping(factors, loss_fn, params, [])
    with pytest.raises(ValueError, match="batches is empty"):
        select_damping(factors, loss_fn, params, [], regularization=0.1)


def test_a_gradient_that_no_weight_decay_explains_is_refused() -> None:
    # the minimum is beyond: these parameters are too large for it, not too small
    with pytest.raises(
        ValueError, match=r"does not pull away from zero \(⟨ḡ, θ - θ_0⟩ = 5, .* = 25\).*regularization="
    ):
        implied_regularization(quadratic, {"w": torch.tensor([5.0])}, [torch.tensor([[4.0]])])
    with pytest.raises(ValueError, match=r"does not pull away from start"):
        implied_regularization(
            quadratic, {"w": torch.tensor([5.0])}, [torch.tensor([[4.0]])], {"w": torch.tensor([5.0])}
        )


def test_curvature_that_is_zero_everywhere_is_refused() -> None:
    factors, loss_fn, params, batches = fitted(method=hessians.autocorrelation)
    nothing = {
        n: Curvature(c.shape, (Basis(None, torch.zeros(math.prod(c.shape)).double()),))
        for n, c in factors.blocks.items()
    }
    zero = replace(factors, blocks=nothing, labels=Labels("data"))
    with pytest.raises(ValueError, match="no block has any curvature"):
        select_damping(zero, loss_fn, params, batches, regularization=0.1)


def table(name: str, outcomes: list[Outcome]) -> None:
    for o in outcomes:
        alone = f"held-out likelihood alone r={o.unregularized:.3f}"
        print(
            f"{name}: selected {o.at:.3g} r={o.selected:.3f}, best {o.best_at:.3g} r={o.best:.3f}, "
            f"0.1 r={o.tenth:.3f}, {alone}"
        )
    curve = torch.stack([o.curve for o in outcomes]).mean(0)
    shown = " ".join(f"{float(GRID[k]):.0e}:{float(curve[k]):.3f}" for k in range(0, 21, 2))
    print(f"{name}: mean over seeds {shown}")


if __name__ == "__main__":
    for labels, method in (("exact", "autocorrelation"), ("data", "autocorrelation"), ("data", "ekfac")):
        for decay, alpha in ((d, a) for d in (0.5, 1.0, 1.5) for a in (1e-3, 1e-2, 1e-1)):
            found = [outcome(p, fit(p, method, labels)) for p in (ridge(seed, decay, alpha) for seed in range(3))]
            table(f"ridge, {method}, {labels} labels, decay {decay}, alpha {alpha}", found)
    for labels, method in ((s, m) for s in ("exact", "sampled", "data") for m in ("autocorrelation", "kfac", "ekfac")):
        for case in ((1e-2, 400), (0.0, 300), (0.0, 1000), (0.0, 500, "cross_entropy")):
            problems = [mlp(seed, *case) for seed in range(3)]
            found = [outcome(p, fit(p, method, labels), start=case[0] == 0) for p in problems]
            table(f"network, {method}, {labels} labels, alpha {case[0]}, {case[1]} steps {' '.join(case[2:])}", found)
