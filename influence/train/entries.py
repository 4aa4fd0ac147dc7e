"""Entries of an optimizer's state: the moments of one parameter, in every form that optimizers keep them."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from influence.func.normalize import Factored, check_second
from influence.func.numbers import check_number
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
