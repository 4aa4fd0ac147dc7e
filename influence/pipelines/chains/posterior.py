"""Loads what a sampling command asks for: the loss as a function of all weights, the data, the options."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from influence import data, sgmcmc
from influence.data import Tokenized
from influence.data.sources import mapping_of
from influence.func.loss.functionalize import functionalize
from influence.func.loss.losses import IGNORED
from influence.func.loss.module_loss import ModuleLoss
from influence.func.numbers import check_number
from influence.pipelines.chains.settings import ChainConfig, Sampling
from influence.pipelines.frame.configs import DataConfig, ModelConfig
from influence.pipelines.frame.loading import load_model, load_tokenizer
from influence.pipelines.frame.prepare import loss_of, predicted
from influence.pipelines.frame.ranks import own_device
from influence.pipelines.frame.tokens import data_hash, load_rows, tokens_of
from influence.sgmcmc import SAMPLERS, Options, Sampler, Source
from influence.sgmcmc.runner.stacking import size_of
from influence.types import Params


class Posterior(NamedTuple):
    """What is sampled, as values.

    Attributes:
        loss_fn: the loss, a function of all weights.
        params: the trained weights.
        source: the data.
        observables: what is measured.
        options: how chains are run.
        sampler: builds the sampler.
        n_beta: the inverse temperature.
        notes: what was decided on the way, in words.
    """

    loss_fn: ModuleLoss
    params: Params
    source: Source
    observables: Mapping[str, Source]
    options: Options
    sampler: Callable[..., Sampler]
    n_beta: float
    notes: tuple[str, ...]


def posterior(config: Sampling) -> Posterior:
    """Load the model and the data.

    Raises:
        ValueError: if an option does not fit, before the model is loaded where that can be seen.
    """
    chains, device = config.chains, own_device(config.pace.device)
    options, sampler = options_of(config), sampler_of(chains)
    options.check()
    for lr in config.lrs or (chains.lr,):
        check_number("lr", lr, 0, above=True)
    for name in ("n_beta", "localization", "weight_decay"):
        check_number(name, getattr(chains, name) or 0, 0)
    check_number("init_noise", options.init_noise, 0)
    named = observables_of(config)
    module = load_model(config.model, device)
    reference = config.loss.reference
    other = None if reference is None else load_model(ModelConfig(reference, task=config.model.task), device)
    loss_fn, params = functionalize(
        module, loss_of(config.loss.loss), label_smoothing=config.loss.label_smoothing, reference=other
    )
    tokenizer, known, task = load_tokenizer(config.model), getattr(module, "config", None), config.model.task
    read = functools.partial(_tokens, tokenizer=tokenizer, model=known)
    tokens = read(config.data)
    source = source_of_tokens(tokens, task, device, padded=False)
    batch = source.size if options.batch_size is None else options.batch_size
    if batch > source.size:
        raise ValueError(
            f"the dataset has {source.size:,} examples that predict something, fewer than one batch of {batch:,}: pass "
            f"--batch-size {source.size} or less, or --batch-size None for all of them at every step"
        )
    notes = [tokens.report()]
    if options.num_chains * len(config.restrictions) > 1 and not (options.shared_batches or batch == source.size):
        source, options, note = _stackable(tokens, source, task, device, params, batch, options)
        notes.append(note)
    observables = {}
    for name, own in named.items():
        seen = tokens if own is None else read(own)
        measured = source_of_tokens(seen, task, device, padded=True, most=config.observed)
        if measured.size:
            observables[name] = measured
        else:
            raise ValueError(f"no example of the observable {name!r} predicts a token: there is nothing to measure")
    n_beta = chains.n_beta if chains.n_beta is not None else sgmcmc.default_n_beta(source.size)
    if chains.n_beta is None:
        notes.append(f"n_beta {n_beta:.6g} is n / log n of the {source.size:,} examples; --n-beta sets another")
    return Posterior(loss_fn, params, source, observables, options, sampler, n_beta, tuple(notes))


def options_of(config: Sampling) -> Options:
    """Return how chains are run: in a grid those that diverge are dropped, since it is there to find where they do."""
    options = config.chains.options
    grid = bool(config.lrs or config.localizations)
    return replace(options, on_divergence="drop") if grid and options.on_divergence == "raise" else options


def sampler_of(config: ChainConfig) -> Callable[..., Sampler]:
    """Return what builds the sampler.

    Raises:
        ValueError: naming the argument that it does not take.
    """
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {config.sampler!r}")
    build = SAMPLERS[config.sampler]
    given = mapping_of(config.sampler_kwargs, "sampler_kwargs")
    taken = [name for name in inspect.signature(build).parameters if name not in ("target", "lr")]
    unknown = [name for name in given if name not in taken]
    if unknown:
        raise ValueError(
            f"--sampler-kwargs names {unknown[0]!r}, and {config.sampler} takes {', '.join(taken) or 'none'}: correct "
            "or remove it"
        )
    return functools.partial(build, **{name: _number(name, value) for name, value in given.items()})


def _number(name: str, value: Any) -> Any:
    """Return a number that YAML took for text, such as 1e-3, which has no point; what is no text as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"--sampler-kwargs: {name} must be a number; got {value!r}") from error


def observables_of(config: Sampling) -> dict[str, DataConfig | None]:
    """Return the data of each observable; `None` for the data that chains are trained on.

    Raises:
        ValueError: if two have one name, or a number is out of range.
    """
    if config.observed < 1:
        raise ValueError(f"--observed must be at least 1, examples of each observable; got {config.observed}")
    found: dict[str, DataConfig | None] = {}
    for word in config.observables:
        name, equals, dataset = word.partition("=")
        if name in found:
            raise ValueError(f"two observables are called {name!r}: give each a name of its own, name=dataset")
        text = {key: value for key, value in vars(config.data).items() if key not in OWN_DATA}
        found[name] = DataConfig(dataset, **text) if equals else None
    return found


OWN_DATA = ("dataset", "split", "subset", "data_kwargs", "max_examples", "max_tokens")
"""What a dataset does not share with the observables'; how text becomes tokens it does."""


def source_of_tokens(tokens: Tokenized, task: str, device: str, padded: bool, most: int | None = None) -> Source:
    """Return examples that predict something as a source of batches.

    Args:
        tokens: the dataset.
        task: of the model.
        device: where batches go.
        padded: whether all batches are as wide as the longest example, so that chains' own batches can be stacked.
        most: the first so many examples only.
    """
    rows = torch.arange(len(tokens))
    parts = rows.split(4096) if len(rows) else ()
    predicts = [predicted(data.collate(tokens, part), task) for part in parts]
    rows = rows[torch.cat(predicts)][:most] if predicts else rows
    width = int(tokens.lengths[rows].max()) if padded and len(rows) else 0

    def fetch(index: Int[Tensor, " n"]) -> dict[str, Tensor]:
        batch = data.collate(tokens, rows[index])
        short = width - batch["input_ids"].shape[1]
        if short > 0:
            fills = {"input_ids": tokens.pad, "attention_mask": 0, "labels": IGNORED}
            batch |= {k: torch.nn.functional.pad(batch[k], (0, short), value=fill) for k, fill in fills.items()}
        return batch if device == "cpu" else {key: value.to(device) for key, value in batch.items()}

    return Source(len(rows), fetch, f"{data_hash(tokens)} {'' if most is None else most}".strip())


def _stackable(
    tokens: Tokenized, source: Source, task: str, device: str, params: Params, batch: int, options: Options
) -> tuple[Source, Options, str]:
    """Return data whose batches are of one width, if chains are to be stepped together; otherwise as they are."""
    wide = source_of_tokens(tokens, task, device, padded=True)
    size = options.chain_chunk
    if size is None:
        moving = sum(p.numel() for p in params.values())
        size = size_of(moving, wide.fetch(torch.arange(batch)), options.num_chains, device == "cpu")
    if size == 1:
        return source, replace(options, chain_chunk=1), "chains are stepped one by one"
    real = int(tokens.lengths.sum())
    whole = len(tokens) * int(tokens.lengths.max())
    share = 100 * (1 - real / whole)
    return (
        wide,
        options,
        (
            f"batches are as wide as the longest example, so that chains step together: {share:.0f} % of "
            "positions are padding (--chain-chunk 1 has less)"
        ),
    )


def _tokens(config: DataConfig, tokenizer: Any, model: Any) -> Tokenized:
    """Return a dataset's tokens.

    Raises:
        ValueError: if nothing is predicted in it.
    """
    tokens = tokens_of(config, load_rows(config), tokenizer, model)
    if tokens.document is None and tokens.counts.empty + tokens.counts.single + tokens.counts.unlabelled == len(tokens):
        raise ValueError(
            f"none of the {len(tokens):,} documents of {config.dataset} has a token to predict ({tokens.report()}): a "
            "conversation needs turns of the role assistant, a text two tokens"
        )
    return tokens
