"""How scores are distributed, and where the strongest lie."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.viz.canvas import Figure, clean, colours, drawn, figure


def score_distributions(scores: Float[Tensor, " n"] | Mapping[str, Float[Tensor, " n"]], *, k: int = 10) -> Figure:
    """Return a histogram of scores on a logarithmic count, the `k` largest and smallest as ticks below it.

    Args:
        scores: of a query, or by method or query; each has its own axis, since their units differ.
        k: how many are marked at either end.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no finite score.

    Example:
        >>> import torch
        >>> from influence import viz
        >>> len(viz.score_distributions({"dot": torch.randn(50), "cosine": torch.rand(50)}).axes)
        2
    """
    check_number("k", k, 1)
    named = dict(scores) if isinstance(scores, Mapping) else {"": scores}
    made, axes = figure(len(named), width=7.0, height=max(3.0, 2.1 * len(named)), squeeze=False)
    for (name, each), colour, plot in zip(named.items(), colours(len(named)), axes[:, 0], strict=True):
        finite = drawn(each[each.isfinite()])
        if not len(finite):
            raise ValueError(f"the scores {name!r} have no finite number: there is nothing to draw")
        plot.hist(finite.numpy(), bins=min(120, max(12, int(len(finite) ** 0.5))), color=colour, alpha=0.75)
        plot.set_yscale("log")
        plot.axvline(0, color="black", linewidth=0.8)
        ordered = finite.sort().values
        ends = torch.cat([ordered[:k], ordered[-k:]]) if len(ordered) > 2 * k else ordered
        place = [-0.035] * len(ends)
        plot.plot(ends, place, "|", color="black", markersize=7, transform=plot.get_xaxis_transform(), clip_on=False)
        plot.tick_params(axis="x", pad=8)
        deviation = float(finite.std(correction=0)) or 1.0
        top = float((ordered[-1] - finite.mean()) / deviation)
        heading = f"{clean(name)}   " if name else ""
        plot.set_title(f"{heading}{len(finite):,} scores; the largest is {top:+.1f} deviations out", fontsize=10)
        plot.set_ylabel("examples")
    axes[-1, 0].set_xlabel("score (ticks: the strongest at either end)")
    return made
