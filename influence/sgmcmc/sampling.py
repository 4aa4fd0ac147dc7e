"""Sample a posterior around trained weights, with observables, as one vmapped computation or chain by chain."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.func.fingerprint import fingerprint, weights_hash
from influence.sgmcmc import baselines, chains, drive, observe, restrict, sgld, traces
from influence.sgmcmc.chains import Chunk, Replica
from influence.sgmcmc.langevin import Sampler
from influence.sgmcmc.order import Data, Source, check_size, source_of
from influence.sgmcmc.plan import Plan
from influence.sgmcmc.progress import bar
from influence.sgmcmc.restrict import Restriction
from influence.sgmcmc.run import Run
from influence.sgmcmc.target import Hyper, Loss, Target, default_n_beta, gradient_at, local_posterior
from influence.types import Params

POLICIES = ("raise", "drop", "prefix")


@dataclass(frozen=True)
class Options:
    """How chains are run: what `sample` takes beside what is sampled.

    Attributes:
        sampler: builds the sampler, `(target, lr=…) -> Sampler`: `functools.partial(rmsprop_sgld.build, alpha=0.9)`.
        batch_size: examples of a step; `None` for all data at every step.
        num_chains: chains.
        num_draws: draws of each, at which observables are measured.
        num_burnin_steps: steps before the first draw's block; no estimator sees them.
        num_steps_bw_draws: steps of a draw.
        shared_batches: whether all chains see the same batches. Their means then share its noise, and the spread
            between chains is less than the error.
        control_variate: take gradients as differences to the anchor's on the same batch.
        accumulate: compute the gradient of a batch in that many pieces.
        init_noise: start chains that far from the anchor, per entry.
        baseline: where the anchor's loss of each batch comes from: `"auto"`, `"lookup"` or `"paired"`.
        keep: what is kept of observables beside their moments: `"sequences"` (every draw's loss per example),
            `"tokens"` (per position), `"moments"` (nothing); `"auto"` keeps sequences, or their co-moments where these
            are smaller.
        on_divergence: `"raise"`, `"drop"` the chain, or keep the `"prefix"` before it, of all chains.
        chain_chunk: how many chains are stepped together; default by the size of the model.
        observable_batch: examples of an observable evaluated at a time; default the batch size.
        checkpoint_every: draws between checkpoints, where there is an `output_path`.
        progress: show a bar.
    """

    sampler: Callable[..., Sampler] = sgld.build
    batch_size: int | None = 32
    num_chains: int = 4
    num_draws: int = 200
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    shared_batches: bool = False
    control_variate: bool = False
    accumulate: int = 1
    init_noise: float = 0.0
    baseline: str = "auto"
    keep: str = "auto"
    on_divergence: str = "raise"
    chain_chunk: int | None = None
    observable_batch: int | None = None
    checkpoint_every: int = 50
    progress: bool = True

    def check(self) -> None:
        """Refuse what is out of range, before anything is computed.

        Raises:
            ValueError: naming it.
        """
        least = {"num_chains": 1, "num_draws": 1, "num_burnin_steps": 0, "num_steps_bw_draws": 1, "checkpoint_every": 1}
        for name, bound in {**least, **({"chain_chunk": 1} if self.chain_chunk is not None else {})}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}; got {getattr(self, name)}")
        for name, values in (("keep", observe.KEEPS), ("on_divergence", POLICIES), ("baseline", baselines.KINDS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")


def sample(
    loss_fn: Loss,
    params: Params,
    dataset: Data | None,
    observables: Mapping[str, Any] | None = None,
    *,
    lr: float,
    n_beta: float,
    localization: float = 0.0,
    weight_decay: float = 0.0,
    restriction: Restriction = None,
    seed: int = 0,
    output_path: str | Path | None = None,
    **options: Any,
) -> Run:
    """Run chains around trained weights.

    The caller's model is not touched and no global generator is read: noise and order are functions of
    (seed, chain, step), so a chain is the same whatever runs beside it.

    Args:
        loss_fn: what `functionalize` returned, or any `(params, batch) -> losses` of `[n]` or `[n, t]`.
        params: the trained weights: the anchor, and where chains start.
        dataset: a pytree of tensors with the example axis first, or a `Source`; `None` for a potential without data.
        observables: data to measure at every draw, or `(data, k)` for `k` batches of it.
        lr: step size.
        n_beta: inverse temperature; `default_n_beta(n)` is n / log n.
        localization: pull to the anchor.
        weight_decay: pull to zero, not scaled by `n_beta`.
        restriction: which weights move (`restrict`): `"l0h1"`, a list, a glob, masks; default all.
        seed: another seed, other noise and order.
        output_path: a folder to checkpoint in. A run that was killed goes on where it stood, bit by bit; one that is
            complete is read; one of other weights, data or settings is refused.
        options: the fields of `Options`, by name.

    Returns:
        The run.

    Raises:
        ValueError: if anything does not fit, before the run.
        DivergedError: if a chain diverges, and `on_divergence` is `"raise"`.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> loss = lambda w, _: w["w"].square().sum() / 2
        >>> run = sgmcmc.sample(loss, {"w": torch.zeros(4)}, None, lr=0.01, n_beta=10.0, num_draws=50, progress=False)
        >>> run.loss.shape, run.observables
        (torch.Size([4, 50]), {})
    """
    target = _target(loss_fn, params, dataset, n_beta, localization, weight_decay, restriction, Options(**options))
    groups = {"": {"restriction": _words(restriction)}}
    return run_groups(target, params, dataset, observables, lr, groups, seed, output_path, Options(**options))[""]


def sample_restrictions(
    loss_fn: Loss,
    params: Params,
    dataset: Data | None,
    observables: Mapping[str, Any],
    *,
    lr: float,
    n_beta: float,
    restrictions: Sequence[str] | Mapping[str, Restriction],
    localization: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    output_path: str | Path | None = None,
    **options: Any,
) -> dict[str, Run]:
    """Run chains of several restrictions as one computation: what `susceptibility.estimate` takes.

    All weights that any restriction moves are stacked for every chain, and a mask says which move. With `chain_chunk=1`
    they are stepped one by one, each still with the gradient of them all; for one layer of a large model call `sample`
    per restriction instead.

    Args:
        loss_fn: as in `sample`.
        params: as in `sample`.
        dataset: as in `sample`.
        observables: as in `sample`.
        lr: step size.
        n_beta: inverse temperature.
        restrictions: words of the grammar, or restrictions by name.
        localization: pull to the anchor.
        weight_decay: pull to zero.
        seed: of noise and order, which are the same in all restrictions.
        output_path: a folder to checkpoint in.
        options: the fields of `Options`.

    Returns:
        A run per restriction.

    Example:
        >>> import torch
        >>> from influence import functionalize, sgmcmc
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 3))
        >>> data = {"input": torch.ones(8, 2), "labels": torch.arange(8) % 3}
        >>> runs = sgmcmc.sample_restrictions(loss_fn, params, data, {"code": data}, lr=1e-3, n_beta=5.0, batch_size=4,
        ...     restrictions=["full", "bias"], num_draws=3, progress=False)
        >>> {name: tuple(run.loss.shape) for name, run in runs.items()}
        {'full': (4, 3), 'bias': (4, 3)}
    """
    wanted = restrictions if isinstance(restrictions, Mapping) else {word: word for word in restrictions}
    chosen = {name: restrict.masks(loss_fn, params, which) for name, which in wanted.items()}  # type: ignore[arg-type]
    names = [name for name in params if any(name in masks for masks in chosen.values())]
    joint = {
        name: torch.stack([_whole(masks.get(name, False), params[name]) for masks in chosen.values()]) for name in names
    }
    settings = Options(**options)
    target = _target(loss_fn, params, dataset, n_beta, localization, weight_decay, joint, settings)
    groups = {name: {"restriction": _words(which)} for name, which in wanted.items()}
    return run_groups(target, params, dataset, observables, lr, groups, seed, output_path, settings)


def run_groups(
    target: Target,
    params: Params,
    dataset: Data | None,
    observables: Mapping[str, Any] | None,
    lr: Hyper,
    groups: Mapping[str, Mapping[str, Any]],
    seed: int,
    output_path: str | Path | None,
    options: Options,
) -> dict[str, Run]:
    """Run chains of several groups; the target and `lr` have theirs along a first axis of hyper-parameters or masks."""
    plan = make_plan(target, params, dataset, observables, lr, groups, seed, options)
    progress, record = drive.begin(plan, params)
    folder = None if output_path is None else Path(output_path)
    if folder is not None:
        found = traces.open_folder(folder, plan, progress, record)
        if isinstance(found, dict):
            return found
        progress = found
    with bar(plan, progress.step, options.progress) as said:
        while progress.step < plan.steps:
            until = plan.steps if folder is None else min(plan.steps, progress.step + plan.checkpoint * plan.between)
            before, progress = progress.step, drive.advance(plan, progress, record, until, said)
            if folder is not None:
                traces.checkpoint(folder, plan, before, progress, record)
            if progress.step < until:
                break
    runs = drive.results(plan, progress, record)
    if folder is not None:
        traces.close_folder(folder, plan, runs)
    return runs


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
    source = None if dataset is None else source_of(dataset)
    batch = 0 if source is None else check_size(source, options.batch_size)
    shared = options.shared_batches or source is None or batch == source.size
    sampler = options.sampler(target, lr=lr)
    replicas = [Replica(g, c) for g in range(len(groups)) for c in range(options.num_chains)]
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
    own = {name: {**said, **drive.hyper_facts(target, lr, g)} for g, (name, said) in enumerate(groups.items())}
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
        size = chains.size_of(moving, batches[0], len(replicas), on_cpu)
    size = min(size, len(replicas))
    if size == 1:
        return chains.cut(replicas, 1), []
    first = chains.cut(replicas[:2], 2)[0]
    why = chains.refuses_vmap(sampler, first, chains.first_state(sampler, params, first, seed), batches, seed)
    if why is None:
        return chains.cut(replicas, size), []
    if options.chain_chunk is not None:
        raise ValueError(f"chain_chunk={size}: this loss cannot be run for several chains at once ({why}); pass 1")
    return chains.cut(replicas, 1), [f"chains are stepped one by one, since vmap refuses this loss: {why}"]


def _target(
    loss_fn: Loss,
    params: Params,
    dataset: Data | None,
    n_beta: Hyper,
    localization: Hyper,
    weight_decay: Hyper,
    restriction: Restriction,
    options: Options,
) -> Target:
    mask = None if restriction is None else restrict.masks(loss_fn, params, restriction)  # type: ignore[arg-type]
    build = functools.partial(
        local_posterior, loss_fn, params, n_beta, localization, weight_decay, mask, init_noise=options.init_noise
    )
    if not options.control_variate:
        return build(accumulate=options.accumulate)
    if dataset is None:
        raise ValueError("control_variate needs a dataset: a potential without data has no gradient noise")
    source = source_of(dataset)
    size = check_size(source, options.batch_size)
    pieces = (source.fetch(rows) for rows in torch.arange(source.size).split(size))
    return build(accumulate=options.accumulate, full_gradient=gradient_at(loss_fn, params, pieces))


def _whole(mask: Tensor | bool, like: Tensor) -> Tensor:
    return mask if isinstance(mask, Tensor) else torch.full(like.shape, mask, dtype=torch.bool)


def _words(restriction: Restriction) -> str:
    if restriction is None or isinstance(restriction, str):
        return restriction or "full"
    if isinstance(restriction, Mapping):
        return f"masks {fingerprint(dict(restriction))[:12]}"
    return " | ".join(restriction)


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
    return {
        "weights": weights_hash(target.loss_fn, {**target.frozen, **target.anchor}),
        "masks": fingerprint({**dict.fromkeys(target.anchor, True), **target.mask}),
        "data": None if source is None else source.identity,
        "size": None if source is None else source.size,
        "observables": {w.name: [w.identity, fingerprint(w.rows)] for w in watched},
        "sampler": f"{function.__module__}.{function.__qualname__}",
        "sampler_settings": {name: repr(value) for name, value in settings.items()},
        "groups": {name: dict(said) for name, said in own.items()},
        "batch": batch,
        "shared_batches": shared,
        "seed": seed,
        "num_chains": options.num_chains,
        "num_draws": options.num_draws,
        "num_burnin_steps": options.num_burnin_steps,
        "num_steps_bw_draws": options.num_steps_bw_draws,
        "control_variate": options.control_variate,
        "accumulate": options.accumulate,
        "init_noise": options.init_noise,
        "keep": keep,
        "on_divergence": options.on_divergence,
    }


__all__ = ["Options", "default_n_beta", "make_plan", "run_groups", "sample", "sample_restrictions"]
