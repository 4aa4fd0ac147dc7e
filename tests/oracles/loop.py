"""Per-example gradients by the plainest means: one example, one forward, one ``torch.autograd.grad``.

Everything is done on a float64 copy of the module, and nothing is imported from the library. The loss
arithmetic is written out here once more, on purpose.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Loss = str | Callable[[Any, Any], Tensor]


class Truth(NamedTuple):
    rows: dict[str, Tensor]  # parameter name: [n, *parameter shape]
    losses: Tensor  # [n]


class Worst(NamedTuple):
    value: float
    name: str


def per_example(model: nn.Module, batch: Any, loss: Loss, reduction: str = "sum", strip: bool = False) -> Truth:
    """Loss and gradient of every example, for every named parameter, used or not, frozen or not.

    ``loss`` is the user's ``loss(output, batch) -> [n]``, or what the model is for: "causal" (labels shifted,
    −100 ignored), "tokens" (one label per position), "class" (one label per example). ``strip`` cuts the
    padding out of each example before the model sees it, which is what padding invariance promises.
    """
    model = copy.deepcopy(model).double().requires_grad_(True)
    names, params = zip(*model.named_parameters(), strict=True)
    size = len(next(iter(batch.values() if isinstance(batch, dict) else batch)))
    rows, losses = [], []
    for i in range(size):
        one = _example(batch, i, strip)
        value = _value(_call(model, one), one, loss, reduction)
        found = torch.autograd.grad(value, params, allow_unused=True) if value.requires_grad else [None] * len(params)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)])
        losses.append(value.detach())
    return Truth(
        {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)},
        torch.stack(losses),
    )


def error(rows: dict[str, Tensor], truth: dict[str, Tensor]) -> Worst:
    """The worst ``‖Δ‖ / max(‖g_parameter‖, 1e-6 · ‖g_all‖)`` over examples and parameters, with its name.

    Taken example by example, so that a small row cannot hide behind a large one. A zero row must be zero.
    """
    if rows.keys() != truth.keys():
        return Worst(float("inf"), f"names differ: {sorted(rows.keys() ^ truth.keys())[:4]}")
    for name, row in rows.items():
        if row.shape != truth[name].shape:
            return Worst(float("inf"), f"{name}: {tuple(row.shape)}, not {tuple(truth[name].shape)}")
    norms = {name: _norms(g) for name, g in truth.items()}
    total = torch.stack(list(norms.values())).norm(dim=0)
    worst = Worst(0.0, "")
    for name, g in truth.items():
        off = _norms(rows[name].double() - g)
        scale = torch.maximum(norms[name], 1e-6 * total)
        ratio = torch.where(off == 0, torch.zeros_like(off), off / scale).nan_to_num(nan=float("inf"))
        worst = max(worst, Worst(ratio.max().item(), name))
    return worst


def _norms(rows: Tensor) -> Tensor:
    return rows.double().reshape(len(rows), -1).norm(dim=1)


def _example(batch: Any, i: int, strip: bool) -> Any:
    if not isinstance(batch, dict):
        return tuple(_double(x[i : i + 1]) for x in batch)
    one = {key: _double(x[i : i + 1]) for key, x in batch.items()}
    mask = one.get("attention_mask")
    if not strip or mask is None:
        return one
    kept = mask[0].bool()
    return {key: x[:, kept] if x.shape[:2] == mask.shape else x for key, x in one.items()}


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _call(model: nn.Module, one: Any) -> Any:
    if isinstance(one, dict):
        return model(**{key: x for key, x in one.items() if key != "labels"})
    return model(one[0])


def _value(output: Any, one: Any, loss: Loss, reduction: str) -> Tensor:
    if callable(loss):
        return loss(output, one)[0]
    logits = (output if isinstance(output, Tensor) else output.logits)[0]
    if loss == "class":
        return logits.exp().sum().log() - logits[int((one["labels"] if isinstance(one, dict) else one[1])[0])]
    labels = one["labels"][0] if "labels" in one else one["input_ids"][0]
    if "labels" not in one and "attention_mask" in one:
        labels = labels.where(one["attention_mask"][0].bool(), -100)
    shift = {"causal": 1, "tokens": 0}[loss]
    terms = [
        logits[t - shift].exp().sum().log() - logits[t - shift, labels[t]]
        for t in range(shift, len(labels))
        if labels[t] != -100
    ]
    if not terms:
        return logits.new_zeros(())
    return torch.stack(terms).sum() / (len(terms) if reduction == "mean" else 1)
