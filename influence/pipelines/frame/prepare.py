"""From a configuration to values: the model as a pure function, the transform, the batches."""

import contextlib
import glob
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from influence import data, hessians, models
from influence.func.fingerprint import weights_hash
from influence.func.loss.functionalize import functionalize
from influence.func.loss.losses import IGNORED
from influence.func.loss.module_loss import LOSSES, ModuleLoss
from influence.func.transform.blocks import as_blocks, split_heads
from influence.func.transform.chain import Transform, chain
from influence.func.transform.precondition import precondition
from influence.func.transform.project import project
from influence.func.transform.scale import unit_norm
from influence.func.transform.whiten import eigen_whiten, kfac_whiten
from influence.hessians import Factors
from influence.index import Index
from influence.pipelines.frame.configs import LossConfig, ModelConfig, RunConfig, TransformConfig
from influence.pipelines.frame.loading import load_model, load_tokenizer, usable
from influence.pipelines.frame.ranks import own_device
from influence.store.folder import run_id
from influence.types import ExampleLoss, Params


def optimizer_step(config: TransformConfig, module: nn.Module, params: Params) -> Transform:
    """Return what a configuration's optimizer makes of gradients.

    Args:
        config: the configuration, with an `optimizer`.
        module: the model that the optimizer trained.
        params: the parameters whose gradients are taken.

    Raises:
        FileNotFoundError: if there is no such optimizer.
        ValueError: if it is another model's, of an unknown kind, or has no moments of a parameter; naming each.
    """
    from influence.train import adam_update, read_optimizer, scale_by_optimizer

    assert config.optimizer is not None
    state = read_optimizer(module, config.optimizer, [glob.escape(name) for name in params])
    return adam_update(state) if config.optimizer_view == "update" else scale_by_optimizer(state)


def transform_of(config: TransformConfig, factors: Factors | None = None, scale: Transform | None = None) -> Transform:
    """Return the transform that a configuration describes.

    Curvature comes where its factors were fitted: on whole blocks, before the projection, or on projected rows.

    Args:
        config: the configuration.
        factors: those of its `hessian`, if they are loaded already.
        scale: what `optimizer_step` makes of its `optimizer`, if it has one.

    Returns:
        The transform.

    Raises:
        ValueError: if the factors belong to other rows, or options exclude one another.
    """
    if config.optimizer is None and config.optimizer_view != "scale":
        raise ValueError("optimizer_view says how an optimizer is applied: pass --optimizer, a checkpoint's folder")
    blocks = as_blocks(config.bias)
    start = chain(blocks, *([split_heads()] if config.heads else []), *([] if scale is None else [scale]))
    sketch = Transform()
    if config.projection_dim:
        sketch = project(
            config.projection_dim,
            config.projection_seed,
            config.projection_kind,
            config.projection_target,
            signs=config.projection_signs,
        )
    end = unit_norm() if config.unit_norm else Transform()
    if config.hessian is None:
        if config.whiten:
            raise ValueError(
                "whiten needs the curvature to whiten with: pass --hessian RUN, as influence hessian wrote"
            )
        return chain(start, sketch, end)
    factors = load_factors(config.hessian) if factors is None else factors
    if factors.under == start.fingerprint:
        return chain(start, *_preconditioned(config, factors, sketch), end)
    if factors.under != chain(start, sketch).fingerprint:
        raise ValueError(
            f"the factors in {config.hessian} were fitted under {factors.description}; here rows are made by "
            f"{chain(start, sketch)}. Pass the same bias, heads and projection options, or fit them under these"
        )
    if config.whiten:
        raise ValueError(
            "whiten chooses the projection by the curvature of whole blocks; these factors are of projected"
        )
    root = precondition(factors, config.power, config.damping, config.inversion, config.missing)
    return chain(start, sketch, root, end)


def _preconditioned(config: TransformConfig, factors: Factors, sketch: Transform) -> tuple[Transform, ...]:
    """Return curvature and projection of whole blocks, one inside the other where that is asked for."""
    dim = config.projection_dim or None
    if config.whiten == "eigen":
        return (eigen_whiten(factors, dim, config.damping, config.inversion, config.power, config.missing),)
    if config.whiten == "kfac":
        kind = config.projection_kind or "rademacher"
        return (kfac_whiten(factors, config.damping, dim, config.projection_seed, kind, config.missing),)
    return (precondition(factors, config.power, config.damping, config.inversion, config.missing), sketch)


def load_factors(path: str | Path) -> Factors:
    """Return the factors of a run of `hessian` or `mix`, or of a file.

    Raises:
        FileNotFoundError: if there are none.
    """
    file = Path(path) / "factors.h5" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        state = (
            "its run is not finished, or it is no run of influence hessian" if Path(path).is_dir() else "no such file"
        )
        raise FileNotFoundError(f"no factors in {path}: {state}; run influence hessian {path} first")
    return hessians.load(file, run_id(file.parent))


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
    device = usable(own_device("cpu" if execution is None else execution.device))
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
    if factors is not None:
        factors.check_function(loss_fn.function)
    return Measured(loss_fn, params, made, load_tokenizer(model), getattr(module, "config", None))


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
