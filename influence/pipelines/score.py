"""Score a corpus against query rows as it streams by: no row is stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from influence.func.sinks import taking
from influence.index import Collected, Columns, done, finish, shard_sink
from influence.pipelines.frame.configs import PassConfig, at_least
from influence.pipelines.frame.directory import fingerprint_for, refuse_finished, run_directory
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.planning import first_batch, predict, shard_ranges
from influence.pipelines.frame.prepare import batches_of, measure, own_shards
from influence.pipelines.frame.ranks import among_ranks, own_device, ranks
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes.best import BEST, best, outcome_of, write_best
from influence.pipelines.passes.collect import Placed, Summed, Work, collect
from influence.pipelines.passes.pass_steps import plan_step
from influence.pipelines.passes.queries import Queries, Scored, column, contents, load_queries, scored
from influence.store.folder import run_id

Mode: TypeAlias = Literal["individual", "nearest"]


@dataclass(frozen=True)
class ScoreConfig(PassConfig):
    """Score every example of a corpus against queries in one pass. A positive score helps the query.

    influence score runs/scores --model gpt2 --dataset corpus.jsonl --query runs/questions

    Queries are indexes written by build or reduce. Several are scored in one pass. The corpus's rows are not stored.

    Attributes:
        query: runs of build or reduce. Their rows are the queries.
        mode: individual keeps a score per query row. nearest keeps the best score over each run's rows.
        blocks: use only these blocks (names or globs).
        per_block: also store each block's part of every score.
        per_token: score every token: use, by where parameters were used, or loss, by whose loss it is. Default: score
            every example.
        top_k: keep only this many best and worst examples per query, instead of all scores.
        force: score even if the fingerprints disagree, with a warning.
        transform: what is scored of the corpus's gradients. With --hessian, the powers of both sides must sum to -1.
    """

    query: tuple[str, ...]
    mode: Mode = "individual"
    blocks: tuple[str, ...] = ()
    per_block: bool = False
    per_token: Literal["use", "loss"] | None = None
    top_k: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "top_k")


@among_ranks
def run(config: ScoreConfig, say: Say = quiet, ahead: int | None = None) -> Outcome:
    """Score a corpus.

    Args:
        config: the run.
        say: where its lines go.
        ahead: query rows of each run, where a dry run plans before there are any.

    Returns:
        What was written, and each query's best examples.
    """
    execution, directory = config.execution, Path(config.run)
    if config.top_k is not None and config.per_block:
        raise ValueError("top_k keeps no matrix, and per_block is one: leave one out")
    if config.top_k is not None and config.per_token is not None:
        raise ValueError("top_k keeps examples, and per_token scores their tokens: leave one out")
    refuse_finished(config)
    measured = measure(config.model, config.loss, config.transform, execution)
    tokens = read_data(config.data, measured)
    if config.top_k is not None and not 1 <= config.top_k <= len(tokens):
        raise ValueError(f"top_k must be between 1 and the number of examples, {len(tokens)}; got {config.top_k}")
    shards, batches = own_shards(tokens, execution), batches_of(execution)
    first = first_batch(shards, batches)
    step = plan_step(measured, first, execution, tokens, config.model.task, config.per_token)
    if execution.dry_run and ahead is not None:
        empty = {name: torch.zeros(ahead, *shape) for name, shape in step.shapes.items()}
        queries = [Queries(path, empty) for path in config.query]
    else:
        known = fingerprint_for(config, measured, tokens, step)
        queries = load_queries(config.query, known, step.shapes, config.blocks, config.force)

    def see(batch: Mapping[str, Tensor]) -> Scored:
        return scored(step.see(batch), queries, config.mode, config.per_block)

    shapes = {name: tuple(values.shape[1:]) for name, values in see(first).columns.items()}
    width = sum(torch.Size(shape).numel() for shape in shapes.values())
    dtype = "float64" if see(first).columns[column(0)].dtype == torch.float64 else "float32"
    count = len(tokens) if config.per_token is None else len(tokens.ids)
    count = count if config.top_k is None else 2 * config.top_k
    kept = "all scores" if config.top_k is None else f"the {config.top_k} best and worst"
    with ranks() as place:
        plan = predict(
            f"scores of {sum(q.number for q in queries)} queries ({config.mode}), {kept}",
            directory,
            shards,
            see,
            first,
            execution,
            world=place.world,
            disk=count * (8 * width + 32),
            notes=[tokens.report()],
        )
        if place.first:
            say(str(plan))
        if execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        settings = {
            "queries": [contents(path) for path in config.query],
            **{name: getattr(config, name) for name in ("mode", "blocks", "per_block", "per_token", "top_k")},
        }
        settings["blocks"] = list(config.blocks)
        results = ["index.h5", "best.h5"]
        with run_directory("scores", config, measured, tokens, shards, step, place, settings, results) as at:
            work = Work(shards, batches, see, own_device(execution.device))
            ranges = shard_ranges(shards)

            def rows(number: int) -> Any:
                sink = shard_sink(at, number, ranges[number], Columns(shapes), dtype, config.per_token is not None)
                return taking(sink, stored)

            sinks: dict[str, Placed | Summed] = {"scores": Placed(lambda: done(at), rows)}
            if config.top_k is not None:
                sinks = _heaps(config.top_k, queries, config.mode)
            found = collect(work, sinks, at, place, what="score", shown=execution.progress)
            if place.first:
                if config.top_k is None:
                    finish(at)
                else:
                    write_best(at / BEST, run_id(at) or "", found, config.query, config.mode)
            place.barrier()
    return outcome_of(directory)


def stored(value: Scored) -> Collected:
    """Return scores as a shard stores them."""
    return value.seen.collected._replace(rows=value.columns)


def _heaps(k: int, queries: Sequence[Queries], mode: str) -> dict[str, Placed | Summed]:
    sinks: dict[str, Placed | Summed] = {}
    for number, run in enumerate(queries):
        count = 1 if mode == "nearest" else run.number
        for end, reverse in (("best", False), ("worst", True)):
            heap = best(k, count, reverse)
            sinks[f"{column(number)}/{end}"] = Summed(taking(heap, _column_of(column(number))))
    return sinks


def _column_of(name: str) -> Callable[[Scored], Tensor]:
    return lambda value: value.columns[name]
