"""Build an index: the row of every example, in the dataset's order, on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from influence.func.fold import Sink
from influence.index import Columns, Index, done, finish, open_index, shard_sink
from influence.pipelines.frame.configs import PassConfig
from influence.pipelines.frame.directory import refuse_finished, run_directory
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.planning import first_batch, predict, shard_ranges
from influence.pipelines.frame.prepare import batches_of, float_size, measure, own_shards
from influence.pipelines.frame.ranks import among_ranks, own_device, ranks
from influence.pipelines.frame.tokens import data_hash, read_data
from influence.pipelines.passes.collect import Placed, Summed, Work, collect
from influence.pipelines.passes.pass_steps import collected, plan_step, total_dim


@dataclass(frozen=True)
class BuildConfig(PassConfig):
    """Write an index: one gradient row for every example of a dataset, to query, score and inspect later.

    influence build runs/corpus --model gpt2 --dataset corpus.jsonl

    A row holds the example's gradients of the matrices in the model's layers. Each is sketched to 16 × 16 numbers. A
    killed run continues where it stopped when you type the same again. To share the work among processes:

    torchrun --nproc-per-node 2 -m influence build runs/corpus --model gpt2 --dataset corpus.jsonl

    Attributes:
        per_token: write a row per token: use, by where parameters were used, or loss, by whose loss it is. Default: a
            row per example.
        append: add the dataset's examples to the finished index in RUN, after those it has.
    """

    per_token: Literal["use", "loss"] | None = None
    append: bool = False


@among_ranks
def run(config: BuildConfig, say: Say = quiet, also: Mapping[str, Summed] | None = None) -> Outcome:
    """Build the index.

    Args:
        config: the run.
        say: where its lines go.
        also: sinks that see the same pass: `{"mean": Summed(of_rows(sinks.mean()))}`.

    Returns:
        What was written; the results of other sinks are in its facts, by name.
    """
    execution, directory = config.execution, Path(config.run)
    if not config.append:
        refuse_finished(config)
    there = open_index(directory) if config.append else None
    measured = measure(config.model, config.loss, config.transform, execution)
    tokens = read_data(config.data, measured)
    behind, written = 0, 0
    if there is not None:
        _refuse_twice(there, data_hash(tokens), directory)
        behind, written = int(there.index.max()) + 1 if there.examples else 0, len(there.about.shards)
        tokens = replace(tokens, index=tokens.index + behind)
    shards, batches = own_shards(tokens, execution), batches_of(execution)
    first = first_batch(shards, batches)
    step = plan_step(measured, first, execution, tokens, config.model.task, config.per_token)
    dim, columns = total_dim(step.shapes), Columns(step.shapes)
    row = dim * float_size(execution.dtype)
    lengths = tokens.lengths if config.per_token else torch.ones(len(tokens), dtype=torch.int64)
    largest = max(int(lengths[begin:end].sum()) for begin, end in shard_ranges(shards))
    settings = {"per_token": config.per_token}
    with ranks() as place:
        plan = predict(
            f"index of {len(step.shapes)} blocks, {dim:,} numbers a row as {execution.dtype}",
            directory,
            shards,
            step.see,
            first,
            execution,
            world=place.world,
            disk=int(lengths.sum()) * (row + 32),
            memory=2 * largest * row,
            notes=[tokens.report()],
            resumes=not config.append,
        )
        if place.first:
            say(str(plan))
        if execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        with run_directory(
            "index", config, measured, tokens, shards, step, place, settings, append=config.append
        ) as at:
            ranges = shard_ranges(shards)

            def rows(number: int) -> Sink:
                return collected(
                    shard_sink(
                        at, written + number, ranges[number], columns, execution.dtype, config.per_token is not None
                    )
                )

            work = Work(shards, batches, step.see, own_device(execution.device))
            sinks: dict[str, Placed | Summed] = {
                "index": Placed(lambda: {number - written for number in done(at, written)}, rows),
                **(also or {}),
            }
            results = collect(work, sinks, at, place, what="build", shown=execution.progress)
            if place.first:
                finish(at)
            place.barrier()
    index = open_index(directory)
    facts = {"run": config.run, "rows": len(index), "dim": index.dim, "dtype": index.dtype, **results}
    return Outcome(config.run, facts, f"{len(index):,} rows of {index.dim:,} numbers ({index.dtype}) in {directory}")


def _refuse_twice(index: Index, data: str, directory: Path) -> None:
    """Refuse data that an append has added: the same command typed again after a kill, most likely."""
    for change in index.about.appended:
        if change["recorded"].get("data") == data:
            raise FileExistsError(
                f"{directory} has these data already, appended from shard {change['first']}: nothing was added; "
                "append other data, or build them into another run"
            )
