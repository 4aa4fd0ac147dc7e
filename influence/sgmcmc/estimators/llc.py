r"""The local learning coefficient (Lau et al. 2023), with errors and a verdict.

$$\hatλ = nβ\,\bigl(E_{w \mid w^*, γ}[L_n(w)] - L_n(w^*)\bigr)$$
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.sgmcmc.estimators import diagnostics
from influence.sgmcmc.runner.draws import Run
from influence.sgmcmc.runner.sampling import execute, target_of
from influence.sgmcmc.runner.schedule import make_plan, options_by_name
from influence.sgmcmc.samplers import sgld
from influence.sgmcmc.samplers.langevin import Sampler
from influence.sgmcmc.samplers.target import Loss, default_n_beta
from influence.types import Params

ESTIMATORS = ("paired", "steps", "draws")
LOW_ACCEPTANCE, HIGH_RHAT, FAR = 0.7, 1.1, 3.0


class LLC(NamedTuple):
    """An estimate of the local learning coefficient.

    Attributes:
        mean: `λ̂`.
        stderr: its Monte-Carlo standard error, from the effective sample size; the spread between chains is in it.
        per_chain: estimates of each chain.
        std: their standard deviation, as the peer states it (`ddof` 0 for `"steps"`, 1 otherwise).
        trace: `nβ` times the excess loss at each step that counts.
        ess: effective sample size of the mean.
        rhat: split R-hat of the trace.
        drift: standard errors by which the second half lies above the first.
        acceptance: mean acceptance probability, where the sampler says it; otherwise NaN.
        verdict: what is wrong, in words, with the number behind it; `"no fault found"`.
    """

    mean: float
    stderr: float
    per_chain: Float[Tensor, " c"]
    std: float
    trace: Float[Tensor, "c s"]
    ess: float
    rhat: float
    drift: float
    acceptance: float
    verdict: str

    def running(self) -> Float[Tensor, "c s"]:
        """Return the estimate over time: the mean of each chain's trace so far."""
        return self.trace.cumsum(1) / torch.arange(1, self.trace.shape[1] + 1)

    def __str__(self) -> str:
        return (
            f"LLC {self.mean:.4g} ± {self.stderr:.2g} (ess {self.ess:.0f}, R-hat {self.rhat:.3f}, "
            f"drift {self.drift:+.1f}): {self.verdict}"
        )

    def __repr__(self) -> str:
        return f"<{self}>"


def estimate(run: Run, estimator: str = "paired", init_loss: float | None = None) -> LLC:
    r"""Return the local learning coefficient of a run.

    | estimator | of | less |
    |---|---|---|
    | `"paired"` | `L_b(w_t)` at every step after burn-in | `L_b(w^*)` of the same batch |
    | `"steps"` (devinterp 2) | at every step, burn-in included | `init_loss` |
    | `"draws"` (devinterp 1) | at every draw after burn-in | `init_loss` |

    Pairing removes the noise of batches, which `nβ` multiplies.

    Args:
        run: the run.
        estimator: one of the three.
        init_loss: `L(w^*)` of the unpaired ones; default the mean of the run's own baselines.

    Returns:
        The estimate.

    Raises:
        ValueError: if the estimator is unknown, or there are fewer than two steps or draws.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> loss = lambda w, _: w["w"].square().sum() / 2  # regular: λ is half the dimension
        >>> run = sgmcmc.sample(loss, {"w": torch.zeros(4)}, None, lr=2e-3, n_beta=100.0, num_draws=2000,
        ...     num_burnin_steps=50, progress=False)
        >>> found = sgmcmc.llc.estimate(run)
        >>> abs(found.mean - 2 / (1 - 0.05)) < 4 * found.stderr, found.stderr < 0.1
        (True, True)
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    if init_loss is not None:
        check_number("init_loss", init_loss)
    trace, acceptance = _trace(run, estimator, init_loss), run.terms.get("acceptance")
    if trace.shape[1] < 2:
        what = "draws" if estimator == "draws" else "steps"
        raise ValueError(f"an LLC needs at least two {what} after burn-in; there are {trace.shape[1]}: {run.remedy}")
    per_chain = trace.mean(1)
    several = len(per_chain) > 1
    std = float(per_chain.std(correction=0 if estimator == "steps" else 1)) if several else float("nan")
    found = LLC(
        float(per_chain.mean()),
        diagnostics.standard_error(trace),
        per_chain,
        std,
        trace,
        diagnostics.ess(trace),
        diagnostics.rhat(trace),
        diagnostics.drift(trace),
        float("nan") if acceptance is None else float(acceptance[:, run.burn_in :].mean()),
        "",
    )
    return found._replace(verdict=_verdict(found, run))


def wbic(run: Run, n: int) -> tuple[float, float]:
    r"""Return `n E[L_n(w)]` and its standard error: WBIC (Watanabe 2013), of a run at `nβ = n / log n`.

    Args:
        run: the run.
        n: examples of the dataset.

    Raises:
        ValueError: if the run was at another temperature.
    """
    if abs(run.n_beta / default_n_beta(n) - 1) > 1e-3:
        raise ValueError(f"WBIC is at n_beta = n / log n = {default_n_beta(n):.6g}; the run was at {run.n_beta:.6g}")
    loss = run.loss[:, run.burn_in :]
    return n * float(loss.mean()), n * diagnostics.standard_error(loss)


class Calibration(NamedTuple):
    """LLC over a grid of step sizes and localizations.

    Attributes:
        lrs: step sizes.
        localizations: localizations.
        estimates: an LLC per `(lr, localization)`; `None` where every chain diverged.
    """

    lrs: Sequence[float]
    localizations: Sequence[float]
    estimates: Mapping[tuple[float, float], LLC | None]

    def __str__(self) -> str:
        head = "lr \\ localization" + "".join(f"{gamma:>20g}" for gamma in self.localizations)
        lines = [head]
        for lr in self.lrs:
            cells = [self.estimates[lr, gamma] for gamma in self.localizations]
            said = ("diverged" if e is None else f"{e.mean:.4g} ± {e.stderr:.2g}" for e in cells)
            lines.append(f"{lr:<17g}" + "".join(f"{cell:>20}" for cell in said))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<LLC at {len(self.lrs)} step sizes × {len(self.localizations)} localizations>"


def calibrate(
    loss_fn: Loss,
    params: Params,
    dataset: Any,
    *,
    lrs: Sequence[float],
    localizations: Sequence[float],
    n_beta: float,
    sampler: Callable[..., Sampler] = sgld.build,
    seed: int = 0,
    output_path: str | Path | None = None,
    **options: Any,
) -> Calibration:
    """Run a grid of step sizes and localizations as one computation, every point a group of chains.

    Chains that diverge are dropped, unless another policy is asked for: a grid is there to find where they do.

    Look for a plateau: an LLC that neither falls with a smaller step (not mixed yet) nor rises with a larger one (its
    bias is `ε · nβ · curvature / 4`).

    Args:
        loss_fn: as in `sample`.
        params: as in `sample`.
        dataset: as in `sample`.
        lrs: step sizes.
        localizations: localizations.
        n_beta: inverse temperature.
        sampler: as in `sample`.
        seed: of noise and order, which are the same at all points.
        output_path: a folder to checkpoint in, as in `sample`.
        options: the fields of `Options`.

    Returns:
        The estimates; `print` and `viz.plateau` show them.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> loss = lambda w, _: w["w"].square().sum() / 2
        >>> grid = sgmcmc.llc.calibrate(loss, {"w": torch.zeros(2)}, None, lrs=[1e-3, 1e-2], localizations=[0.0, 100.0],
        ...     n_beta=100.0, num_draws=400, num_burnin_steps=100, progress=False)
        >>> grid.estimates[1e-2, 0.0].mean > grid.estimates[1e-2, 100.0].mean
        True
    """
    steps, pulls, groups = grid(lrs, localizations)
    settings = options_by_name({"on_divergence": "drop", **options})
    target = target_of(loss_fn, params, dataset, n_beta, pulls, 0.0, None, settings)
    plan = make_plan(target, params, dataset, {}, steps, groups, seed, settings, sampler)
    return calibration(execute(plan, params, output_path, settings.progress), lrs, localizations)


def grid(
    lrs: Sequence[float], localizations: Sequence[float]
) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"], dict[str, dict[str, Any]]]:
    """Return the step sizes and localizations of a grid's points, and the points as groups of chains."""
    for lr in lrs:
        check_number("each of lrs", lr, 0, above=True)
    for gamma in localizations:
        check_number("each of localizations", gamma, 0)
    points = [(lr, gamma) for lr in lrs for gamma in localizations]
    if not points or len(set(points)) < len(points):
        raise ValueError("a grid is of at least one lr and one localization, each once: correct lrs and localizations")
    steps, pulls = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    return steps, pulls, {_point(*point): {} for point in points}


def calibration(runs: Mapping[str, Run], lrs: Sequence[float], localizations: Sequence[float]) -> Calibration:
    """Return the estimates of a grid's runs, `None` where no chain is left."""
    found = {
        (lr, gamma): estimate(runs[_point(lr, gamma)]) if _point(lr, gamma) in runs else None
        for lr in lrs
        for gamma in localizations
    }
    return Calibration(lrs, localizations, found)


def _point(lr: float, localization: float) -> str:
    return f"lr={lr!r} localization={localization!r}"


def _trace(run: Run, estimator: str, init_loss: float | None) -> Float[Tensor, "c s"]:
    if estimator == "paired":
        if init_loss is not None:
            raise ValueError(
                "estimator='paired' has its own baseline: leave init_loss out, or choose another estimator"
            )
        return run.n_beta * run.excess()
    start = float(run.baseline.mean()) if init_loss is None else init_loss
    if estimator == "draws":
        return run.n_beta * (run.loss[:, run.burn_in + run.between - 1 :: run.between] - start)
    return run.n_beta * (run.loss - start)


def _verdict(found: LLC, run: Run) -> str:
    said = []
    if found.mean < -2 * found.stderr:
        below = float((found.trace < 0).double().mean())
        said.append(
            f"not at a minimum: LLC {found.mean:.3g}, and {100 * below:.0f} % of steps lie below the anchor's loss"
        )
    if found.acceptance < LOW_ACCEPTANCE:
        said.append(f"too hot: acceptance {found.acceptance:.2f}, lower lr")
    if found.rhat > HIGH_RHAT:
        said.append(f"not mixed: R-hat {found.rhat:.2f}, more steps or more localization")
    if abs(found.drift) > FAR:
        said.append(f"not settled: the second half lies {found.drift:+.1f} standard errors off, more burn-in")
    if not found.ess >= 50:  # of fewer than 4 steps it is NaN
        said.append(f"too short: effective sample size {found.ess:.0f}")
    if run.facts.get("dropped"):
        said.append(f"{len(run.facts['dropped'])} chains diverged and were dropped")
    if run.facts.get("stopped") is not None:
        said.append(f"a chain diverged at step {run.facts['stopped']}: only what came before is here")
    return "; ".join(said) or "no fault found"
