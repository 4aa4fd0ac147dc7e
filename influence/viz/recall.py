"""How much of what is known to be true is found among the first k."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from influence.viz.canvas import MARKERS, Figure, colours, drawn, figure, legend


def recall_curves(
    recall: Mapping[str, Float[Tensor, " k"] | Float[Tensor, "seeds k"]], *, at: Tensor | None = None
) -> Figure:
    """Return recall@k over k, a line per method; a band of two standard errors where there are several seeds.

    Args:
        recall: by method, the share found among the first `k`.
        at: the values of `k`; default 1, 2, ….

    Returns:
        The figure.

    Raises:
        ValueError: if a method has another number of values than `at`.

    Example:
        >>> import torch
        >>> from influence import viz
        >>> made = viz.recall_curves({"ekfac": torch.tensor([0.9, 1.0]), "bm25": torch.tensor([0.2, 0.5])})
        >>> made.axes[0].get_ylabel()
        'recall@k'
    """
    made, axes = figure(width=7.0, height=4.4)
    for number, (name, values) in enumerate(recall.items()):
        colour = colours(len(recall))[number]
        each = drawn(values).reshape(-1, values.shape[-1])
        ks = torch.arange(1, each.shape[1] + 1) if at is None else at
        if len(ks) != each.shape[1]:
            raise ValueError(f"recall of {name!r} has {each.shape[1]} values, and there are {len(ks)} values of k")
        mean = each.mean(0)
        few = torch.logspace(0, torch.tensor(float(len(ks))).log10(), 7).long().sub(1).clamp(0, len(ks) - 1).unique()
        mark = MARKERS[number % len(MARKERS)]
        axes.plot(ks, mean, color=colour, marker=mark, markevery=few.tolist(), markersize=5, linewidth=1.8, label=name)
        if len(each) > 1:
            error = 2 * each.std(0) / len(each) ** 0.5
            axes.fill_between(ks, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="k", ylabel="recall@k", ylim=(-0.02, 1.02))
    low, high = axes.get_xlim()
    marks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if low <= k <= high]
    axes.set_xticks(marks, [str(k) for k in marks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    legend(axes, len(recall))
    return made
