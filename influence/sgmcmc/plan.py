"""What a run will do, decided once, in a value that prints itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.sgmcmc.baselines import Baseline
from influence.sgmcmc.chains import Chunk, Replica
from influence.sgmcmc.langevin import Sampler
from influence.sgmcmc.observe import Watched
from influence.sgmcmc.order import Source

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
