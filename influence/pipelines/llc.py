"""The local learning coefficient of a model, of parts of it, or over a grid of settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from influence import viz
from influence.pipelines.chains.finished import Samples, sampled
from influence.pipelines.chains.settings import SamplingConfig, sampling_of
from influence.pipelines.frame.configs import at_least
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.sgmcmc import llc
from influence.sgmcmc.estimators.llc import LLC
from influence.terminal import table
from influence.visible import visible


@dataclass(frozen=True)
class LlcConfig(SamplingConfig):
    """Estimate the local learning coefficient: half the directions that matter, fewer where the loss is singular.

    influence llc runs/llc --model gpt2 --dataset corpus.jsonl --plot llc.png

    The verdict says what is wrong, if anything: chains that diverge, do not mix, have not settled, or find lower losses
    than the trained weights have. To find settings, run a grid and look for a plateau:

    influence llc runs/g --model gpt2 --dataset corpus.jsonl --lrs 1e-5 1e-4 1e-3 --localizations 10 100 --plot g.png

    Attributes:
        run: the run directory; of a finished run of influence sample or llc, it is read, and needs no model.
        model: the model.
        data: the data that chains are trained on.
        restrictions: which weights move, with chains for each: full, embed, unembed, l0, 'l0 attn', 'l0 mlp', l0h1,
            l0g0, names and globs of parameters; a plus joins them: l0h0+l0h1.
        lrs: run a grid of these step sizes instead, as one computation.
        localizations: and of these localizations.
        estimator: paired takes each batch's own loss at the trained weights as its baseline; steps and draws are
            devinterp's two, with their mean.
        plot: draw the traces and the LLC with its error, or the grid, into this file (.png, .pdf, .svg).
        chains: the chains.
        loss: the loss.
        pace: how they are run.
    """

    restrictions: tuple[str, ...] = ("full",)
    lrs: tuple[float, ...] = ()
    localizations: tuple[float, ...] = ()
    estimator: Literal["paired", "steps", "draws"] = "paired"
    plot: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 0, "lrs", above=True)
        at_least(self, 0, "localizations")


def run(config: LlcConfig, say: Say = quiet) -> Outcome:
    """Sample if need be, and estimate.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The estimates.
    """
    if config.plot is not None:
        viz.check(config.plot)
    samples = sampled("llc", config, sampling_of(config), say)
    if isinstance(samples, Outcome):
        return samples
    grid = all("lr=" in name for name in samples.runs)
    found = estimates(samples, config.estimator)
    facts = {**samples.facts, "estimator": config.estimator, "llc": {name: facts_of(e) for name, e in found.items()}}
    text = table_of(found)
    picture = None
    if grid:
        groups = next(iter(samples.runs.values())).facts["groups"].values()  # those that diverged are in it
        lrs, pulls = (list(dict.fromkeys(group[key] for group in groups)) for key in ("lr", "localization"))
        points = llc.calibration(samples.runs, lrs, pulls)
        text, picture = str(points), viz.plateau(points) if config.plot else None
    elif config.plot:
        picture = viz.llc_traces(found if len(found) > 1 else next(iter(found.values())))
    if config.plot is not None:
        viz.save(picture, config.plot)
        text, facts["plot"] = f"{text}\n{config.plot}", config.plot
    return Outcome(config.run, facts, text)


def estimates(samples: Samples, estimator: str) -> dict[str, LLC]:
    """Return the estimate of every run."""
    return {name: llc.estimate(run, estimator) for name, run in samples.runs.items()}


def facts_of(found: LLC) -> dict[str, Any]:
    """Return an estimate as JSON can write it; what is not known is null."""
    numbers = {name: getattr(found, name) for name in ("mean", "stderr", "std", "ess", "rhat", "drift", "acceptance")}
    return {
        **{name: x if math.isfinite(x) else None for name, x in numbers.items()},
        "per_chain": found.per_chain.tolist(),
        "verdict": found.verdict,
    }


def table_of(found: Mapping[str, LLC]) -> str:
    """Return estimates for a terminal: one in full, several as a table."""
    if len(found) == 1:
        (name, only), *_ = found.items()
        chains = ", ".join(f"{x:.4g}" for x in only.per_chain.tolist())
        where = "" if name == "full" else f"{visible(name, lines=False)}: "
        acceptance = "" if math.isnan(only.acceptance) else f"\nacceptance {only.acceptance:.2f}"
        return f"{where}{only}\nper chain: {chains}{acceptance}"
    rows = [[name, e.mean, f"± {e.stderr:.2g}", round(e.ess), f"{e.rhat:.3f}", e.verdict] for name, e in found.items()]
    return table(["restriction", "LLC", "s.e.", "ess", "R-hat", "verdict"], rows)
