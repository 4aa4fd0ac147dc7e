"""The loop: step every chunk of chains, record scalars, fold observables, stop or go on when a chain diverges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from influence.sgmcmc.estimators.moments import Moments
from influence.sgmcmc.runner import observables, stacking
from influence.sgmcmc.runner.draws import Run
from influence.sgmcmc.runner.minibatches import batch_index
from influence.sgmcmc.runner.observables import Drawn
from influence.sgmcmc.runner.schedule import Plan
from influence.sgmcmc.runner.stacking import Chunk
from influence.sgmcmc.samplers.langevin import Info
from influence.types import Batch, Params


class DivergedError(ValueError):
    """A chain's loss is no number."""


class Progress(NamedTuple):
    """Where a run stands, for a checkpoint: everything that its rest depends on.

    Attributes:
        step: steps done.
        states: a state per chunk.
        alive: which chains have not diverged.
    """

    step: int
    states: list[Any]
    alive: Bool[Tensor, " c"]


@dataclass
class Record:
    """What is written down on the way.

    Attributes:
        arrays: traces by name, all chains along the first axis.
        moments: by observable.
        axes: names of the axes of each trace.
    """

    arrays: dict[str, Tensor]
    moments: dict[str, Moments]
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def begin(plan: Plan, params: Params) -> tuple[Progress, Record]:
    """Return the first states, and an empty record."""
    states = [stacking.first_state(plan.sampler, params, chunk, plan.seed) for chunk in plan.chunks]
    c, s, d = len(plan.replicas), plan.steps, plan.options.num_draws
    nothing = float("nan")
    arrays = {name: torch.full((c, s), nothing, dtype=torch.float64) for name in ("loss", "baseline")}
    axes: dict[str, tuple[str, ...]] = dict.fromkeys(arrays, ("chain", "step"))
    for w in plan.watched:
        arrays[f"mean/{w.name}"] = torch.full((c, d), nothing, dtype=torch.float64)
        axes[f"mean/{w.name}"] = ("chain", "draw")
        if plan.keep in ("sequences", "tokens"):
            arrays[f"sequences/{w.name}"] = torch.full((c, d, len(w.rows)), nothing)
            axes[f"sequences/{w.name}"] = ("chain", "draw", f"batch_{w.name}")
        if plan.keep == "tokens":
            arrays[f"tokens/{w.name}"] = torch.full((c, d, *w.anchor.shape), nothing)
            axes[f"tokens/{w.name}"] = ("chain", "draw", f"batch_{w.name}", f"token_pos_{w.name}")
    empty = observables.empty(plan.watched, c, plan.keep == "pairs")
    return Progress(0, states, torch.ones(c, dtype=torch.bool)), Record(arrays, empty, axes)


def advance(
    plan: Plan,
    progress: Progress,
    record: Record,
    until: int,
    said: Callable[[int, Record], None],
) -> Progress:
    """Run the chains to a step, write into the record, and call `said` after each step.

    It stops at an earlier step where a chain diverged and the prefix is to be kept.

    Raises:
        ValueError: if a batch has no loss at the anchor.
        DivergedError: if a chain diverged and nothing else was asked for, or none is left of the whole run.
    """
    states, alive, o = list(progress.states), progress.alive.clone(), plan.options
    for t in range(progress.step, until):
        rows = _rows(plan, t)
        fetched: dict[int, tuple[Batch, float]] = {}
        for chain, index in rows.items():
            batch = None if plan.source is None or index is None else plan.source.fetch(index)
            fetched[chain] = batch, plan.baseline(index, batch)
            if not isfinite(fetched[chain][1]):
                raise ValueError(_without_loss(t, chain, index, fetched[chain][1]))
        draw, rest = divmod(t - o.num_burnin_steps - o.num_steps_bw_draws + 1, o.num_steps_bw_draws)
        after, drawn = [], []
        for k, chunk in enumerate(plan.chunks):
            whose = [0] if 0 in rows and len(rows) == 1 else [r.chain for r in chunk.replicas]
            noise = stacking.noise_of(plan.sampler, chunk, plan.seed, t + 1)
            state, info = stacking.step(plan.sampler, chunk, states[k], [fetched[c][0] for c in whose], noise)
            after.append(state)
            _write_step(record, chunk, t, info, [fetched[c][1] for c in whose])
            if plan.watched and rest == 0 and draw >= 0:
                drawn.append(
                    {w.name: observables.draw(plan.sampler.target, chunk, states[k].params, w) for w in plan.watched}
                )
        good = record.arrays["loss"][:, t].isfinite()
        if drawn:
            good = good & torch.cat([torch.stack([d.mean.isfinite() for d in part.values()]).all(0) for part in drawn])
        lost = alive & ~good
        if bool(lost.any()):
            if o.on_divergence == "prefix":
                return Progress(t, states, alive)
            alive = alive & good
            if o.on_divergence == "raise" or (plan.whole and not bool(alive.any())):
                raise DivergedError(_diverged(plan, record, lost, t))
        if not bool(alive.any()):
            break
        for chunk, part in zip(plan.chunks, drawn, strict=False):
            _write_draw(plan, record, chunk, part, draw, alive)
        states = after
        said(t, record)
    return Progress(until, states, alive)


def _rows(plan: Plan, t: int) -> dict[int, Int[Tensor, " n"] | None]:
    """Return the rows each chain sees at a step; under 0 alone, those that all see."""
    if plan.source is None:
        return {0: None}
    who = [0] if plan.shared else sorted({r.chain for r in plan.replicas})
    return {chain: batch_index(plan.seed, chain, t, plan.source.size, plan.batch) for chain in who}


def _write_step(record: Record, chunk: Chunk, t: int, info: Info, baseline: list[float]) -> None:
    record.arrays["loss"][chunk.at, t] = info.loss.detach().double().cpu()
    record.arrays["baseline"][chunk.at, t] = torch.tensor(baseline, dtype=torch.float64)
    for name, value in info.terms.items():
        key = f"term/{name}"
        if key not in record.arrays:
            record.arrays[key] = torch.full_like(record.arrays["loss"], float("nan"))
            record.axes[key] = ("chain", "step")
        record.arrays[key][chunk.at, t] = value.detach().double().cpu()


def _write_draw(plan: Plan, record: Record, chunk: Chunk, drawn: Mapping[str, Drawn], draw: int, alive: Tensor) -> None:
    for name, found in drawn.items():
        record.arrays[f"mean/{name}"][chunk.at, draw] = found.mean
        for kind, value in (("sequences", found.sequences), ("tokens", found.tokens)):
            if f"{kind}/{name}" in record.arrays:
                record.arrays[f"{kind}/{name}"][chunk.at, draw] = value.float()
    observables.folded(record.moments, drawn, chunk.at, alive[chunk.at])


def _without_loss(t: int, chain: int, index: Tensor | None, value: float) -> str:
    rows = "" if index is None else f" (rows {', '.join(map(str, index[:4].tolist()))}{' …' if len(index) > 4 else ''})"
    return (
        f"the batch of step {t} of chain {chain}{rows} has the loss {value} at the anchor itself: where no position is "
        "labelled there is none. Leave examples that predict nothing out of the dataset, or raise batch_size"
    )


def _diverged(plan: Plan, record: Record, lost: Tensor, t: int) -> str:
    at = int(lost.nonzero()[0])
    replica = plan.replicas[at]
    group = list(plan.groups)[replica.group]
    before = [f"{x:.4g}" for x in record.arrays["loss"][at, max(0, t - 4) : t].tolist()]
    where = f"chain {replica.chain}" + (f" of {group!r}" if group else "")
    loss = float(record.arrays["loss"][at, t])
    raising = plan.options.on_divergence == "raise"
    instead = ", or pass on_divergence='drop' or 'prefix'" if raising else ": no chain is left"
    what = f"its loss is {loss}" if loss != loss or abs(loss) == float("inf") else "an observable's loss is no number"
    return (
        f"{where} diverged: at step {t} {what}, after {', '.join(before) or 'no step'}. "
        "Lower lr (a quadratic is stable for lr · (n_beta · curvature + localization) < 4), raise localization"
        f"{instead}"
    )


def results(plan: Plan, progress: Progress, record: Record) -> dict[str, Run]:
    """Return the run of every group that has a chain left, without those that diverged, up to where it stands.

    Raises:
        DivergedError: if no step is left.
    """
    steps, burn_in, between = progress.step, plan.options.num_burnin_steps, plan.options.num_steps_bw_draws
    draws = max(0, (steps - burn_in) // between)
    if steps <= burn_in:
        raise DivergedError(
            f"a chain diverged at step {steps}, within the burn-in of {burn_in}: nothing is left to keep; lower lr"
        )
    arrays = {}
    for name, x in record.arrays.items():
        arrays[name] = x[:, :steps] if record.axes[name][1] == "step" else x[:, :draws]
    count = len(plan.replicas) // len(plan.groups)
    runs: dict[str, Run] = {}
    for g, (group, own) in enumerate(plan.groups.items()):
        at = slice(g * count, (g + 1) * count)
        kept = progress.alive[at].nonzero().flatten().tolist()
        dropped = [plan.replicas[at][c].chain for c in range(count) if c not in kept]
        if not kept:
            continue
        facts: dict[str, Any] = {
            **plan.facts,
            **own,
            "dropped": dropped,
            "stopped": steps if steps < plan.steps else None,
        }
        observed = {w.name: observables.result(w, arrays, record.moments[w.name], at) for w in plan.watched}
        pairs = record.moments.get("")
        some = None if pairs is None else Moments(*(each[at] for each in pairs))
        terms = {name[5:]: x[at] for name, x in arrays.items() if name.startswith("term/")}
        chain_numbers = tuple(r.chain for r in plan.replicas[at])
        run = Run(
            arrays["loss"][at],
            arrays["baseline"][at],
            terms,
            observed,
            some,
            chain_numbers,
            burn_in,
            between,
            facts,
        )
        runs[group] = run if not dropped else run.keep(kept)
    return runs
