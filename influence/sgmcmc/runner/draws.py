"""A run of chains as a value, with its losses of every step and its observables at every draw, and as a file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence import store
from influence.sgmcmc.estimators.moments import Moments
from influence.store import BadFileError
from influence.store.schema import conform
from influence.visible import visible

RUN, SCHEMA = "sampling run", 1


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

    def __repr__(self) -> str:
        (n, t), draws = self.anchor.shape, self.mean.shape[1]
        kept = "tokens" if self.tokens is not None else "sequences" if self.sequences is not None else "moments"
        return f"<losses of {n:,} examples × {t:,} positions at {draws:,} draws, kept: {kept}>"


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

    def __repr__(self) -> str:
        seen = ", ".join(f"{visible(name, lines=False)} ({len(o.index):,})" for name, o in self.observables.items())
        steps = self.loss.shape[1]
        return (
            f"<{len(self.chains)} chains of {steps:,} steps, {self.burn_in:,} of them burn-in, at n_beta "
            f"{self.n_beta:.6g}; observables: {seen or 'none'}>"
        )

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
        """Write the run to one HDF5 file, which is netCDF-4 too; `load` reads it."""
        tensors, dims, about = pack(self, "")
        store.write(path, tensors, about, kind=RUN, schema=SCHEMA, dims=dims)

    def to_xarray(self) -> Any:
        """Return the run as an xarray Dataset, with devinterp's names and dimensions (needs the extra `xarray`).

        `loss_{observable}` is not shifted there.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError("to_xarray needs the extra: pip install 'influence[xarray]'") from error
        variables: dict[str, Any] = {
            "sampling_loss": (("chain", "step"), self.loss.numpy()),
            "init_loss": (("chain", "step"), self.baseline.numpy()),
            **{f"metrics_{name}": (("chain", "step"), x.numpy()) for name, x in self.terms.items()},
        }
        for name, o in self.observables.items():
            n, t = f"batch_{name}", f"token_pos_{name}"
            if o.tokens is not None:
                variables[f"loss_{name}"] = (("chain", "draw", n, t), (o.tokens + o.anchor).numpy())
            elif o.sequences is not None:
                counts = o.labelled.sum(1).clamp_min(1)
                start = (o.anchor * o.labelled).sum(1) / counts
                variables[f"loss_{name}"] = (("chain", "draw", n), (o.sequences + start).numpy())
            if o.ids is not None:
                variables[f"input_ids_{name}"] = ((n, f"token_{name}"), o.ids.numpy())
        facts = {name: str(value) for name, value in self.facts.items()}
        return xarray.Dataset(variables, {"chain": list(self.chains)}, facts)


class RunFacts(NamedTuple):
    """The facts of a run as JSON holds them."""

    observables: dict[str, str]
    terms: list[str]
    chains: tuple[int, ...]
    burn_in: int
    between: int
    facts: dict[str, Any]


class _HyperFacts(NamedTuple):
    """What the facts of a run must say for its estimates."""

    lr: float
    n_beta: float
    localization: float
    weight_decay: float
    groups: dict[str, dict[str, Any]]
    dropped: list[int] = []  # noqa: RUF012 (of a named tuple, never changed)
    stopped: int | None = None


def pack(run: Run, prefix: str) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], dict[str, Any]]:
    """Return a run as tensors, the names of their dimensions, and facts."""
    c, s = "chain", "step"
    named: dict[str, tuple[Tensor, tuple[str, ...]]] = {
        "sampling_loss": (run.loss, (c, s)),
        "baseline_loss": (run.baseline, (c, s)),
        **{f"metrics_{name}": (x, (c, s)) for name, x in run.terms.items()},
    }
    for name, o in run.observables.items():
        n, t, d = f"batch_{name}", f"token_pos_{name}", "draw"
        named |= {
            f"anchor_loss_{name}": (o.anchor, (n, t)),
            f"labelled_{name}": (o.labelled.to(torch.uint8), (n, t)),
            f"index_{name}": (o.index, (n,)),
            f"shifted_mean_{name}": (o.mean, (c, d)),
            **_named_moments(o.moments, f"moments_{name}", "observable", f"position_{name}"),
        }
        if o.ids is not None:
            named[f"input_ids_{name}"] = (o.ids, (n, f"token_{name}"))
        if o.sequences is not None:
            named[f"shifted_sequence_loss_{name}"] = (o.sequences, (c, d, n))
        if o.tokens is not None:
            named[f"shifted_loss_{name}"] = (o.tokens, (c, d, n, t))
    if run.pairs is not None:
        named |= _named_moments(run.pairs, "pairs", "example", "example_2")
    about = {
        "observables": {name: o.identity for name, o in run.observables.items()},
        "terms": list(run.terms),
        "chains": list(run.chains),
        "burn_in": run.burn_in,
        "between": run.between,
        "facts": dict(run.facts),
    }
    tensors = {prefix + name: x for name, (x, _) in named.items()}
    return tensors, {prefix + name: tuple(prefix + axis for axis in axes) for name, (_, axes) in named.items()}, about


def _named_moments(moments: Moments, name: str, p: str, q: str) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    axes = {"draws": (), "x": (p,), "xx": (p,), "y": (q,), "yy": (q,), "xy": (p, q)}
    return {f"{name}_{field}": (x, ("chain", *axes[field])) for field, x in moments._asdict().items()}


def unpack(tensors: Mapping[str, Tensor], about: RunFacts, prefix: str, where: str) -> Run:
    """Return a run of a file.

    Raises:
        BadFileError: if the file lacks a tensor, or its facts cannot be.
    """

    def moments(name: str) -> Moments:
        return Moments(*(tensors[f"{prefix}{name}_{field}"] for field in Moments._fields))

    observables = {
        name: Observed(
            tensors[f"{prefix}anchor_loss_{name}"],
            tensors[f"{prefix}labelled_{name}"].bool(),
            tensors[f"{prefix}index_{name}"],
            tensors.get(f"{prefix}input_ids_{name}"),
            identity,
            tensors[f"{prefix}shifted_mean_{name}"],
            moments(f"moments_{name}"),
            tensors.get(f"{prefix}shifted_sequence_loss_{name}"),
            tensors.get(f"{prefix}shifted_loss_{name}"),
        )
        for name, identity in about.observables.items()
    }
    loss = tensors[f"{prefix}sampling_loss"]
    known = {name: about.facts[name] for name in _HyperFacts._fields if name in about.facts}
    conform(known, _HyperFacts, f"{where}: facts of a run")
    steps = loss.shape[-1] if loss.ndim == 2 else -1
    if len(about.chains) != len(loss) or not 0 <= about.burn_in <= steps or about.between < 1:
        raise BadFileError(f"{where} is not what it says: its losses are not those of {len(about.chains)} chains")
    return Run(
        loss,
        tensors[f"{prefix}baseline_loss"],
        {name: tensors[f"{prefix}metrics_{name}"] for name in about.terms},
        observables,
        moments("pairs") if f"{prefix}pairs_draws" in tensors else None,
        about.chains,
        about.burn_in,
        about.between,
        about.facts,
    )
