"""Joins the chains that several processes ran into one run, in memory and in a folder."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.sgmcmc.estimators.moments import Moments
from influence.sgmcmc.runner import traces
from influence.sgmcmc.runner.draws import Observed, Run

OWN = ("chains", "dropped")
"""Facts of a part that the whole does not share."""


def join(parts: Sequence[Run]) -> Run:
    """Return runs of different chains as one run, its chains in order: the same as if one process had run them all.

    Args:
        parts: runs of the same settings, each with `chains` of its own.

    Returns:
        The run.

    Raises:
        ValueError: if they are of other settings, or have a chain in common.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> run = lambda **own: sgmcmc.sample(lambda w, _: w["w"].square().sum(), {"w": torch.zeros(2)}, None, lr=0.01,
        ...     n_beta=1.0, num_draws=5, progress=False, **own)
        >>> bool((join([run(chains=[0, 2]), run(chains=[1, 3])]).loss == run().loss).all())
        True
    """
    facts = joined_facts([part.facts for part in parts])
    first = parts[0]
    numbers = [chain for part in parts for chain in part.chains]
    whole = Run(
        torch.cat([part.loss for part in parts]),
        torch.cat([part.baseline for part in parts]),
        {name: torch.cat([part.terms[name] for part in parts]) for name in first.terms},
        {name: _observed([part.observables[name] for part in parts]) for name in first.observables},
        None if first.pairs is None else _moments([part.pairs for part in parts if part.pairs is not None]),
        tuple(numbers),
        first.burn_in,
        first.between,
        facts,
    )
    return whole.keep(sorted(range(len(numbers)), key=numbers.__getitem__))


def join_folders(parts: Sequence[Path], folder: Path, run: str | None = None) -> None:
    """Join the complete runs of folders, group by group, and write what one process would have left to another folder.

    `run` is the id of that folder's run, where the caller has begun it; `None` begins it here.
    """
    runs, facts, probes = zip(*map(traces.read_runs, parts), strict=True)
    joint = joined_facts(facts)
    whole = {}
    for name in dict.fromkeys(name for each in runs for name in each):
        each = join([part[name] for part in runs if name in part])
        lost = sorted({*joint["chains"]} - {*each.chains})  # in some part no chain of this group may be left
        whole[name] = replace(each, facts={**each.facts, "chains": joint["chains"], "dropped": lost})
    if run is not None:
        traces.write_runs(folder, run, whole, joint, probes[0])
        return
    with traces.claim(folder, joint) as manifest:
        traces.write_runs(folder, manifest.id, whole, joint, probes[0])


def joined_facts(facts: Sequence[Any]) -> dict[str, Any]:
    """Return what made a whole run, from what made its parts; refuse parts of different runs, naming the field."""
    first, *others = facts
    for other in others:
        for name, one, two in traces.differences(first, other):
            if name not in OWN:
                raise ValueError(
                    f"the runs differ in {name}: {one!r} and {two!r}; chains of one run have all but their numbers in "
                    "common"
                )
    numbers = sorted(chain for each in facts for chain in each["chains"])
    twice = [chain for chain, after in pairwise(numbers) if chain == after]
    if twice:
        raise ValueError(f"chain {twice[0]} is in two of the runs: pass each process chains of its own")
    lost = {"dropped": sorted(chain for each in facts for chain in each["dropped"])} if "dropped" in first else {}
    return {**first, "chains": numbers, **lost}


def _observed(parts: Sequence[Observed]) -> Observed:
    return replace(
        parts[0],
        mean=torch.cat([part.mean for part in parts]),
        moments=_moments([part.moments for part in parts]),
        sequences=_joined([part.sequences for part in parts]),
        tokens=_joined([part.tokens for part in parts]),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def _moments(parts: Sequence[Moments]) -> Moments:
    return Moments(*(torch.cat(each) for each in zip(*parts, strict=True)))
