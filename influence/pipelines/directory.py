"""A run directory under a pass: begun by the first rank, locked while the pass runs, and able to replay itself."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence.data import Tokenized, collate
from influence.func.trial import EXAMPLES
from influence.hessians.fitting import FitStep
from influence.index import Fingerprint, fingerprint_of, start
from influence.index.run import ROOT, what_is_there
from influence.pipelines.plain import to_mapping, write_config
from influence.pipelines.planning import shard_ranges
from influence.pipelines.prepare import Measured
from influence.pipelines.ranks import Ranks
from influence.pipelines.reading import data_hash, vocabulary_hash
from influence.pipelines.seen import Step
from influence.store import Lock
from influence.store.folder import RUN, read_manifest, refuse_foreign, tidy
from influence.store.schema import conform

CONFIG = "config.yaml"
RESULTS = (ROOT, "factors.h5", "best.h5")
"""Files, one of which a finished pass has."""


@contextlib.contextmanager
def run_directory(
    kind: str,
    config: Any,
    measured: Measured,
    tokens: Tokenized,
    shards: Sequence[Tokenized],
    step: Step | FitStep,
    place: Ranks,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[str] = (),
    scratch: Sequence[str] = (),
    stored: Sequence[Sequence[int]] | None = None,
    append: bool = False,
) -> Iterator[Path]:
    """Begin or resume a run.

    Args:
        kind: what it will hold.
        config: its configuration, with `run` and `execution`.
        measured: what is measured.
        tokens: the dataset.
        shards: its shards.
        step: the planned step, which knows the rows' shapes.
        place: this process among its peers.
        settings: what else decides the result, so that a run with other settings does not resume this one.
        results: names of what it makes beside the index, as `Manifest.files` has them.
        scratch: names of what it keeps there until it is finished.
        stored: begin and end of every shard that is written, where they are not the dataset's.
        append: add to a finished index, whose configuration stays.

    Yields:
        The directory. The first rank holds its lock until the end.

    Raises:
        FileExistsError: if a finished run is there, or one that may not be resumed.
    """
    directory, execution = Path(config.run), config.execution
    kept = replace(config, execution=replace(execution, overwrite=False))  # who replays a run does not delete one
    with contextlib.ExitStack() as stack:
        if place.first:
            if not append:
                refuse_finished(config)
            plan = {
                "shards": shard_ranges(shards) if stored is None else [list(ends) for ends in stored],
                "seen": shard_ranges(shards),
                "data": data_hash(tokens),
                **{name: getattr(execution, name) for name in ("token_budget", "max_rows", "dtype", "nonfinite")},
                **(settings or {}),
            }
            run = start(
                directory,
                kind,
                to_mapping(kept),
                ["influence", kind_command(kind), "--config", str(directory / "config.yaml"), "--run", "ANOTHER_RUN"],
                plan,
                fingerprint_for(config, measured, tokens, step),
                overwrite=execution.overwrite,
                resume=execution.resume,
                append=append,
                results=[*results, CONFIG],
                scratch=scratch,
            )
            stack.enter_context(run)
            if not append:
                write_config(directory / CONFIG, kept, kind_command(kind), run.manifest.id)
        place.barrier()
        yield directory
        place.barrier()
        if place.first:
            tidy(directory, read_manifest(directory))


def refuse_finished(config: Any) -> None:
    """Refuse to begin where a finished run is, unless it is to be replaced: before a model or data are loaded.

    Args:
        config: the configuration, with `run` and `execution`.

    Raises:
        FileExistsError: saying what is there.
    """
    directory, execution = Path(config.run), config.execution
    refuse_foreign(directory)
    found = [name for name in RESULTS if (directory / name).exists()]
    if not found or execution.overwrite or execution.dry_run or not (directory / RUN).exists():
        return
    manifest = read_manifest(directory)
    if os.access(directory, os.W_OK):
        with Lock(directory):
            tidy(directory, manifest)  # a run that was killed as it finished
    kind = manifest.kind
    there = f"{directory} holds a finished run of influence {kind_command(kind)} ({found[0]})"
    appended = kind == "index" and hasattr(config, "append")
    raise FileExistsError(
        f"{what_is_there(directory) if kind == 'index' else there}: pass --overwrite to replace it, "
        f"{'--append to add examples, ' if appended else ''}or another --run"
    )


def config_of(run: str | Path) -> dict[str, Any]:
    """Return the configuration that a run's manifest holds; none where there is no run."""
    return read_manifest(run).config if (Path(run) / RUN).exists() else {}


def names_in(run: str | Path, field: str) -> list[str]:
    """Return the names that a run's configuration lists under a field; none, where it has no such field.

    Raises:
        BadFileError: if there is something else.
    """
    return conform(config_of(run).get(field, []), list[str], f"{Path(run) / RUN}: {field}")


def kind_command(kind: str) -> str:
    """Return the command that makes a kind of run."""
    return {"index": "build", "scores": "score"}.get(kind, kind)


def fingerprint_for(config: Any, measured: Measured, tokens: Tokenized, step: Step | FitStep) -> Fingerprint:
    """Return the fingerprint of a configuration's rows; data and loss are recorded."""
    recorded = {
        "data": data_hash(tokens),
        "vocabulary": vocabulary_hash(measured.tokenizer),
        "loss": config.loss.loss,
        "reduction": config.loss.reduction,
        "label_smoothing": config.loss.label_smoothing,
        "model": config.model.model,
    }
    shapes, layout = (step.shapes, step.layout) if isinstance(step, Step) else (step.about.shapes, step.plan.layout)
    some = (tokens.lengths > 0).nonzero().flatten()[:EXAMPLES]
    return fingerprint_of(
        measured.loss_fn,
        measured.params,
        measured.transform,
        shapes,
        recorded=recorded,
        layout=layout,
        batch=collate(tokens, some) if len(some) else None,
    )
