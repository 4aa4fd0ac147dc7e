"""What a run of chains returns: scalars of every step, and observables at every draw, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence.sgmcmc.estimators.moments import Moments


@dataclass(frozen=True)
class Observed:
    """An observable: losses of some examples along chains, less what they are at the anchor.

    A draw's shifted loss of an example is the mean over its labelled positions, that of the observable the mean over
    all of them.

    Attributes:
        anchor: losses at the anchor.
        labelled: which positions count.
        index: the examples' rows in their dataset.
        ids: their token ids, where they have any.
        identity: a hash of the dataset.
        mean: shifted losses of the observable.
        moments: of all observables' shifted losses (`x`, in the run's order) and this one's positions (`y`, flattened).
        sequences: shifted losses of examples.
        tokens: shifted losses of positions.
    """

    anchor: Float[Tensor, "n t"]
    labelled: Bool[Tensor, "n t"]
    index: Int[Tensor, " n"]
    ids: Int[Tensor, "n s"] | None
    identity: str
    mean: Float[Tensor, "c d"]
    moments: Moments
    sequences: Float[Tensor, "c d n"] | None = None
    tokens: Float[Tensor, "c d n t"] | None = None

    @property
    def anchor_mean(self) -> float:
        """Mean loss at the anchor."""
        return float((self.anchor.double() * self.labelled).sum() / self.labelled.sum())


@dataclass(frozen=True)
class Run:
    """Chains.

    Step `t` is the one before which `loss[:, t]` was measured; draw `d` is the state before step
    `burn_in + (d + 1) · between - 1`.

    Attributes:
        loss: mean loss of each step's batch.
        baseline: of the same batch, at the anchor.
        terms: what else the sampler said of each step.
        observables: by name, in order.
        pairs: moments of all examples' shifted losses with one another, where they take less room than the losses.
        chains: the chains' numbers: those that were dropped are missing.
        burn_in: steps before the first draw's block.
        between: steps of a draw.
        facts: everything that made the run: hyper-parameters, seeds, hashes.
    """

    loss: Float[Tensor, "c s"]
    baseline: Float[Tensor, "c s"]
    terms: Mapping[str, Float[Tensor, "c s"]]
    observables: Mapping[str, Observed]
    pairs: Moments | None
    chains: tuple[int, ...]
    burn_in: int
    between: int
    facts: Mapping[str, Any]

    @property
    def n_beta(self) -> float:
        """The inverse temperature `nβ`."""
        return float(self.facts["n_beta"])

    @property
    def remedy(self) -> str:
        """What to do where draws are too few: a run that stopped early would stop there again."""
        if self.facts.get("stopped") is None:
            return "raise num_draws"
        return f"a chain diverged at step {self.facts['stopped']}, and only what came before is here: lower lr"

    def excess(self) -> Float[Tensor, "c s"]:
        """Return the loss above the anchor's on the same batch, after burn-in."""
        return (self.loss - self.baseline)[:, self.burn_in :]

    def observable(self, name: str) -> Observed:
        """Return an observable.

        Raises:
            KeyError: listing those there are.
        """
        if name not in self.observables:
            raise KeyError(f"the run has no observable {name!r}; it has {', '.join(self.observables) or 'none'}")
        return self.observables[name]

    def keep(self, chains: list[int]) -> "Run":
        """Return the run of some of its chains, by their places."""
        at = torch.tensor(chains)

        def only(moments: Moments) -> Moments:
            return Moments(*(each[at] for each in moments))

        observed = {
            name: replace(
                o,
                mean=o.mean[at],
                moments=only(o.moments),
                sequences=None if o.sequences is None else o.sequences[at],
                tokens=None if o.tokens is None else o.tokens[at],
            )
            for name, o in self.observables.items()
        }
        return replace(
            self,
            loss=self.loss[at],
            baseline=self.baseline[at],
            terms={name: x[at] for name, x in self.terms.items()},
            observables=observed,
            pairs=None if self.pairs is None else only(self.pairs),
            chains=tuple(self.chains[c] for c in chains),
        )

    def save(self, path: str | Path) -> None:
        """Write the run to one HDF5 file, which is netCDF-4 too."""
        from influence.sgmcmc.runner.traces import save

        save(self, path)

    def to_xarray(self) -> Any:
        """Return the run as an xarray Dataset, with devinterp's names and dimensions (needs the extra `xarray`)."""
        from influence.sgmcmc.runner.traces import to_xarray

        return to_xarray(self)
