"""Spectra of curvature, and how many directions they are worth."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from influence.viz.canvas import Figure, clean, colours, drawn, figure


def spectra(values: Mapping[str, Float[Tensor, " d"]]) -> Figure:
    r"""Return every block's eigenvalues, largest first, and its effective rank `(Σ λ)² / Σ λ²`.

    Args:
        values: eigenvalues by block: `factors.spectra()`.

    Returns:
        The figure; eigenvalues at or below zero are left out of the logarithmic axes.

    Raises:
        ValueError: if there is no block.

    Example:
        >>> import torch
        >>> from influence import viz
        >>> made = viz.spectra({"0": torch.tensor([4.0, 1.0, 0.25])})
        >>> made.axes[1].get_yticklabels()[0].get_text()
        '0'
    """
    if not values:
        raise ValueError("there is no spectrum to draw: pass {block: eigenvalues}")
    count = len(values)
    shades = colours(count)
    made, (curves, bars) = figure(1, 2, width=10.0, height=max(4.2, 0.2 * count + 1.4), width_ratios=(1.5, 1.0))
    ranks, sizes = [], []
    for (_, each), colour in zip(values.items(), shades, strict=True):
        ordered = drawn(each).flatten().sort(descending=True).values
        positive = ordered[ordered > 0]
        at = (torch.logspace(0, torch.tensor(float(max(len(positive), 1))).log10(), 600).round().long() - 1).unique()
        at = at[at < len(positive)]
        curves.plot(at + 1, positive[at], color=colour, linewidth=1.4)
        squares = float(ordered.square().sum())
        ranks.append(float(ordered.sum()) ** 2 / squares if squares else 0.0)
        sizes.append(len(ordered))
    curves.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="eigenvalue")
    curves.set_title("spectra", fontsize=10)
    rows = list(range(count))[::-1]
    bars.barh(rows, ranks, color=shades, height=0.72)
    bars.set_yticks(rows, [clean(name) for name in values], fontsize=9 if count < 20 else 6)
    for row, rank, size in zip(rows, ranks, sizes, strict=True):
        bars.text(rank, row, f" {rank:.3g} of {size:,}", va="center", fontsize=8 if count < 20 else 5.5)
    bars.set_xlim(0, max([*ranks, 1.0]) * 1.45)
    bars.set_xlabel("effective rank (Σλ)²/Σλ²")
    bars.set_title("directions it is worth", fontsize=10)
    return made
