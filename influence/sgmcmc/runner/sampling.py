"""Runs chains around trained weights, in memory or in a folder from which a killed run goes on."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from influence.func.fingerprint import fingerprint
from influence.sgmcmc.runner import loop, restrict, traces
from influence.sgmcmc.runner.draws import Run
from influence.sgmcmc.runner.loop import Record
from influence.sgmcmc.runner.minibatches import Data, check_size, source_of
from influence.sgmcmc.runner.restrict import Restriction
from influence.sgmcmc.runner.schedule import Options, Plan, make_plan, options_by_name
from influence.sgmcmc.samplers import sgld
from influence.sgmcmc.samplers.langevin import Sampler
from influence.sgmcmc.samplers.target import Hyper, Loss, Mask, Target, gradient_at, local_posterior
from influence.types import Params

_EVERY = 0.5
"""Seconds between two updates of the numbers beside a bar."""


@contextmanager
def _bar(
    plan: Plan, done: int, shown: bool, look: Callable[[], None] | None = None
) -> Iterator[Callable[[int, Record], None]]:
    """Yield a function to call after every step, which moves the bar, if one is shown, and calls `look`."""
    if not shown:
        yield lambda t, record: None if look is None else look()
        return
    from tqdm import tqdm

    with tqdm(total=plan.steps, initial=done, desc="sampling", unit="step") as drawn:
        last = [0.0]

        def said(t: int, record: Record) -> None:
            drawn.update(1)
            if look is not None:
                look()
            if monotonic() - last[0] > _EVERY:
                last[0] = monotonic()
                drawn.set_postfix_str(_summary(plan, t, record))

        yield said


def _summary(plan: Plan, t: int, record: Record) -> str:
    """Return the loss, the LLC so far and the acceptance after a step."""
    loss, baseline = record.arrays["loss"], record.arrays["baseline"]
    parts = [f"loss {float(loss[:, t].nanmean()):.4g}"]
    burn_in = plan.options.num_burnin_steps
    if t >= burn_in and len(plan.groups) == 1:
        excess = (loss - baseline)[:, burn_in : t + 1].nanmean()
        parts.append(f"LLC {next(iter(plan.groups.values()))['n_beta'] * float(excess):.4g}")
    if "term/acceptance" in record.arrays:
        seen = record.arrays["term/acceptance"][:, : t + 1]
        parts.append(f"acceptance {float(torch.nanmean(seen)):.2f}")
    return ", ".join(parts)


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
    sampler: Callable[..., Sampler] = sgld.build,
    seed: int = 0,
    chains: Sequence[int] | None = None,
    output_path: str | Path | None = None,
    **options: Any,
) -> Run:
    """Run chains around trained weights.

    The caller's model is not touched and no global generator is read: noise and order are functions of
    (seed, chain, step), so a chain is the same whatever runs beside it.

    Args:
        loss_fn: what `functionalize` returned, or any `(params, batch) -> losses` of `[n]` or `[n, t]`.
        params: the trained weights: the anchor, and where chains start.
        dataset: a torch `Dataset`, such as `loader.dataset`; a pytree of tensors with the example axis first; or a
            `Source`. `None` for a potential without data.
        observables: data to measure at every draw, or `(data, k)` for `k` batches of it.
        lr: step size.
        n_beta: inverse temperature; `default_n_beta(n)` is n / log n.
        localization: pull to the anchor.
        weight_decay: pull to zero, not scaled by `n_beta`.
        restriction: which weights move (`restrict`): `"l0h1"`, a list, a glob, masks; default all.
        sampler: builds the sampler, `(target, lr=…) -> Sampler`: `functools.partial(rmsprop_sgld.build, alpha=0.9)`.
        seed: another seed, other noise and order.
        chains: which of the `num_chains` chains, by number, are run here, where processes share them (`join`); default
            all.
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
    settings = options_by_name(options)
    target = target_of(loss_fn, params, dataset, n_beta, localization, weight_decay, restriction, settings)
    groups = {"": {"restriction": _words(restriction)}}
    plan = make_plan(target, params, dataset, observables, lr, groups, seed, settings, sampler, chains)
    return _complete(execute(plan, params, output_path, settings.progress), groups)[""]


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
    sampler: Callable[..., Sampler] = sgld.build,
    seed: int = 0,
    chains: Sequence[int] | None = None,
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
        sampler: as in `sample`.
        seed: of noise and order, which are the same in all restrictions.
        chains: as in `sample`.
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
    masks, groups = together(loss_fn, params, wanted)
    settings = options_by_name(options)
    target = target_of(loss_fn, params, dataset, n_beta, localization, weight_decay, masks, settings)
    plan = make_plan(target, params, dataset, observables, lr, groups, seed, settings, sampler, chains)
    return _complete(execute(plan, params, output_path, settings.progress), groups)


def together(
    loss_fn: Loss, params: Params, restrictions: Mapping[str, Restriction]
) -> tuple[Mask, dict[str, dict[str, Any]]]:
    """Return masks under which chains of several restrictions run at once, with a group axis, and the groups.

    One restriction alone has no group axis: what it does not move is closed over.
    """
    if not restrictions:
        raise ValueError("there is no restriction to sample under: pass at least 'full'")
    chosen = {name: restrict.masks(loss_fn, params, which) for name, which in restrictions.items()}  # type: ignore[arg-type]
    groups = {name: {"restriction": _words(which)} for name, which in restrictions.items()}
    if len(chosen) == 1:
        return next(iter(chosen.values())), groups
    names = [name for name in params if any(name in masks for masks in chosen.values())]
    return {
        name: torch.stack([_whole(masks.get(name, False), params[name]) for masks in chosen.values()]) for name in names
    }, groups


def execute(
    plan: Plan,
    params: Params,
    output_path: str | Path | None,
    shown: bool,
    look: Callable[[], None] | None = None,
) -> dict[str, Run]:
    """Run what was planned: a run per group that has a chain left.

    With an `output_path` it checkpoints there, and goes on from what is there; `look` is called after every step.
    """
    o = plan.options
    progress, record = loop.begin(plan, params)
    if output_path is None:
        with _bar(plan, progress.step, shown, look) as said:
            return loop.results(plan, loop.advance(plan, progress, record, plan.steps, said), record)
    folder = Path(output_path)
    if (folder / traces.RESULT).is_file() and not os.access(folder, os.W_OK):
        return traces.read_planned(folder, plan)
    with traces.claim(folder, plan.facts) as manifest:
        found = traces.open_folder(folder, manifest, plan, progress, record)
        if isinstance(found, dict):
            return found
        progress = found
        with _bar(plan, progress.step, shown, look) as said:
            while progress.step < plan.steps:
                until = min(plan.steps, progress.step + o.checkpoint_every * o.num_steps_bw_draws)
                before, progress = progress.step, loop.advance(plan, progress, record, until, said)
                traces.checkpoint(folder, manifest.id, plan, before, progress, record)
                if progress.step < until:
                    break
        runs = loop.results(plan, progress, record)
        traces.close_folder(folder, manifest, plan, runs)
        return runs


def target_of(
    loss_fn: Loss,
    params: Params,
    dataset: Data | None,
    n_beta: Hyper,
    localization: Hyper,
    weight_decay: Hyper,
    restriction: Restriction,
    options: Options,
) -> Target:
    """Return what is sampled, with a control variate where the options ask for one."""
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


def _complete(runs: dict[str, Run], groups: Mapping[str, Any]) -> dict[str, Run]:
    """Refuse a result in which a group is missing."""
    missing = [name for name in groups if name not in runs]
    if missing:
        raise loop.DivergedError(f"every chain of {missing} diverged: lower lr, or raise localization")
    return runs


def _whole(mask: Tensor | bool, like: Tensor) -> Tensor:
    return mask if isinstance(mask, Tensor) else torch.full(like.shape, mask, dtype=torch.bool)


def _words(restriction: Restriction) -> str:
    if restriction is None or isinstance(restriction, str):
        return restriction or "full"
    if isinstance(restriction, Mapping):
        return f"masks {fingerprint(dict(restriction))[:12]}"
    return " | ".join(restriction)
