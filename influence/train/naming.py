"""Names: which parameter each entry of an optimizer's state belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from influence.models.targets import active_adapters
from influence.train.entries import check_entry

WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names that the Trainer of transformers 5 takes out of weight decay, beside the weights of `nn.LayerNorm`."""

State = Mapping[Any, Mapping[str, Any]]
Groups = Sequence[Mapping[str, Any]]


def name_entries(model: nn.Module, state: State, groups: Groups, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return whose entry is whose: `{parameter: key of its entry}`, and `{parameter: number of its group}`.

    Names that were saved come first (`param_names` of the groups, `param_name` of the entries, keys that are names);
    otherwise entries are numbered, group after group, in the order of `named_parameters()`, and two groups are split
    as the Trainer splits them. Every shape is verified.

    Args:
        model: the model that was trained.
        state: entries by number or name.
        groups: the parameter groups, `params` listing the keys of the entries.
        where: the source, for messages.

    Raises:
        ValueError: if they do not fit the model, saying how.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keys = [list(group["params"]) for group in groups] or [list(state)]
    saved = _saved_names(model, state, groups, keys, where)
    if saved is not None:
        _check_shapes(saved, state, keys, shapes)
        return _joined(saved, keys)
    sizes, tried = [len(group) for group in keys], []
    problem: ValueError | None = None
    for order in _orders(model, len(keys)):
        tried.append([len(group) for group in order])
        if tried[-1] != sizes:
            continue
        try:
            _check_shapes(order, state, keys, shapes)
            return _joined(order, keys)
        except ValueError as error:
            problem = problem or error
    if problem is not None:
        raise ValueError(f"{where}: {problem}") from problem
    known = " or ".join(sorted({str(size) for size in tried})) or "one or two groups"
    raise ValueError(
        f"{where} holds {sum(sizes)} parameters in groups of {sizes}; {type(model).__name__} gives {known}: it is "
        "the optimizer of another model, or its groups are made in a way that does not show. Build the optimizer from "
        "model.named_parameters(), whose names are saved, or pass the live optimizer"
    )


def _saved_names(
    model: nn.Module, state: State, groups: Groups, keys: list[list[Any]], where: str
) -> list[list[str]] | None:
    """Return the names that were saved with the state, as the model has them."""
    if any("param_names" in group for group in groups):
        named = [list(group["param_names"]) for group in groups]
    elif state and all(isinstance(entry, Mapping) and "param_name" in entry for entry in state.values()):
        named = [[state[key]["param_name"] if key in state else f"{key}" for key in group] for group in keys]
    elif any(isinstance(key, str) for group in keys for key in group):
        named = [[str(key) for key in group] for group in keys]
    else:
        return None
    own = {name: name for name, _ in model.named_parameters()}
    aliases = {alias: name for name in own for alias in _aliases(model, name)} | own
    found = [[aliases.get(_unwrapped(name)) for name in group] for group in named]
    unknown = [name for name, own in zip(_flat(named), _flat(found), strict=True) if own is None]
    if unknown:
        raise ValueError(
            f"{where} is of parameters that {type(model).__name__} does not have: {', '.join(unknown[:5])}"
            f"{' …' if len(unknown) > 5 else ''} ({len(unknown)} of {sum(map(len, named))}). Load the model that it "
            "was saved with, adapters included"
        )
    return [[name for name in group if name is not None] for group in found]


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").replace(".parametrizations.weight.original", ".weight")


def _aliases(model: nn.Module, name: str) -> Iterator[str]:
    """Yield other names of a parameter: without its adapter's name, and as the base model has it."""
    active = getattr(model, "active_adapters", ())
    adapters = active if isinstance(active, list | tuple) else ()
    short = name
    for adapter in adapters:
        short = short.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    yield short
    yield short.removeprefix("base_model.model.")
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(prefix, str):
        yield name.removeprefix(f"{prefix}.")


def _orders(model: nn.Module, count: int) -> Iterator[list[list[str]]]:
    """Yield the orders in which an optimizer may have got a model's parameters."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    every = [name for name, _ in model.named_parameters()]
    own = active_adapters(model)
    adapters = [name for name in every if name.startswith(own)]
    some = [names for names in (trainable, adapters) if names]  # PEFT loads adapters frozen
    if count == 1:
        yield from ([names] for names in (*some, every))
    elif count == 2:
        ndim = {name: p.ndim for name, p in model.named_parameters()}
        for decays in (*_decaying(model), {name for name in every if ndim[name] >= 2}):
            for names in some:
                yield [[name for name in names if (name in decays) == first] for first in (True, False)]


def _decaying(model: nn.Module) -> Iterator[set[str]]:
    """Yield the names which the Trainer decays: by its rule now, and by the one before."""
    from transformers.trainer_pt_utils import get_parameter_names

    yield set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))
    yield {name for name in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in name}


def _check_shapes(
    names: list[list[str]], state: State, keys: list[list[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, key in zip(_flat(names), _flat(keys), strict=True):
        if state.get(key):
            check_entry(name, state[key], shapes[name])


def _joined(names: list[list[str]], keys: list[list[Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    entries = dict(zip(_flat(names), _flat(keys), strict=True))
    return entries, {name: number for number, group in enumerate(names) for name in group}


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for group in groups for item in group]


def name_live(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return whose parameter is whose in a live optimizer: `{name: parameter}`, and the number of its group.

    Raises:
        ValueError: if none of them is the model's.
    """
    own = {id(p): name for name, p in model.named_parameters()}
    found = {own[id(p)]: (p, number) for number, group in enumerate(groups) for p in group["params"] if id(p) in own}
    if not found:
        count = sum(len(group["params"]) for group in groups)
        raise ValueError(
            f"none of the optimizer's {count} parameters is one of this {type(model).__name__}'s: pass the very model "
            "that it updates"
        )
    return {name: p for name, (p, _) in found.items()}, {name: number for name, (_, number) in found.items()}
