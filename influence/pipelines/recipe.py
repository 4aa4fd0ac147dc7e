"""Recipes: steps in directories of their own, each of which is skipped once it is finished."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from influence.index import Fingerprint, start
from influence.pipelines.configs import RunConfig, to_mapping, write_config
from influence.pipelines.outcome import Outcome, Say
from influence.pipelines.ranks import Ranks, ranks

RESULTS = ("index.h5", "factors.h5", "best.h5")
"""Files, one of which a finished step has."""


def run_steps(
    kind: str, config: Any, steps: Mapping[str, Callable[[RunConfig], Outcome | None]], say: Say
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
            if not done:
                outcomes[name] = work(inner)
                place.barrier()
            if execution.dry_run:
                break
    return outcomes


def _begin(kind: str, config: Any, names: list[str], place: Ranks, stack: contextlib.ExitStack) -> None:
    """Begin or resume the recipe's own directory, and hold its lock."""
    directory, execution = Path(config.run), config.execution
    if place.first:
        if not execution.overwrite and all(finished(directory / name) for name in names):
            raise FileExistsError(
                f"{directory} holds a finished run of influence {kind}: pass --overwrite to replace it, or another "
                "--run"
            )
        kept = replace(config, execution=replace(execution, overwrite=False))
        settings = to_mapping(replace(kept, execution=replace(execution, **_indifferent())))
        settings.pop("run")
        command = ["influence", kind, "--config", str(directory / "config.yaml"), "--run", "ANOTHER_RUN"]
        plan = {"shards": [], "steps": names, "settings": settings}
        how: dict[str, Any] = {"overwrite": execution.overwrite, "resume": execution.resume, "results": names}
        stack.enter_context(start(directory, kind, to_mapping(kept), command, plan, Fingerprint(), **how))
        write_config(directory / "config.yaml", kept, kind)
    place.barrier()


def _indifferent() -> dict[str, Any]:
    """Return the settings of a pass that change nothing of its result, at one value."""
    plain = RunConfig()
    names = ("device", "overwrite", "resume", "progress", "dry_run", "compile")
    return {name: getattr(plain, name) for name in names}


def finished(directory: Path) -> bool:
    """Whether a step has its result."""
    return any((directory / name).exists() for name in RESULTS)
