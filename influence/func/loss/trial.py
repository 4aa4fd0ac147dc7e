"""Trials: what a function says of a few examples. It is known by that where no setting tells it from another.

Of a model: two numbers of its outputs, so that a forward which was replaced shows. Of a loss: its losses, so that an
edited constant shows, or another function of the same name. They are compared within the rounding of other machines.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from influence.func.engine.batch import batch_size, take
from influence.func.fingerprint import fingerprint
from influence.func.loss.module_loss import ModuleLoss
from influence.types import Batch, LossFn, Params

EXAMPLES = 4
"""Most examples of a trial."""
KEPT = 1 << 16
"""Most characters of examples that are kept, as JSON has them."""
TOKENS = 8
"""Positions of the token ids that are made up for a language model."""
ROUNDING = 5e-4
"""How far numbers may lie apart, the largest of them being 1: another machine or kernel. In float32 it was 4e-6."""
STEPS = {"outputs": 16, "losses": 4}
"""How many units in the last place of the arithmetic's type they may, where that is more. Losses are means of many
numbers: of bfloat16 models of 48 layers they moved by 0.7 % between kernels, outputs by 2 %, by 4 % from float64."""
TF32 = 2.0**-10
"""A unit in the last place of products in TF32."""
ROWS = 16
"""Rows of outputs that are looked at."""
DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}
"""Types that kept examples may have."""


class Tolerance(NamedTuple):
    """How far numbers of two trials may lie apart, the largest of them being 1."""

    outputs: float
    losses: float


class Trial(NamedTuple):
    """What a file holds of a trial, as `tried` returns it."""

    on: dict[str, Any]
    outputs: list[float | str] | None
    losses: list[float | str]
    tolerance: Tolerance
    floor: float
    note: str | None = None


def tried(loss_fn: LossFn, params: Params, batch: Batch) -> dict[str, Any]:
    """Return a trial as JSON has it.

    Args:
        loss_fn: the loss function.
        params: its parameters.
        batch: examples. A language model under a loss of ours is tried on token ids that are made up, and of anything
            else the first few examples are kept if they are small; of larger ones the hash is, so that they can be
            told when they come again.

    Returns:
        `on` (what it was tried on), `losses`, `outputs` (`None` of a function that has no model), and how far they may
        lie apart from another trial's: `tolerance` relatively, of both, and `floor`.
    """
    why: dict[str, Any] = {}
    if isinstance(loss_fn, ModuleLoss) and (vocabulary := loss_fn.vocabulary) is not None:
        on: dict[str, Any] = {"vocabulary": vocabulary, "shape": [2, min(TOKENS, loss_fn.longest)]}
        try:
            return {"on": on, **measured(loss_fn, params, batch_of(on))}
        except Exception as error:  # a model of any kind, which takes real examples: those are next
            why = {"note": f"{type(error).__name__} on token ids alone"}
    some, on = _examples(batch)
    return {"on": on, **measured(loss_fn, params, some), **why}


def again(loss_fn: LossFn, params: Params, trial: Mapping[str, Any], losses: bool = True) -> dict[str, Any]:
    """Return what a function says of the examples of another's trial.

    Args:
        loss_fn: the loss function.
        params: its parameters.
        trial: the other trial, of which `can_repeat`.
        losses: whether to compute the losses too, beside the outputs.

    Returns:
        As `tried`.
    """
    return {"on": trial["on"], **measured(loss_fn, params, batch_of(trial["on"]), losses)}


def can_repeat(trial: Mapping[str, Any]) -> bool:
    """Whether the examples of a trial are there, and not their hash alone."""
    return "hash" not in trial["on"]


def apart(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> bool:
    """Whether the `outputs` or the `losses` of two trials on the same examples lie further apart than by rounding.

    Example:
        >>> trial = {"losses": [1.0, 2.0], "tolerance": {"losses": 2e-3}, "floor": 1e-9}
        >>> apart(trial, {**trial, "losses": [1.0, 2.001]}, "losses")
        False
        >>> apart(trial, {**trial, "losses": [1.0, 2.01]}, "losses")
        True
    """
    mine, theirs = one.get(what), other.get(what)
    if mine is None or theirs is None:
        return False
    if len(mine) != len(theirs):
        return True
    pairs = list(zip(mine, theirs, strict=True))
    if any(a != b for a, b in pairs if isinstance(a, str) or isinstance(b, str)):
        return True
    numbers = [(a, b) for a, b in pairs if not isinstance(a, str)]
    largest = max((abs(x) for pair in numbers for x in pair), default=0.0)
    most = max(one["tolerance"][what], other["tolerance"][what]) * largest + max(one["floor"], other["floor"])
    return any(abs(a - b) > most for a, b in numbers)


def measured(loss_fn: LossFn, params: Params, batch: Batch, losses: bool = True) -> dict[str, Any]:
    """Return what a function says of a batch, and how exact that is."""
    device = next((p.device for p in params.values()), torch.device("cpu"))
    batch = _moved(batch, device)
    model = loss_fn if isinstance(loss_fn, ModuleLoss) else None
    with torch.no_grad():
        seen = None if model is None else _summary(model.outputs(params, batch), batch)
        said = _numbers(loss_fn(params, batch).flatten()) if losses else None
    whole = params if model is None else {**model.frozen, **params}
    kinds = {p.dtype for p in whole.values() if p.is_floating_point()}
    coarsest = max((torch.finfo(dtype).eps for dtype in kinds if dtype.itemsize > 1), default=0.0)
    if device.type == "cuda" and torch.float32 in kinds:
        convolves = any(p.ndim > 2 for p in whole.values())  # by default in TF32
        coarse = convolves or torch.get_float32_matmul_precision() != "highest"
        coarsest = max(coarsest, TF32) if coarse else coarsest
    tolerance = {what: max(ROUNDING, steps * coarsest) for what, steps in STEPS.items()}
    alike = getattr(loss_fn, "name", None) == "kl"  # of two models that may be the same: zero, but for rounding
    floor = tolerance["losses"] if alike else 1e-9
    return {"outputs": seen, "losses": said, "tolerance": tolerance, "floor": floor}


def batch_of(on: Mapping[str, Any]) -> Batch:
    """Return the examples of a trial, made up or as they were kept.

    Raises:
        ValueError: if they are none.
    """
    if "vocabulary" in on:
        n, s, vocabulary = (int(number) for number in (*on["shape"], on["vocabulary"]))
        if not (0 < n <= EXAMPLES and 0 < s <= TOKENS and vocabulary > 0):
            raise ValueError(f"no token ids of shape {on['shape']} can be made up for a trial: it is damaged")
        ids = (torch.arange(n * s) * 7919 + 1) % vocabulary
        return {"input_ids": ids.reshape(n, s)}
    return _decoded(on["examples"])


def _examples(batch: Batch) -> tuple[Batch, dict[str, Any]]:
    """Return the first examples of a batch, as many as are small enough to be kept, and how; or else their hash."""
    n = min(EXAMPLES, batch_size(batch))
    for count in range(n, 0, -1):
        some = take(batch, slice(0, count))
        if sum(leaf.numel() for leaf in tree_leaves(some) if isinstance(leaf, Tensor)) > KEPT // 2:
            continue
        kept = _encoded(some)
        if kept is not None and len(json.dumps(kept)) <= KEPT:
            return some, {"examples": kept}
    some = take(batch, slice(0, n))
    leaves, spec = tree_flatten(some)
    return some, {"hash": fingerprint([str(spec), [leaf for leaf in leaves if isinstance(leaf, Tensor)]])}


def _encoded(batch: Any) -> Any:
    """Return a batch as JSON has it; `None` where it cannot be told exactly."""
    if isinstance(batch, Tensor):
        finite = not batch.is_floating_point() or bool(torch.isfinite(batch).all())
        if batch.layout != torch.strided or batch.dtype not in DTYPES.values() or not finite:
            return None
        dtype = str(batch.dtype).removeprefix("torch.")
        wide = batch.double() if batch.is_floating_point() else batch
        return {"dtype": dtype, "shape": list(batch.shape), "values": wide.flatten().tolist()}
    if type(batch) is dict and all(isinstance(key, str) for key in batch):
        items = {key: _encoded(item) for key, item in batch.items()}
        return None if None in items.values() else {"dict": items}
    if type(batch) in (tuple, list):
        parts = [_encoded(item) for item in batch]
        return None if None in parts else {type(batch).__name__: parts}
    return None


def _decoded(kept: Any) -> Any:
    """Undo `_encoded`.

    Raises:
        ValueError: if it is not what that writes.
    """
    match kept:
        case {"dtype": str(dtype), "shape": list(shape), "values": list(values)} if dtype in DTYPES:
            return torch.tensor(values, dtype=DTYPES[dtype]).reshape(shape)
        case {"dict": dict(items)}:
            return {key: _decoded(item) for key, item in items.items()}
        case {"tuple": list(parts)}:
            return tuple(_decoded(part) for part in parts)
        case {"list": list(parts)}:
            return [_decoded(part) for part in parts]
    raise ValueError(f"the examples of a trial are damaged: {str(kept)[:60]!r} is no tensor and holds none")


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _summary(outputs: Any, batch: Batch) -> list[float | str]:
    """Return two numbers of each output: its magnitude, and a sum of its entries under fixed weights.

    Of padded positions nothing counts: attention kernels differ there.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else tree_leaves(outputs)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    summary: list[float | str] = []
    for x in found:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            continue
        if isinstance(mask, Tensor) and mask.ndim == 2 and x.shape[:2] == mask.shape:
            x = x[mask.bool()]
        rows = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
        some = rows[:: -(-len(rows) // ROWS)].double().flatten()
        weights = torch.arange(len(some), dtype=torch.float64, device=some.device).cos()
        summary += _numbers(torch.stack([some.square().mean().sqrt(), some @ weights / len(some) ** 0.5]))
    return summary


def _numbers(values: Float[Tensor, " n"]) -> list[float | str]:
    """Return numbers as JSON has them."""
    return [x if x - x == 0 else str(x) for x in values.double().tolist()]
