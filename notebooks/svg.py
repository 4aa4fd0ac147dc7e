"""Two plots as SVG, to be put into a page: bars by name, and lines over a common axis with their errors."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#8B4513", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart, and three more."""
WIDTH = 640


def bars(groups: Mapping[str, Sequence[float]], series: Sequence[str], label: str) -> str:
    """Return horizontal bars of shares in [0, 1]: a group a name, a bar in it for each series."""
    left, thick, gap = 170, 13, 10
    height = len(groups) * (thick * len(series) + gap) + 48
    scale = WIDTH - left - 60
    parts = [_text(left + scale * x, height - 20, f"{x:g}", "middle") for x in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_line(left + scale * x, 4, left + scale * x, height - 36, "#ddd") for x in (0, 0.25, 0.5, 0.75, 1)]
    y = 8.0
    for name, values in groups.items():
        parts.append(_text(left - 8, y + thick * len(series) / 2 + 4, name, "end"))
        for colour, value in zip(COLOURS, values, strict=False):
            width = max(scale * value, 1)
            parts.append(f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{thick - 2}" fill="{colour}"/>')
            parts.append(_text(left + width + 5, y + thick - 3, f"{value:.2f}", "start", 11))
            y += thick
        y += gap
    return _svg(height, label, parts) + _legend(series)


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    across: str,
    up: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    logarithmic: bool = False,
    bounds: tuple[float, float] | None = None,
) -> str:
    """Return lines over `x`, each with two standard errors around it where they are given."""
    left, right, top, bottom, height = 60, 20, 26, 44, 300
    errors = errors or {}
    values = [
        v + s * 2 * e for n, ys in series.items() for v, e in zip(ys, _of(errors, n, ys), strict=True) for s in (-1, 1)
    ]
    low, high = bounds or (min(0.0, *values), max(values) * 1.05 or 1.0)
    place = [math.log10(v) for v in x] if logarithmic else list(x)
    span = (place[-1] - place[0]) or 1

    def at(i: int, value: float) -> tuple[float, float]:
        across = left + (place[i] - place[0]) / span * (WIDTH - left - right)
        return across, top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for tick in _ticks(low, high):
        y = at(0, tick)[1]
        parts += [_line(left, y, WIDTH - right, y, "#e4e4e4"), _text(left - 6, y + 4, f"{tick:g}", "end")]
    for i, value in enumerate(x):
        if len(x) <= 12 or value in (1, 2, 5, 10, 20, 50, 100):
            parts.append(_text(at(i, low)[0], height - bottom + 18, f"{value:g}", "middle"))
    parts += [_text(WIDTH / 2, height - 6, across, "middle"), _text(left, 12, up, "start")]
    for colour, (name, ys) in zip(COLOURS, series.items(), strict=False):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(i, y) for i, y in enumerate(ys)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for i, (y, error) in enumerate(zip(ys, _of(errors, name, ys), strict=True)):
            if len(x) <= 12:
                parts.append(f'<circle cx="{at(i, y)[0]:.1f}" cy="{at(i, y)[1]:.1f}" r="3" fill="{colour}"/>')
            if error:
                parts.append(_line(at(i, y)[0], at(i, y - 2 * error)[1], at(i, y)[0], at(i, y + 2 * error)[1], colour))
    return _svg(height, up, parts) + _legend(list(series))


def _of(errors: Mapping[str, Sequence[float]], name: str, ys: Sequence[float]) -> Sequence[float]:
    return errors.get(name, [0.0] * len(ys))


def _ticks(low: float, high: float) -> list[float]:
    """Return four to ten round numbers in a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _legend(names: Sequence[str]) -> str:
    keys = (f'<span><i style="background:{c}"></i>{escape(n)}</span>' for c, n in zip(COLOURS, names, strict=False))
    return f'<p class="legend">{"".join(keys)}</p>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
