"""The pass: shards of a dataset through one step into several sinks, resumable, on any number of ranks.

Two laws. A *placed* sink writes one file per shard, so any number of ranks and any resume give the same bytes. A
*summed* sink keeps a running state per process in `partial-*.h5`, with the list of shards that are in it, replaced
after a shard but at most every 30 seconds; in the end, or when a run is resumed by another number of ranks, the states
merge and the shards that are missing are dealt out again.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from influence.data import Tokenized
from influence.func.engine.batch import batch_size
from influence.func.fold import Sink
from influence.pipelines.frame.outcome import progress
from influence.pipelines.frame.ranks import Ranks
from influence.store import BadFileError
from influence.store.folder import run_id
from influence.store.schema import conform

SCHEMA = 1


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Return a state's tensors by name, and the rest of it as JSON can write it.

    Args:
        state: the state.

    Returns:
        Tensors, and the structure that refers to them.

    Example:
        >>> import torch
        >>> from influence.func.sinks import Total
        >>> flatten(Total({"w": torch.ones(2)}, 3))[1]
        {'tuple': [{'dict': {'w': {'tensor': '0'}}}, {'value': 3}]}
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = str(len(names))
                tensors[names[id(value)]] = value
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            return {"dict": {key: walk(item) for key, item in value.items()}}
        if isinstance(value, tuple | list):
            return {"tuple": [walk(item) for item in value]}
        return {"value": value}

    return tensors, walk(state)


def restore(tensors: Mapping[str, Tensor], structure: Any, like: Any, where: str = "a state") -> Any:
    """Return the state that `flatten` took apart.

    Args:
        tensors: its tensors.
        structure: the rest of it.
        like: an empty state, which says what kind of named tuple it is.
        where: the file, for the message.

    Returns:
        The state.

    Raises:
        BadFileError: if the structure is none of `flatten`'s.
    """
    wrong = BadFileError(f"{where} is not what it says: its state is none of this pass. Remove it, or pass --overwrite")

    def walk(node: Any) -> Any:
        if not isinstance(node, dict) or len(node) != 1:
            raise wrong
        ((kind, value),) = node.items()
        if kind == "tensor" and isinstance(value, str) and value in tensors:
            return tensors[value]
        if kind == "dict" and isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if kind == "tuple" and isinstance(value, list):
            return tuple(walk(item) for item in value)
        if kind == "value" and (value is None or isinstance(value, str | int | float)):
            return value
        raise wrong

    found = walk(structure)
    if hasattr(like, "_make"):
        if not isinstance(found, tuple) or len(found) != len(like):
            raise wrong
        return type(like)._make(found)
    return found


SAVE_EVERY = 30.0
"""Seconds between two writes of a running state: what a crash loses of a sum, beside the shard at hand."""


class Placed(NamedTuple):
    """A sink with one file per shard.

    Attributes:
        done: the shards that are finished.
        sink: the sink of a shard, by its number; `finalize` writes the file.
    """

    done: Callable[[], set[int]]
    sink: Callable[[int], Sink]


class Summed(NamedTuple):
    """A sink with one result for all shards."""

    sink: Sink


class Work(NamedTuple):
    """What a pass is over.

    Attributes:
        shards: all shards of the plan, in order.
        batches: a shard's batches, the same for everyone who asks.
        step: a batch to a value; what all sinks see.
        device: where values, and so running states, are.
    """

    shards: Sequence[Tokenized]
    batches: Callable[[Tokenized], Iterable[dict[str, Tensor]]]
    step: Callable[[dict[str, Tensor]], Any]
    device: str = "cpu"


def collect(
    work: Work,
    sinks: Mapping[str, Placed | Summed],
    directory: Path,
    ranks: Ranks,
    *,
    what: str = "pass",
    shown: bool | None = None,
    partial: str = "partial",
) -> dict[str, Any]:
    """Run a pass: each shard that some sink lacks goes through the step once, whatever number of sinks want it.

    Args:
        work: the shards, their batches and the step.
        sinks: where values go.
        directory: the run's.
        ranks: this process among its peers.
        what: the name of the work, for the progress bar.
        shown: whether to show it.
        partial: how the files of running states are called.

    Returns:
        On the first rank, the result of every summed sink; nothing elsewhere.
    """
    summed = {name: sink.sink for name, sink in sinks.items() if isinstance(sink, Summed)}
    placed = {name: sink for name, sink in sinks.items() if isinstance(sink, Placed)}

    run = run_id(directory) or ""

    def missing() -> list[list[Any]]:
        states = partials(directory, partial) if summed else []
        done = {name: sink.done() for name, sink in placed.items()} | _summed_shards(states, run, summed)
        numbers = range(len(work.shards))
        lacking = {n: [name for name in sinks if n not in done[name]] for n in numbers}
        return [[n, names] for n, names in lacking.items() if names]

    todo = ranks.once(missing)[ranks.rank :: ranks.world]
    mine = directory / f"{partial}-{ranks.rank:05d}.h5"
    held, running = read_partial(mine, run, summed, work.device) if summed else ({}, {})
    total = sum(len(work.shards[n].ids) for n, _ in todo)
    saved, unsaved = time.monotonic(), False
    with progress(what, total, shown, ranks.rank) as seen:
        for number, names in todo:
            shard_sinks = {name: placed[name].sink(number) for name in names if name in placed}
            wanted = {**shard_sinks, **{name: summed[name] for name in names if name in summed}}
            state = {name: sink.init() for name, sink in shard_sinks.items()} | running
            for batch in work.batches(work.shards[number]):
                ranks.check()
                value, index = work.step(batch), batch["index"].cpu()
                state |= {name: sink.update(state[name], index, value) for name, sink in wanted.items()}
                seen(_tokens(batch))
            for name, sink in shard_sinks.items():
                sink.finalize(state[name])
            running = {name: state[name] for name in summed}
            held = {name: sorted({*shards, number} if name in names else shards) for name, shards in held.items()}
            unsaved |= bool(set(names) & set(summed))
            if unsaved and time.monotonic() - saved >= SAVE_EVERY:
                write_partial(mine, run, held, running)
                saved, unsaved = time.monotonic(), False
        if unsaved:
            write_partial(mine, run, held, running)
    ranks.barrier()
    return _merged(partials(directory, partial) if summed else [], run, summed) if ranks.first else {}


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return batch_size(batch) if mask is None else int(mask.sum())


def write_partial(path: Path, run: str, shards: Mapping[str, list[int]], running: Mapping[str, Any]) -> None:
    """Write states and the shards that are in them, atomically."""
    from influence import store

    flat = {name: flatten(state) for name, state in running.items()}
    tensors = {f"{name}/{key}": tensor for name, (own, _) in flat.items() for key, tensor in own.items()}
    about = {"shards": dict(shards), "states": {name: structure for name, (_, structure) in flat.items()}}
    store.write(path, tensors, about, kind="partial", schema=SCHEMA, run=run)


class PartialFacts(NamedTuple):
    """The facts of running states as JSON holds them: the shards in each, and its structure."""

    shards: dict[str, list[int]]
    states: dict[str, Any]


def read_partial(
    path: Path, run: str, summed: Mapping[str, Sink], device: str = "cpu"
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Read what `write_partial` wrote; empty states where there is no file.

    Args:
        path: the file.
        run: the id of the run.
        summed: the sinks.
        device: where states shall be.

    Returns:
        The shards in each state, and the states.

    Raises:
        BadFileError: if the file is damaged, another run's, or lacks a sink.
    """
    from influence import store

    if not path.is_file():
        return {name: [] for name in summed}, {name: sink.init() for name, sink in summed.items()}
    tensors, about = store.read(path, kind="partial", schema=SCHEMA, run=run)
    held = conform(about, PartialFacts, str(path))
    lost = [name for name in summed if name not in held.states or name not in held.shards]
    if lost:
        raise store.BadFileError(f"{path} holds no {lost[0]}: it is another run's; remove it, or pass --overwrite")
    running = {}
    for name, sink in summed.items():
        own = {key.removeprefix(f"{name}/"): t.to(device) for key, t in tensors.items() if key.startswith(f"{name}/")}
        running[name] = restore(own, held.states[name], sink.init(), str(path))
    return {name: held.shards[name] for name in summed}, running


def partials(directory: Path, name: str) -> list[Path]:
    """Return the files of running states, by rank."""
    return sorted(path for path in directory.glob(f"{name}-*.h5") if path.stem.rpartition("-")[2].isdecimal())


def _summed_shards(states: Sequence[Path], run: str, summed: Mapping[str, Sink]) -> dict[str, set[int]]:
    """Return which shards are in the states of all processes."""
    found: dict[str, set[int]] = {name: set() for name in summed}
    for path in states:
        for name, shards in read_partial(path, run, summed)[0].items():
            found[name] |= set(shards)
    return found


def _merged(states: Sequence[Path], run: str, summed: Mapping[str, Sink]) -> dict[str, Any]:
    """Merge the states of all processes, in the order of their files, and finalise them."""
    whole = {name: sink.init() for name, sink in summed.items()}
    for path in states:
        for name, state in read_partial(path, run, summed)[1].items():
            whole[name] = summed[name].merge(whole[name], state)
    return {name: sink.finalize(whole[name]) for name, sink in summed.items()}
