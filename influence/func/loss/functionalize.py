"""From a module to a pure function: the one edge where modules become `(loss_fn, params)`."""

import copy
import types
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from influence.families import experts_of, heads_of
from influence.func.loss.described import described
from influence.func.loss.module_loss import LOSSES, Model, ModuleLoss, constants_of
from influence.func.loss.unembedding import unembedding
from influence.func.numbers import check_number
from influence.func.transform.layout import Layout, ParamLayout, block_name
from influence.types import ExampleLoss, Params

TASKS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForSequenceClassification": "example",
    "ForImageClassification": "example",
    "ForMaskedLM": "position",
    "ForTokenClassification": "position",
}
"""Ends of Hugging Face's class names, and where their labels sit: at the next token, the example, the position."""


def functionalize(
    model: nn.Module,
    loss: str | ExampleLoss = "cross_entropy",
    reduction: str = "sum",
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    mode: str = "eval",
    label_smoothing: float = 0.0,
    reference: nn.Module | None = None,
) -> tuple[ModuleLoss, Params]:
    """Turn a module into a pure function of its parameters, one loss per example.

    The function works on a skeleton of the module without storage; the module itself is never touched. The parameters
    alias the module's (nothing is copied): train the module further and they move along.

    Args:
        model: any module. Hugging Face causal LMs, masked LMs, sequence, token and image classifiers are known.
        loss: `"cross_entropy"`, `"squared_error"` (`‖output - labels‖² / 2`), `"kl"` (`KL(model ‖ reference)`),
            `"log_odds"` (TRAK's output function), or your own `loss(output, batch) -> [n]`, which sees the whole batch,
            `weight` included, and is taken as it is.
        reduction: `"sum"` or `"mean"` over an example's own labelled positions.
        targets: globs over parameter names to differentiate; default all. The rest is closed over.
        exclude: globs over parameter names to leave out.
        mode: `"eval"` or `"train"`; dropout must be inactive and no layer may mix examples.
        label_smoothing: for cross-entropy.
        reference: the other model of a KL; default: the same model with its PEFT adapters off.

    Returns:
        `(loss_fn, params)`. A dictionary batch is passed to the model by name, but for `labels`, `weight` (multiplies
        an example's loss, as advantages do) and `index`; a tuple `(x, y)` as `model(x)`. A causal LM's labels default
        to its unpadded `input_ids` and are shifted here.

    Raises:
        ValueError: if an option is unknown, a glob matches nothing, or the loss does not fit the model.

    Example:
        >>> import torch
        >>> from influence import functionalize
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 3), targets="*weight")
        >>> loss_fn(params, (torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))).shape
        torch.Size([5])
        >>> list(params)
        ['weight']
    """
    _check_options(model, loss, reduction, mode, label_smoothing, reference)
    quantised = [name for name, module in model.named_modules() if is_quantised(module)]
    if quantised:
        raise ValueError(
            f"{len(quantised)} layers ({quantised[0]}, …) are quantised by {type(model.get_submodule(quantised[0]))}, "
            "which no pure function can run: load the model by influence.models.load(precision='int4' or 'int8')"
        )
    named = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    chosen = select(list(named), targets, exclude)
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in set(chosen)}
    skeleton = make_skeleton(model, mode)
    mixing = [name for name, m in skeleton.named_modules() if mixes_examples(m)]
    if mixing:
        raise ValueError(
            f"{mixing[:3]} normalise over the batch in train mode, so an example's loss depends on the others and has "
            "no gradient of its own; use mode='eval', or torch.func.replace_all_batch_norm_modules_ on a copy"
        )
    dropping = [name for name, m in skeleton.named_modules() if m.training and drops(m)]
    if dropping:
        raise ValueError(f"dropout is active in {dropping[:3]}: use mode='eval', or set its p to 0 on a copy")
    ours = _made(skeleton, _task(model), {**named, **frozen})
    other = _reference(model, reference, loss)
    spec = ModuleLoss(ours, frozen, module_layout(model), loss, reduction, label_smoothing, other)
    return spec, {name: named[name] for name in chosen}


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer keeps its weight in a library's own format, which is lost when a function is made of it."""
    return type(module).__module__.split(".")[0] in ("bitsandbytes", "gptqmodel", "awq", "auto_gptq")


def _check_options(
    model: nn.Module, loss: str | ExampleLoss, reduction: str, mode: str, smoothing: float, reference: Any
) -> None:
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, or a function (output, batch) -> [n]; got {loss!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean'; got {reduction!r}")
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train'; got {mode!r}")
    check_number("label_smoothing", smoothing, 0, 1)
    if smoothing and loss != "cross_entropy":
        raise ValueError("label_smoothing is for loss='cross_entropy'")
    if reference is not None and loss != "kl":
        raise ValueError("reference is for loss='kl'")
    if loss == "kl" and reference is None and not hasattr(model, "disable_adapter"):
        raise ValueError("loss='kl' needs reference=another model, or a PEFT model whose adapters can be switched off")


def select(names: Sequence[str], targets: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> list[str]:
    """Return the names that globs choose.

    Args:
        names: all names.
        targets: globs to take; `None` takes all.
        exclude: globs to leave out.

    Returns:
        The chosen names, in order.

    Raises:
        ValueError: if a glob matches nothing, with near misses, or nothing is left.
    """

    def matched(globs: str | Sequence[str], which: str) -> set[str]:
        found: set[str] = set()
        for glob in [globs] if isinstance(globs, str) else globs:
            hits = {name for name in names if fnmatchcase(name, glob)}
            if not hits:
                near = get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.2) or list(names[:3])
                raise ValueError(
                    f"{which}={glob!r} matches none of {len(names)} parameters; near misses: {', '.join(near)}"
                )
            found |= hits
        return found

    kept = set(names) if targets is None else matched(targets, "targets")
    kept -= matched(exclude, "exclude") if exclude else set()
    if not kept:
        raise ValueError("targets and exclude together leave no parameter")
    return [name for name in names if name in kept]


def make_skeleton(model: nn.Module, mode: str = "eval") -> nn.Module:
    """Return a copy of a module without parameter storage, in a mode.

    Transformers' once-only reminder about padding looks at the tokens' values, which no transform or compiled graph
    can: the copy does without it.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo).train(mode == "train")
    for module in skeleton.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            vars(module)["warn_if_padding_and_no_attention_mask"] = _no_reminder
        own = {name: f for name, f in vars(module).items() if isinstance(f, types.FunctionType | types.MethodType)}
        vars(module).update({name: _moved(f, memo) for name, f in own.items()})
    return skeleton


def _moved(value: Any, memo: dict[int, Any]) -> Any:
    """Return a function with the copies of the modules that it closes over.

    A forward that was put on a module (TRL's trainers and others do) calls the one before it, which is bound to the
    module itself, weights and all: copying a module does not copy what a function on it closes over.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(_moved(value.__func__, memo), _moved(value.__self__, memo))
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    if id(value) in memo:  # a function may close over itself
        return memo[id(value)]
    cells = tuple(types.CellType() for _ in value.__closure__)
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = value.__kwdefaults__, value.__dict__
    memo[id(value)] = made
    for cell, held in zip(cells, value.__closure__, strict=True):
        if held != types.CellType():  # nothing in it yet
            cell.cell_contents = _moved(held.cell_contents, memo)
    return made


def _no_reminder(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Say nothing."""


def mixes_examples(module: nn.Module) -> bool:
    """Whether a layer is known to normalise over the batch in its present mode."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or not module.track_running_stats


def drops(module: nn.Module) -> bool:
    """Whether a layer has active dropout of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0


def _task(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", lambda: model)()
    name = type(base).__name__
    return next((task for end, task in TASKS.items() if name.endswith(end)), "plain")


def _reference(model: nn.Module, reference: nn.Module | None, loss: Any) -> tuple[Model, Params] | None:
    """Return the other model of a KL, and its parameters."""
    if loss != "kl":
        return None
    source = model if reference is None else reference
    skeleton = make_skeleton(source)
    if reference is None:
        for module in skeleton.modules():
            if hasattr(module, "_disable_adapters"):
                vars(module)["_disable_adapters"] = True
    values = {name: p.detach() for name, p in source.named_parameters()}
    return _made(skeleton, _task(source), values), values


def _made(skeleton: nn.Module, task: str, values: Params) -> Model:
    """Return a skeleton as a function; what it is made of is read before anything runs in it."""
    constants, function = constants_of(skeleton), described(skeleton, task)
    return Model(skeleton, task, unembedding(skeleton, values), constants, function)


def module_layout(model: nn.Module) -> Layout:
    """Return the layout of a module's parameters, from the classes of its layers and its config."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
    for module in model.modules():
        weight, bias = (getattr(module, key, None) for key in ("weight", "bias"))
        name = names.get(id(weight)) if isinstance(weight, nn.Parameter) else None
        partner = names.get(id(bias)) if isinstance(bias, nn.Parameter) else None
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.in_proj_weight, nn.Parameter):
            found[names[id(module.in_proj_weight)]] = {
                "family": "linear",
                "bias": names.get(id(module.in_proj_bias)),
            }
        for stack in experts_of(module):
            matrix, biases = names[id(getattr(module, stack.matrix))], None
            held = {"family": "linear", "experts": stack.number}
            if stack.bias is not None:
                biases = names[id(getattr(module, stack.bias))]
                found[biases] = held
            found[matrix] = {**held, "bias": biases, "transposed": stack.transposed}
        if name is None or found[name]:
            continue
        if isinstance(module, nn.Linear):
            found[name] = {"family": "linear", "bias": partner}
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            found[name] = {"family": "linear", "bias": partner, "transposed": True}
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name] = {"family": "conv", "bias": partner, "groups": module.groups}
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[name] = {"family": "embedding"}
        elif "Norm" in type(module).__name__:
            found[name] = {"family": "norm"}
    config = getattr(model, "config", None)
    layouts = {}
    for name, p in model.named_parameters():
        heads = heads_of(config, block_name(_unadapted(name))) if p.ndim == 2 else None
        layouts[name] = ParamLayout(tuple(p.shape), p.dtype, p.device, heads=heads, **found[name])
    return Layout(layouts)


def _unadapted(name: str) -> str:
    """Return a PEFT parameter's name as its base model has it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
