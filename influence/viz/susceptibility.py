"""Susceptibilities in the plane of their first two principal components."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.susceptibility import pca
from influence.viz.canvas import GREY, MARKERS, Figure, clean, colours, figure, legend

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
    """Return tokens in the plane of the first two principal components, and the restrictions' loadings beside it.

    Args:
        matrix: `Susceptibility.matrix()`, of one observable or of several below one another.
        restrictions: names of its columns.
        tokens: what each row is, to name the outermost ones.
        groups: which data each row is from, to colour it.
        named: how many tokens are named.
        kind: what the rows are, for the title: `"examples"` where the loss has one number for each.

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
    """Return the points farthest from the middle, no two of them close, each with the side its name is put on."""
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
