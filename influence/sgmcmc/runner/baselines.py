"""The loss of each step's batch at the anchor: looked up by row, computed beside the step, or the dataset's mean."""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.sgmcmc.runner.minibatches import Source
from influence.sgmcmc.samplers.gradients import mean_loss, position_losses
from influence.sgmcmc.samplers.target import Target
from influence.types import Batch

KINDS = ("auto", "lookup", "paired")

Baseline = Callable[[Int[Tensor, " n"] | None, Batch], float]
"""`(rows, batch) -> the batch's mean loss at the anchor`."""


def build(target: Target, source: Source | None, kind: str, batch: int, steps: int) -> tuple[Baseline, str]:
    """Return the baseline, and which kind was taken.

    Args:
        target: whose anchor.
        source: the dataset, if any.
        kind: `"lookup"` computes every example's loss once and looks it up; `"paired"` computes the batch's beside the
            step, one more forward; `"auto"` takes what needs fewer forwards.
        batch: examples of a batch.
        steps: how many batches there will be.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"baseline must be one of {', '.join(KINDS)}; got {kind!r}")

    def paired(rows: Int[Tensor, " n"] | None, batch: Batch) -> float:
        with torch.no_grad():
            return float(mean_loss(target, target.anchor, batch))

    if source is None:
        once = cache(lambda: paired(None, None))
        return lambda rows, batch: once(), "once"
    # a table is made when it is first asked for: a plan, or a run that is read, needs none
    if batch == source.size:
        table = cache(lambda: anchor_table(target, source, min(batch, 256)))
        mean = cache(lambda: float(table()[0].sum() / table()[1].sum()))
        return lambda rows, batch: mean(), "once"
    if kind == "paired" or (kind == "auto" and source.size > steps * batch):
        return paired, "paired"
    table = cache(lambda: anchor_table(target, source, batch))

    def lookup(rows: Int[Tensor, " n"] | None, batch: Batch) -> float:
        sums, counts = table()
        return float(sums[rows].sum() / counts[rows].sum())

    return lookup, "lookup"


def anchor_table(target: Target, source: Source, batch: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return every example's summed loss at the anchor, in float64, and its labelled positions."""
    sums, counts = [], []
    with torch.no_grad():
        for begin in range(0, source.size, batch):
            rows = torch.arange(begin, min(begin + batch, source.size))
            found = position_losses(target.loss_fn, {**target.frozen, **target.anchor}, source.fetch(rows))
            sums.append((found[0].double() * found[1]).sum(1).cpu())
            counts.append(found[1].sum(1).double().cpu())
    return torch.cat(sums), torch.cat(counts)
