"""Recipes: steps in directories of their own, each of which is skipped once it is finished."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from influence.index import Fingerprint, start
from influence.pipelines.frame.config_file import to_mapping, write_config
from influence.pipelines.frame.configs import (
    Data,
    DataConfig,
    Execution,
    Loss,
    LossConfig,
    Model,
    Run,
    RunConfig,
    TransformConfig,
    View,
)
from influence.pipelines.frame.directory import CONFIG, RESULTS, contents, tidy_finished
from influence.pipelines.frame.outcome import Outcome, Say
from influence.pipelines.frame.ranks import Ranks, ranks
from influence.terminal import duration, size


@dataclass(frozen=True)
class RecipeConfig:
    """What every recipe takes, which scores a corpus against queries.

    Attributes:
        run: the run directory to write.
        model: the model.
        data: the corpus.
        query: the queries.
        loss: the loss.
        transform: what is compared of each gradient.
        execution: every pass.
    """

    run: Run
    model: Model
    data: Data
    query: DataConfig
    _: KW_ONLY
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)


def refuse_decided(view: TransformConfig, recipe: str) -> None:
    """Refuse options of the transform that a recipe sets itself, and would ignore.

    Raises:
        ValueError: naming the first of them.
    """
    free = replace(view, hessian=None, whiten=None, power=TransformConfig.power, unit_norm=False)
    for name in (each.name for each in fields(view)):
        if getattr(view, name) != getattr(free, name):
            raise ValueError(f"{name}={getattr(view, name)!r} is decided by influence {recipe} itself: leave it out")


def run_steps(
    kind: str, config: RecipeConfig, steps: Mapping[str, Callable[[RunConfig], Outcome | None]], say: Say
) -> dict[str, Any]:
    """Run a recipe's steps one after the other.

    Args:
        kind: the recipe.
        config: its configuration.
        steps: each step's directory in the run's, and what runs it, by how its pass is to be run.
        say: where its lines go.

    Returns:
        What each step that was run handed back.

    Raises:
        FileExistsError: if the recipe is finished already.
        ValueError: if a file or a model that its finished steps read is another now, naming it.
    """
    directory, execution = Path(config.run), config.execution
    with ranks() as place, contextlib.ExitStack() as stack:
        if place.first:
            say(f"plan: {kind} → {directory}: " + " → ".join(steps))
        if not execution.dry_run:
            _begin(kind, config, list(steps), place, stack)
        outcomes: dict[str, Any] = {}
        inner = replace(execution, overwrite=False, resume=True)
        for number, (name, work) in enumerate(steps.items()):
            done = place.once(partial(finished, directory / name))
            if place.first:
                say(f"step {number + 1} of {len(steps)}, {name}{': finished already' if done else ''}")
            if done and place.first and not execution.dry_run:
                tidy_finished(directory / name)
            if not done:
                outcomes[name] = work(inner)
                place.barrier()
    return outcomes


def result(config: RecipeConfig, outcomes: Mapping[str, Outcome]) -> Outcome:
    """Return a recipe's outcome: its scores; or of a dry run, what its steps take together.

    Raises:
        OSError: if the disk has room for each step, but not for all.
    """
    if not config.execution.dry_run:
        return Outcome(config.run, {**outcomes["scores"].facts, "run": config.run}, outcomes["scores"].text)
    facts = {name: dict(step.facts) for name, step in outcomes.items()}
    seconds, disk = (sum(step.get(name, 0) for step in facts.values()) for name in ("seconds", "disk"))
    free = min((step["free"] for step in facts.values() if "free" in step), default=None)
    if free is not None and disk > free:
        raise OSError(
            f"no space: all steps in {config.run} together will take {size(disk)} and the disk has {size(free)} free. "
            "Choose a smaller --projection-dim, a half-precision --dtype, or another disk"
        )
    text = f"all steps together: about {duration(seconds)}, disk {size(disk)}"
    return Outcome(config.run, {**facts, "seconds": seconds, "disk": disk}, text)


def planned(step: str, execution: RunConfig, say: Say) -> Outcome | None:
    """Say that a step which is no pass will be done; of a run that is none, nothing."""
    if not execution.dry_run:
        return None
    say(f"plan: {step}")
    return Outcome("", {}, "")


def without_what_is_not_there(view: TransformConfig, execution: RunConfig) -> TransformConfig:
    """Return a transform as a dry run can plan it: curvature that an earlier step will fit is left out.

    It is folded into the projection where it separates, so the plan's time is about right without it.
    """
    if execution.dry_run and view.hessian is not None and not finished(Path(view.hessian)):
        return replace(view, hessian=None, whiten=None)
    return view


def fewer(data: DataConfig, count: int | None) -> DataConfig:
    """Return a dataset's first rows: so many, and not more than it was cut to already."""
    limits = [n for n in (data.max_examples, count) if n is not None]
    return replace(data, max_examples=min(limits, default=None))


def _begin(kind: str, config: RecipeConfig, names: list[str], place: Ranks, stack: contextlib.ExitStack) -> None:
    """Begin or resume the recipe's own directory, and hold its lock."""
    directory, execution = Path(config.run), config.execution
    if place.first:
        if not execution.overwrite and all(finished(directory / name) for name in names):
            raise FileExistsError(
                f"{directory} holds a finished run of influence {kind}: pass --overwrite to replace it, or name "
                "another run"
            )
        kept = replace(config, execution=replace(execution, overwrite=False))
        settings = to_mapping(replace(kept, execution=replace(execution, **_indifferent())))
        settings.pop("run")
        command = ["influence", kind, "ANOTHER_RUN", "--config", str(directory / "config.yaml")]
        plan = {"shards": [], "steps": names, "settings": settings}
        plan |= {f"contents of {name}": found for name, found in contents(config).items()}
        how: dict[str, Any] = {"overwrite": execution.overwrite, "resume": execution.resume}
        how["results"] = [*(f"{name}/" for name in names), CONFIG]
        run = stack.enter_context(start(directory, kind, to_mapping(kept), command, plan, Fingerprint(), **how))
        write_config(directory / CONFIG, kept, kind, run.manifest.id)
    place.barrier()


def _indifferent() -> dict[str, Any]:
    """Return the settings of a pass that change nothing of its result, at one value."""
    plain = RunConfig()
    names = ("device", "overwrite", "resume", "progress", "dry_run", "compile")
    return {name: getattr(plain, name) for name in names}


def finished(directory: Path) -> bool:
    """Whether a step has its result."""
    return any((directory / name).exists() for name in RESULTS)
