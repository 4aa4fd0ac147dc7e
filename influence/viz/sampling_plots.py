"""Pictures of sampling: LLC traces, the plateau of a calibration, and the plane of susceptibilities."""

import textwrap
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.estimators.diagnostics import standard_error
from influence.sgmcmc.estimators.llc import LLC, Calibration
from influence.sgmcmc.estimators.susceptibility import pca
from influence.viz.canvas import GREY, MARKERS, Figure, clean, colours, figure, legend

POINTS = 60
"""Steps of a trace at which its standard error is computed."""


def llc_traces(estimates: LLC | Mapping[str, LLC]) -> Figure:
    """Return the excess loss along chains, and below it the LLC so far with a band of two standard errors.

    Args:
        estimates: an estimate, or several by name: then chains are averaged, and each name has a line.

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
    several = isinstance(estimates, Mapping)
    named = dict(estimates) if isinstance(estimates, Mapping) else {"": estimates}
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
        at, mean, error = _running_mean(trace)
        shown = f"{name}: {each.mean:.3g} ± {each.stderr:.2g}" if several else None
        below.fill_between(at, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.22, linewidth=0)
        below.plot(at, mean, color=colour, linewidth=1.8, label=shown)
        below.axhline(each.mean, color=colour, linewidth=0.8, linestyle=":")
    above.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("nβ · excess loss")
    below.set_ylabel("LLC so far ± 2 s.e.")
    below.set_xlabel("step after burn-in")
    _limit_axis(below, named)
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


def _running_mean(trace: Float[Tensor, "c s"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return some step counts `t`, the mean over the first `t` steps of all chains, and its standard error."""
    steps = trace.shape[1]
    at = torch.linspace(min(8, steps), steps, min(POINTS, steps)).long().unique()
    mean = torch.stack([trace[:, :t].mean() for t in at.tolist()])
    return at, mean, torch.tensor([standard_error(trace[:, :t]) for t in at.tolist()], dtype=torch.float64)


def _limit_axis(axes: object, named: Mapping[str, LLC]) -> None:
    """Set the limits by the later steps, so that the first wild ones of a running mean don't flatten the rest."""
    later = [each.running()[:, each.trace.shape[1] // 10 :] for each in named.values()]
    low, high = min(float(x.min()) for x in later), max(float(x.max()) for x in later)
    low = min([low, *(each.mean - 3 * each.stderr for each in named.values() if each.stderr == each.stderr)])
    high = max([high, *(each.mean + 3 * each.stderr for each in named.values() if each.stderr == each.stderr)])
    pad = 0.1 * (high - low) or 1.0
    axes.set_ylim(low - pad, high + pad)  # type: ignore[attr-defined]


def plateau(grid: Calibration) -> Figure:
    """Return the LLC over step sizes, a line per localization; a cross is a point where every chain diverged.

    Args:
        grid: what `llc.calibrate` returns.

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


ARROW = "#D55E00"


def susceptibility_plane(
    matrix: Float[Tensor, "tokens r"],
    restrictions: Sequence[str],
    tokens: Sequence[str] = (),
    groups: Sequence[str] = (),
    *,
    named: int = 14,
    kind: str = "tokens",
) -> Figure:
    """Return the tokens in the plane of their first two principal components, with the restrictions' loadings.

    Args:
        matrix: `Susceptibility.matrix()` of one observable, or several of them stacked.
        restrictions: the names of its columns.
        tokens: each row's token, to label the outermost ones.
        groups: which data each row comes from, to colour it.
        named: how many tokens are labelled.
        kind: what the rows are, for the title: `"examples"` if the loss has one number per example.

    Returns:
        The figure.

    Raises:
        ValueError: if there are fewer than two restrictions or tokens.

    Example:
        >>> import torch
        >>> from influence import viz
        >>> made = viz.susceptibility_plane(torch.eye(3, 2), ["l0h0", "l0h1"], ["a", "b", "c"])
        >>> len(made.axes)
        2
    """
    if min(matrix.shape) < 2:
        raise ValueError(
            f"a plane needs two restrictions and two tokens; the matrix is {list(matrix.shape)}: add restrictions, "
            "'full' among them"
        )
    found = pca(matrix, 2)
    share = [100 * float(x) for x in found.explained]
    count = len(restrictions)
    made, (plane, bars) = figure(1, 2, width=10.0, height=max(4.6, 0.24 * count + 1.6), width_ratios=(2.2, 1.0))
    names = list(dict.fromkeys(groups)) or [""]
    of = list(groups) or [""] * len(matrix)
    for name, colour, marker in zip(names, colours(len(names)), MARKERS * len(names), strict=False):
        at = torch.tensor([each == name for each in of])
        size = 22 if len(matrix) < 500 else 8
        x, y = found.scores[at].T
        plane.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    for place, mark in _outermost(found.scores, named if tokens else 0):
        x, y = found.scores[place].tolist()
        plane.annotate(
            clean(tokens[place]),
            (x, y),
            xytext=(5 * mark[0], 5 * mark[1]),
            textcoords="offset points",
            fontsize=8,
            ha="left" if mark[0] > 0 else "right",
            va="bottom" if mark[1] > 0 else "top",
        )
    plane.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    plane.axvline(0, color=GREY, linewidth=0.6, zorder=0)
    plane.margins(0.12)
    plane.set_xlabel(f"first component ({share[0]:.0f} % of the variance)")
    plane.set_ylabel(f"second component ({share[1]:.0f} %)")
    plane.set_title(f"susceptibilities of {len(matrix):,} {kind}", fontsize=10)
    legend(plane, len(names))
    rows = torch.arange(count).flip(0).double()
    for k, (colour, shift) in enumerate(((colours(2)[0], 0.18), (ARROW, -0.18))):
        bars.barh(
            (rows + shift).tolist(),
            found.loadings[:, k].tolist(),
            height=0.34,
            color=colour,
            label=("first", "second")[k],
        )
    bars.set_yticks(rows.tolist(), [clean(name) for name in restrictions], fontsize=9 if count < 30 else 6)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_title("loadings of the restrictions", fontsize=10)
    bars.legend(fontsize=8, frameon=False)
    return made


def _outermost(scores: Float[Tensor, "tokens 2"], count: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the points farthest from the middle, no two of them close, each with the side its label goes to."""
    if not count:
        return []
    scaled = scores / scores.abs().amax(0).clamp_min(1e-300)
    chosen: list[int] = []
    for place in scaled.norm(dim=1).argsort(descending=True).tolist():
        gaps = [(scaled[place] - scaled[other]).abs().tolist() for other in chosen]
        if all(x > 0.2 or y > 0.08 for x, y in gaps):
            chosen.append(place)
        if len(chosen) == count:
            break
    return [(p, (1 if scaled[p, 0] >= 0 else -1, 1 if scaled[p, 1] >= 0 else -1)) for p in chosen]
