"""What sampling is made of, as values: the chains, the loss they feel, and how they are run."""

import math
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from influence.pipelines.frame.configs import Data, DataConfig, Model, ModelConfig, Run, at_least


@dataclass(frozen=True)
class ChainConfig:
    """The chains, and the law they draw from: exp(-n_beta L(w) - localization/2 |w - w*|² - weight_decay/2 |w|²).

    Attributes:
        lr: step size: too large diverges or inflates the LLC, too small does not mix; influence llc --lrs compares.
        n_beta: inverse temperature, times the mean loss; default n / log n of the dataset's n examples.
        localization: pull to the trained weights; less explores more widely and mixes more slowly.
        weight_decay: pull to zero.
        sampler: how chains step. leimkuhler_matthews costs the same as sgld without its bias in lr; mala says its
            acceptance.
        sampler_kwargs: more arguments of the sampler, as JSON or YAML: '{bounding_box: 0.1}', '{metrics: true}'.
        batch_size: examples of a step; 0 takes all at every step.
        num_chains: chains. Their disagreement is part of the error.
        num_burnin_steps: steps before the first draw, which no estimator sees.
        num_draws: draws of each chain, at which observables are measured.
        num_steps_bw_draws: steps of a draw.
        shared_batches: all chains see the same batches; their spread is then less than the error.
        control_variate: take gradients as differences to those at the trained weights: less noise, at twice the cost.
        accumulate: compute a batch's gradient in so many pieces.
        init_noise: start chains so far from the trained weights, per weight.
        keep: of observables, beside their moments: losses of examples, or of tokens; auto keeps what the command needs.
        on_divergence: what to do with a chain whose loss is no number: fail, drop the chain, or keep what came before,
            of all chains.
        seed: of noise and of the order of the data.
    """

    lr: float = 1e-4
    n_beta: float | None = None
    localization: float = 100.0
    weight_decay: float = 0.0
    sampler: Literal["sgld", "rmsprop_sgld", "adam_sgld", "sghmc", "sgnht", "leimkuhler_matthews", "mala"] = "sgld"
    sampler_kwargs: str | None = None
    batch_size: int = 32
    num_chains: int = 4
    num_burnin_steps: int = 100
    num_draws: int = 200
    num_steps_bw_draws: int = 1
    shared_batches: bool = False
    control_variate: bool = False
    accumulate: int = 1
    init_noise: float = 0.0
    keep: Literal["auto", "sequences", "tokens", "moments"] = "auto"
    on_divergence: Literal["raise", "drop", "prefix"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no number; the ranges are the samplers' own."""
        at_least(self, -math.inf, "lr", "n_beta", "localization", "weight_decay", "init_noise")


@dataclass(frozen=True)
class FeltConfig:
    """The loss that chains feel: its mean over labelled positions.

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
    """How chains are run. Nothing here changes a number beyond rounding.

    Attributes:
        chain_chunk: chains that are stepped together; default by the size of the model.
        observable_batch: examples of an observable that are evaluated at a time; default the batch size.
        checkpoint_every: draws between checkpoints: what a crash loses.
        device: where: cpu, cuda, cuda:1, mps. Ranks take their own GPU, and chains of their own.
        overwrite: replace what is in the run directory.
        progress: show a bar with the loss, the LLC so far and the acceptance; default where there is a terminal.
        dry_run: print the plan and stop.
    """

    chain_chunk: int | None = None
    observable_batch: int | None = None
    checkpoint_every: int = 50
    device: str = "cpu"
    overwrite: bool = False
    progress: bool | None = None
    dry_run: bool = False


Chains: TypeAlias = Annotated[ChainConfig, tyro.conf.OmitArgPrefixes]
Felt: TypeAlias = Annotated[FeltConfig, tyro.conf.OmitArgPrefixes]
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
        loss: the loss they feel.
        pace: how they are run.
    """

    run: Run
    model: Model = field(default_factory=no_model)
    data: Data = field(default_factory=no_data)
    _: KW_ONLY
    chains: Chains = field(default_factory=ChainConfig)
    loss: Felt = field(default_factory=FeltConfig)
    pace: Pace = field(default_factory=PaceConfig)


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """Everything that a run of chains is made of, whichever command asks for it.

    Attributes:
        run: the run directory.
        model: the model.
        data: the data that chains are trained on.
        chains: the chains.
        loss: the loss they feel.
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
