"""A run directory under a pass: begun by the first rank, locked while the pass runs, and able to replay itself."""

import contextlib
import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence.data import Tokenized, collate
from influence.func.loss.trial import EXAMPLES
from influence.hessians.fitting import FitStep
from influence.index import Fingerprint, fingerprint_of, start
from influence.index.run import what_is_there
from influence.index.shards import ROOT
from influence.pipelines.frame.config_file import to_mapping, write_config
from influence.pipelines.frame.planning import shard_ranges
from influence.pipelines.frame.prepare import Measured
from influence.pipelines.frame.ranks import Ranks
from influence.pipelines.frame.tokens import data_hash, vocabulary_hash
from influence.pipelines.passes.pass_steps import Step
from influence.store import Lock
from influence.store.folder import RUN, Manifest, read_manifest, refuse_foreign, tidy
from influence.store.schema import conform

SOURCES = ("model", "tokenizer", "adapter", "reference", "dataset", "template", "checkpoints", "optimizer")
"""Fields that may name a file or a folder."""


def contents(config: Any) -> dict[str, str]:
    """Return the hash of every file and folder that a configuration names; what is on the Hub has none.

    A folder's is that of all its files, with their names; a pattern's that of all files it matches. It costs one
    reading of everything.

    Args:
        config: a dataclass of this package, with a `run`, whose own files do not count.

    Returns:
        Hashes, by what the configuration says.
    """
    own = Path(config.run).absolute()  # which may lie in a folder that it reads

    def read(name: str) -> list[Path]:
        return [path for path in _paths(name) if own not in path.absolute().parents]

    return {name: _hash(paths) for name in dict.fromkeys(_named(config)) if (paths := read(name))}


def _named(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _named(value)
        elif field.name in SOURCES:
            yield from (one for one in (value if isinstance(value, tuple) else (value,)) if one is not None)


def _paths(name: str) -> list[Path]:
    """Return the files that a name stands for, in order."""
    place = Path(name).expanduser()
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file())
    return [place] if place.is_file() else sorted(map(Path, glob.glob(str(place))))


def _hash(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


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
                ["influence", kind_command(kind), "ANOTHER_RUN", "--config", str(directory / "config.yaml")],
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


def tidy_finished(directory: Path) -> Manifest:
    """Remove what a run leaves that is killed as it finishes, and return its manifest."""
    manifest = read_manifest(directory)
    if os.access(directory, os.W_OK):
        with Lock(directory):
            tidy(directory, manifest)
    return manifest


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
    kind = tidy_finished(directory).kind
    there = f"{directory} holds a finished run of influence {kind_command(kind)} ({found[0]})"
    appended = kind == "index" and hasattr(config, "append")
    raise FileExistsError(
        f"{what_is_there(directory) if kind == 'index' else there}: pass --overwrite to replace it, "
        f"{'--append to add examples, ' if appended else ''}or name another run"
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
