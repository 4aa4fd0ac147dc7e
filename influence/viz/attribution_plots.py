"""Pictures of attribution: heat maps, recall curves, score distributions, and spectra of curvature."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.viz.canvas import MARKERS, SIGNED, Figure, clean, colours, figure, legend, plain, ticks


def heat_map(
    influences: Float[Tensor, "n m"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    label: str = "influence",
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """Return a heat map of signed values: red above zero, blue below, white at zero.

    If all values have one sign, the scale shows that half of the colours.

    Args:
        influences: the matrix, between examples, or between the tokens of two examples.
        rows: their labels: names, texts or tokens.
        columns: their labels.
        label: the label of the colour scale.
        title: the title of the picture.
        limit: the value of the strongest colour; by default the largest, off the diagonal if the matrix is square.

    Returns:
        The figure.

    Raises:
        ValueError: if there are not as many labels as rows or columns.

    Example:
        >>> import torch
        >>> from influence import viz
        >>> made = viz.heat_map(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), ["a", "b"], ["a", "b"])
        >>> [text.get_text() for text in made.axes[0].get_yticklabels()]
        ['a', 'b']
    """
    influences = plain(influences)
    n, m = influences.shape
    for what, labels, count in (("rows", rows, n), ("columns", columns, m)):
        if labels and len(labels) != count:
            raise ValueError(f"there are {count} {what} and {len(labels)} labels for them")
    longest = max([1, *map(len, rows)]) if n <= 72 else 1
    tallest = max([1, *map(len, columns)]) if m <= 72 else 1
    width = min(14.0, max(4.5, 0.18 * m + 1.8) + 0.055 * longest)
    height = min(14.0, max(3.2, 0.18 * n + 1.0) + 0.055 * tallest)
    made, axes = figure(width=width, height=height)
    if limit is not None:
        check_number("limit", limit, 0, above=True)
    most = _colour_limit(influences) if limit is None else limit
    shown = axes.imshow(influences.numpy(), cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#CCCCCC")  # where there is no number
    axes.spines[:].set_visible(False)
    ticks(axes, rows, columns)
    beyond = bool((influences.abs() > most).any())
    bar = made.colorbar(shown, ax=axes, shrink=0.9, extend="both" if beyond else "neither")
    bar.set_label(label, fontsize=9)
    above, below = bool((influences > 0).any()), bool((influences < 0).any())
    if above != below:
        bar.ax.set_ylim((0.0, most) if above else (-most, 0.0))
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if title:
        axes.set_title(title, fontsize=10)
    return made


def _colour_limit(influences: Float[Tensor, "n m"]) -> float:
    """Return the largest `|entry|`; of a square matrix, off the diagonal, which would outshine the rest."""
    sizes = influences.double().abs().nan_to_num()
    whole = float(sizes.max())
    n, m = sizes.shape
    if n != m or n < 3:
        return whole or 1.0
    off = sizes.clone().fill_diagonal_(0.0)
    return float(off.max()) or whole or 1.0


def recall_curves(
    recall: Mapping[str, Float[Tensor, " k"] | Float[Tensor, "seeds k"]], *, at: Tensor | None = None
) -> Figure:
    """Return recall@k over k, a line per method, with a band of two standard errors if there are several seeds.

    Args:
        recall: for each method, the share found among the first `k`.
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
        each = plain(values).reshape(-1, values.shape[-1])
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


def score_distributions(scores: Float[Tensor, " n"] | Mapping[str, Float[Tensor, " n"]], *, k: int = 10) -> Figure:
    """Return a histogram of scores with logarithmic counts, and the `k` largest and smallest as ticks below it.

    Args:
        scores: a query's scores, or several by name, each with an axis of its own, since their units differ.
        k: how many scores are marked at either end.

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
        finite = plain(each[each.isfinite()])
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
        ordered = plain(each).flatten().sort(descending=True).values
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
