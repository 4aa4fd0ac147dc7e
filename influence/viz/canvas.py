"""Figures, colours, labels and saving, for all pictures; without pyplot, whose settings stay as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from influence.store import output_file

Figure: TypeAlias = Any
"""`matplotlib.figure.Figure`."""

Axes: TypeAlias = Any
"""`matplotlib.axes.Axes`."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A800")
"""Okabe and Ito's colours, which colour-blind readers tell apart; their yellow darkened for white paper."""

MARKERS = "osD^vP*X"
"""A second way to tell lines apart."""

SIGNED = "RdBu_r"
"""The colour map of signed values: red above zero, blue below, white at zero."""

GREY = "#777777"
ALTERNATIVE = "choose .png, .pdf or .svg"


def figure(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2, **settings: Any) -> Any:
    """Return a figure, sizes in inches, and its axes, an array where there are several; `settings` are `subplots`'."""
    try:
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise ImportError("pictures need the extra: pip install 'influence[viz]'") from error
    made = MatplotlibFigure(figsize=(width, height), layout="constrained")
    axes = made.subplots(rows, columns, **settings)
    for each in made.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
    return made, axes


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file, whose ending decides the format.

    Raises:
        ValueError: if matplotlib does not know the ending.
    """
    check(path)
    path = Path(path)
    with output_file(path) as name:
        figure.savefig(name, dpi=160, format=path.suffix.lstrip(".").lower())


def check(path: str | Path) -> None:
    """Refuse a file name that `save` could not write, before anything is computed.

    Raises:
        ImportError: if the extra is not installed.
        ValueError: if matplotlib does not know the ending.
    """
    known = figure()[0].canvas.get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in known:
        raise ValueError(f"{path} ends in no format for pictures ({', '.join(sorted(known))}): {ALTERNATIVE}")


def colours(count: int) -> list[Any]:
    """Return `count` colours: Okabe and Ito's if they suffice, otherwise a scale from dark to light."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](float(x)) for x in torch.linspace(0, 0.92, count)]


def legend(axes: Axes, count: int) -> None:
    """Add a legend of `count` lines: inside the axes or, for more than six, beside them."""
    if count > 6:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + count // 24)
    elif count > 1:
        axes.legend(fontsize=9, frameon=False)


def plain(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers in float64 on the CPU, detached."""
    return values.detach().cpu().double()


def ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], most: int = 72) -> None:
    """Label the rows and columns of a matrix, unless there are too many to read."""
    for labels, setter, turned in ((rows, axes.set_yticks, {}), (columns, axes.set_xticks, {"rotation": 90})):
        if 0 < len(labels) <= most:
            size = max(4.5, min(9.0, 230 / len(labels)))
            setter(range(len(labels)), [clean(label) for label in labels], fontsize=size, **turned)


def clean(text: str) -> str:
    """Return a label that matplotlib draws literally: no mathematics, leading spaces visible, no line breaks.

    Example:
        >>> clean(" the")
        '·the'
    """
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    lead = len(shown) - len(shown.lstrip(" "))
    return "·" * lead + shown[lead:]
