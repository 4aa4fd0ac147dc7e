"""`python -m benchmarks <suite>`: run a suite and print its table."""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import (
    agree,
    beside,
    building,
    coefficients,
    collect,
    curvature,
    every,
    loader,
    peers,
    ranks,
    report,
    search,
    sgmcmc,
    training,
    vocabulary,
)
from benchmarks.models import MODELS
from benchmarks.report import Check

RESULTS = Path(__file__).parent / "results"
FULL = "benchmarks/results, for a full run"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the suite, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)

    suite = suites.add_parser("collect", help="projected per-example gradients against the floor, hooks and peers")
    suite.add_argument("--model", choices=[*MODELS, "all"], default="all")
    _measuring(suite, collect.VARIANTS)
    suite.set_defaults(run=_collect)

    suite = suites.add_parser("curvature", help="K-FAC, EK-FAC and their use against the floor and kronfluence")
    _measuring(suite, curvature.VARIANTS)
    suite.set_defaults(run=_curvature)

    suite = suites.add_parser("agree", help="EK-FAC scores beside kronfluence's: Pearson correlation and scale")
    suite.add_argument("--threads", type=int, default=1)
    _writing(suite, "nowhere")
    suite.add_argument("--quick", action="store_true", help="fewer examples: whether it runs")
    suite.set_defaults(run=_agree)

    suite = suites.add_parser("ranks", help="projected scores beside exact K-FAC ones: rank correlation by dimension")
    suite.add_argument("--threads", type=int, default=2)
    suite.add_argument("--json", type=Path, help="where to write (default: benchmarks/results, for a full run)")
    suite.add_argument("--quick", action="store_true", help="a small, barely trained model: whether it runs")
    suite.set_defaults(run=_ranks)

    for name, which, meaning in (
        ("vocabulary", vocabulary, "projected rows at a vocabulary of 128,256: logits whole and in pieces"),
        ("loader", loader, "tokens a second of the loader and of the model on its batches"),
        ("training", training, "what collecting adds to a Trainer's step"),
        ("sgmcmc", sgmcmc, "a sampling step beside its forward and backward, chains together and apart, token BIF"),
        ("coefficients", coefficients, "LLC of deep linear and reduced-rank nets beside their closed forms"),
    ):
        suite = suites.add_parser(name, help=meaning)
        if which is not coefficients:  # nothing there is timed
            suite.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
            suite.set_defaults(whole={"rounds": 7})
        suite.add_argument("--threads", type=int, default=1)
        if hasattr(which, "targets"):
            _writing(suite)
        else:
            suite.add_argument("--json", type=Path, help=f"where to write (default: {FULL})")
            suite.set_defaults(check=False, plot=None)
        suite.add_argument("--quick", action="store_true", help="a small batch: whether it runs")
        suite.set_defaults(run=_simple, suite_module=which)

    suite = suites.add_parser(
        "index", help="building beside bare collection, search and bandwidth beside a bare product and memory maps"
    )
    suite.add_argument("--rows", type=int, default=1_000_000)
    suite.add_argument("--dim", type=int, default=512)
    suite.add_argument("--rounds", type=int, default=50, help="interleaved rounds (default: 50)")
    suite.add_argument("--threads", type=int, default=2)
    suite.add_argument("--path", type=Path, help="directory for the temporary index (default: the system's)")
    _writing(suite)
    suite.add_argument("--quick", action="store_true", help="40,000 rows and 5 rounds: whether it runs, not how fast")
    suite.add_argument("--faiss", action=argparse.BooleanOptionalAction, default=True, help="build and time FAISS too")
    suite.set_defaults(run=_index, whole={"rows": 1_000_000, "dim": 512, "rounds": 50})

    suite = suites.add_parser("all", help=f"{', '.join(every.SUITES)} in turn, and a summary")
    _writing(suite, "as each suite does; with it, everything in one file")
    suite.add_argument("--quick", action="store_true", help="every suite at its smallest: whether they run")
    suite.add_argument("--only", nargs="+", choices=every.SUITES, metavar="SUITE", help="these alone")
    suite.set_defaults(run=_all)

    suite = suites.add_parser("report", help="write docs/benchmarks.md and its figures from benchmarks/results")
    suite.add_argument("--check", action="store_true", help="write no page: exit with 1 when it is not the results', "
                       "or the newest run of a suite missed a target")  # fmt: skip
    suite.add_argument("--json", type=Path, help="write the newest run of every suite into one file")
    suite.add_argument("--plot", type=Path, help="draw the newest runs' targets into this file")
    suite.set_defaults(run=_report)

    one = suites.add_parser("memory", help="the memory of one variant, as JSON")
    of = one.add_subparsers(dest="of", required=True)
    variants_of = {
        "collect": collect.VARIANTS,
        "curvature": curvature.VARIANTS,
        "vocabulary": vocabulary.VARIANTS,
        "sgmcmc": sgmcmc.MEMORY,
    }
    for name, variants in variants_of.items():
        suite = of.add_parser(name)
        if name == "collect":
            suite.add_argument("--model", choices=MODELS, required=True)
        suite.add_argument("--variant", choices=variants, required=True)
        suite.add_argument("--threads", type=int, default=1)
        suite.add_argument("--quick", action="store_true")
    one.set_defaults(run=_memory)

    arguments = parser.parse_args(argv)
    if getattr(arguments, "check", False) and getattr(arguments, "quick", False):
        parser.error("--check judges a full run: leave out --quick")
    if getattr(arguments, "check", False) and (less := _less(arguments)):
        parser.error(f"--check judges a full run: leave out {' and '.join(less)}")
    if getattr(arguments, "plot", None) is not None:
        from influence import viz  # only here: the import would count in the memory of a `memory` process

        viz.check(arguments.plot)
    return arguments.run(parser, arguments)


def _less(arguments: argparse.Namespace) -> list[str]:
    """Return what makes a run smaller than a full one, with what a full one has."""
    whole = getattr(arguments, "whole", {})
    return [f"--{name} (of {size:,} at least)" for name, size in whole.items() if getattr(arguments, name) < size]


def _writing(suite: argparse.ArgumentParser, default: str = FULL) -> None:
    """Add what every suite does with its figures."""
    suite.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 when a target is missed; rows beside a peer that is not installed are skipped by name",
    )
    suite.add_argument("--json", type=Path, help=f"where to write (default: {default})")
    suite.add_argument("--plot", type=Path, help="draw the main table into this file (.png, .pdf, .svg)")


def _measuring(suite: argparse.ArgumentParser, variants: Mapping[str, object]) -> None:
    """Add the arguments of a suite that measures variants."""
    suite.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: 15)")
    suite.set_defaults(whole={"rounds": 15})
    suite.add_argument("--threads", type=int, default=1, help="1 is judged by processor time, more by wall time")
    suite.add_argument(
        "--only", nargs="+", choices=variants, metavar="VARIANT", help=f"time these alone: {', '.join(variants)}"
    )
    _writing(suite)
    suite.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: whether it runs, not how fast")
    suite.add_argument("--no-memory", action="store_true", help="leave out the process per variant")
    suite.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="run the peers, a missing one fails (default: those that are installed)",
    )


def _collect(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _judged_whole(parser, arguments)
    if arguments.check and arguments.model not in ("neox", "all"):
        parser.error("--check has targets for --model neox (or all)")
    found = collect.run(
        list(MODELS) if arguments.model == "all" else [arguments.model],
        **_settings(arguments, collect.VARIANTS, collect.PEERS),
    )
    checks = []
    if arguments.check:
        # The bars are the NeoX's; the other models are reported.
        judged = next(summary for summary in found["models"] if summary["model"] == "neox")
        checks = collect.targets(judged, with_peers=not _left_out(arguments, collect.PEERS))
    status = _finish(arguments, found, checks, collect.PEERS)
    if checks and not checks[0].met:
        print("The run is void.")
    return status


def _curvature(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _judged_whole(parser, arguments)
    found = curvature.run(**_settings(arguments, curvature.VARIANTS, curvature.PEERS))
    with_peers = not _left_out(arguments, curvature.PEERS)
    checks = curvature.targets(found, with_peers=with_peers) if arguments.check else []
    return _finish(arguments, found, checks, curvature.PEERS)


def _agree(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if not peers.importable("kronfluence"):
        parser.error("agree compares with kronfluence, which is not installed: make bench-peers")
    found = agree.run(threads=arguments.threads, quick=arguments.quick)
    arguments.only = "no file unless asked"
    return _finish(arguments, found, agree.targets(found) if arguments.check else [])


def _ranks(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    found = ranks.run(threads=arguments.threads, quick=arguments.quick)
    path = arguments.json or (None if arguments.quick else RESULTS / "ranks.json")
    if path is not None:
        report.write(found, path)
        print(f"\nwrote {path}")
    return 0


def _simple(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    suite = arguments.suite_module
    timed = {"rounds": arguments.rounds} if "rounds" in arguments else {}
    found = suite.run(**timed, threads=arguments.threads, quick=arguments.quick)
    beside = getattr(suite, "PEERS", {})
    settings = {"with_peers": not _left_out(arguments, beside)} if beside else {}
    arguments.only = None
    return _finish(arguments, found, suite.targets(found, **settings) if arguments.check else [], beside)


def _index(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    settings = {
        name: getattr(arguments, name) for name in ("rows", "dim", "rounds", "threads", "quick", "path", "faiss")
    }
    made = building.run(
        rounds=2 if arguments.quick else 5,
        threads=1,
        documents=200 if arguments.quick else 3_000,
        path=arguments.path,
    )
    found = {**search.run(**settings), "building": made}
    if not _left_out(arguments, beside.PEERS):
        with tempfile.TemporaryDirectory(dir=arguments.path) as scratch:
            rounds, documents = (1, 40) if arguments.quick else (3, 1_000)
            found["beside bergson"] = beside.run(Path(scratch), rounds, documents)
    arguments.only = None
    checks = search.targets(found) + building.targets(made) if arguments.check else []
    return _finish(arguments, found, checks, beside.PEERS)


def _all(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    found = every.run(check=arguments.check, quick=arguments.quick, only=arguments.only or ())
    print(f"\n=== all\n{every.summary(found)}")
    if arguments.json is not None:
        report.write(found, arguments.json)
        print(f"wrote {arguments.json}")
    elif not arguments.quick:
        for run in found["suites"].values():
            print(f"wrote {_default(run)}")
            report.write(run, _default(run))
    _draw(arguments, found)
    return 0 if all(check.met for check in every.targets(found)) else 1


def _report(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from benchmarks import page

    newest = page.newest()
    checks = every.targets(newest)
    if arguments.json is not None:
        report.write(newest, arguments.json)
        print(f"wrote {arguments.json}")
    _draw(arguments, newest)
    if arguments.check:
        stale = page.stale()
        print(report.verdict(checks))
        print("\n".join(f"STALE   {path}: run python -m benchmarks report" for path in stale))
        return 0 if not stale and all(check.met for check in checks) else 1
    print("\n".join(f"wrote {path}" for path in page.write()))
    return 0


def _memory(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.of == "collect":
        collect.print_memory(arguments.model, arguments.variant, arguments.threads, arguments.quick)
    elif arguments.of == "sgmcmc":
        sgmcmc.print_memory(arguments.variant, arguments.threads, arguments.quick)
    elif arguments.of == "vocabulary":
        vocabulary.print_memory(arguments.variant, arguments.threads, arguments.quick)
    else:
        curvature.print_memory(arguments.variant, arguments.threads, arguments.quick)
    return 0


def _judged_whole(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse to judge a part of a suite."""
    if arguments.check and (arguments.only or arguments.no_memory):
        parser.error("--check judges a full run: leave out --only and --no-memory")


def _left_out(arguments: argparse.Namespace, beside: Mapping[str, str]) -> dict[str, str]:
    """Return the rows beside peers that are not run, with the peer: those not installed, unless it is insisted."""
    insisted = getattr(arguments, "peers", None)
    if insisted is None:
        return {row: package for row, package in beside.items() if not peers.importable(package)}
    return {} if insisted else dict(beside)


def _settings(arguments: argparse.Namespace, variants: Mapping[str, object], packages: Mapping[str, str]) -> dict:
    """What a suite's `run` is given; `packages` says which variant needs which peer."""
    left_out = _left_out(arguments, packages)
    return {
        "rounds": 3 if arguments.quick else arguments.rounds,
        "threads": arguments.threads,
        "quick": arguments.quick,
        "names": arguments.only or [name for name in variants if name not in left_out],
        "memory": not arguments.no_memory,
    }


def _finish(
    arguments: argparse.Namespace, found: dict, checks: list[Check], beside: Mapping[str, str] | None = None
) -> int:
    """Print the verdict, write everything, and return the exit status."""
    left_out = _left_out(arguments, beside or {})
    if left_out and getattr(arguments, "peers", None) is None:
        found["skipped"] = left_out
        print(f"\n{report.skipped(left_out)}")
    if checks:
        found["checks"] = [check._asdict() for check in checks]
        print(f"\n{report.verdict(checks)}")
    path = arguments.json
    if path is None and not (arguments.quick or arguments.only or _less(arguments)):
        path = _default(found)
    if path is not None:
        report.write(found, path)
        print(f"\nwrote {path}")
    _draw(arguments, found)
    return 0 if all(check.met for check in checks) else 1


def _default(found: dict) -> Path:
    """Return where a full run goes."""
    return RESULTS / f"{found['benchmark']}-{found['machine']['date'][:10]}.json"


def _draw(arguments: argparse.Namespace, found: dict) -> None:
    """Draw the figure, if it is asked for."""
    if arguments.plot is not None:
        from benchmarks import figures

        figures.draw(found, arguments.plot)
        print(f"wrote {arguments.plot}")


if __name__ == "__main__":
    sys.exit(main())
