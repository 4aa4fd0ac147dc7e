"""Pictures of the local learning coefficient: its traces over time, and its plateau over step sizes."""

import textwrap
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.diagnostics import standard_error
from influence.sgmcmc.llc import LLC, Calibration
from influence.viz.canvas import GREY, MARKERS, Figure, colours, figure, legend

POINTS = 60
"""Places along a trace where its standard error is computed."""


def llc_traces(found: LLC | Mapping[str, LLC]) -> Figure:
    """Return the excess loss along chains, and below it the LLC so far with a band of two standard errors.

    Args:
        found: an estimate, or several by name: then chains are averaged, and each name has a line.

    Returns:
        The figure.

    Example:
        >>> import torch
        >>> from influence import sgmcmc, viz
        >>> loss = lambda w, _: w["w"].square().sum() / 2
        >>> run = sgmcmc.sample(loss, {"w": torch.zeros(4)}, None, lr=0.01, n_beta=10.0, num_draws=50, progress=False)
        >>> len(viz.llc_traces(sgmcmc.llc.estimate(run)).axes)
        2
    """
    several = isinstance(found, Mapping)
    named = dict(found) if isinstance(found, Mapping) else {"": found}
    made, (above, below) = figure(2, width=7.5, height=6.0, sharex=True)
    for (name, each), colour in zip(named.items(), colours(len(named)), strict=True):
        trace = each.trace.double()
        steps = torch.arange(1, trace.shape[1] + 1)
        width = max(1, trace.shape[1] // 50)
        if not several:
            for chain in trace:
                above.plot(steps, chain, color=GREY, alpha=0.35, linewidth=0.6)
            for chain in each.running():
                below.plot(steps, chain, color=GREY, alpha=0.6, linewidth=0.8)
        smooth = trace.mean(0).unfold(0, width, 1).mean(1)
        above.plot(steps[width - 1 :] - (width - 1) / 2, smooth, color=colour, linewidth=1.6, label=name)
        at, mean, error = so_far(trace)
        shown = f"{name}: {each.mean:.3g} ± {each.stderr:.2g}" if several else None
        below.fill_between(at, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.22, linewidth=0)
        below.plot(at, mean, color=colour, linewidth=1.8, label=shown)
        below.axhline(each.mean, color=colour, linewidth=0.8, linestyle=":")
    above.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("nβ · excess loss")
    below.set_ylabel("LLC so far ± 2 s.e.")
    below.set_xlabel("step after burn-in")
    room(below, named)
    if several:
        legend(below, len(named))
        above.set_title("local learning coefficients", fontsize=11)
    else:
        one = named[""]
        chains = len(one.per_chain)
        above.set_title(
            f"LLC {one.mean:.4g} ± {one.stderr:.2g}: {chains} chain{'s' * (chains > 1)} in grey, their mean in blue\n"
            + textwrap.fill(one.verdict, 100),
            fontsize=10,
        )
    return made


def so_far(trace: Float[Tensor, "c s"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return some numbers of steps, the mean over all chains' so many first steps, and its standard error."""
    steps = trace.shape[1]
    at = torch.linspace(min(8, steps), steps, min(POINTS, steps)).long().unique()
    mean = torch.stack([trace[:, :t].mean() for t in at.tolist()])
    return at, mean, torch.tensor([standard_error(trace[:, :t]) for t in at.tolist()], dtype=torch.float64)


def room(axes: object, named: Mapping[str, LLC]) -> None:
    """Let the first wild steps of a running mean leave the picture rather than flatten the rest of it."""
    later = [each.running()[:, each.trace.shape[1] // 10 :] for each in named.values()]
    low, high = min(float(x.min()) for x in later), max(float(x.max()) for x in later)
    low = min([low, *(each.mean - 3 * each.stderr for each in named.values() if each.stderr == each.stderr)])
    high = max([high, *(each.mean + 3 * each.stderr for each in named.values() if each.stderr == each.stderr)])
    pad = 0.1 * (high - low) or 1.0
    axes.set_ylim(low - pad, high + pad)  # type: ignore[attr-defined]


def plateau(grid: Calibration) -> Figure:
    """Return the LLC over step sizes, a line for each localization; crosses are points where every chain diverged.

    Args:
        grid: what `llc.calibrate` found.

    Returns:
        The figure.
    """
    made, axes = figure(height=4.5)
    count = len(grid.localizations)
    for k, (gamma, colour, marker) in enumerate(zip(grid.localizations, colours(count), MARKERS * count, strict=False)):
        aside = 1.04 ** (k - (count - 1) / 2)  # so that bars do not hide one another
        points = [(lr, grid.estimates[lr, gamma]) for lr in grid.lrs]
        there = [(lr, e) for lr, e in points if e is not None]
        errors = [2 * e.stderr for _, e in there]
        axes.errorbar(
            [lr * aside for lr, _ in there],
            [e.mean for _, e in there],
            errors,
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
            label=f"γ = {gamma:g}",
        )
        lost = [lr for lr, e in points if e is None]
        axes.plot(
            lost, [0.03 + 0.04 * k] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False
        )
    axes.set(xscale="log", xlabel="step size ε", ylabel="LLC ± 2 s.e.")
    axes.set_xticks(list(grid.lrs), [f"{lr:g}" for lr in grid.lrs])
    axes.minorticks_off()
    legend(axes, count)
    axes.set_title("look for a plateau (× diverged)", fontsize=10)
    return made
