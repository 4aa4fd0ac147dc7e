"""Runs the chains of a sampling command in its run directory, on one rank or several, and reads finished ones."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from influence import sgmcmc
from influence.pipelines.chains.posterior import Posterior, posterior
from influence.pipelines.chains.settings import Sampling, SamplingConfig
from influence.pipelines.frame import recorded
from influence.pipelines.frame.config_file import to_mapping, write_config
from influence.pipelines.frame.directory import CONFIG, config_of
from influence.pipelines.frame.loading import load_tokenizer
from influence.pipelines.frame.outcome import Outcome, Say
from influence.pipelines.frame.ranks import Ranks, ranks
from influence.sgmcmc import Run
from influence.sgmcmc.estimators import llc
from influence.sgmcmc.runner import joining, observables, sampling, schedule, stacking, traces
from influence.sgmcmc.runner.schedule import Plan
from influence.sgmcmc.runner.traces import RESULT
from influence.store.folder import Manifest, clear, refuse_foreign, tidy
from influence.terminal import duration, size

SHARES = "chains-#-#/"
"""Folders of the chains that ranks run, while they do."""
SAMPLED = ("observables", "observed", "restrictions", "lrs", "localizations")
"""Fields of commands that say what is sampled, and not what is made of it."""
READ = ("trust_remote_code",)
"""Fields of the groups that the reading of a finished run uses: its tokenizer is loaded by it."""


class Samples(NamedTuple):
    """Finished chains.

    Attributes:
        directory: where they are.
        runs: by restriction, or by point of a grid.
        facts: of the sampling, for machines.
    """

    directory: Path
    runs: Mapping[str, Run]
    facts: Mapping[str, Any]


def sampled(
    command: str,
    config: SamplingConfig,
    what: Sampling,
    say: Say,
    fits: Callable[[Posterior], None] = lambda made: None,
) -> Samples | Outcome:
    """Sample, or go on, or read what is finished.

    Args:
        command: who asks.
        config: its configuration, which is written down.
        what: what is to be sampled.
        say: where its lines go.
        fits: refuses what the loaded data cannot answer, before anything is sampled.

    Returns:
        The samples; the outcome of a dry run.

    Raises:
        FileNotFoundError: if there is neither a model nor a finished run.
        ValueError: if the directory holds another run, naming the field and both values; or if it is to be read, and
            something is asked of its chains.
    """
    directory = Path(what.run)
    if not what.model.model:
        found = read_samples(directory)
        _check_read(config)
        return found
    if not what.data.dataset:
        raise ValueError("no dataset: chains need the data they are trained on; pass --dataset")
    refuse_foreign(directory)
    made = posterior(what)
    fits(made)
    masks, lr, localization, groups = _groups(what, made)
    target = sampling.target_of(
        made.loss_fn, made.params, made.source, made.n_beta, localization, what.chains.weight_decay, masks, made.options
    )

    def planned(numbers: list[int] | None) -> Plan:
        return schedule.make_plan(
            target,
            made.params,
            made.source,
            made.observables,
            lr,
            groups,
            what.chains.seed,
            made.options,
            made.sampler,
            numbers,
        )

    with ranks() as place:
        _check_ranks(what, place)
        plan = planned(None)
        told = _told(command, directory, plan, made, place.world)
        if place.first:
            say(told.text)
        if what.pace.dry_run:
            return told._replace(text="")
        with _directory(command, config, directory, plan, what.pace.overwrite, place) as manifest:
            shares = _shares(directory, manifest, what, place)
            for begin, end in shares[place.rank :: place.world]:
                folder = directory / f"chains-{begin}-{end}"
                own = plan if end - begin == made.options.num_chains else planned([*range(begin, end)])
                with _readable():
                    sampling.execute(own, made.params, folder, _shown(what, place), place.check)
            place.barrier()
            if place.first and shares:
                assert manifest is not None
                joining.join_folders(shares_in(directory), directory, manifest.id)
            elif place.first:
                with _readable():
                    traces.read_planned(directory, plan)
            if manifest is not None:
                tidy(directory, manifest)
            place.barrier()
        return read_samples(directory)


def tokenizer_of(what: Sampling) -> Any:
    """Return the tokenizer of a run's model, to say what its tokens are; `None` where there is none."""
    model = what.model
    if not model.model:
        stored = config_of(what.run)
        if "model" not in stored:
            return None
        model = recorded.tokenizer_of(stored["model"], what.run, model.trust_remote_code)
    return load_tokenizer(model)


def read_samples(directory: Path) -> Samples:
    """Read finished chains.

    Raises:
        FileNotFoundError: if there are none.
    """
    if not (directory / RESULT).is_file():
        raise FileNotFoundError(
            f"{directory} has no finished chains ({RESULT}): pass --model and --dataset to sample, or name a "
            "finished run of influence sample"
        )
    found = sgmcmc.load(directory)
    runs = {str(found.facts.get("restriction", "full")): found} if isinstance(found, Run) else found
    if not runs:
        raise sgmcmc.DivergedError(f"every chain in {directory} diverged: lower --lr, or raise --localization")
    some = next(iter(runs.values()))
    facts = {
        "run": str(directory),
        "runs": {
            name: {
                **{key: run.facts.get(key) for key in ("lr", "n_beta", "localization", "weight_decay", "restriction")},
                "chains": list(run.chains),
                "dropped": run.facts.get("dropped", []),
            }
            for name, run in runs.items()
        },
        "steps": some.loss.shape[1],
        "burn_in": some.burn_in,
        "observables": {name: o.anchor.shape[0] for name, o in some.observables.items()},
    }
    return Samples(directory, runs, facts)


def _check_read(config: SamplingConfig) -> None:
    """Refuse flags that only chains which are yet to run could use."""
    flag = next(_unused(config, type(config)(config.run)), None)
    if flag is not None:
        raise ValueError(
            f"{flag} is of chains that are yet to run, and without --model the finished ones in {config.run} are "
            f"read as they are: leave {flag} out, or pass --model and --dataset, and name another run"
        )


def _unused(asked: Any, plain: Any) -> Iterator[str]:
    """Yield the flags of a configuration and of its groups that differ from their defaults, and that no reading uses.

    A command's own fields are used, but for those that say what is sampled.
    """
    for each in fields(asked):
        one, two = getattr(asked, each.name), getattr(plain, each.name)
        if is_dataclass(one):
            yield from _unused(one, two)
        elif one != two and not (each.name in READ or (isinstance(asked, SamplingConfig) and each.name not in SAMPLED)):
            yield ("--no-" if one is False else "--") + each.name.replace("_", "-")


def _groups(what: Sampling, made: Posterior) -> tuple[Any, Any, Any, dict[str, dict[str, Any]]]:
    """Return masks, step sizes, localizations and the groups of chains: restrictions, or a grid's points."""
    if what.lrs or what.localizations:
        lrs, pulls = what.lrs or (what.chains.lr,), what.localizations or (what.chains.localization,)
        if len(what.restrictions) > 1:
            raise ValueError("a grid is run under one restriction: pass one of --restrictions, or leave --lrs out")
        masks, _ = sampling.together(made.loss_fn, made.params, _wanted(what))
        steps, localizations, groups = llc.grid(lrs, pulls)
        return masks, steps, localizations, groups
    masks, groups = sampling.together(made.loss_fn, made.params, _wanted(what))
    return masks, what.chains.lr, what.chains.localization, groups


def _wanted(what: Sampling) -> dict[str, list[str] | str]:
    """Return restrictions by name; words joined by a plus are a union."""
    twice = [word for word in what.restrictions if what.restrictions.count(word) > 1]
    if twice:
        raise ValueError(f"--restrictions has {twice[0]!r} twice")
    return {word: [part.strip() for part in word.split("+")] if "+" in word else word for word in what.restrictions}


def _check_ranks(what: Sampling, place: Ranks) -> None:
    if place.world > 1 and what.chains.options.on_divergence == "prefix":
        raise ValueError(
            "--on-divergence prefix stops every chain where one diverges, and chains of another process cannot be "
            "stopped: pass --on-divergence drop, or start one process"
        )


def _told(command: str, directory: Path, plan: Plan, made: Posterior, world: int) -> Outcome:
    """Return the plan in words and as facts, with the time it will take, measured on one step."""
    seconds = _seconds(plan, made) / min(world, made.options.num_chains)
    lines = [*str(plan).splitlines(), *made.notes]
    head = f"plan: {command} → {directory}: about {duration(seconds)}"
    head += f" on {world} ranks" if world > 1 else ""
    facts = {
        "run": str(directory),
        "seconds": seconds,
        "bytes": plan.bytes(),
        "chains": len(plan.replicas),
        "steps": plan.steps,
        "n_beta": made.n_beta,
        "groups": {name: dict(said) for name, said in plan.groups.items()},
        "keep": plan.keep,
        "observables": {w.name: len(w.rows) for w in plan.watched},
    }
    text = "\n".join([f"{head}; disk {size(plan.bytes())}", *(f"      {line}" for line in lines)])
    return Outcome(str(directory), facts, text)


def _seconds(plan: Plan, made: Posterior) -> float:
    """Return how long a run takes: a step of the first chunk and a draw, timed once they are warm."""
    chunk, taken = plan.chunks[0], 0.0
    whose = 1 if plan.shared or plan.source is None else len(chunk.replicas)
    batches = [made.source.fetch(torch.arange(plan.batch)) for _ in range(whose)]
    state = stacking.first_state(plan.sampler, made.params, chunk, plan.seed)
    for _ in range(2):
        began = time.perf_counter()
        noise = stacking.noise_of(plan.sampler, chunk, plan.seed, 1)
        stacking.step(plan.sampler, chunk, state, batches, noise)
        taken = (time.perf_counter() - began) * plan.steps
        began = time.perf_counter()
        for watched in plan.watched:
            observables.draw(plan.sampler.target, chunk, state.params, watched)
        taken += (time.perf_counter() - began) * plan.options.num_draws
    return taken * len(plan.replicas) / len(chunk.replicas)


@contextlib.contextmanager
def _directory(
    command: str, config: SamplingConfig, directory: Path, plan: Plan, overwrite: bool, place: Ranks
) -> Iterator[Manifest | None]:
    """Hold the directory's lock on the first rank, begin the run or go on with it, and write down what is run."""
    with contextlib.ExitStack() as stack:
        manifest = None
        if place.first:
            kept = replace(config, pace=replace(config.pace, overwrite=False))  # a replay deletes nothing
            replay = ["influence", command, "ANOTHER_RUN", "--config", str(directory / CONFIG)]
            claim = traces.claim(directory, plan.facts, overwrite, to_mapping(kept), replay, [CONFIG], [SHARES])
            with _readable():
                manifest = stack.enter_context(claim)
            if not (directory / CONFIG).is_file():
                write_config(directory / CONFIG, kept, command, manifest.id)
        place.barrier()
        yield manifest


def shares_in(directory: Path) -> list[Path]:
    """Return the folders of chains that ranks run, by their first chain."""
    found = [path for path in directory.iterdir() if re.fullmatch(r"chains-\d+-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _shares(directory: Path, manifest: Manifest | None, what: Sampling, place: Ranks) -> list[list[int]]:
    """Return which chains are run together: what an unfinished run decided, or a share for every rank.

    So the run can be resumed by any number of processes.
    """
    count = what.chains.options.num_chains

    def decided() -> list[list[int]]:
        assert manifest is not None
        if (directory / RESULT).is_file():
            return []
        there = [[int(x) for x in path.name.split("-")[1:]] for path in shares_in(directory)]
        if there and [n for begin, end in there for n in range(begin, end)] == [*range(count)]:
            return there
        clear(directory, manifest, [SHARES])  # a run that was killed as it dealt them out
        shares = min(place.world, count)
        edges = [count * k // shares for k in range(shares + 1)]
        cut = [[begin, end] for begin, end in pairwise(edges)]
        for begin, end in cut:
            (directory / f"chains-{begin}-{end}").mkdir()
        return cut

    return place.once(decided)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Say in the words of the command line that a folder holds another run."""
    try:
        yield
    except sgmcmc.DivergedError:
        raise
    except (ValueError, FileExistsError) as error:
        raise type(error)(str(error).replace(traces.ANEW, "Pass --overwrite, or name another run")) from error


def _shown(what: Sampling, place: Ranks) -> bool:
    """Return whether to show a bar: on the first rank, and not in the middle of a log file."""
    return place.first and what.chains.options.progress and sys.stderr.isatty()
