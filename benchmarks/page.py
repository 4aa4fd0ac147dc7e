"""The benchmark page of the documentation, made from benchmarks/results: `python -m benchmarks report`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from influence.data.parsing import json_of

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
FIGURES = PAGE.parent / "figures"

HEAD = "\n".join(
    (
        "# Benchmarks\n",
        "Made from `benchmarks/results/*.json` by `python -m benchmarks report`; a test compares this page with them. "
        "Every table is one run, with its machine and date; compare ratios, not seconds, between runs. A ratio is the "
        "median over rounds that interleave everything in the table, with its quartiles. Targets that were missed "
        "stand here as missed.\n",
    )
)

SAYS = {
    "collect": (
        "Projected per-example gradients",
        "Rows of all linear blocks, each projected to 16 × 16. The *floor* is one forward and one backward that forms "
        "no weight gradient. `error` is the largest difference to autograd, relative.",
    ),
    "curvature": (
        "Curvature",
        "Fits and their use, against the floor. The variants whose names begin with the peer's are the peer's.",
    ),
    "training": ("Collecting during training", "What collecting adds to a Trainer's step, in processor seconds."),
    "sgmcmc": ("Sampling", "A sampling step beside its bare forward, backward and observable; token influences."),
    "coefficients": (
        "LLC beside closed forms",
        "Deep linear networks and reduced-rank regressions whose coefficients are known. The oracle has the "
        "correction for finite nβ.",
    ),
    "index": ("The index", "Building beside bare collection, and search beside a bare product."),
}


def render(results: Path = RESULTS) -> str:
    """Return the page.

    Args:
        results: the folder with the JSON of every run.
    """
    runs = kept(results)
    kinds = [*SAYS, *sorted({run["benchmark"] for _, run in runs} - set(SAYS))]
    parts = [HEAD]
    for kind in kinds:
        mine = [(name, run) for name, run in runs if run["benchmark"] == kind]
        if mine:
            title, says = SAYS.get(kind, (kind.capitalize(), ""))
            parts.append(f"## {title}\n\n{says} `python -m benchmarks {kind} --check`.\n")
            if kind in figures.FIGURES:
                parts.append(f"![{title}, the newest run](figures/{kind}.png)\n")
            parts += [_section(results / name, run) for name, run in mine]
    return "\n".join(parts)


def kept(results: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """Return every suite's runs with their files' names, the newest first."""
    found = [(path.name, result(path)) for path in sorted(results.glob("*.json"))]
    suites = [(name, run) for name, run in found if "suites" not in run]
    return sorted(suites, key=lambda each: each[1]["machine"]["date"], reverse=True)


def result(path: Path) -> dict[str, Any]:
    """Return what a file of results holds.

    Raises:
        ValueError: if it is no result of a benchmark; naming it.
    """
    run = json_of(path)
    machine = run.get("machine") if isinstance(run, dict) else None
    dated = isinstance(machine, dict) and isinstance(machine.get("date"), str)
    if not dated or not isinstance(run.get("benchmark"), str):
        raise ValueError(
            f"{path} is no result of a benchmark: expected an object with benchmark and machine. Delete it, or write "
            "it again by python -m benchmarks NAME --json FILE"
        )
    return run


def _section(path: Path, run: Mapping[str, Any]) -> str:
    """Return one run, or say which file lacks a part of it."""
    try:
        return section(path.name, run)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} lacks a part of a result of {run['benchmark']!r} ({type(error).__name__}: {error}): delete it, or "
            f"write it again by python -m benchmarks {run['benchmark']} --json {path}"
        ) from error


def newest(results: Path = RESULTS) -> dict[str, Any]:
    """Return the newest run of every suite, as `all` writes them.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = kept(results)
    if not runs:
        raise FileNotFoundError(f"{results} has no results: run python -m benchmarks all")
    suites: dict[str, Any] = {}
    for _, run in runs:
        suites.setdefault(run["benchmark"], run)
    return {"benchmark": "all", "machine": runs[0][1]["machine"], "suites": suites, "failed": {}, "skipped": {}}


def write(page: Path = PAGE, folder: Path = FIGURES) -> list[Path]:
    """Write the page and the figures of the newest runs, and return their paths."""
    page.write_text(render())
    drawn = [folder / f"{kind}.png" for kind in newest()["suites"] if kind in figures.FIGURES]
    for path in drawn:
        figures.draw(newest()["suites"][path.stem], path)
    return [page, *drawn]


def stale(page: Path = PAGE, folder: Path = FIGURES) -> list[Path]:
    """Return what is not as the results say: the page by its text, a figure by its being there."""
    drawn = [folder / f"{kind}.png" for kind in newest()["suites"] if kind in figures.FIGURES]
    old = [] if page.exists() and page.read_text() == render() else [page]
    return old + [path for path in drawn if not path.exists()]


def section(name: str, run: Mapping[str, Any]) -> str:
    """Return one run: machine and date, its table, its targets."""
    machine, settings = run["machine"], run.get("settings", {})
    memory = machine["memory_bytes"] / 2**30
    facts = [f"{machine['processor']} ({machine['capability']}), {machine['cores']} cores, {memory:.0f} GiB"]
    if settings:
        clock = f", {settings['clock']} time" if "clock" in settings else ""
        rounds = f", {settings['rounds']} rounds" if "rounds" in settings else ""
        facts.append(f"{settings['threads']} threads{rounds}{clock}")
    versions = {key: value for key, value in run.get("versions", {}).items() if key not in ("influence", "numpy")}
    facts += [f"{package} {version}" for package, version in versions.items()]
    facts.append(f"load {machine['load'][0]:.1f} before")
    lines = [f"### {machine['date'][:10]}: `{name}`\n", "; ".join(facts) + ".\n"]
    table = TABLES.get(run["benchmark"])
    if table is not None:
        lines.append(table(run))
    if run.get("skipped"):
        rows = ", ".join(f"`{row}` ({peer})" for row, peer in run["skipped"].items())
        lines.append(f"Skipped, as the peer was not installed: {rows}.\n")
    if run.get("checks"):
        lines.append(targets(run["checks"]))
    return "\n".join(lines)


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def ratio(value: Mapping[str, float] | Sequence[float] | None) -> str:
    """Return a median with its quartiles."""
    if value is None:
        return ""
    median, low, high = value.values() if isinstance(value, Mapping) else value
    return f"{median:.3f} ({low:.3f} … {high:.3f})"


def targets(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return what was aimed at, and whether it was met."""
    rows = [
        [check["name"], number(check["value"], ".4g") or "not measured", check["bound"], met(check)] for check in checks
    ]
    return grid(["target", "measured", "bound", "met"], rows)


def met(check: Mapping[str, Any]) -> str:
    """Return whether a target was met."""
    return "yes" if check["met"] else "**no**"


def variants(found: Sequence[Mapping[str, Any]]) -> str:
    """Return variants against the floor, and against what else each was compared with."""
    others = [key for key in ("throughput_over_bergson", "over_rival") if any(v.get(key) for v in found)]
    names = {"throughput_over_bergson": "throughput ÷ Bergson's", "over_rival": "time ÷ kronfluence's"}
    rows = []
    for v in found:
        memory = (v.get("memory") or {}).get("above_floor")
        row = [
            f"`{v['name']}`" + (f": {v['note']}" if v.get("note") else ""),
            ratio(v.get("over_floor")) or f"failed: {v['failed']}",
            *(ratio(v.get(key)) for key in others),
            "" if memory is None else f"{memory:+.0%}",
            number(v.get("error"), ".0e"),
        ]
        rows.append(row)
    return grid(["variant", "time ÷ floor", *(names[key] for key in others), "peak memory", "error"], rows)


def collected(run: Mapping[str, Any]) -> str:
    """Return a table per model."""
    models = run["models"]
    return "\n".join(f"{m['model']}, {m['shape']}, {m['blocks']} blocks:\n\n{variants(m['variants'])}" for m in models)


def trained(run: Mapping[str, Any]) -> str:
    """Return what collecting adds to a step."""
    rows = []
    for name, variant in run["variants"].items():
        seconds = sorted(variant["times"]["cpu"])[len(variant["times"]["cpu"]) // 2]
        rows.append([name, number(seconds, ".2f"), ratio(variant["over_plain"])])
    return grid(["step", "seconds", "÷ plain"], rows)


def sampled(run: Mapping[str, Any]) -> str:
    """Return ratios of steps, and seconds of influences."""
    meaning = {
        "lookup": "a chain-step with baselines looked up ÷ bare",
        "paired": "with the baseline computed beside it ÷ bare",
        "together": "four chains together ÷ one after the other",
    }
    rows = [[meaning.get(name, name), ratio(value)] for name, value in run["ratios"].items()]
    rows += [[f"token influences, `{name}`", f"{seconds:.2f} s"] for name, seconds in run["influences"].items()]
    rows += [[f"memory above the result, `{name}`", f"{gb:.2f} GB"] for name, gb in run["memory_above_gb"].items()]
    return grid(["what", "measured"], rows)


def known(run: Mapping[str, Any]) -> str:
    """Return estimates beside closed forms."""
    rows = [
        [
            family,
            " × ".join(map(str, net["widths"])),
            str(net["rank"]),
            number(net["oracle"], ".2f"),
            f"{net['estimate']:.2f} ± {net['stderr']:.2f}",
            f"{net['error']:+.1%}",
            net["verdict"],
        ]
        for family, nets in run["families"].items()
        for net in nets
    ]
    return grid(["family", "widths", "rank", "closed form", "LLC", "error", "verdict"], rows)


def indexed(run: Mapping[str, Any]) -> str:
    """Return what searching and writing take, what building adds, and both beside Bergson's."""
    lines = [[f["name"], f"{1e3 * f['p50']:.1f}", f"{1e3 * f['p99']:.1f}", number(f["over"])] for f in run["lines"]]
    parts = [grid(["variant, queries", "p50 ms", "p99 ms", "÷ bare"], lines)]
    speeds = [[name, ratio(value)] for name, value in run["building"]["of_bare"].items()]
    parts.append(grid(["building", "speed ÷ bare collection's"], speeds))
    if "beside bergson" in run:
        both = run["beside bergson"]
        rows = [
            [name, f"{1e3 * sorted(seconds)[len(seconds) // 2]:,.1f}", over]
            for line in both["lines"]
            for name, seconds, over in line["rows"]
        ]
        parts.append(
            f"Beside Bergson, {both['documents']:,} documents, whole processes; processor time of one thread:\n"
        )
        parts.append(grid(["variant, queries", "ms", "÷ bergson's"], rows))
    return "\n".join(parts)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "collect": collected,
    "curvature": lambda run: variants(run["variants"]),
    "training": trained,
    "sgmcmc": sampled,
    "coefficients": known,
    "index": indexed,
}
"""How a benchmark's run is shown; one without an entry shows its targets alone."""
