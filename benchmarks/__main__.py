"""`python -m benchmarks <suite>`: run a suite and print its table."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import (
    agree,
    beside,
    building,
    coefficients,
    collect,
    curvature,
    loader,
    page,
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


def main() -> int:
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
    suite.add_argument("--json", type=Path, help="where to write (default: nowhere)")
    suite.add_argument("--quick", action="store_true", help="fewer examples, nothing judged: whether it runs")
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
        suite.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
        suite.add_argument("--threads", type=int, default=1)
        suite.add_argument("--json", type=Path, help="where to write (default: benchmarks/results, for a full run)")
        suite.add_argument("--quick", action="store_true", help="a small batch: whether it runs")
        suite.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
        suite.set_defaults(run=_simple, suite_module=which)

    suite = suites.add_parser(
        "index", help="building beside bare collection, search and bandwidth beside a bare product and memory maps"
    )
    suite.add_argument("--rows", type=int, default=1_000_000)
    suite.add_argument("--dim", type=int, default=512)
    suite.add_argument("--rounds", type=int, default=50, help="interleaved rounds (default: 50)")
    suite.add_argument("--threads", type=int, default=2)
    suite.add_argument("--path", type=Path, help="directory for the temporary index (default: the system's)")
    suite.add_argument("--json", type=Path, help="where to write (default: benchmarks/results, for a full run)")
    suite.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    suite.add_argument("--quick", action="store_true", help="40,000 rows and 5 rounds: whether it runs, not how fast")
    suite.add_argument("--faiss", action=argparse.BooleanOptionalAction, default=True, help="build and time FAISS too")
    suite.set_defaults(run=_index)

    suite = suites.add_parser("report", help="write docs/benchmarks.md from the JSON in benchmarks/results")
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

    arguments = parser.parse_args()
    return arguments.run(parser, arguments)


def _measuring(suite: argparse.ArgumentParser, variants: Mapping[str, object]) -> None:
    """Add the arguments of a suite that measures variants."""
    suite.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: 15)")
    suite.add_argument("--threads", type=int, default=1, help="1 is judged by processor time, more by wall time")
    suite.add_argument(
        "--only", nargs="+", choices=variants, metavar="VARIANT", help=f"time these alone: {', '.join(variants)}"
    )
    suite.add_argument("--json", type=Path, help="where to write (default: benchmarks/results, for a full run)")
    suite.add_argument("--check", action="store_true", help="exit with 1 when a target is missed; implies --peers")
    suite.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: whether it runs, not how fast")
    suite.add_argument("--no-memory", action="store_true", help="leave out the process per variant")
    suite.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="run the peers, a missing one fails (default: those that are installed)",
    )


def _collect(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    wanted = _wanted(parser, arguments)
    if arguments.check and arguments.model not in ("neox", "all"):
        parser.error("--check has targets for --model neox (or all)")
    found = collect.run(
        list(MODELS) if arguments.model == "all" else [arguments.model],
        **_settings(arguments, collect.VARIANTS, collect.PEERS, wanted),
    )
    checks = []
    if arguments.check:
        # The bars are the NeoX's; the other models are reported.
        judged = next(summary for summary in found["models"] if summary["model"] == "neox")
        checks = collect.targets(judged, with_peers=wanted)
    status = _finish(arguments, found, checks)
    if checks and not checks[0].met:
        print("The run is void.")
    return status


def _curvature(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    wanted = _wanted(parser, arguments)
    if arguments.check and arguments.rounds < 15:
        parser.error("--check judges 15 rounds at least")
    found = curvature.run(**_settings(arguments, curvature.VARIANTS, curvature.PEERS, wanted))
    return _finish(arguments, found, curvature.targets(found, with_peers=wanted) if arguments.check else [])


def _agree(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    found = agree.run(threads=arguments.threads, quick=arguments.quick)
    checks = [] if arguments.quick else agree.targets(found)
    if checks:
        print(f"\n{report.verdict(checks)}")
    if arguments.json is not None:
        report.write(found, arguments.json)
    return 0 if all(check.met for check in checks) else 1


def _ranks(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    found = ranks.run(threads=arguments.threads, quick=arguments.quick)
    path = arguments.json or (None if arguments.quick else RESULTS / "ranks.json")
    if path is not None:
        report.write(found, path)
        print(f"\nwrote {path}")
    return 0


def _simple(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    suite = arguments.suite_module
    found = suite.run(rounds=arguments.rounds, threads=arguments.threads, quick=arguments.quick)
    judged = arguments.check and hasattr(suite, "targets") and not arguments.quick
    arguments.only = None
    return _finish(arguments, found, suite.targets(found) if judged else [])


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
    if peers.importable("bergson"):
        with tempfile.TemporaryDirectory(dir=arguments.path) as scratch:
            rounds, documents = (1, 40) if arguments.quick else (3, 1_000)
            found["beside bergson"] = beside.run(Path(scratch), rounds, documents)
    arguments.only = arguments.rows < 1_000_000
    return _finish(arguments, found, search.targets(found) + building.targets(made) if arguments.check else [])


def _report(_: argparse.ArgumentParser, __: argparse.Namespace) -> int:
    page.write()
    print(f"wrote {page.PAGE}")
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


def _wanted(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Whether the peers must run."""
    if arguments.check and (arguments.quick or arguments.only or arguments.no_memory):
        parser.error("--check judges a full run: leave out --quick, --only and --no-memory")
    return arguments.check if arguments.peers is None else arguments.peers


def _settings(
    arguments: argparse.Namespace, variants: Mapping[str, object], packages: Mapping[str, str], wanted: bool
) -> dict:
    """What a suite's `run` is given; `packages` says which variant needs which peer."""
    left_out = {
        name
        for name, package in packages.items()
        if arguments.peers is False or not (wanted or peers.importable(package))
    }
    return {
        "rounds": 3 if arguments.quick else arguments.rounds,
        "threads": arguments.threads,
        "quick": arguments.quick,
        "names": arguments.only or [name for name in variants if name not in left_out],
        "memory": not arguments.no_memory,
    }


def _finish(arguments: argparse.Namespace, found: dict, checks: list[Check]) -> int:
    """Print the verdict, write everything, and return the exit status."""
    if checks:
        found["checks"] = [check._asdict() for check in checks]
        print(f"\n{report.verdict(checks)}")
    path = arguments.json
    if path is None and not (arguments.quick or arguments.only):
        path = RESULTS / f"{found['benchmark']}-{arguments.threads}-threads.json"
    if path is not None:
        report.write(found, path)
        print(f"\nwrote {path}")
    return 0 if all(check.met for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
