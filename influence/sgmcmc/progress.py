"""A bar that says how a run goes: the loss, the LLC so far, acceptance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import torch

from influence.sgmcmc.drive import Record
from influence.sgmcmc.plan import Plan

EVERY = 0.5
"""Seconds between looks at the numbers."""


@contextmanager
def bar(
    plan: Plan, done: int, shown: bool, look: Callable[[], None] | None = None
) -> Iterator[Callable[[int, Record], None]]:
    """Yield what is to be called after every step; it calls `look` too."""
    if not shown:
        yield lambda t, record: None if look is None else look()
        return
    from tqdm import tqdm

    with tqdm(total=plan.steps, initial=done, desc="sampling", unit="step") as drawn:
        last = [0.0]

        def said(t: int, record: Record) -> None:
            drawn.update(1)
            if look is not None:
                look()
            if monotonic() - last[0] > EVERY:
                last[0] = monotonic()
                drawn.set_postfix_str(summary(plan, t, record))

        yield said


def summary(plan: Plan, t: int, record: Record) -> str:
    """Return the loss, the LLC so far and the acceptance after a step."""
    loss, baseline = record.arrays["loss"], record.arrays["baseline"]
    parts = [f"loss {float(loss[:, t].nanmean()):.4g}"]
    if t >= plan.burn_in and len(plan.groups) == 1:
        excess = (loss - baseline)[:, plan.burn_in : t + 1].nanmean()
        parts.append(f"LLC {next(iter(plan.groups.values()))['n_beta'] * float(excess):.4g}")
    if "term/acceptance" in record.arrays:
        seen = record.arrays["term/acceptance"][:, : t + 1]
        parts.append(f"acceptance {float(torch.nanmean(seen)):.2f}")
    return ", ".join(parts)
