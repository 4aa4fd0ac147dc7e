"""``python -m tests.sampling_oracles [A3 …]``: every oracle of sampling, what is measured, and its error.

The rows are those which the tests assert. ± is a standard error where a row says z, otherwise the most that it may be
off. Rows with * count in their group's χ². Exits with 1 where a row or a group disagrees.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

from tests import test_sgmcmc_estimators as estimators
from tests import test_sgmcmc_regression as regression
from tests import test_sgmcmc_runs as runs
from tests import test_sgmcmc_steps as steps
from tests import test_sgmcmc_targets as targets
from tests.agreement import Group

TABLE: dict[str, tuple[str, list[Callable[[], Group]]]] = {
    "A1": (
        "the algebra of a step",
        [
            steps.sgld_step,
            steps.rmsprop_metric,
            steps.other_steps,
            steps.acceptances,
            *(partial(steps.masked_entry, name) for name in steps.SAMPLERS),
            *(partial(steps.boxed, name) for name in steps.BOXED),
        ],
    ),
    "A2": ("a step without noise", [steps.descent]),
    "A3": (
        "quadratics",
        [
            targets.quadratic_forms,
            partial(targets.finite_run, 0),
            partial(targets.finite_run, 50),
            targets.stationary_variances,
            targets.other_variances,
            targets.metropolis,
        ],
    ),
    "A4": ("even powers and a normal crossing", [targets.even_powers, targets.normal_crossing]),
    "A5": (
        "influences and susceptibilities of a Gaussian regression",
        [
            regression.closed_forms,
            partial(regression.influences, "within"),
            partial(regression.influences, "stacked"),
            regression.normalized_influences,
            regression.posterior_influences,
            regression.susceptibilities,
            regression.coefficient,
        ],
    ),
    "A6": ("streaming moments", [estimators.streaming]),
    "A7": (
        "identities",
        [
            *(
                partial(estimators.token_influences, pooling, statistic)
                for statistic in ("correlation", "covariance")
                for pooling in ("within", "stacked", "mean")
            ),
            estimators.raw_moments,
        ],
    ),
    "A8": (
        "chains beside others, and nothing global",
        [partial(runs.company, False), partial(runs.company, True), runs.global_state],
    ),
    "A9": (
        "laws of the LLC",
        [
            targets.scale_identity,
            targets.frozen_coordinate,
            targets.order_of_points,
            *(partial(targets.planted_teacher, *teacher) for teacher in targets.TEACHERS),
        ],
    ),
}


def lines(group: Group) -> Iterator[str]:
    """Yield a group as text."""
    for row in group.rows:
        last = f"z {row.off:+.2f}{' *' if row.counted else ''}" if row.random else ""
        fault = "" if row.agrees else "  DISAGREES"
        yield f"{row.name:60}{row.oracle:14.7g}{row.measured:14.7g}{row.error:11.2g}  {last}{fault}"
    value, count = group.chi_square()
    if count > 1:
        fault = "" if group.plausible else "  IMPLAUSIBLE"
        yield f"{'':60}χ² = {value:.2f} of {count}, with a chance of {group.chance():.3f}{fault}"


def main() -> int:
    unknown = sorted({*sys.argv[1:]} - {*TABLE})
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(unknown)}: there are {', '.join(TABLE)}")
    groups = []
    print(f"{'':60}{'oracle':>14}{'measured':>14}{'±':>11}")
    for name, (text, functions) in TABLE.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        print(f"{name}: {text}", flush=True)
        for function in functions:
            groups.append(function())
            print("\n".join(lines(groups[-1])), flush=True)
    rows = [row for group in groups for row in group.rows]
    random = [abs(row.off) for row in rows if row.random]
    bad = sum(bool(group.faults()) for group in groups)
    far = f", worst |z| {max(random):.2f} of {len(random)}" if random else ""
    print(f"{len(rows)} rows{far}; of {len(groups)} groups {bad} disagree")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
