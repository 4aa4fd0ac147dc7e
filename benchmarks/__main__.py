"""`python -m benchmarks <suite>`: run a suite and print its table."""

import argparse
import sys
from pathlib import Path

from benchmarks import collect, peers, report
from benchmarks.models import MODELS

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Parse the command line, run the suite, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)

    suite = suites.add_parser("collect", help="projected per-example gradients against the floor, hooks and peers")
    suite.add_argument("--model", choices=[*MODELS, "all"], default="all")
    suite.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: 15)")
    suite.add_argument("--threads", type=int, default=1, help="1 is judged by processor time, more by wall time")
    suite.add_argument("--only", nargs="+", choices=collect.VARIANTS, metavar="VARIANT", help="time these alone")
    suite.add_argument("--json", type=Path, help="where to write (default: benchmarks/results, for a full run)")
    suite.add_argument("--check", action="store_true", help="exit with 1 when a target is missed; implies --peers")
    suite.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: whether it runs, not how fast")
    suite.add_argument("--no-memory", action="store_true", help="leave out the process per variant")
    suite.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="run the peers, a missing one fails (default: those that are installed)",
    )
    suite.set_defaults(run=_collect)

    one = suites.add_parser("memory", help="the memory of one variant of collect, as JSON")
    one.add_argument("--model", choices=MODELS, required=True)
    one.add_argument("--variant", choices=collect.VARIANTS, required=True)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--quick", action="store_true")
    one.set_defaults(run=_memory)

    arguments = parser.parse_args()
    return arguments.run(parser, arguments)


def _collect(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.check and (arguments.quick or arguments.only or arguments.no_memory):
        parser.error("--check judges a full run: leave out --quick, --only and --no-memory")
    if arguments.check and arguments.model not in ("neox", "all"):
        parser.error("--check has targets for --model neox (or all)")
    wanted = arguments.check if arguments.peers is None else arguments.peers
    skipped = {name for name in collect.PEERS if arguments.peers is False or not (wanted or peers.importable(name))}
    names = arguments.only or [name for name in collect.VARIANTS if name not in skipped]
    found = collect.run(
        list(MODELS) if arguments.model == "all" else [arguments.model],
        rounds=3 if arguments.quick else arguments.rounds,
        threads=arguments.threads,
        quick=arguments.quick,
        names=names,
        memory=not arguments.no_memory,
    )
    met = True
    if arguments.check:
        # The bars are the NeoX's; the other models are reported.
        judged = next(summary for summary in found["models"] if summary["model"] == "neox")
        checks = collect.targets(judged, with_peers=wanted)
        found["checks"] = [check._asdict() for check in checks]
        met = all(check.met for check in checks)
        print(f"\n{report.verdict(checks)}")
        if not checks[0].met:
            print("The run is void.")
    path = arguments.json
    if path is None and not (arguments.quick or arguments.only):
        path = RESULTS / f"collect-{arguments.threads}-threads.json"
    if path is not None:
        report.write(found, path)
        print(f"\nwrote {path}")
    return 0 if met else 1


def _memory(_: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    collect.print_memory(arguments.model, arguments.variant, arguments.threads, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
