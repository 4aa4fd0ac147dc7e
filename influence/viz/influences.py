"""A matrix of influences as a heat map."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.viz.canvas import SIGNED, Figure, drawn, figure, ticks


def heat_map(
    influences: Float[Tensor, "n m"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    label: str = "influence",
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """Return a heat map of signed values, red above zero and blue below, white at it.

    Where all values have one sign, the scale shows that half of the colours.

    Args:
        influences: the matrix: of examples, or of the tokens of two examples.
        rows: their labels: names, texts or tokens.
        columns: the same.
        label: of the scale.
        title: of the picture.
        limit: the value of the strongest colour; default the largest, but for a diagonal that outshines the rest.

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
    influences = drawn(influences)
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
    most = strongest(influences) if limit is None else limit
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


def strongest(influences: Float[Tensor, "n m"]) -> float:
    """Return the largest size of an entry; off the diagonal, where the diagonal is of ones or outshines the rest."""
    sizes = influences.double().abs().nan_to_num()
    whole = float(sizes.max())
    n, m = sizes.shape
    if n != m or n < 3:
        return whole or 1.0
    off = sizes.clone().fill_diagonal_(0.0)
    return float(off.max()) or whole or 1.0
