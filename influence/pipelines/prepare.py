"""From a configuration to values: the model as a pure function, the data as tokens."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from influence import data, models
from influence.data.sources import mapping_of
from influence.func.fingerprint import fingerprint, weights_hash
from influence.func.functionalize import functionalize
from influence.func.losses import IGNORED
from influence.func.module_loss import LOSSES, ModuleLoss
from influence.func.transform import Transform
from influence.index import Index
from influence.pipelines.configs import DataConfig, LossConfig, ModelConfig, RunConfig, TransformConfig
from influence.pipelines.ranks import own_device
from influence.pipelines.views import load_factors, optimizer_step, transform_of
from influence.types import ExampleLoss, Params


class Measured(NamedTuple):
    """What is measured, and at which weights.

    Attributes:
        loss_fn: the loss function.
        params: the parameters.
        transform: what is wanted of gradients.
        tokenizer: the model's tokenizer, if it has one.
        config: transformers' config of the model.
    """

    loss_fn: ModuleLoss
    params: Params
    transform: Transform
    tokenizer: Any
    config: Any


def measure(
    model: ModelConfig, loss: LossConfig, transform: TransformConfig, execution: RunConfig | None = None
) -> Measured:
    """Load a model and make the function and the transform of it.

    Args:
        model: which model.
        loss: what is measured.
        transform: what is wanted of gradients.
        execution: where.

    Returns:
        The values.

    Raises:
        ValueError: if an option does not fit, or the curvature is of other weights.
    """
    device = _usable(own_device("cpu" if execution is None else execution.device))
    factors = None if transform.hessian is None else load_factors(transform.hessian)
    made = Transform()
    if transform.optimizer is None:
        made = transform_of(transform, factors)  # whatever is wrong with it shows before the model is loaded
    else:
        from influence.train.checkpoints import find_state

        find_state(transform.optimizer)
    module = load_model(model, device)
    targets = transform.targets or models.layer_matrices(module)
    reference = None if loss.reference is None else load_model(ModelConfig(loss.reference, task=model.task), device)
    loss_fn, params = functionalize(
        module,
        loss_of(loss.loss),
        loss.reduction,
        _with_biases(module, targets) if transform.bias else targets,
        transform.exclude or None,
        label_smoothing=loss.label_smoothing,
        reference=reference,
    )
    if transform.optimizer is not None:
        made = transform_of(transform, factors, optimizer_step(transform, module, params))
    if factors is not None and factors.weights != (weights := weights_hash(loss_fn, params)):
        raise ValueError(
            f"the factors in {transform.hessian} were fitted at other weights (hash {factors.weights[:12]}…, this "
            f"model has {weights[:12]}…): fit them on this model, or load the checkpoint they belong to"
        )
    return Measured(loss_fn, params, made, load_tokenizer(model), getattr(module, "config", None))


def _usable(device: str) -> str:
    """Refuse a device that is not there, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"the device {device!r} cannot be used here ({said}): pass --device cpu, or another"
        ) from error
    return device


def load_model(config: ModelConfig, device: str = "cpu") -> nn.Module:
    """Load a model.

    Raises:
        ValueError: if there is no such model.
    """
    fresh = None if config.peft_init_kwargs is None else mapping_of(config.peft_init_kwargs, "peft_init_kwargs")
    with _found(config.model, "model"):
        return models.load(
            config.model,
            task=config.task,
            precision=config.precision,
            revision=config.revision,
            model_kwargs=mapping_of(config.model_kwargs, "model_kwargs"),
            adapter=config.adapter,
            peft_init_kwargs=fresh,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )


def load_tokenizer(config: ModelConfig) -> Any:
    """Load a model's tokenizer; `None` where it has none and none is named."""
    from transformers import AutoTokenizer

    path = config.tokenizer or config.model
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if config.tokenizer is None and Path(path).is_dir() and not any((Path(path) / name).exists() for name in files):
        return None
    with _found(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


@contextlib.contextmanager
def _found(path: str, what: str) -> Iterator[None]:
    """Say in a line that there is no such thing, where transformers needs a page."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) or Path(path).is_dir():
            raise
        raise ValueError(
            f"no {what} {path!r}: it is no folder here, and the Hub has none that can be reached "
            f"({str(error).splitlines()[0]}). Give a folder which save_pretrained wrote, or the id of a Hub model"
        ) from error


def _with_biases(module: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return targets and the biases of the layers they name."""
    if any("*" in target or "?" in target or "[" in target for target in targets):
        return targets
    names = {name for name, _ in module.named_parameters()}
    partners = [target.removesuffix("weight") + "bias" for target in targets if target.endswith("weight")]
    return (*targets, *(name for name in partners if name in names))


def loss_of(name: str) -> str | ExampleLoss:
    """Return a loss by its name, or a function of the user's by its dotted name.

    Raises:
        ValueError: if there is no such loss or function.
    """
    if name in LOSSES:
        return name
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, or package.module:function of your own; got {name!r}"
        )
    try:
        with _importable(os.getcwd()):
            found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss={name!r} cannot be imported from {os.getcwd()}: {error}") from error
    if not callable(found):
        raise ValueError(f"loss={name!r} is a {type(found).__name__}; a function (output, batch) -> [n] is needed")
    return found


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Let a folder's modules be imported, as python does for scripts."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def check_gradients(index: Index) -> None:
    """Refuse a run whose rows are no gradients.

    Raises:
        ValueError: saying what they are.
    """
    if index.about.kind == "scores":
        raise ValueError(f"{index.path} holds scores, and no gradients: give a run of influence build or reduce")


def read_data(config: DataConfig, measured: Measured) -> data.Tokenized:
    """Return a dataset's tokens.

    Raises:
        ValueError: if no document has a token to predict: every gradient would be zero.
    """
    tokens = tokens_of(config, load_rows(config), measured.tokenizer, measured.config)
    seen = tokens.counts
    if tokens.document is None and seen.empty + seen.single + seen.unlabelled == len(tokens):
        raise ValueError(
            f"none of the {len(tokens):,} documents of {config.dataset} has a token to predict, so every gradient is "
            f"zero ({tokens.report()}): a conversation needs turns of the role assistant, a text two tokens"
        )
    return tokens


def load_rows(config: DataConfig) -> Any:
    """Return a dataset's rows.

    Raises:
        ValueError: if there is no such dataset.
    """
    with _read(config.dataset):
        rows = data.load(config.dataset, split=config.split, subset=config.subset, data_kwargs=config.data_kwargs)
    return rows if config.max_examples is None else rows.select(range(min(config.max_examples, len(rows))))


@contextlib.contextmanager
def _read(dataset: str) -> Iterator[None]:
    """Say in a line what datasets could not read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the dataset {dataset!r} cannot be read: {said}") from error


def text_format(config: DataConfig) -> data.TextFormat:
    """Return which columns hold the text."""
    return data.TextFormat(
        config.prompt_column, config.completion_column, config.conversation_column, config.template, config.end_of_turn
    )


def tokens_of(config: DataConfig, rows: Any, tokenizer: Any, model: Any) -> data.Tokenized:
    """Return the tokens of rows.

    Args:
        config: how they become tokens.
        rows: what `load_rows` returns.
        tokenizer: the tokenizer.
        model: transformers' config of the model, which knows its longest document.

    Returns:
        The tokens.
    """
    limit = config.max_length if config.max_length is not None else data.context_length(tokenizer, model)
    return data.tokenize(
        rows,
        tokenizer,
        text_format(config),
        max_length=None if config.chunk_length is not None else limit,
        truncation=config.truncation,
        chunk_length=config.chunk_length,
        max_tokens=config.max_tokens,
        reward_column=config.reward_column,
        advantage_column=config.advantage_column,
        skip_nan_rewards=config.skip_nan_rewards,
    )


def vocabulary_hash(tokenizer: Any) -> str | None:
    """Return the hash of which number a tokenizer gives to which token; `None` where there is no tokenizer."""
    return None if tokenizer is None else fingerprint(tokenizer.get_vocab())


def data_hash(tokens: data.Tokenized) -> str:
    """Return the hash of everything a pass sees of its data."""
    return fingerprint({name: getattr(tokens, name) for name in ("ids", "labels", "offsets", "weight")})


def batches_of(execution: RunConfig) -> Callable[[data.Tokenized], Iterator[dict[str, Tensor]]]:
    """Return the function from a shard to its batches, on the device."""
    device = own_device(execution.device)

    def batches(shard: data.Tokenized) -> Iterator[dict[str, Tensor]]:
        made = data.batches(shard, execution.token_budget, max_rows=execution.max_rows)
        return made if device == "cpu" else ({k: v.to(device) for k, v in batch.items()} for batch in made)

    return batches


def predicted(batch: Mapping[str, Tensor], task: str) -> Tensor:
    """Return which examples of a batch have a label to predict: `bool [n]`, what a mean averages."""
    labels = batch["labels"][:, 1:] if task == "causal" else batch["labels"]
    return (labels != IGNORED).any(1)


def float_size(dtype: str) -> int:
    """Return the bytes of a stored number."""
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]


def peak_memory(device: str) -> int:
    """Return the most bytes this process has used so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def own_shards(tokens: data.Tokenized, execution: RunConfig) -> list[data.Tokenized]:
    """Return all shards of a dataset; which of them are a rank's own, the pass decides."""
    return data.shards(tokens, execution.shard_size)
