"""From a target, data and options to a plan: everything about a run is decided here, once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence.func.fingerprint import fingerprint, weights_hash
from influence.sgmcmc.runner import baselines, loop, stacking
from influence.sgmcmc.runner import observables as observe
from influence.sgmcmc.runner.baselines import Baseline
from influence.sgmcmc.runner.minibatches import Data, Source, check_size, source_of
from influence.sgmcmc.runner.observables import Watched
from influence.sgmcmc.runner.options import Options
from influence.sgmcmc.runner.stacking import Chunk, Replica
from influence.sgmcmc.samplers.langevin import Sampler
from influence.sgmcmc.samplers.target import Hyper, Target
from influence.types import Params

SHOWN = 4
"""Groups that are printed."""


@dataclass(frozen=True)
class Plan:
    """A run of chains.

    Attributes:
        sampler: the sampler, and through it the target.
        source: the dataset, if there is one.
        batch: examples of a batch.
        shared: whether all chains see the same batches.
        seed: of noise and order.
        groups: names of groups of chains, with what differs between them.
        replicas: all chains, group by group.
        chunks: which are stepped together.
        burn_in: steps before the first draw's block.
        draws: how many.
        between: steps of each.
        watched: the observables.
        keep: what is kept of them: `sequences`, `tokens`, `moments` or `pairs`.
        baseline: the loss at the anchor.
        on_divergence: `raise`, `drop` or `prefix`.
        checkpoint: draws between checkpoints.
        facts: what made the run, for the cache.
        notes: what else was decided, in words.
    """

    sampler: Sampler
    source: Source | None
    batch: int
    shared: bool
    seed: int
    groups: Mapping[str, Mapping[str, Any]]
    replicas: Sequence[Replica]
    chunks: Sequence[Chunk]
    burn_in: int
    draws: int
    between: int
    watched: Sequence[Watched]
    keep: str
    baseline: Baseline
    on_divergence: str
    checkpoint: int
    facts: Mapping[str, Any]
    notes: Sequence[str]

    @property
    def steps(self) -> int:
        """Steps of every chain."""
        return self.burn_in + self.draws * self.between

    @property
    def whole(self) -> bool:
        """Whether all chains of the run are here, and none are another process's."""
        return len(self.facts["chains"]) == self.facts["num_chains"]

    def bytes(self) -> int:
        """Return how much the traces and moments take."""
        chains = len(self.replicas)
        total = 16 * chains * self.steps
        positions, examples = sum(w.anchor.numel() for w in self.watched), sum(len(w.rows) for w in self.watched)
        total += 8 * chains * (len(self.watched) + 2) * positions
        kept = {"sequences": 4 * self.draws * examples, "tokens": 4 * self.draws * (positions + examples)}
        return total + chains * kept.get(self.keep, 8 * examples**2 if self.keep == "pairs" else 0)

    def __str__(self) -> str:
        moving = sum(p.numel() for p in self.sampler.target.anchor.values())
        examples = sum(len(w.rows) for w in self.watched)
        lines = [
            *(_hypers(name, said) for name, said in [*self.groups.items()][:SHOWN]),
            *([f"… and {len(self.groups) - SHOWN} groups more"] if len(self.groups) > SHOWN else []),
            f"{len(self.replicas)} chains of {moving:,} weights, {self.steps:,} steps: {self.burn_in:,} of burn-in, "
            f"then {self.draws:,} draws of {self.between}",
            f"stepped {', '.join(str(len(chunk.replicas)) for chunk in self.chunks[:8])} at a time, "
            f"{self.batch:,} examples a step" + (", the same for all chains" if self.shared else ""),
            f"{len(self.watched)} observables of {examples:,} examples; kept: {self.keep}; "
            f"{self.bytes() / 2**20:,.1f} MiB",
        ]
        return "\n".join([*lines, *self.notes])


def _hypers(name: str, said: Mapping[str, Any]) -> str:
    """Return a group's hyper-parameters, in a line."""
    parts = [f"lr {said['lr']:g}, n_beta {said['n_beta']:.6g}, localization {said['localization']:g}"]
    if said["weight_decay"]:
        parts.append(f"weight decay {said['weight_decay']:g}")
    if said.get("restriction", "full") not in ("full", name):
        parts.append(f"restricted to {said['restriction']}")
    return f"{name}: {', '.join(parts)}" if name else ", ".join(parts)


HYPERS = ("n_beta", "localization", "weight_decay")
"""Hyper-parameters of a target, which may have an entry per group."""


def make_plan(
    target: Target,
    params: Params,
    dataset: Data | None,
    observables: Mapping[str, Any] | None,
    lr: Hyper,
    groups: Mapping[str, Mapping[str, Any]],
    seed: int,
    options: Options,
) -> Plan:
    """Decide everything about a run; `print(plan)` says it."""
    options.check()
    for name, value in {"lr": lr, **{name: getattr(target, name) for name in HYPERS}}.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != len(groups):
            raise ValueError(
                f"{name} has {len(value)} entries, for {len(groups)} groups of chains: pass one number, or a grid's to "
                "llc.calibrate"
            )
    source = None if dataset is None else source_of(dataset)
    batch = 0 if source is None else check_size(source, options.batch_size)
    shared = options.shared_batches or source is None or batch == source.size
    sampler = options.sampler(target, lr=lr)
    replicas = [Replica(g, c) for g in range(len(groups)) for c in options.numbers]
    steps = options.num_burnin_steps + options.num_draws * options.num_steps_bw_draws
    baseline, kind = baselines.build(
        target, source, options.baseline, batch, steps * (1 if shared else options.num_chains)
    )
    evaluated = options.observable_batch or options.batch_size or 32
    watched = observe.watch(target, observables or {}, evaluated, seed)
    examples = sum(len(w.rows) for w in watched)
    keep = options.keep
    if keep == "auto":
        keep = "pairs" if 0 < 2 * examples < options.num_draws else "sequences"
    chunks, notes = _chunks(sampler, params, source, replicas, options, shared, batch, seed)
    own = {name: {**said, **loop.hyper_facts(target, lr, g)} for g, (name, said) in enumerate(groups.items())}
    return Plan(
        sampler,
        source,
        batch,
        shared,
        seed,
        own,
        replicas,
        chunks,
        options.num_burnin_steps,
        options.num_draws,
        options.num_steps_bw_draws,
        watched,
        keep,
        baseline,
        options.on_divergence,
        options.checkpoint_every,
        _facts(target, source, batch, shared, seed, own, options, watched, keep),
        [f"the anchor's loss of each batch: {kind}", *notes],
    )


def _chunks(
    sampler: Sampler,
    params: Params,
    source: Source | None,
    replicas: Sequence[Replica],
    options: Options,
    shared: bool,
    batch: int,
    seed: int,
) -> tuple[list[Chunk], list[str]]:
    """Return which chains are stepped together, and why not more."""
    rows = [torch.arange(batch)] * (1 if shared else 2)
    batches = [None if source is None else source.fetch(each) for each in rows]
    size = options.chain_chunk
    if size is None:
        moving = sum(p.numel() for p in sampler.target.anchor.values())
        on_cpu = all(p.device.type == "cpu" for p in sampler.target.anchor.values())
        size = stacking.size_of(moving, batches[0], len(replicas), on_cpu)
    size = min(size, len(replicas))
    if size == 1:
        return stacking.cut(replicas, 1), []
    first = stacking.cut(replicas[:2], 2)[0]
    why = stacking.refuses_vmap(sampler, first, stacking.first_state(sampler, params, first, seed), batches, seed)
    if why is None:
        return stacking.cut(replicas, size), []
    if options.chain_chunk is not None:
        raise ValueError(f"chain_chunk={size}: this loss cannot be run for several chains at once ({why}); pass 1")
    return stacking.cut(replicas, 1), [f"chains are stepped one by one, since vmap refuses this loss: {why}"]


def _facts(
    target: Target,
    source: Source | None,
    batch: int,
    shared: bool,
    seed: int,
    own: Mapping[str, Any],
    options: Options,
    watched: Sequence[observe.Watched],
    keep: str,
) -> dict[str, Any]:
    """Return everything that makes a run what it is."""
    sampler = options.sampler
    settings = dict(getattr(sampler, "keywords", {}))
    function = getattr(sampler, "func", sampler)
    described = getattr(target.loss_fn, "function", None)
    return {
        "groups": {name: dict(said) for name, said in own.items()},
        "weights": weights_hash(target.loss_fn, {**target.frozen, **target.anchor}),
        **({} if described is None else {"function": described}),
        "masks": fingerprint({**dict.fromkeys(target.anchor, True), **target.mask}),
        "data": None if source is None else source.identity,
        "size": None if source is None else source.size,
        "observables": {w.name: [w.identity, fingerprint(w.rows)] for w in watched},
        "sampler": f"{function.__module__}.{function.__qualname__}",
        "sampler_settings": {name: repr(value) for name, value in settings.items()},
        "batch": batch,
        "shared_batches": shared,
        "seed": seed,
        "num_chains": options.num_chains,
        "chains": sorted(options.numbers),
        "num_draws": options.num_draws,
        "num_burnin_steps": options.num_burnin_steps,
        "num_steps_bw_draws": options.num_steps_bw_draws,
        "control_variate": options.control_variate,
        "accumulate": options.accumulate,
        "init_noise": options.init_noise,
        "keep": keep,
        "on_divergence": options.on_divergence,
    }
