"""Reduce a dataset to one row: the mean or the sum of its gradients, as an index of a single row."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from influence.func.fold import Sink
from influence.func.loss.losses import widen
from influence.func.transform.folding import flat
from influence.index import Collected, Columns, finish, open_index, shard_sink
from influence.pipelines.frame.configs import PassConfig
from influence.pipelines.frame.directory import refuse_finished, run_directory
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.planning import first_batch, predict
from influence.pipelines.frame.prepare import batches_of, measure, own_shards
from influence.pipelines.frame.ranks import among_ranks, own_device, ranks
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes.collect import Summed, Work, collect
from influence.pipelines.passes.pass_steps import Seen, plan_step, total_dim
from influence.types import Rows


@dataclass(frozen=True)
class ReduceConfig(PassConfig):
    """Average or sum the gradients of a dataset into one row, an index that score and query take as a query.

    influence reduce runs/questions --model gpt2 --dataset questions.jsonl

    The mean divides by the examples that have a label to predict, and says how many there were.

    Attributes:
        method: mean or sum.
        normalize: divide the result by its norm.
        transform: what is reduced of each gradient. --unit-norm gives every example the same weight.
    """

    method: Literal["mean", "sum"] = "mean"
    normalize: bool = False


class Totals(NamedTuple):
    """Sums over examples.

    Attributes:
        rows: of rows, at least float32.
        loss: of losses, float64.
        tokens: of lengths.
        counted: examples with a label to predict.
        seen: all examples.
    """

    rows: Rows
    loss: float = 0.0
    tokens: int = 0
    counted: int = 0
    seen: int = 0


def totals() -> Sink:
    """Return the sink that sums what a pass sees; rows without a label are zero, so they only do not count."""

    def update(state: Totals, index: Int[Tensor, " n"], seen: Seen) -> Totals:
        sums = {name: widen(row).sum(0) for name, row in seen.collected.rows.items()}
        length = seen.collected.length
        tokens = 0 if length is None else int(length.sum())
        loss = float(seen.collected.loss.double().sum())
        return merge(state, Totals(sums, loss, tokens, int(seen.counts.sum()), len(index)))

    def merge(a: Totals, b: Totals) -> Totals:
        rows = {name: value + b.rows[name] for name, value in a.rows.items()} if a.rows and b.rows else a.rows or b.rows
        return Totals(rows, a.loss + b.loss, a.tokens + b.tokens, a.counted + b.counted, a.seen + b.seen)

    return Sink(lambda: Totals({}), update, merge, lambda state: state)


def reduced(sums: Totals, method: str, normalize: bool) -> Collected:
    """Return the one row.

    Raises:
        ValueError: if there is nothing to average, or to normalise.
    """
    if method == "mean" and not sums.counted:
        raise ValueError(f"none of {sums.seen} examples has a label to predict, so there is no mean")
    divisor = sums.counted if method == "mean" else 1
    rows = {name: value[None] / divisor for name, value in sums.rows.items()}
    if normalize:
        norm = float(flat(rows).norm())
        if norm == 0:
            raise ValueError("the reduced row is zero and has no direction: leave --normalize out")
        rows = {name: row / norm for name, row in rows.items()}
    return Collected(rows, torch.tensor([sums.loss / divisor]), torch.tensor([sums.tokens]))


@among_ranks
def run(config: ReduceConfig, say: Say = quiet) -> Outcome:
    """Reduce a dataset.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        What was written, and how many examples it is of.
    """
    execution, directory = config.execution, Path(config.run)
    refuse_finished(config)
    measured = measure(config.model, config.loss, config.transform, execution)
    tokens = read_data(config.data, measured)
    shards, batches = own_shards(tokens, execution), batches_of(execution)
    first = first_batch(shards, batches)
    step = plan_step(measured, first, execution, tokens, config.model.task)
    dim = total_dim(step.shapes)
    with ranks() as place:
        plan = predict(
            f"{config.method} of rows of {len(step.shapes)} blocks, {dim:,} numbers",
            directory,
            shards,
            step.see,
            first,
            execution,
            world=place.world,
            disk=16 * dim,
            notes=[tokens.report()],
        )
        if place.first:
            say(str(plan))
        if execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        settings = {"method": config.method, "normalize": config.normalize}
        one = [[0, 1]]  # the only row, whatever the dataset's shards
        with run_directory("reduce", config, measured, tokens, shards, step, place, settings, stored=one) as at:
            work = Work(shards, batches, step.see, own_device(execution.device))
            found = collect(work, {"sum": Summed(totals())}, at, place, what="reduce", shown=execution.progress)
            facts: dict[str, Any] = {}
            if place.first:
                sums = found["sum"]
                sink = shard_sink(at, 0, (0, 1), Columns(step.shapes), execution.dtype)
                sink.finalize(
                    sink.update(sink.init(), torch.tensor([0]), reduced(sums, config.method, config.normalize))
                )
                finish(at)
                facts = {"examples": sums.seen, "averaged": sums.counted, "tokens": sums.tokens}
            facts = place.once(lambda: facts)
    loss = float(open_index(directory).loss[0])
    left = facts["examples"] - facts["averaged"]
    note = f"; {left:,} without a label to predict were left out" if left else ""
    text = f"{config.method} of {facts['averaged']:,} examples{note}; loss {loss:.6g}; {directory}"
    return Outcome(config.run, {"run": config.run, "method": config.method, **facts, "dim": dim, "loss": loss}, text)
