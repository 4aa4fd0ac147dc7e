"""Run chains around trained weights, and keep what the other commands of sampling read."""

from dataclasses import dataclass
from pathlib import Path

from influence.pipelines.chains.finished import Samples, sampled
from influence.pipelines.chains.settings import SamplingConfig, sampling_of
from influence.pipelines.frame.configs import at_least
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.llc import estimates, table_of
from influence.sgmcmc.runner.traces import RESULT
from influence.terminal import size
from influence.visible import visible


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """Run chains around the trained weights, and keep what observables do along them.

    influence sample runs/s --model gpt2 --dataset corpus.jsonl --observables code=code.jsonl prose=prose.jsonl

    Then influence llc runs/s, and bif and susceptibilities, read it, as often as you like. A run that was killed goes
    on when the same is typed again; torchrun shares its chains out among processes, and none of this changes a chain.

    Attributes:
        run: the run directory; run.h5 in it is the result, which netCDF-4 readers understand.
        model: the model.
        data: the data that chains are trained on.
        observables: what is measured at every draw: name=dataset, or a word for the data themselves.
        observed: use the first so many examples of each observable.
        restrictions: which weights move, with chains for each: full, embed, unembed, l0, 'l0 attn', 'l0 mlp', l0h1,
            l0g0, names and globs of parameters; a plus joins them: l0h0+l0h1.
        chains: the chains.
        loss: the loss.
        pace: how they are run.
    """

    observables: tuple[str, ...] = ()
    observed: int = 64
    restrictions: tuple[str, ...] = ("full",)

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 1, "observed")


def run(config: SampleConfig, say: Say = quiet) -> Outcome:
    """Sample.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        What was sampled, and its LLC.
    """
    samples = sampled("sample", config, sampling_of(config), say)
    return outcome(samples) if isinstance(samples, Samples) else samples


def outcome(samples: Samples) -> Outcome:
    """Return what there is to say of finished chains."""
    found = estimates(samples, "paired")
    named = ", ".join(
        f"{visible(name, lines=False)} ({n:,} examples)" for name, n in samples.facts["observables"].items()
    )
    steps, burn_in = samples.facts["steps"], samples.facts["burn_in"]
    several = next(iter(samples.runs.values())).loss.shape[0]
    text = (
        f"{several} chains of {steps:,} steps, {burn_in:,} of them burn-in; observables: "
        f"{named or 'none'}\n{table_of(found)}\n{Path(samples.directory) / RESULT}: "
        f"{size((samples.directory / RESULT).stat().st_size)}"
    )
    return Outcome(str(samples.directory), samples.facts, text)
