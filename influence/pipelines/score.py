"""Score a corpus against query rows as it streams by: no row is stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.fingerprint import fingerprint as hash_of
from influence.func.folding import vectors
from influence.func.losses import widen
from influence.func.sinks import taking
from influence.func.top import Top
from influence.index import Collected, Columns, Fingerprint, done, finish, narrowed, open_index, shard_sink
from influence.index.chosen import choose
from influence.index.matching import matched
from influence.pipelines.collect import Placed, Summed, Work, collect, remove_partials
from influence.pipelines.configs import (
    Data,
    Execution,
    Loss,
    LossConfig,
    Model,
    Run,
    RunConfig,
    TransformConfig,
    View,
    read_config,
)
from influence.pipelines.directory import fingerprint_for, run_directory
from influence.pipelines.outcome import Outcome, Say, quiet, table
from influence.pipelines.planning import first_batch, predict, shard_ranges
from influence.pipelines.prepare import batches_of, check_gradients, measure, own_shards, read_data
from influence.pipelines.ranks import own_device, ranks
from influence.pipelines.seen import Seen, plan_step
from influence.pipelines.topk import best
from influence.types import Rows

Mode: TypeAlias = Literal["individual", "nearest"]
AT_ONCE = 1 << 14
"""Scores that are looked through at once."""
SHOWN = 3
"""Queries, and examples of each, that are shown."""


@dataclass(frozen=True)
class ScoreConfig:
    """Score every example of a corpus against queries, as the corpus streams by. Positive helps the query.

    influence score --model gpt2 --dataset corpus.jsonl --query runs/questions --run runs/scores

    The queries are indexes that build or reduce wrote; several are scored in one pass. Rows are not stored.

    Attributes:
        run: the run directory to write.
        model: the model.
        data: the corpus.
        query: runs of build or reduce, whose rows are the queries.
        mode: individual keeps a score for each query row, nearest the best of each run's rows.
        blocks: score by these blocks only (names or globs).
        per_block: keep each block's part of every score too.
        top_k: keep the so many best and worst examples of each query only, not all scores.
        force: score what the fingerprints refuse, with a warning.
        loss: the loss.
        transform: the corpus's side; with --hessian, the powers of both sides must sum to -1.
        execution: the pass.
    """

    run: Run
    model: Model
    data: Data
    query: tuple[str, ...]
    mode: Mode = "individual"
    blocks: tuple[str, ...] = ()
    per_block: bool = False
    top_k: int | None = None
    force: bool = False
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)


class Queries(NamedTuple):
    """The query rows of one run.

    Attributes:
        name: the run.
        rows: its rows, decoded.
    """

    name: str
    rows: Rows

    @property
    def number(self) -> int:
        """How many there are."""
        return len(next(iter(self.rows.values())))


def load_queries(
    paths: Sequence[str],
    fingerprint: Fingerprint,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Sequence[str] = (),
    force: bool = False,
) -> list[Queries]:
    """Return the rows of query runs, checked against the rows that they will meet.

    Args:
        paths: the runs.
        fingerprint: of the corpus's rows.
        shapes: of the corpus's rows.
        blocks: the blocks to take, names or globs; all by default.
        force: warn where fingerprints refuse.

    Returns:
        The queries.

    Raises:
        ValueError: if there is none, or one does not belong to these rows, naming the field and both values.
    """
    if not paths:
        raise ValueError("no query: pass --query RUN, a run of influence build or reduce")
    found, chosen = [], choose(shapes, list(blocks) or None)
    for path in paths:
        index = open_index(path)
        check_gradients(index)
        if not len(index):
            raise ValueError(f"the query {path} holds no row")
        mine, theirs = index.fingerprint.dim, fingerprint.dim
        if mine is not None and theirs is not None and mine > theirs:
            index = narrowed(index, theirs)
        common = [name for name in chosen.names if name in index.blocks]
        rows = matched(index.rows(common or None), fingerprint, chosen, index.fingerprint, force=force)
        chosen.matrix(rows)  # says what does not fit where a difference was forced
        found.append(Queries(path, rows))
    return found


def contents(path: str) -> dict[str, Any]:
    """Return what a query run's rows are, and a hash of them: a run that is resumed must meet the same."""
    index = open_index(path)
    sums = [
        shard.places[name].sha256 for shard in index.about.shards for name in ("rows", "scale") if name in shard.places
    ]
    return {"rows": hash_of(sums), **index.fingerprint.json()}


def scores_of(rows: Rows, queries: Queries) -> Float[Tensor, "b n q"]:
    """Return every block's inner products of rows with a run's queries, in at least float32."""
    parts = []
    for name, theirs in queries.rows.items():
        mine, wanted = widen(vectors(rows[name])), widen(vectors(theirs))
        dtype = torch.promote_types(mine.dtype, wanted.dtype)
        parts.append(mine.to(dtype) @ wanted.to(mine.device, dtype).mT)
    return torch.stack(parts)


class Scored(NamedTuple):
    """The scores of a batch.

    Attributes:
        columns: `{name: [n, q]}`: a run's scores under its number, and where asked for each block's part of them.
        seen: what else was seen.
    """

    columns: Rows
    seen: Seen


def scored(seen: Seen, queries: Sequence[Queries], mode: str, per_block: bool) -> Scored:
    """Return the scores of a batch's rows."""
    columns: Rows = {}
    for number, run in enumerate(queries):
        parts = scores_of(seen.collected.rows, run)
        whole = parts.sum(0)
        chosen = whole.argmax(1, keepdim=True) if mode == "nearest" else None
        columns[column(number)] = whole if chosen is None else whole.gather(1, chosen)
        if per_block:
            for name, part in zip(run.rows, parts, strict=True):
                columns[column(number, name)] = part if chosen is None else part.gather(1, chosen)
    return Scored(columns, seen)


def column(number: int, block: str | None = None) -> str:
    """Return the name under which the scores of a query run are stored."""
    return f"query{number}" if block is None else f"query{number}/{block}"


def run(config: ScoreConfig, say: Say = quiet) -> Outcome:
    """Score a corpus.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        What was written, and each query's best examples.
    """
    execution, directory = config.execution, Path(config.run)
    if config.top_k is not None and config.per_block:
        raise ValueError("top_k keeps no matrix, and per_block is one: leave one out")
    measured = measure(config.model, config.loss, config.transform, execution)
    tokens = read_data(config.data, measured)
    if config.top_k is not None and not 1 <= config.top_k <= len(tokens):
        raise ValueError(f"top_k must be between 1 and the number of examples, {len(tokens)}; got {config.top_k}")
    shards, batches = own_shards(tokens, execution), batches_of(execution)
    first = first_batch(shards, batches)
    step = plan_step(measured, first, execution, tokens, config.model.task)
    queries = load_queries(
        config.query,
        fingerprint_for(config, measured, tokens, step),
        step.shapes,
        config.blocks,
        config.force,
    )

    def see(batch: Mapping[str, Tensor]) -> Scored:
        return scored(step.see(batch), queries, config.mode, config.per_block)

    shapes = {name: tuple(values.shape[1:]) for name, values in see(first).columns.items()}
    width = sum(torch.Size(shape).numel() for shape in shapes.values())
    dtype = "float64" if see(first).columns[column(0)].dtype == torch.float64 else "float32"
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
            disk=(len(tokens) if config.top_k is None else 2 * config.top_k) * (8 * width + 32),
            notes=[tokens.report()],
        )
        if place.first:
            say(str(plan))
        if execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        settings = {
            "queries": [contents(path) for path in config.query],
            **{name: getattr(config, name) for name in ("mode", "blocks", "per_block", "top_k")},
        }
        settings["blocks"] = list(config.blocks)
        results = ["index.h5", "best.h5"]
        with run_directory("scores", config, measured, tokens, shards, step, place, settings, results) as at:
            work = Work(shards, batches, see, own_device(execution.device))
            ranges = shard_ranges(shards)

            def rows(number: int) -> Any:
                sink = shard_sink(at, number, ranges[number], Columns(shapes), dtype)
                return taking(sink, stored)

            sinks: dict[str, Placed | Summed] = {"scores": Placed(lambda: done(at), rows)}
            if config.top_k is not None:
                sinks = _heaps(config.top_k, queries, config.mode)
            found = collect(work, sinks, at, place, what="score", shown=execution.progress)
            if place.first:
                if config.top_k is None:
                    finish(at)
                else:
                    write_best(at / "best.h5", found, config)
                remove_partials(at)
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


def write_best(path: Path, heaps: Mapping[str, Top], config: ScoreConfig) -> None:
    """Write the best and worst examples of every query."""
    from influence import store

    tensors = {f"{name}/{key}": value for name, heap in heaps.items() for key, value in heap._asdict().items()}
    store.write(path, tensors, {"queries": list(config.query), "mode": config.mode}, kind="best", schema=1)


def read_best(path: str | Path) -> dict[str, Top]:
    """Return the best and worst examples that a run with `top_k` kept: `{"query0/best": …, "query0/worst": …}`."""
    from influence import store

    tensors, _ = store.read(Path(path) / "best.h5" if Path(path).is_dir() else path, kind="best", schema=1)
    names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
    return {name: Top(tensors[f"{name}/values"], tensors[f"{name}/indices"]) for name in names}


def ends(run: str | Path, k: int = 5) -> dict[str, Top]:
    """Return each query run's best and worst examples, from all scores or from those that were kept."""
    if (Path(run) / "best.h5").is_file():
        return {name: Top(heap.values[:, :k], heap.indices[:, :k]) for name, heap in read_best(run).items()}
    index = open_index(run)
    found = {}
    for name, shape in index.blocks.items():
        if "/" in name:  # a block's part of a score
            continue
        for end, reverse in (("best", False), ("worst", True)):
            heap = best(min(k, len(index)), shape[0], reverse)
            state = heap.init()
            for begin in range(0, len(index), AT_ONCE):
                scores = index.rows([name], begin, begin + AT_ONCE)[name]
                state = heap.update(state, index.index[begin : begin + AT_ONCE], scores)
            found[f"{name}/{end}"] = heap.finalize(state)
    return found


def outcome_of(run: str | Path) -> Outcome:
    """Return what there is to say of finished scores: the ends of each query's."""
    about = read_config(Path(run) / "config.yaml") if (Path(run) / "config.yaml").exists() else {}
    names = list(about.get("query", ()))
    found = ends(run)
    facts: dict[str, Any] = {"run": str(run), "queries": []}
    lines = []
    for number in range(len(found) // 2):
        top, bottom = (found[f"{column(number)}/{end}"] for end in ("best", "worst"))
        name = names[number] if number < len(names) else column(number)
        ways = {"best": top, "worst": bottom}
        facts["queries"].append(
            {"query": name, "rows": len(top.values)}
            | {end: {key: value.tolist() for key, value in heap._asdict().items()} for end, heap in ways.items()}
        )
        shown = range(min(SHOWN, len(top.values)))
        rows = [
            [row, rank + 1, float(top.values[row, rank]), int(top.indices[row, rank])]
            for row in shown
            for rank in range(min(SHOWN, top.values.shape[1]))
        ]
        lines += [f"{name}: {len(top.values):,} query rows", table(["query", "rank", "score", "example"], rows, "  ")]
    return Outcome(str(run), facts, "\n".join([*lines, f"scores in {run}"]))


def of_recipe(run: str, outcomes: Mapping[str, Outcome]) -> Outcome:
    """Return a recipe's outcome: its scores, or the plan of its first step."""
    last = outcomes.get("scores")
    if last is None:
        return Outcome(run, {name: step.facts for name, step in outcomes.items()}, "")
    return Outcome(run, {**last.facts, "run": run}, last.text)
