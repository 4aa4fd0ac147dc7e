"""Every suite with targets in turn, each in a process of its own, so that none inherits another's threads or heap."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, peers, report
from influence.data.parsing import json_of

SUITES = {
    "collect": ("--model", "neox"),
    "curvature": (),
    "agree": (),
    "index": (),
    "training": (),
    "sgmcmc": (),
    "coefficients": (),
    "loader": (),
}
"""The suites in their order, with what they are passed."""
BESIDE = {"agree": "kronfluence"}
"""Suites that are nothing without a peer."""


def run(*, check: bool, quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run the suites and return what each wrote; one that fails leaves the others alone.

    Args:
        check: whether they judge their targets.
        quick: whether each runs at its smallest.
        only: the suites to run; default all.
    """
    suites: dict[str, Any] = {}
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in only or SUITES:
            if name in BESIDE and not peers.importable(BESIDE[name]):
                skipped[name] = BESIDE[name]
                continue
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks", name, *SUITES[name], "--json", str(path)]
            command += ["--check"] * check + ["--quick"] * quick
            print(f"\n=== {name}", flush=True)
            status = subprocess.run(command, check=False).returncode
            if path.exists():
                suites[name] = json_of(path)
                skipped |= {f"{name}, {row}": peer for row, peer in suites[name].get("skipped", {}).items()}
            else:
                failed[name] = f"`python -m benchmarks {name}` ended with status {status} and no result"
    return {
        "benchmark": "all",
        "machine": measure.machine(),
        "settings": {"quick": quick},
        "suites": suites,
        "failed": failed,
        "skipped": skipped,
    }


def targets(found: Mapping[str, Any]) -> list[report.Check]:
    """Return the targets of every suite; a suite that failed has missed its own."""
    checks = [
        report.Check(**{**check, "name": f"{suite}: {check['name']}"})
        for suite, run in found["suites"].items()
        for check in run.get("checks", [])
    ]
    return checks + [report.Check(f"{suite} ran", None, why, False) for suite, why in found["failed"].items()]


def summary(found: Mapping[str, Any]) -> str:
    """Return a line per suite: its targets, those it missed, what was left out."""
    rows = []
    for suite, run in found["suites"].items():
        checks = run.get("checks", [])
        missed = [check["name"] for check in checks if not check["met"]]
        rows.append([suite, str(len(checks)), str(len(checks) - len(missed)), "; ".join(missed)])
    rows += [[suite, "", "", f"FAILED: {why}"] for suite, why in found["failed"].items()]
    lines = [report.table(["suite", "targets", "met", "missed"], rows)] if rows else []
    return "\n".join([*lines, *([report.skipped(found["skipped"])] if found["skipped"] else [])])
