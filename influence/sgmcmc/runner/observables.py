"""Observables: examples whose losses are measured at every draw, less what they are at the anchor."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from influence.sgmcmc.estimators import moments
from influence.sgmcmc.estimators.moments import Moments
from influence.sgmcmc.runner.draws import Observed
from influence.sgmcmc.runner.minibatches import Data, Source, sample_rows, source_of
from influence.sgmcmc.runner.stacking import Chunk, Replica, losses_along
from influence.sgmcmc.samplers.target import Target, position_losses
from influence.types import Batch, Params


class Watched(NamedTuple):
    """An observable before the run.

    Attributes:
        name: its name.
        batches: its examples.
        anchor: their losses at the anchor.
        labelled: which positions count.
        rows: their places in the dataset.
        ids: their token ids, if any.
        identity: a hash of the dataset.
    """

    name: str
    batches: tuple[Batch, ...]
    anchor: Float[Tensor, "n t"]
    labelled: Bool[Tensor, "n t"]
    rows: Int[Tensor, " n"]
    ids: Int[Tensor, "n s"] | None
    identity: str


class Drawn(NamedTuple):
    """An observable's shifted losses at one draw, in float64: of positions, of examples, of all."""

    tokens: Float[Tensor, "c n t"]
    sequences: Float[Tensor, "c n"]
    mean: Float[Tensor, " c"]


def watch(target: Target, observables: Mapping[str, Data | tuple[Data, int]], batch: int, seed: int) -> list[Watched]:
    """Return observables with their losses at the anchor; of `(data, k)`, `k` batches drawn without replacement."""
    watched = []
    for name, given in observables.items():
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"an observable's name is letters, digits and underscores; got {name!r}")
        data, count = given, None
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int):
            data, count = given
        source = source_of(data)
        if count is not None:
            _check_count(name, source, batch, count)
        rows = torch.arange(source.size) if count is None else sample_rows(seed, source.size, batch * count)
        batches = tuple(source.fetch(part) for part in rows.split(batch))
        if all(isinstance(part, Mapping) and "index" in part for part in batches):
            rows = torch.cat([part["index"].cpu() for part in batches])
        alone = Chunk((Replica(0, 0),), slice(0, 1), False)
        anchor, labelled = _evaluate(target, alone, target.anchor, batches, with_labels=True)
        assert labelled is not None
        if not bool(anchor.isfinite().all()):
            raise ValueError(f"observable {name!r} has losses that are no numbers at the anchor itself")
        ids = [part.get("input_ids") if isinstance(part, Mapping) else None for part in batches]
        texts = None if any(x is None or x.shape[1] != ids[0].shape[1] for x in ids) else torch.cat(ids)  # type: ignore
        watched.append(Watched(name, batches, anchor[0], labelled, rows, texts, source.identity))
    return watched


def _check_count(name: str, source: Source, batch: int, count: int) -> None:
    """Refuse more batches of an observable than it has."""
    if count < 1 or batch * count > source.size:
        raise ValueError(
            f"the observable {name!r} has {source.size} examples, and {count} batches of {batch} are asked for: "
            "ask for fewer, at least one, lower observable_batch, or pass the data alone for all of them"
        )


def draw(target: Target, chunk: Chunk, params: Params, watched: Watched) -> Drawn:
    """Return an observable's shifted losses for each chain of a chunk."""
    losses, _ = _evaluate(target, chunk, params, watched.batches)
    tokens = torch.where(watched.labelled, losses.double() - watched.anchor.double(), 0.0)
    counts = watched.labelled.sum(1)
    sums = tokens.sum(2)
    return Drawn(tokens, sums / counts.clamp_min(1), sums.sum(1) / counts.sum())


def _evaluate(
    target: Target, chunk: Chunk, params: Params, batches: Sequence[Batch], with_labels: bool = False
) -> tuple[Float[Tensor, "c n t"], Bool[Tensor, "n t"] | None]:
    """Return the losses of all batches one after the other, and which are labelled; shorter ones padded with none."""
    found = [losses_along(target, chunk, params, batch).cpu() for batch in batches]
    width = max(losses.shape[2] for losses in found)

    losses = torch.cat([pad(x, (0, width - x.shape[-1])) for x in found], 1)
    if not with_labels:
        return losses, None
    with torch.no_grad():
        whole = {**target.frozen, **target.anchor}
        labels = [position_losses(target.loss_fn, whole, batch)[1].cpu() for batch in batches]
    return losses, torch.cat([pad(x, (0, width - x.shape[-1])) for x in labels])


def folded(states: dict[str, Moments], drawn: Mapping[str, Drawn], at: slice, alive: Bool[Tensor, " c"]) -> None:
    """Fold a draw of some chains into the moments of all, in place of the dictionary's entries."""
    if not drawn:
        return
    everyone = None if bool(alive.all()) else alive
    means = torch.stack([d.mean for d in drawn.values()], 1)[:, None]
    for name, d in drawn.items():
        _fold(states, name, at, means, d.tokens.flatten(1)[:, None], everyone)
    if "" in states:
        examples = torch.cat([d.sequences for d in drawn.values()], 1)[:, None]
        _fold(states, "", at, examples, examples, everyone)


def _fold(states: dict[str, Moments], name: str, at: slice, x: Tensor, y: Tensor, alive: Tensor | None) -> None:
    part = Moments(*(each[at] for each in states[name]))
    for whole, new in zip(states[name], moments.update(part, x, y, alive), strict=True):
        whole[at] = new


def empty(watched: Sequence[Watched], chains: int, pairs: bool) -> dict[str, Moments]:
    """Return the moments of no draws: per observable, and of all examples with one another under `""`."""
    states = {w.name: moments.init(chains, len(watched), w.anchor.numel()) for w in watched}
    total = sum(len(w.rows) for w in watched)
    return {**states, **({"": moments.init(chains, total, total)} if pairs else {})}


def result(w: Watched, arrays: Mapping[str, Tensor], state: Moments, at: slice) -> Observed:
    """Return an observable after the run, of some chains."""

    def kept(kind: str) -> Tensor | None:
        return arrays[f"{kind}/{w.name}"][at] if f"{kind}/{w.name}" in arrays else None

    mean = kept("mean")
    assert mean is not None
    some = Moments(*(each[at] for each in state))
    return Observed(w.anchor, w.labelled, w.rows, w.ids, w.identity, mean, some, kept("sequences"), kept("tokens"))
