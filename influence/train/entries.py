"""Names: which parameter each entry of an optimizer's state belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from influence.func.numbers import check_number
from influence.func.transform.scale import Factored, check_second
from influence.models.describe import active_adapters
from influence.store import BadFileError

QUANTISED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes keeps what FSDP cannot shard."""
BLOCK_SIZES = (256, 2048)
"""Entries that share one largest value: since bitsandbytes 0.44, and before."""
FACTORS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))
"""Adafactor's, in transformers and in torch."""


class Entry(NamedTuple):
    """What an optimizer keeps of one parameter.

    Attributes:
        kind: `"adam"` or `"adafactor"`.
        second: the second moment, as kept: no bias correction.
        first: the first moment, if there is one.
        step: updates so far, if it counts them.
    """

    kind: str
    second: Tensor | Factored
    first: Tensor | None
    step: float | None


def read_entry(name: str, entry: Mapping[str, Any], shape: tuple[int, ...]) -> Entry:
    """Return a parameter's moments.

    Args:
        name: the parameter, for messages.
        entry: its part of the optimizer's state.
        shape: the parameter's shape.

    Returns:
        The moments, in at least float32.

    Raises:
        ValueError: if no known optimizer keeps such a state, or the shapes are another parameter's.
    """
    check_entry(name, entry, shape)
    held = _held(entry)
    step = None if held.get("step") is None else float(held["step"])
    first = None if held.get("exp_avg") is None else _wide(held["exp_avg"])
    if "state2" in held:
        return Entry("adam", _decoded(held, 2).reshape(shape), _decoded(held, 1).reshape(shape), step)
    if "exp_avg_sq_row" in held:
        return Entry("adafactor", _product(_wide(held["exp_avg_sq_row"]), _wide(held["exp_avg_sq_col"])), first, step)
    if "row_var" in held:
        row, col = _wide(held["row_var"]).squeeze(-1), _wide(held["col_var"]).squeeze(-2)
        return Entry("adafactor", _product(row, col), None, step)
    if "variance" in held:
        return Entry("adafactor", _wide(held["variance"]), None, step)
    kind = "adafactor" if "RMS" in held else "adam"
    return Entry(kind, _wide(held.get("max_exp_avg_sq", held["exp_avg_sq"])), first, step)


def check_entry(name: str, entry: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Refuse an entry that no known optimizer keeps, or whose shapes are another parameter's.

    Raises:
        ValueError: naming the parameter, and what came.
    """
    held = _held(entry)
    factors = next((keys for keys in FACTORS if keys[0] in held), None)
    whole = next((key for key in ("state2", "exp_avg_sq", "variance") if key in held), None)
    if factors is not None:
        row, col = (tuple(held[key].shape) for key in factors)
        got = (*(row[:-1] if factors[0] == "row_var" else row), col[-1])
    elif whole is not None:
        got = tuple(held[whole].shape)
    else:
        raise ValueError(
            f"the optimizer keeps {', '.join(sorted(map(str, held))) or 'nothing'} for {name!r}, and no second moment: "
            "expected the state of Adam or AdamW (exp_avg_sq), Adafactor (exp_avg_sq_row, or row_var and variance) or "
            "bitsandbytes' Adam (state2)"
        )
    flat = whole == "state2" and got == (prod(shape),)
    if got != shape and not flat:
        raise ValueError(
            f"the moment of {name!r} has shape {list(got)}, and the parameter {list(shape)}: this is the optimizer of "
            "another model, or of another order of parameters"
        )


ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
EIGHT_BIT = ("state1", "state2", "absmax1", "absmax2", "max1", "max2", "qmap1", "qmap2")
TENSORS = (*ADAM, *EIGHT_BIT, *(key for keys in FACTORS for key in keys), "variance")
"""Parts of an entry that are tensors."""


def checked(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an optimizer's state dict whose every part that is read is of its type.

    Args:
        found: the state dict.
        where: the source, for messages.

    Raises:
        BadFileError: naming the source and the part.
    """

    def refuse(what: str, got: Any) -> BadFileError:
        return BadFileError(f"{where} is no state of an optimizer: {what}; it is a {type(got).__name__}")

    def check(entry: Any, key: Any) -> None:
        if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
            raise refuse(f"the entry {key!r} must be a mapping", entry)
        for name in TENSORS:
            if not isinstance(entry.get(name), Tensor | None) or (name != "exp_avg" and entry.get(name, 0) is None):
                raise refuse(f"{name} of the entry {key!r} must be a tensor", entry[name])
        step = entry.get("step")
        if not isinstance(step, Tensor | float | int | None) or (isinstance(step, Tensor) and step.numel() != 1):
            raise refuse(f"the step of the entry {key!r} must be a number", step)
        if QUANTISED in entry:
            check(entry[QUANTISED], key)

    state, groups = found.get("state"), found.get("param_groups", ())
    if not isinstance(state, Mapping) or not all(isinstance(key, int | str) for key in state):
        raise refuse("state must be a mapping of entries, by number or name", state)
    for key, entry in state.items():
        check(entry, key)
    if not isinstance(groups, list | tuple):
        raise refuse("param_groups must be a list", groups)
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise refuse(f"group {number} must be a mapping", group)
        names = ("params", *(name for name in ("param_names",) if name in group))
        for name in names:
            listed = group.get(name)
            if not isinstance(listed, list | tuple) or not all(isinstance(one, int | str) for one in listed):
                raise refuse(f"{name} of group {number} must be a list of numbers or names", listed)
        betas = group.get("betas", (0.0, 0.0))
        if not isinstance(betas, list | tuple) or not all(isinstance(one, Tensor | float | int) for one in betas):
            raise refuse(f"betas of group {number} must be two numbers", betas)
    return {"state": dict(state), "param_groups": list(groups)}


def check_numbers(where: str, name: str, entry: Entry, settings: Mapping[str, Any]) -> None:
    """Refuse moments and settings that no training leaves behind.

    Args:
        where: what they are from, for messages.
        name: the parameter.
        entry: its moments.
        settings: its group's settings.

    Raises:
        ValueError: naming the parameter, and what came.
    """
    check_second(where, name, entry.second)
    if entry.first is not None and not bool(entry.first.isfinite().all()):
        raise ValueError(
            f"{where}: the first moment of {name!r} has numbers that are not finite: the training diverged, or the "
            "file is damaged. Take an earlier checkpoint, or leave the parameter out of the targets"
        )
    if entry.step is not None:
        check_number(f"{where}: the number of updates of {name!r}", entry.step, 0)
    for key in ("lr", "eps"):
        said = settings.get(key)
        if isinstance(said, Tensor | float | int):
            check_number(f"{where}: {key} of the group of {name!r}", float(said), 0)
        elif entry.kind != "adafactor" and (said is not None or (key == "eps" and key in settings)):  # it has two
            raise ValueError(f"{where}: {key} of the group of {name!r} must be a number; got {said!r:.60}")
    betas = settings.get("betas")
    if betas is not None and not (len(betas) >= 2 and all(0 <= float(beta) < 1 for beta in betas)):
        raise ValueError(f"{where}: betas of the group of {name!r} must be two numbers in [0, 1); got {betas!r}")


def _held(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, **entry.get(QUANTISED, {})}


def dequantise(
    codes: UInt8[Tensor, "..."], values: Float[Tensor, " codes"], largest: Float[Tensor, " blocks"]
) -> Float[Tensor, "..."]:
    r"""Return what 8-bit codes stand for: a table's value, times the largest of their block.

    $$x_i = \text{values}[c_i] \cdot \text{largest}[\lfloor i / B \rfloor]$$

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. A code 0 of a second moment is
    zero exactly: what was below 2e-7 of its block's largest.

    Args:
        codes: one byte per entry.
        values: the table, 256 numbers.
        largest: one number per block of `B` = 256 (or 2048) entries in memory order, or one for all.

    Returns:
        The numbers, shaped as the codes.

    Raises:
        ValueError: if the blocks do not cover the codes.

    Example:
        >>> import torch
        >>> table = torch.linspace(0, 1, 256)
        >>> dequantise(torch.tensor([0, 255], dtype=torch.uint8), table, torch.tensor([3.0]))
        tensor([0., 3.])
    """
    flat = codes.flatten()
    size = next((size for size in BLOCK_SIZES if -(-len(flat) // size) == len(largest)), None)
    if len(largest) == 1:
        size = max(len(flat), 1)
    if size is None:
        raise ValueError(
            f"{len(flat)} codes came with {len(largest)} blocks: expected blocks of 256 entries, of 2048, or one block"
        )
    scale = largest.repeat_interleave(size)[: len(flat)]
    return (values[flat.long()] * scale).reshape(codes.shape)


def _decoded(held: Mapping[str, Any], number: int) -> Tensor:
    """Return one of the two moments of bitsandbytes' Adam."""
    state = held[f"state{number}"]
    if state.dtype != torch.uint8:
        return _wide(state)
    largest = held.get(f"absmax{number}", held.get(f"max{number}"))
    table = held.get(f"qmap{number}")
    if largest is None or table is None:
        raise ValueError(
            f"an 8-bit moment came without {f'absmax{number}' if largest is None else f'qmap{number}'}: the codes "
            "alone say nothing. Save the whole of optimizer.state_dict()"
        )
    return dequantise(state.cpu(), table.float().cpu(), largest.float().cpu())


def _product(row: Tensor, col: Tensor) -> Tensor | Factored:
    """Return a factored moment; of more than two axes, of which the last two are factored, in full."""
    if row.ndim == 1:
        return Factored(row, col)
    mean = row.mean(-1, keepdim=True)
    safe = torch.where(mean > 0, mean, torch.ones_like(mean))
    return (row / safe)[..., :, None] * col[..., None, :]


def _wide(tensor: Tensor) -> Tensor:
    """Return a moment whole, on the CPU, in at least float32; it may be the optimizer's own tensor."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", torch.promote_types(whole.dtype, torch.float32))


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
