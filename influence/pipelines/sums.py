"""Sums over checkpoints: the steps that build both sides' rows at each, and the scores that are made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from influence.func.fingerprint import fingerprint as hash_of
from influence.index import Collected, Columns, Fingerprint, Index, done, finish, open_index, shard_sink, start
from influence.pipelines import build
from influence.pipelines.checkpoints import learning_rates, model_at
from influence.pipelines.configs import DataConfig, RunConfig, TransformConfig, at_least
from influence.pipelines.ends import outcome_of
from influence.pipelines.outcome import Outcome, Say
from influence.pipelines.queries import column, load_queries
from influence.pipelines.ranks import ranks
from influence.pipelines.recipe import RecipeConfig
from influence.types import Rows


@dataclass(frozen=True)
class SumConfig(RecipeConfig):
    """What a recipe takes that sums over the checkpoints of a training run.

    Attributes:
        checkpoints: the folders that a Trainer saved.
        learning_rates: one for each checkpoint; default those that the Trainer logged.
    """

    checkpoints: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse rates that no training has."""
        at_least(self, 0, "learning_rates")


def rates_of(config: SumConfig, say: Say) -> list[float]:
    """Return the learning rate of each checkpoint, and say them and where they are from.

    Raises:
        ValueError: if a checkpoint does not say its learning rate.
    """
    rates, source = learning_rates(config.checkpoints, config.learning_rates)
    with ranks() as place:
        if place.first:
            say(f"learning rates ({source}): {', '.join(f'{rate:.6g}' for rate in rates)}")
    return rates


def refuse_optimizer(view: TransformConfig, recipe: str) -> None:
    """Refuse an optimizer in the flags of a recipe over checkpoints, whose optimizers are several.

    Raises:
        ValueError: saying what to do.
    """
    if view.optimizer is not None:
        raise ValueError(
            f"--optimizer {view.optimizer} is the state at one checkpoint, and {recipe} is over several: leave it out; "
            "influence less takes each checkpoint's own"
        )


def row_steps(
    config: SumConfig, query: TransformConfig, train: list[TransformConfig], say: Say
) -> dict[str, Callable[[RunConfig], Outcome]]:
    """Return the steps that build both sides' indexes at each checkpoint.

    Args:
        config: the recipe's.
        query: the queries' side.
        train: the corpus's side at each checkpoint.
        say: where lines go.

    Returns:
        The steps.
    """
    steps: dict[str, Callable[[RunConfig], Outcome]] = {}

    def add(name: str, number: int, data: DataConfig, view: TransformConfig) -> None:
        model = model_at(config.model, config.checkpoints[number])
        made = build.BuildConfig(str(Path(config.run) / name), model, data, loss=config.loss, transform=view)
        steps[name] = lambda execution: build.run(replace(made, execution=execution), say)

    for number, view in enumerate(train):
        add(f"checkpoint{number}-query", number, config.query, query)
        add(f"checkpoint{number}-rows", number, config.data, view)
    return steps


def pairs(at: Path, count: int) -> list[tuple[Index, Rows]]:
    """Return the corpus's index and the queries' rows at each checkpoint, checked against one another."""
    found = []
    for number in range(count):
        index = open_index(at / f"checkpoint{number}-rows")
        (queries,) = load_queries([str(at / f"checkpoint{number}-query")], index.fingerprint, index.blocks)
        found.append((index, queries.rows))
    return found


def write_sums(
    at: Path,
    sides: Sequence[tuple[Index, Rows]],
    rates: Sequence[float],
    over: Callable[[list[Any]], Float[Tensor, "n q"]],
) -> None:
    """Write sums over checkpoints, shard by shard.

    Args:
        at: the recipe's directory.
        sides: the corpus's index and the queries' rows at each checkpoint.
        rates: the learning rate of each.
        over: from `Checkpoint`s to the scores of their examples, as `tracin`.
    """
    from influence.train import Checkpoint

    def part(begin: int, end: int) -> Rows:
        some = [Checkpoint(i.rows(None, begin, end), rows, rate) for (i, rows), rate in zip(sides, rates, strict=True)]
        return {column(0): over(some)}

    indexes = [index for index, _ in sides]
    plan = {"parts": [index.fingerprint.digest for index in indexes], "learning_rates": list(rates)}
    write_scores(str(at / "scores"), indexes[-1], part, plan, over_checkpoints(indexes, rates))


def over_checkpoints(indexes: Sequence[Index], rates: Sequence[float] = ()) -> Fingerprint:
    """Return the fingerprint of what is made of several checkpoints: its weights are those of all."""
    first = indexes[0].fingerprint
    hashes = [index.fingerprint.must_match["weights"] for index in indexes]
    recorded = {**first.recorded, "checkpoints": hashes, "learning_rates": list(rates)}
    recorded.pop("trial", None)  # of one of them
    return replace(first, must_match={**first.must_match, "weights": hash_of(hashes)}, recorded=recorded)


def write_scores(
    to: str, like: Index, part: Callable[[int, int], Rows], plan: Mapping[str, Any], fingerprint: Fingerprint
) -> None:
    """Write scores that are made of other runs, shard by shard; shards that are there already stay.

    Args:
        to: the run to write.
        like: an index or scores of the same examples, whose numbers, losses and shards these are.
        part: from begin and end of a shard to its scores.
        plan: what else decides them.
        fingerprint: what they are.
    """
    sample = part(0, 1)
    about, columns = like.about, Columns({name: tuple(rows.shape[1:]) for name, rows in sample.items()})
    dtype = str(next(iter(sample.values())).dtype).removeprefix("torch.")
    with start(to, "scores", about.config, about.command, {**about.plan, **plan, "dtype": dtype}, fingerprint):
        ready = done(to)
        for number, (begin, end) in enumerate(about.plan["shards"]):
            if number not in ready:
                value = Collected(part(begin, end), like.loss[begin:end], like.length[begin:end])
                sink = shard_sink(to, number, (begin, end), columns, dtype)
                sink.finalize(sink.update(sink.init(), like.index[begin:end], value))
        finish(to)


def written(to: Path, write: Callable[[], None]) -> Outcome:
    """Have scores written by the first rank, and return what there is to say of them on all.

    Args:
        to: the run that is written.
        write: what writes it.

    Returns:
        The scores.
    """
    with ranks() as place:
        if place.first:
            write()
        place.barrier()
    return outcome_of(to)
