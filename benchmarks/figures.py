"""A suite's main table as a figure: what is this library's, what a peer's, and what neither; whiskers are quartiles."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from influence.viz import canvas

KINDS = {
    "influence": {"color": canvas.COLOURS[0]},
    "a peer": {"color": canvas.COLOURS[1], "hatch": "///"},
    "neither": {"color": "#B0B0B0"},
}
"""Whose a bar is: by colour, and by hatching for who does not see it."""

PEERS = ("bergson", "kronfluence", "devinterp", "peer")
NEITHER = ("floor", "hooks", "bare", "raw", "plain", "model", "product", "FAISS", "training_step", "vmap_then_project")


class Bar(NamedTuple):
    """One bar.

    Attributes:
        name: what was measured.
        value: its length.
        low: lower quartile; `value` where there is one measurement.
        high: upper quartile.
    """

    name: str
    value: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """Whose it is."""
        if self.name.startswith(PEERS):
            return "a peer"
        return "neither" if self.name.startswith(NEITHER) else "influence"


def draw(found: Mapping[str, Any], path: str | Path) -> None:
    """Write the figure of a suite's run, whether it was just measured or read from JSON.

    Raises:
        ValueError: if the suite has no figure.
    """
    plain = json.loads(json.dumps(found))
    if plain["benchmark"] not in FIGURES:
        raise ValueError(f"{plain['benchmark']} has no figure; there are {', '.join(FIGURES)}")
    made = FIGURES[plain["benchmark"]](plain)
    machine = plain["machine"]
    quick = " · a quick run: whether it runs, not how fast" if plain.get("settings", {}).get("quick") else ""
    made.supxlabel(
        f"{machine['processor']}, {machine['cores']} cores, {machine['date'][:10]}{quick}",
        fontsize=7,
        color=canvas.GREY,
    )
    canvas.save(made, path)


def bars(axes: canvas.Axes, found: Sequence[Bar], label: str, one: str | None = None, log: bool = False) -> None:
    """Draw bars below one another, the value beside each; `one` names what a ratio of 1 means."""
    places = range(len(found))
    for name, style in KINDS.items():
        some = [place for place in places if found[place].kind == name]
        if some:
            lengths = [found[place].value for place in some]
            axes.barh(some, lengths, height=0.68, label=name, edgecolor="white", linewidth=0.5, **style)
    spread = [[bar.value - bar.low for bar in found], [bar.high - bar.value for bar in found]]
    values = [bar.value for bar in found]
    axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for place, bar in zip(places, found, strict=True):
        text = f"{bar.value:,.0f}" if bar.value >= 1000 else f"{bar.value:.3g}"
        axes.annotate(text, (bar.high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [canvas.clean(bar.name) for bar in found], fontsize=8)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.14)
    axes.set_xlabel(label, fontsize=9)
    if one is not None:
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(f" {one}", (1, 1.01), xycoords=("data", "axes fraction"), fontsize=7, color=canvas.GREY)


def legend(figure: canvas.Figure) -> None:
    """Explain the kinds that any of the axes has, once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    order = [name for name in KINDS if name in named]
    figure.legend([named[name] for name in order], order, loc="outside upper right", ncols=3, fontsize=8, frameon=False)


def panels(parts: Sequence[tuple[Sequence[Bar], dict[str, Any]]], title: str) -> canvas.Figure:
    """Return bars in panels below one another, as high as they have bars."""
    heights = [len(found) + 1.5 for found, _ in parts]
    made, axes = canvas.figure(
        len(parts), width=7.5, height=0.9 + 0.27 * sum(heights), squeeze=False, height_ratios=heights
    )
    for each, (found, settings) in zip(axes[:, 0], parts, strict=True):
        bars(each, found, **settings)
    legend(made)
    made.suptitle(title, fontsize=10, x=0.01, ha="left")
    return made


def quartiles(name: str, value: Mapping[str, float] | Sequence[float]) -> Bar:
    """Return the bar of a median with its quartiles."""
    return Bar(name, *(value.values() if isinstance(value, Mapping) else value))


def over_floor(title: str, models: Sequence[Mapping[str, Any]]) -> canvas.Figure:
    """Return the time of every variant that ran over the floor's, a panel for each model."""
    parts = []
    for model in models:
        found = [quartiles(v["name"], v["over_floor"]) for v in model["variants"] if v.get("over_floor")]
        label = f"time ÷ floor ({model['model']}, {model['shape']}; {model['blocks']} blocks)"
        parts.append((found, {"label": label, "one": "the floor"}))
    return panels(parts, title)


def trained(run: Mapping[str, Any]) -> canvas.Figure:
    """Return a training step with the callback over one without."""
    found = [quartiles(name, variant["over_plain"]) for name, variant in run["variants"].items()]
    return panels([(found, {"label": "time ÷ plain training step", "one": "plain"})], "collecting during training")


def sampled(run: Mapping[str, Any]) -> canvas.Figure:
    """Return chain-steps over what they are compared with, and seconds of token influences."""
    meaning = {"lookup": "step, baseline looked up ÷ bare", "paired": "step, baseline beside it ÷ bare"}
    meaning["together"] = "four chains together ÷ apart"
    steps = [quartiles(meaning[name], value) for name, value in run["ratios"].items()]
    seconds = [Bar(name, value, value, value) for name, value in run["influences"].items()]
    return panels(
        [(steps, {"label": "ratio of times", "one": "equal"}), (seconds, {"label": "token BIF, seconds", "log": True})],
        "sampling",
    )


def indexed(run: Mapping[str, Any]) -> canvas.Figure:
    """Return searching and writing in milliseconds, and the speed of building."""
    lines = [Bar(f["name"], 1e3 * f["p50"], 1e3 * f["p50"], 1e3 * f["p99"]) for f in run["lines"]]
    speeds = [quartiles(name, value) for name, value in run["building"]["of_bare"].items()]
    size = f"{run['settings']['rows']:,} × {run['settings']['dim']}"
    parts = [
        (lines, {"label": f"milliseconds, {size} rows (whisker: 99th percentile)", "log": True}),
        (speeds, {"label": "speed of building ÷ bare collection", "one": "bare"}),
    ]
    if "beside bergson" in run:
        both = [(name, seconds) for line in run["beside bergson"]["lines"] for name, seconds, _ in line["rows"]]
        found = [Bar(name, *[1e3 * sorted(seconds)[len(seconds) // 2]] * 3) for name, seconds in both]
        parts.append((found, {"label": "milliseconds, each by its own command or index", "log": True}))
    return panels(parts, "the index")


def known(run: Mapping[str, Any]) -> canvas.Figure:
    """Return how far estimates are from their closed forms, with two standard errors."""
    made, axes = canvas.figure(width=7.0, height=4.2)
    axes.axhspan(-5, 5, color="#E8E8E8", zorder=0, label="± 5 %")
    axes.axhline(0, color="black", linewidth=0.8)
    for (family, nets), colour, marker in zip(run["families"].items(), canvas.COLOURS, canvas.MARKERS, strict=False):
        for singular in (True, False):
            some = [net for net in nets if net["singular"] == singular]
            if some:
                axes.errorbar(
                    [net["oracle"] for net in some],
                    [100 * net["error"] for net in some],
                    [200 * net["stderr"] / net["oracle"] for net in some],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=colour if singular else "white",
                    capsize=2,
                    label=f"{family}, {'singular' if singular else 'a manifold of minima'}",
                )
    axes.set(xlabel="closed form of the coefficient", ylabel="LLC ÷ closed form − 1, in % (± 2 s.e.)")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("LLC beside closed forms", fontsize=10, loc="left")
    return made


def loaded(run: Mapping[str, Any]) -> canvas.Figure:
    """Return tokens a second."""
    found = []
    for name, speeds in run["tokens_per_second"].items():
        ordered = sorted(speeds)
        middle, quarter = len(ordered) // 2, len(ordered) // 4
        found.append(Bar(name, ordered[middle], ordered[quarter], ordered[-1 - quarter]))
    return panels([(found, {"label": "tokens a second", "log": True})], "the loader beside the model")


def agreeing(run: Mapping[str, Any]) -> canvas.Figure:
    """Return how far from 1 the correlation with the peer's scores is."""
    found = [
        Bar(f"{row['model']}, {row['damping']}", *[max(1 - row["pearson"], 1e-16)] * 3)
        for row in run["rows"]
        if not row["failed"]
    ]
    return panels([(found, {"label": "1 − Pearson correlation with kronfluence's scores", "log": True})], "EK-FAC")


def targets(run: Mapping[str, Any]) -> canvas.Figure:
    """Return every target: what was measured over its bound, on the side of it that counts as met, or not."""
    rows = [(suite, check) for suite, found in run["suites"].items() for check in found.get("checks", [])]
    made, axes = canvas.figure(width=8.5, height=1.3 + 0.24 * max(len(rows), 3))
    axes.axvline(1, color="black", linewidth=0.9)
    for met, colour, marker, name in ((True, canvas.COLOURS[0], "o", "met"), (False, canvas.COLOURS[5], "X", "missed")):
        at = [place for place, (_, check) in enumerate(rows) if check["met"] == met]
        axes.plot([_share(rows[p][1]) for p in at], at, marker, color=colour, label=name, markersize=7, clip_on=False)
    axes.set_yticks(range(len(rows)), [f"{suite}: {canvas.clean(check['name'])}" for suite, check in rows], fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("measured ÷ bound; inverted where the bound is from below: left of 1 is met", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.set_title(f"{sum(check['met'] for _, check in rows)} of {len(rows)} targets are met", fontsize=10, loc="left")
    return made


def _share(check: Mapping[str, Any]) -> float:
    """Return a measurement over its bound, within a picture's reach; what was not measured is at its far end."""
    sign, _, bound = check["bound"].partition(" ")
    if check["value"] is None or sign not in ("≤", "≥"):
        return 10.0
    share = check["value"] / float(bound) if sign == "≤" else float(bound) / check["value"] if check["value"] else 10.0
    return min(max(share, 0.01), 10.0) if math.isfinite(share) else 10.0


FIGURES: dict[str, Callable[[Mapping[str, Any]], canvas.Figure]] = {
    "collect": lambda run: over_floor("projected per-example gradients", run["models"]),
    "curvature": lambda run: over_floor("curvature", [run]),
    "index": indexed,
    "training": trained,
    "sgmcmc": sampled,
    "coefficients": known,
    "loader": loaded,
    "agree": agreeing,
    "all": targets,
}
"""What each suite's run looks like."""
