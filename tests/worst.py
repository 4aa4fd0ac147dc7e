"""``python -m tests.worst [case …]``: the worst error of every model and engine over every combination.

Measured against the float64 loop of `tests.oracles`, all parameters, as docs/conventions.md says.
"""

import fnmatch
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from influence import functionalize, per_example_grads, per_example_grads_fn
from tests.cases import CASES, Case
from tests.oracles import Truth, Worst, error, per_example

ENGINES = ("loop", "vmap", "batched", "auto")
Combo = tuple[str, bool, int, int]  # reduction, padded, n, s


@functools.cache
def model_of(case: Case) -> nn.Module:
    return case.make()


@functools.cache
def truth_of(case: Case, combo: Combo) -> Truth:
    reduction, padded, n, s = combo
    batch = case.batch(n, s, padded)
    truth = per_example(case.exact(), batch, case.oracle_loss(reduction), reduction, strip=padded and case.strip)
    return Truth({name: g for name, g in truth.rows.items() if asked(case, name)}, truth.losses)


def asked(case: Case, name: str) -> bool:
    return case.targets is None or fnmatch.fnmatchcase(name, case.targets)


def function_of(case: Case, reduction: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    return functionalize(model_of(case), loss=case.user_loss(reduction), reduction=reduction, targets=case.targets)


def measure(case: Case, engine: str, combo: Combo, **settings: Any) -> Worst:
    reduction, padded, n, s = combo
    loss_fn, params = function_of(case, reduction)
    rows = per_example_grads(loss_fn, params, case.batch(n, s, padded), engine=engine, **settings)
    return error(rows, truth_of(case, combo).rows)


def refused(case: Case, engine: str, combo: Combo) -> bool:
    when = case.refuses.get(engine)
    return when == "always" or (when == "padded" and combo[1])


def chosen(case: Case, combo: Combo) -> str:
    loss_fn, params = function_of(case, combo[0])
    return per_example_grads_fn(loss_fn, params, case.batch(combo[2], combo[3], combo[1])).plan.engine


def worst_of(case: Case, engine: str) -> str:
    worst, refusals = Worst(0.0, ""), 0
    combos = case.combos()
    for combo in combos:
        if refused(case, engine, combo):
            refusals += 1
            continue
        try:
            worst = max(worst, measure(case, engine, combo))
        except Exception as problem:
            worst = max(worst, Worst(float("inf"), f"{type(problem).__name__}: {problem}".split("\n")[0][:90]))
    if refusals == len(combos):
        return f"{'refused':>8}"
    return f"{worst.value:8.1e} {worst.name}{f' ({refusals} of {len(combos)} refused)' if refusals else ''}"


def main(patterns: list[str]) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        if patterns and not any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns):
            continue
        start = time.perf_counter()
        lines = [f"    {engine:8} {worst_of(case, engine)}" for engine in ENGINES]
        try:
            routes = sorted({chosen(case, combo) for combo in case.combos()})
        except Exception as problem:
            routes = [type(problem).__name__]
        stated = f"bound {case.tolerance:.0e}" + (f", {case.reason}" if case.reason else "")
        print(
            f"{case.name}: {stated}; auto takes {', '.join(routes)}; {time.perf_counter() - start:.1f} s",
            *lines,
            sep="\n",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
