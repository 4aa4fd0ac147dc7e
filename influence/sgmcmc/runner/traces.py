"""The folder of a run of chains: checkpoints while it goes, one file when it is done.

A folder is a run directory (`store.folder`). It holds `segment-00000.h5`, … (the traces of some steps, immutable),
`state.h5` (the chains and the moments after the last of them, replaced at once, with the checksums of the segments),
and at the end `run.h5` alone. Whatever is killed when, the rest is a function of `state.h5`, so the run goes on as if
nothing had happened.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from influence import store
from influence.sgmcmc.estimators.moments import Moments
from influence.sgmcmc.runner.draws import RUN, SCHEMA, Run, RunFacts, pack, unpack
from influence.sgmcmc.runner.loop import Progress, Record
from influence.sgmcmc.runner.schedule import Plan
from influence.sgmcmc.samplers.target import mean_loss
from influence.store import BadFileError
from influence.store.folder import Manifest, manifest_of, run_id, take, tidy
from influence.store.schema import conform

STATE, SEGMENT = "sampling state", "sampling segment"
RESULT, STOOD, SEGMENTS = "run.h5", "state.h5", "segment-#.h5"
ANEW = "Delete the folder, or pass another output_path"
"""What to do about a folder of another run."""
PAIRS = "-"
"""What stands for all examples with one another; no observable is called so. HDF5 would drop an empty name."""
TOLERANCE = 1e-3
"""How far the loss at the anchor may lie from what it was, relatively: the rounding of another machine."""


@contextmanager
def claim(
    folder: Path,
    facts: Mapping[str, Any],
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
    results: Sequence[str] = (),
    scratch: Sequence[str] = (),
) -> Iterator[Manifest]:
    """Hold a folder's lock for a run, begun or gone on with, and yield its manifest.

    `facts` are those of `Plan.facts`; `results` and `scratch` name what else the run holds, at the end and until then.

    Raises:
        FileExistsError: if the folder holds something else.
        BlockingIOError: if another process writes there.
        ValueError: if its run is another one, naming the field and both values.
    """
    files, left = [RESULT, *results], [STOOD, SEGMENTS, *scratch]
    wanted = manifest_of(RUN, config or {}, command, facts, {}, files, left)
    lock, there = take(folder, wanted, overwrite)
    with lock:
        if there is not None:
            if there.kind != RUN:
                raise FileExistsError(f"{folder} holds a run of another kind: {there.kind!r}. {ANEW}")
            _refuse_facts(folder, facts, there.plan)
        yield there or wanted


def open_folder(
    folder: Path, manifest: Manifest, plan: Plan, progress: Progress, record: Record
) -> Progress | dict[str, Run]:
    """Return where a folder's run stands, with its traces read into the record; or its runs, if it is complete."""
    if (folder / RESULT).is_file():
        tidy(folder, manifest)  # a run that was killed as it finished
        return read_planned(folder, plan)
    if not (folder / STOOD).is_file():
        return progress
    tensors, about = store.read(folder / STOOD, kind=STATE, schema=SCHEMA, run=manifest.id)
    about = conform(about, StateFacts, str(folder / STOOD))
    _refuse_probe(folder, plan, tensors["probe"])
    for name, digest in about.segments.items():
        part, said = store.read(folder / name, kind=SEGMENT, schema=SCHEMA, run=manifest.id)
        if store.digest_of(folder / name) != digest:
            raise BadFileError(f"{folder / name} is not the segment that {STOOD} goes on from: restore it. {ANEW}")
        for key, values in part.items():
            if key not in record.arrays:
                record.arrays[key] = torch.full_like(record.arrays["loss"], float("nan"))
                record.axes[key] = ("chain", "step")
            begin, end = said["steps"] if record.axes[key][1] == "step" else said["draws"]
            record.arrays[key][:, begin:end] = values
    for name in record.moments:
        record.moments[name] = _moments(tensors, f"moments/{name or PAIRS}/")
    states = []
    for chunk, state in zip(plan.chunks, progress.states, strict=True):
        leaves, spec = tree_flatten(state)
        stored = (tensors[f"leaf/{i}"][chunk.at].to(leaf.device) for i, leaf in enumerate(leaves))
        states.append(tree_unflatten([x if chunk.stacked else x[0] for x in stored], spec))
    return Progress(about.step, states, tensors["alive"])


class StateFacts(NamedTuple):
    """The facts of a state as JSON holds them: its step, and its segments by name with their checksums."""

    step: int
    segments: dict[str, str]


def read_planned(folder: Path, plan: Plan) -> dict[str, Run]:
    """Read the complete runs of a folder; refuse those of other settings, naming the field and both values."""
    runs, facts, then = read_runs(folder)
    _refuse_facts(folder, plan.facts, facts)
    _refuse_probe(folder, plan, then)
    return runs


def checkpoint(folder: Path, run: str, plan: Plan, begin: int, progress: Progress, record: Record) -> None:
    """Write the traces since a step, then the state that follows them."""
    known: dict[str, str] = {}
    if begin:
        known = store.read_facts(folder / STOOD, kind=STATE, schema=SCHEMA, run=run)["segments"]
    steps = (begin, progress.step)
    o = plan.options
    draws = tuple(max(0, (t - o.num_burnin_steps) // o.num_steps_bw_draws) for t in steps)
    spans = {"step": slice(*steps), "draw": slice(*draws)}
    part = {key: x[:, spans[record.axes[key][1]]] for key, x in record.arrays.items()}
    name = f"segment-{len(known):05d}.h5"
    part = {key: x for key, x in part.items() if x.numel()}
    store.write(folder / name, part, {"steps": steps, "draws": draws}, kind=SEGMENT, schema=SCHEMA, run=run)
    pairs = zip(plan.chunks, progress.states, strict=True)
    parts = [[x if chunk.stacked else x[None] for x in tree_flatten(state)[0]] for chunk, state in pairs]
    tensors = {f"leaf/{i}": torch.cat(leaves) for i, leaves in enumerate(zip(*parts, strict=True))}
    for key, moments in record.moments.items():
        tensors |= {f"moments/{key or PAIRS}/{field}": x for field, x in moments._asdict().items()}
    tensors |= {"alive": progress.alive, "probe": probe(plan)}
    about = {"step": progress.step, "segments": {**known, name: store.digest_of(folder / name)}}
    store.write(folder / STOOD, tensors, about, kind=STATE, schema=SCHEMA, run=run)


def close_folder(folder: Path, manifest: Manifest, plan: Plan, runs: Mapping[str, Run]) -> None:
    """Write the complete runs as one file, and remove what led to it."""
    write_runs(folder, manifest.id, runs, plan.facts, probe(plan))
    tidy(folder, manifest)


def write_runs(folder: Path, run: str, runs: Mapping[str, Run], facts: Mapping[str, Any], probed: Tensor) -> None:
    """Write complete runs as one file of a folder, with what made them."""
    tensors, about = {"probe": probed}, {}
    dims: dict[str, tuple[str, ...]] = {}
    for g, (name, each) in enumerate(runs.items()):
        own, axes, about[name] = pack(each, f"{g}/")
        tensors |= own
        dims |= axes
    said = {"runs": about, "plan": dict(facts)}
    store.write(folder / RESULT, tensors, said, kind=RUN, schema=SCHEMA, run=run, dims=dims)


def read_runs(folder: Path) -> tuple[dict[str, Run], dict[str, Any], Tensor]:
    """Read what `write_runs` wrote: the runs, what made them, and what the loss said at the anchor."""
    tensors, about = store.read(folder / RESULT, kind=RUN, schema=SCHEMA, run=run_id(folder))
    where = str(folder / RESULT)
    held = conform(about, RunsFacts, where)
    runs = {name: unpack(tensors, said, f"{g}/", where) for g, (name, said) in enumerate(held.runs.items())}
    return runs, held.plan, tensors["probe"]


def probe(plan: Plan) -> Tensor:
    """Return what the loss function says at the anchor: a cache of another one is known by it."""
    rows = None if plan.source is None else torch.arange(plan.batch)
    batch = None if plan.source is None or rows is None else plan.source.fetch(rows)
    with torch.no_grad():
        own = float(mean_loss(plan.sampler.target, plan.sampler.target.anchor, batch))
    found = [own, *(float((w.anchor.double() * w.labelled).sum()) for w in plan.watched)]
    return torch.tensor(found, dtype=torch.float64)


def _refuse_facts(folder: Path, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    for name, was, now in differences(there, wanted):
        raise ValueError(
            f"{folder} holds a run of another {name}: it has {_short(was)}, this one {_short(now)}. {ANEW}"
        )


def _refuse_probe(folder: Path, plan: Plan, then: Tensor) -> None:
    now = probe(plan)
    if then.shape != now.shape or not torch.allclose(then, now, rtol=TOLERANCE, atol=1e-9):
        raise ValueError(
            f"{folder} holds a run of another loss_fn: at the anchor it gave {then.tolist()}, this one {now.tolist()}. "
            f"{ANEW}"
        )


def differences(was: Any, now: Any, *path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the names of the facts that differ, and both values: of leaves, where both are mappings of the same keys.

    Example:
        >>> list(differences({"seed": 0, "groups": {"": {"lr": 1.0}}}, {"seed": 0, "groups": {"": {"lr": 2.0}}}))
        [('lr', 1.0, 2.0)]
    """
    was, now = _plain(was), _plain(now)
    nested = not path or path == ("function",)
    if isinstance(was, dict) and isinstance(now, dict) and (nested or was.keys() == now.keys()):
        for key in {**was, **now} if path else now:
            yield from differences(was.get(key), now.get(key), *path, key)
    elif was != now:
        grouped = path[0] == "groups" and len(path) > 2
        name = [f"{path[-1]} of {path[1]}" if path[1] else path[-1]] if grouped else path
        yield " ".join(name), was, now


def _short(value: Any) -> str:
    """Return a value as a message shows it: of a hash, enough to tell it from another."""
    said = repr(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", said)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class RunsFacts(NamedTuple):
    """The facts of a folder's runs as JSON holds them: each one's, and what made them."""

    runs: dict[str, RunFacts]
    plan: dict[str, Any]


def load(path: str | Path) -> Run | dict[str, Run]:
    """Read a run that `Run.save` wrote, or the runs of a folder."""
    path = Path(path)
    if path.is_dir():
        runs = read_runs(path)[0]
        return runs[""] if list(runs) == [""] else runs
    tensors, about = store.read(path, kind=RUN, schema=SCHEMA)
    return unpack(tensors, conform(about, RunFacts, str(path)), "", str(path))


def _moments(tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    return Moments(*(tensors[prefix + field] for field in Moments._fields))
