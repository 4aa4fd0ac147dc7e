"""Settings of the sampling commands: the chains with their `sgmcmc.Options`, the loss, and where they are run."""

import math
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from influence.pipelines.frame.configs import Data, DataConfig, Model, ModelConfig, Run, at_least
from influence.sgmcmc import SAMPLERS, Options
from influence.sgmcmc.runner.schedule import Keep

if TYPE_CHECKING:
    SamplerName: TypeAlias = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]

RunOptions: TypeAlias = Annotated[Options, tyro.conf.OmitArgPrefixes]


def default_options() -> Options:
    """Return the defaults of the command line: those of `Options`, with steps of burn-in before the first draw."""
    return Options(num_burnin_steps=100)


@dataclass(frozen=True)
class ChainConfig:
    """The law of the chains, exp(-n_beta L(w) - localization/2 |w - w*|² - weight_decay/2 |w|²), and their steps.

    Attributes:
        lr: step size: too large diverges or inflates the LLC, too small does not mix; influence llc --lrs compares.
        n_beta: inverse temperature, times the mean loss; default n / log n of the dataset's n examples.
        localization: pull to the trained weights; less explores more widely and mixes more slowly.
        weight_decay: pull to zero.
        sampler: how chains step. leimkuhler_matthews costs the same as sgld without its bias in lr; mala says its
            acceptance.
        sampler_kwargs: more arguments of the sampler, as JSON or YAML: '{bounding_box: 0.1}', '{metrics: true}'.
        seed: of noise and of the order of the data.
        options: how many chains there are, and how they are run.
    """

    lr: float = 1e-4
    n_beta: float | None = None
    localization: float = 100.0
    weight_decay: float = 0.0
    sampler: SamplerName = "sgld"
    sampler_kwargs: str | None = None
    seed: int = 0
    options: RunOptions = field(default_factory=default_options)

    def __post_init__(self) -> None:
        """Refuse numbers that are not finite; their ranges are checked when the run is planned."""
        at_least(self, -math.inf, "lr", "n_beta", "localization", "weight_decay")
        at_least(self.options, -math.inf, "init_noise")


@dataclass(frozen=True)
class MeanLossConfig:
    """The loss that chains are run on: its mean over labelled positions.

    Attributes:
        loss: cross_entropy, squared_error, kl, log_odds, or a function of your own, package.module:function, called as
            function(model_output, batch) and returning one loss per example.
        label_smoothing: of the cross-entropy.
        reference: for kl, a folder or Hub id of the other model; default the model without its adapters.
    """

    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    reference: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        at_least(self, 0, "label_smoothing", most=1)


@dataclass(frozen=True)
class PaceConfig:
    """Where chains are run, and what becomes of the run directory.

    Attributes:
        device: where: cpu, cuda, cuda:1, mps. Ranks take their own GPU, and chains of their own.
        overwrite: replace what is in the run directory.
        dry_run: print the plan and stop.
    """

    device: str = "cpu"
    overwrite: bool = False
    dry_run: bool = False


Chains: TypeAlias = Annotated[ChainConfig, tyro.conf.OmitArgPrefixes]
MeanLoss: TypeAlias = Annotated[MeanLossConfig, tyro.conf.OmitArgPrefixes]
Pace: TypeAlias = Annotated[PaceConfig, tyro.conf.OmitArgPrefixes]


def no_model() -> ModelConfig:
    """Return what stands where no model is named, because a finished run is read."""
    return ModelConfig("")


def no_data() -> DataConfig:
    """Return what stands where no dataset is named."""
    return DataConfig("")


@dataclass(frozen=True)
class SamplingConfig:
    """What every command that samples takes.

    Attributes:
        run: the run directory; of a finished run, it is read, and needs no model.
        model: the model.
        data: the data that chains are trained on.
        chains: the chains.
        loss: the loss they are run on.
        pace: how they are run.
    """

    run: Run
    model: Model = field(default_factory=no_model)
    data: Data = field(default_factory=no_data)
    _: KW_ONLY
    chains: Chains = field(default_factory=ChainConfig)
    loss: MeanLoss = field(default_factory=MeanLossConfig)
    pace: Pace = field(default_factory=PaceConfig)


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """Everything that a run of chains is made of, whichever command asks for it.

    Attributes:
        run: the run directory.
        model: the model.
        data: the data that chains are trained on.
        chains: the chains.
        loss: the loss they are run on.
        pace: how they are run.
        observables: what is measured at every draw: `name=dataset`, or a word for the data themselves.
        observed: examples of each.
        restrictions: which weights move, a group of chains for each.
        lrs: step sizes of a grid, instead of the chains' own.
        localizations: localizations of a grid.
    """

    observables: tuple[str, ...] = ()
    observed: int = 64
    restrictions: tuple[str, ...] = ("full",)
    lrs: tuple[float, ...] = ()
    localizations: tuple[float, ...] = ()


def sampling_of(config: SamplingConfig, **instead: Any) -> Sampling:
    """Return what a command's configuration asks to be sampled, with some of it replaced."""
    asked = {f.name: getattr(config, f.name) for f in fields(Sampling) if hasattr(config, f.name)}
    return Sampling(**{**asked, **instead})


def with_keep(chains: ChainConfig, keep: Keep) -> ChainConfig:
    """Return chains that keep of observables what a command needs, unless something else is asked for."""
    asked = chains.options.keep
    return replace(chains, options=replace(chains.options, keep=keep)) if asked == "auto" else chains
