"""How chains are run: `Options` as they are asked for, and the `Plan` that is made of them, a target and data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from influence.func.fingerprint import fingerprint, weights_hash
from influence.sgmcmc.runner import observables as observe
from influence.sgmcmc.runner import stacking
from influence.sgmcmc.runner.minibatches import Baseline, Data, Source, baseline_of, check_size, source_of
from influence.sgmcmc.runner.observables import Watched
from influence.sgmcmc.runner.stacking import Chunk, Replica
from influence.sgmcmc.samplers import sgld
from influence.sgmcmc.samplers.langevin import Sampler
from influence.sgmcmc.samplers.target import Hyper, Target
from influence.types import Params

Keep: TypeAlias = Literal["auto", "sequences", "tokens", "moments"]
Policy: TypeAlias = Literal["raise", "drop", "prefix"]
Baselines: TypeAlias = Literal["auto", "lookup", "paired"]

HYPERS = ("n_beta", "localization", "weight_decay")
"""Hyper-parameters of a target, which may have an entry per group."""


@dataclass(frozen=True)
class Options:
    """How chains are run. The command line has these fields as flags, with the same words.

    Attributes:
        batch_size: examples of a step; None takes all at every step.
        num_chains: chains of the whole run. Their disagreement is part of the error.
        num_draws: draws of each chain, at which observables are measured.
        num_burnin_steps: steps before the first draw, which no estimator sees.
        num_steps_bw_draws: steps from one draw to the next.
        shared_batches: give all chains the same batches. Their means then share its noise, and the spread between
            chains is less than the error.
        control_variate: take gradients as differences to those at the anchor on the same batch: less noise, at twice
            the cost.
        accumulate: compute a batch's gradient in so many pieces, which takes less memory.
        init_noise: start chains so far from the anchor, per weight.
        baseline: where the anchor's loss of each batch comes from: a table of all examples' losses (lookup), or one
            more forward pass beside each step (paired); auto takes what needs fewer passes.
        keep: of observables, beside their moments: every draw's loss of each example (sequences), of each position
            (tokens), or nothing (moments); auto keeps sequences, or their co-moments where these are smaller.
        on_divergence: what to do with a chain whose loss is no number: raise an error, drop the chain, or keep the
            prefix before it, of all chains.
        chain_chunk: chains that are stepped together; default by the size of the model.
        observable_batch: examples of an observable that are evaluated at a time; default the batch size.
        checkpoint_every: draws between checkpoints, where the run has a folder: what a crash loses.
        progress: show a progress bar, with the loss, the LLC so far and the acceptance.
    """

    batch_size: int | None = 32
    num_chains: int = 4
    num_draws: int = 200
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    shared_batches: bool = False
    control_variate: bool = False
    accumulate: int = 1
    init_noise: float = 0.0
    baseline: Baselines = "auto"
    keep: Keep = "auto"
    on_divergence: Policy = "raise"
    chain_chunk: int | None = None
    observable_batch: int | None = None
    checkpoint_every: int = 50
    progress: bool = True

    def check(self) -> None:
        """Refuse what is out of range, before anything is computed.

        Raises:
            ValueError: naming the field and its value.
        """
        least = {"num_chains": 1, "num_draws": 1, "num_burnin_steps": 0, "num_steps_bw_draws": 1, "checkpoint_every": 1}
        for name, bound in {**least, "accumulate": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}; got {getattr(self, name)}")
        for name in ("batch_size", "observable_batch", "chain_chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None for its default; got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Steps of every chain."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws

    def numbers(self, chains: Sequence[int] | None) -> list[int]:
        """Return which chains are run here, by their numbers: all, where `chains` does not say.

        Raises:
            ValueError: if there are no such chains, or none.
        """
        numbers, known = list(range(self.num_chains) if chains is None else chains), set(range(self.num_chains))
        if not numbers or len(set(numbers)) < len(numbers) or not known.issuperset(numbers):
            raise ValueError(
                f"chains must be some of the {self.num_chains} chains, each once, by their numbers from 0; got "
                f"{numbers}: raise num_chains, or leave the others out"
            )
        if self.on_divergence == "prefix" and known != set(numbers):
            raise ValueError(
                "on_divergence='prefix' stops every chain where one diverges, and chains of another process cannot be "
                "stopped: pass on_divergence='drop', or run all chains here"
            )
        return numbers


def options_by_name(given: Mapping[str, Any]) -> Options:
    """Return the options that a call was given by name; refuse a word that is none of a field's."""
    for name, words in (("keep", Keep), ("on_divergence", Policy), ("baseline", Baselines)):
        if name in given and given[name] not in get_args(words):
            raise ValueError(f"{name} must be one of {', '.join(get_args(words))}; got {given[name]!r}")
    return Options(**given)


@dataclass(frozen=True)
class Plan:
    """A run of chains, decided; `print(plan)` says it.

    Attributes:
        options: what was asked for.
        sampler: the sampler, and through it the target.
        source: the dataset, if there is one.
        batch: examples of a batch.
        shared: whether all chains see the same batches.
        seed: of noise and order.
        groups: names of groups of chains, with what differs between them.
        replicas: all chains, group by group.
        chunks: which are stepped together.
        watched: the observables.
        keep: what is kept of them: `sequences`, `tokens`, `moments` or `pairs`.
        baseline: the loss at the anchor.
        facts: what made the run, for the cache.
        notes: what else was decided, in words.
    """

    options: Options
    sampler: Sampler
    source: Source | None
    batch: int
    shared: bool
    seed: int
    groups: Mapping[str, Mapping[str, Any]]
    replicas: Sequence[Replica]
    chunks: Sequence[Chunk]
    watched: Sequence[Watched]
    keep: str
    baseline: Baseline
    facts: Mapping[str, Any]
    notes: Sequence[str]

    @property
    def steps(self) -> int:
        """Steps of every chain."""
        return self.options.steps

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
        draws = self.options.num_draws
        kept = {"sequences": 4 * draws * examples, "tokens": 4 * draws * (positions + examples)}
        return total + chains * kept.get(self.keep, 8 * examples**2 if self.keep == "pairs" else 0)

    def __str__(self) -> str:
        moving = sum(p.numel() for p in self.sampler.target.anchor.values())
        examples, o = sum(len(w.rows) for w in self.watched), self.options
        shown = 4
        lines = [
            *(_hypers(name, said) for name, said in [*self.groups.items()][:shown]),
            *([f"… and {len(self.groups) - shown} groups more"] if len(self.groups) > shown else []),
            f"{len(self.replicas)} chains of {moving:,} weights, {self.steps:,} steps: {o.num_burnin_steps:,} of "
            f"burn-in, then {o.num_draws:,} draws of {o.num_steps_bw_draws}",
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


def make_plan(
    target: Target,
    params: Params,
    dataset: Data | None,
    observables: Mapping[str, Any] | None,
    lr: Hyper,
    groups: Mapping[str, Mapping[str, Any]],
    seed: int,
    options: Options,
    sampler: Callable[..., Sampler] = sgld.build,
    chains: Sequence[int] | None = None,
) -> Plan:
    """Decide everything about a run; arguments as in `sample`, hyper-parameters with an entry per group or one."""
    options.check()
    numbers = options.numbers(chains)
    for name, value in {"lr": lr, **{name: getattr(target, name) for name in HYPERS}}.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != len(groups):
            raise ValueError(
                f"{name} has {len(value)} entries, for {len(groups)} groups of chains: pass one number, or a grid's to "
                "llc.calibrate"
            )
    source = None if dataset is None else source_of(dataset)
    batch = 0 if source is None else check_size(source, options.batch_size)
    shared = options.shared_batches or source is None or batch == source.size
    built = sampler(target, lr=lr)
    replicas = [Replica(g, c) for g in range(len(groups)) for c in numbers]
    batches = options.steps * (1 if shared else options.num_chains)
    baseline, kind = baseline_of(target, source, options.baseline, batch, batches)
    evaluated = options.observable_batch or options.batch_size or 32
    watched = observe.watch(target, observables or {}, evaluated, seed)
    examples = sum(len(w.rows) for w in watched)
    automatic = "pairs" if 0 < 2 * examples < options.num_draws else "sequences"
    keep = automatic if options.keep == "auto" else options.keep
    chunks, notes = _chunks(built, params, source, replicas, options, shared, batch, seed)
    own = {name: {**said, **_hyper_facts(target, lr, g)} for g, (name, said) in enumerate(groups.items())}
    return Plan(
        options,
        built,
        source,
        batch,
        shared,
        seed,
        own,
        replicas,
        chunks,
        watched,
        keep,
        baseline,
        _facts(target, source, batch, shared, seed, own, options, watched, keep, sampler, numbers),
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
    watched: Sequence[Watched],
    keep: str,
    sampler: Callable[..., Sampler],
    numbers: Sequence[int],
) -> dict[str, Any]:
    """Return everything that makes a run what it is."""
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
        "chains": sorted(numbers),
        "num_draws": options.num_draws,
        "num_burnin_steps": options.num_burnin_steps,
        "num_steps_bw_draws": options.num_steps_bw_draws,
        "control_variate": options.control_variate,
        "accumulate": options.accumulate,
        "init_noise": options.init_noise,
        "keep": keep,
        "on_divergence": options.on_divergence,
    }


def _hyper_facts(target: Target, lr: Hyper, group: int) -> dict[str, float]:
    """Return a group's hyper-parameters as numbers."""
    setting = target.setting(lr, {}, group)
    return {name: float(getattr(setting, name)) for name in ("lr", *HYPERS)}
