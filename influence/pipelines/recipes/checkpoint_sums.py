"""Sums over checkpoints: the steps that build both sides' rows at each, and the scores that are made of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from influence.data.parsing import json_of
from influence.func.fingerprint import fingerprint as hash_of
from influence.index import Collected, Columns, Fingerprint, Index, done, finish, open_index, shard_sink, start
from influence.pipelines import build
from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig, TransformConfig, at_least
from influence.pipelines.frame.outcome import Outcome, Say
from influence.pipelines.frame.ranks import ranks
from influence.pipelines.passes.best import outcome_of
from influence.pipelines.passes.queries import column, load_queries
from influence.pipelines.recipes.frame import RecipeConfig
from influence.store import BadFileError
from influence.store.folder import read_manifest
from influence.types import Rows

STATE = "trainer_state.json"


def model_at(model: ModelConfig, checkpoint: str) -> ModelConfig:
    """Return the model of a checkpoint: a whole model with the first one's tokenizer, or an adapter on the model."""
    place = Path(checkpoint).expanduser()
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        return replace(model, adapter=checkpoint)
    return replace(model, model=checkpoint, tokenizer=model.tokenizer or model.model)


def learning_rates(checkpoints: Sequence[str], given: Sequence[float] = ()) -> tuple[list[float], str]:
    """Return how far training went towards each checkpoint, per unit of gradient.

    The Trainer logs the rate of each update. A checkpoint's is the mean of those logged since the checkpoint before it.
    Where one has none, all are those that the optimizers were saved with, which are the next update's.

    Args:
        checkpoints: folders.
        given: the rates, if they are known.

    Returns:
        The rates, and where they are from.

    Raises:
        ValueError: if there is not one for each, or a checkpoint says none; naming it.
    """
    if not checkpoints:
        raise ValueError("there is no checkpoint: pass --checkpoints, the folders which training saved")
    if given:
        if len(given) != len(checkpoints):
            raise ValueError(
                f"{len(given)} learning rates came for {len(checkpoints)} checkpoints: give one for each, in order"
            )
        if not all(math.isfinite(rate) and rate >= 0 for rate in given):
            raise ValueError(f"learning rates are finite and at least 0; got {', '.join(map(str, given))}")
        return list(given), "given"
    logged = _logged([_trainer_state(checkpoint) for checkpoint in checkpoints])
    if None not in logged:
        return [rate for rate in logged if rate is not None], f"logged in {STATE}"
    return [_saved(checkpoint) for checkpoint in checkpoints], "of the update after each"


def _trainer_state(checkpoint: str) -> Mapping[str, Any]:
    path = Path(checkpoint).expanduser() / STATE
    state = json_of(path) if path.is_file() else {}
    if not _is_state(state):
        raise BadFileError(
            f"{path} is no state of a Trainer: expected a global_step and a log_history of steps and learning rates, "
            "all finite and at least 0. It is damaged: take another checkpoint, or pass --learning-rates"
        )
    return state


def _is_state(state: Any) -> bool:
    """Whether all that is read of a Trainer's state is there, as it should be."""
    entries = state.get("log_history", []) if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return False
    numbers = [state.get("global_step", 0), *(entry.get("learning_rate", 0) for entry in entries)]
    numbers += [entry.get("step") for entry in entries if "learning_rate" in entry]
    return all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers)


def _logged(states: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the mean of the rates logged since the checkpoint before each; `None` where none was."""
    steps, rates = [int(state.get("global_step", 0)) for state in states], []
    for state, step in zip(states, steps, strict=True):
        before = max((other for other in steps if other < step), default=0)
        entries = [entry for entry in state.get("log_history", ()) if "learning_rate" in entry]
        found = [float(entry["learning_rate"]) for entry in entries if before < entry["step"] <= step]
        rates.append(math.fsum(found) / len(found) if found else None)
    return rates


def _saved(checkpoint: str) -> float:
    """Return the rate in a checkpoint's optimizer."""
    from influence.train.checkpoints import read_state

    ways = "log it during training (logging_steps), or pass --learning-rates, one for each checkpoint"
    try:
        groups = read_state(checkpoint)["param_groups"]
    except FileNotFoundError as error:
        raise ValueError(
            f"{checkpoint} does not say its learning rate: its {STATE} logged none since the checkpoint before, and it "
            f"has no optimizer; {ways}"
        ) from error
    rate = groups[0].get("lr") if groups else None
    if not rate:
        raise ValueError(
            f"the optimizer in {checkpoint} has the learning rate {rate} for its next update, and {STATE} logged none "
            f"since the checkpoint before; {ways}"
        )
    return float(rate)


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

    Their configuration and command are the recipe's: those of the runs would describe other runs.

    Args:
        to: the run to write, a step of a recipe.
        like: an index or scores of the same examples, whose numbers, losses and shards these are.
        part: from begin and end of a shard to its scores.
        plan: what else decides them.
        fingerprint: what they are.
    """
    sample = part(0, 1)
    about, columns = like.about, Columns({name: tuple(rows.shape[1:]) for name, rows in sample.items()})
    dtype = str(next(iter(sample.values())).dtype).removeprefix("torch.")
    recipe = read_manifest(Path(to).parent)
    config = {**recipe.config, "query": [], "query_data": recipe.config.get("query")}
    config |= {str(name): about.config[name] for name in ("query", "mode") if name in about.config}  # of scores' runs
    with start(to, "scores", config, recipe.command, {**about.plan, **plan, "dtype": dtype}, fingerprint):
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
