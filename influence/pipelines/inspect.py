"""Describe a run of any kind, finished or not: contents, provenance, sizes, health."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence import hessians, store
from influence.index import done, open_index
from influence.index.run import made_by
from influence.index.shards import KIND, SCHEMA, planned_shards, shard_name
from influence.pipelines import hessian, sample
from influence.pipelines.chains.finished import read_samples, shares_in
from influence.pipelines.frame.configs import Run
from influence.pipelines.frame.directory import CONFIG, config_of, kind_command
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.passes.best import read_best
from influence.store.folder import RUN, Manifest, read_manifest
from influence.store.schema import conform
from influence.terminal import size, table
from influence.visible import visible


@dataclass(frozen=True)
class InspectConfig:
    """Show what a run directory holds, how large it is, and whether it is whole.

    influence inspect runs/corpus --verify

    Attributes:
        run: the run directory.
        verify: also read every byte and compare checksums.
    """

    run: Run
    verify: bool = False


def run(config: InspectConfig, say: Say = quiet) -> Outcome:
    """Inspect a run.

    Args:
        config: which.
        say: where its lines go.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it is damaged, naming the file.
    """
    directory = Path(config.run)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no run directory {directory}")
    facts: dict[str, Any] = {"run": config.run, "bytes": _bytes(directory)}
    if (directory / "index.h5").exists():
        text = _index(directory, config.verify, facts)
    elif (directory / "factors.h5").exists():
        factors = hessians.load(directory)
        found = hessian.outcome(config.run, factors)
        kind = "mix" if "mix" in factors.notes else "hessian"
        facts |= {**found.facts, "kind": kind, "finished": True}
        text = f"{_at(kind, directory)}\n{found.text}"
    elif (directory / "best.h5").exists():
        facts |= {"kind": "scores", "finished": True}
        rows = [[name, *heap.values.shape] for name, heap in read_best(directory).items()]
        text = f"{_at('scores', directory)}\n" + table(["heap", "queries", "kept"], rows)
    elif (directory / "run.h5").exists():
        found = sample.outcome(read_samples(directory))
        facts |= {**found.facts, "kind": _command(directory), "finished": True}
        text = f"{_at('chains', directory)}\n{found.text}"
    elif shares := [path.name for path in shares_in(directory)]:
        facts |= {"kind": _command(directory), "finished": False, "shares": shares}
        text = f"{_at('chains', directory)}: not finished ({', '.join(shares)})"
    elif (directory / RUN).exists() and read_manifest(directory).kind == "training":
        text = _training(directory, config.verify, facts)
    elif (directory / RUN).exists():
        text = _unfinished(directory, config.verify, facts)
    else:
        raise FileNotFoundError(f"{directory} holds no run of influence: it has no run.json")
    if config.verify:
        facts["verified"] = True
        text += "\nverified: every checksum holds"
    if (directory / CONFIG).exists():
        file = shlex.quote(str(directory / CONFIG))
        replay = f"replay: influence {kind_command(facts['kind'])} ANOTHER_RUN --config {file}"
        text += f"\n{visible(replay, lines=False)}"
        facts["config"] = config_of(directory)
    return Outcome(config.run, facts, f"{text}\n{size(facts['bytes'])} on disk")


def _index(directory: Path, verify: bool, facts: dict[str, Any]) -> str:
    index = open_index(directory)
    if verify:
        index.verify()
    facts |= {
        "kind": index.about.kind,
        "finished": True,
        "rows": len(index),
        "examples": index.examples,
        "dim": index.dim,
        "dtype": index.dtype,
        "per_token": index.per_token,
        "blocks": {name: list(shape) for name, shape in index.blocks.items()},
        "fingerprint": index.fingerprint.json(),
        "shards": len(index.about.shards),
        "command": index.about.command,
    }
    return str(index)


def _training(directory: Path, verify: bool, facts: dict[str, Any]) -> str:
    from influence.train.collected import progress

    found = progress(directory)
    facts |= {"kind": "training", **found}
    for epoch, about in found["epochs"].items():
        if verify and about["index"]:
            open_index(directory / f"epoch-{epoch}").verify()
    rows = [
        [
            f"epoch-{epoch}",
            f"{about['steps'][0]} … {about['steps'][1] - 1}",
            about["visits"],
            "yes" if about["index"] else "not yet",
        ]
        for epoch, about in found["epochs"].items()
    ]
    state = "ended" if found["finished"] else "not ended"
    head = f"rows of a training at {directory}: {state}, {found['examples']:,} examples\n"
    return head + table(["epoch", "steps", "visits", "index"], rows)


def _unfinished(directory: Path, verify: bool, facts: dict[str, Any]) -> str:
    about = read_manifest(directory)
    steps = sorted(path.parent.name for path in directory.glob(f"*/{RUN}"))
    facts |= {"kind": about.kind, "command": about.command, "steps": steps}
    if about.plan.get("steps"):
        states = {name: _finished(directory / name) for name in steps_of(about)}
        facts |= {"finished": all(states.values()), "steps": states}
        for name in [name for name, ready in states.items() if verify and ready]:
            run(InspectConfig(str(directory / name), verify))
        rows = [[name, "finished" if ready else "not finished"] for name, ready in states.items()]
        return f"{_at(about.kind, directory)}\n" + table(["step", "state"], rows)
    planned, finished = planned_shards(about) or [], sorted(done(directory, every_byte=False))
    facts |= {"finished": False, "shards": len(planned), "done": finished}
    for number in finished if verify else []:
        store.check_whole(directory / shard_name(number), kind=KIND, schema=SCHEMA)
    return (
        f"{_at(about.kind, directory)}: not finished, {len(finished)} of {len(planned)} shards\n"
        f"made by: {made_by(about.command)}\nconfiguration: {json.dumps(about.config)[:400]}"
    )


def _at(kind: str, directory: Path) -> str:
    return visible(f"{kind} at {directory}", lines=False)


def steps_of(manifest: Manifest) -> list[str]:
    """Return the steps of a recipe's run: names of folders in it."""
    names = conform(manifest.plan["steps"], list[str], f"{RUN}: the plan's steps")
    return [name for name in names if f"{name}/" in manifest.files]


def _command(directory: Path) -> str:
    """Return the command that sampled a run, or what it is where Python did."""
    manifest = read_manifest(directory)
    return manifest.command[1] if len(manifest.command) > 1 else manifest.kind


def _finished(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("index.h5", "factors.h5", "best.h5"))


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
