r"""Sharing: rows from the training's own forward and backward.

The Trainer's loss is computed with probes in the place of the parameters, whose gradients flow on to the parameters
themselves; each use's tap hands its part of every example's row to a zero `Z`. So `loss.backward()`, which the Trainer
calls as ever, fills `p.grad` and `Z.grad` at once. With `L = Σ_n ℓ_n / N`,

$$G_n = N\, \partial L / \partial Z_n$$

No hook, and no second pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.func.engine.batched import BatchedPlan, tap
from influence.func.engine.plan import compare_rows
from influence.func.loss.losses import widen
from influence.func.loss.module_loss import ModuleLoss
from influence.types import Batch, Rows

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How far the Trainer's loss may be from the sum over the count; half precision: 2e-2. Transformers' losses are
computed in float32, whatever the model's dtype."""


class Whole(nn.Module):
    """A model and how its loss is computed, as one module: calling it computes the loss."""

    def __init__(self, model: nn.Module, compute_loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._compute_loss = model, compute_loss
        self._outputs: list[Any] = []
        self._view = _view_of(model, self._outputs)

    def forward(self, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """Return the loss and the model's outputs; TRL's trainers, asked for them, would run the model once more."""
        self._outputs.clear()
        loss = self._compute_loss(self._view[0], inputs, **settings)
        if not self._outputs:
            raise ValueError(
                "share=True: the Trainer's loss does not call the model that it is given. Pass share=False"
            )
        return loss, self._outputs[0]


def _view_of(model: nn.Module, outputs: list[Any]) -> tuple[nn.Module]:
    """Return the same model under a type that notes what each differentiable call returns; no part of another module.

    It has the model's own attributes, not copies: whatever a call changes, it changes there.
    """
    kind = type(model)

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        found = kind.__call__(module, *args, **kwargs)
        if torch.is_grad_enabled():
            outputs.append(found)
        return found

    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    view: nn.Module = object.__new__(type(kind.__name__, (kind,), {**named, "__call__": call}))
    object.__setattr__(view, "__dict__", vars(model))
    return (view,)


class Shared(NamedTuple):
    """What a training forward leaves behind, until its backward is done.

    Attributes:
        zeros: where the backward puts the rows.
        seed: a zero added to the loss; its gradient says what the loss was multiplied with before the backward.
        loss: the Trainer's loss.
        losses: each example's summed loss, from the same outputs.
        lengths: its labelled positions.
    """

    zeros: Rows
    seed: Float[Tensor, ""]
    loss: Float[Tensor, ""]
    losses: Float[Tensor, " n"]
    lengths: Int[Tensor, " n"]


def forward(
    whole: Whole,
    plan: BatchedPlan,
    params: Mapping[str, nn.Parameter],
    loss_fn: ModuleLoss,
    inputs: dict[str, Any],
    n: int,
    **settings: Any,
) -> tuple[Tensor, Any, Shared]:
    """Compute the Trainer's loss with every use of the parameters tapped.

    Args:
        whole: the model and its loss.
        plan: what to execute.
        params: the parameters themselves.
        loss_fn: the examples' losses.
        inputs: the Trainer's inputs.
        n: how many examples they are.
        settings: for `compute_loss`.

    Returns:
        The loss to differentiate, the outputs, and what to make rows from afterwards.
    """
    probes, run = tap(plan, dict(params), n, live=True)
    places = {id(p): name for name, p in whole.named_parameters()}
    replaced = {places[id(params[name])]: value for name, value in probes.items()}
    loss, outputs = torch.func.functional_call(whole, replaced, (dict(inputs),), settings)
    with torch.no_grad():
        losses, lengths = losses_of(loss_fn, outputs, inputs)
    seed = torch.zeros_like(loss, requires_grad=True)
    return loss + seed, outputs, Shared(run.zeros, seed, loss.detach(), losses, lengths)


def losses_of(loss_fn: ModuleLoss, outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return each example's summed loss, and its labelled positions, from what the Trainer's forward returned.

    TRL's trainers never make the logits: their outputs hold the labels' log-probabilities, zero where there is none.
    """
    log_probs, smoothing = getattr(outputs, "log_probs", None), loss_fn.settings["label_smoothing"]
    if log_probs is None or loss_fn.name != "cross_entropy" or smoothing:
        return loss_fn.of_outputs(outputs, inputs)
    return -widen(log_probs).sum(1), outputs.label_mask.sum(1)


def rows_of(shared: Shared, plan: BatchedPlan, counts: Sequence[float], reduction: str) -> tuple[Rows, Tensor]:
    """Return the rows of each example's own loss, and those losses, once the backward is done.

    Args:
        shared: what the forward left.
        plan: what was executed.
        counts: what the Trainer may have divided by, the likeliest first.
        reduction: `"sum"` or `"mean"` over an example's labelled positions.

    Raises:
        ValueError: if the Trainer's loss is no sum of the examples' losses over any of the counts.
    """
    count = count_of(shared, counts)
    seed = shared.seed.grad
    assert seed is not None
    each = torch.full_like(shared.losses, count, dtype=torch.float64) / seed.double()
    losses = shared.losses
    if reduction == "mean":
        each, losses = each / shared.lengths.clamp_min(1), losses / shared.lengths.clamp_min(1)
    rows = {name: widen(row) for name, row in raw_rows(shared).items()}
    scaled = {name: row * each.to(row).reshape(-1, *[1] * (row.ndim - 1)) for name, row in rows.items()}
    return plan.folded.finish_rows(scaled), losses


def raw_rows(shared: Shared) -> Rows:
    """Return what the backward left in the zeros."""
    return {name: zero.new_zeros(zero.shape) if zero.grad is None else zero.grad for name, zero in shared.zeros.items()}


def count_of(shared: Shared, counts: Sequence[float]) -> float:
    """Return what the Trainer divided the sum of the examples' losses by.

    Raises:
        ValueError: if it is none of the counts.
    """
    loss, total = float(shared.loss), float(shared.losses.double().sum())
    limit = TOLERANCE.get(shared.loss.dtype, 2e-2)
    nearest = min(counts, key=lambda count: abs(loss * count - total))  # of long documents two counts are near
    if abs(loss * nearest - total) <= limit * max(abs(total), 1e-6):
        return nearest
    listed = ", ".join(f"{count:g}" for count in dict.fromkeys(counts))
    raise ValueError(
        f"share=True: the Trainer's loss is {loss:.6g}, and the examples' losses sum to {total:.6g}: their sum over "
        f"none of {listed} (the counts of items, labelled positions, examples, one). The Trainer's loss has another "
        "part or another weighting; pass loss=(output, batch) -> [n] whose sum it is, or share=False"
    )


def check_sum(shared: Shared, plan: BatchedPlan, params: Mapping[str, nn.Parameter]) -> None:
    """Refuse rows which do not sum to the gradient that the same backward gave the parameters.

    Raises:
        ValueError: naming the block, and by how much.
    """
    grads = {name: torch.zeros_like(p)[None] if p.grad is None else p.grad[None] for name, p in params.items()}
    expected = plan.folded.linear_rows(grads)
    got = {name: widen(row).sum(0)[None] for name, row in raw_rows(shared).items()}
    dtype = next(iter(params.values())).dtype
    error, where = compare_rows(got, expected, dtype)
    if error is not None and not error <= {torch.float64: 1e-5, torch.float32: 1e-2}.get(dtype, 0.1):
        raise ValueError(
            f"share=True: the rows of the first batch do not sum to its gradient at {where!r} (relative error "
            f"{error:.2g}): the model takes another path in training than in evaluation. Pass share=False"
        )


def refuse(model: nn.Module, arguments: Any) -> None:
    """Refuse models whose training forward cannot be shared.

    Args:
        model: the model.
        arguments: the Trainer's.

    Raises:
        ValueError: saying why, and what to do.
    """
    mixing = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    again = bool(arguments.gradient_checkpointing) or any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )
    reasons = {
        "gradient checkpointing runs the forward again, without probes": again,
        "a compiled model cannot be probed": bool(arguments.torch_compile),
        f"{', '.join(mixing[:3])} mixes examples in training": bool(mixing),
        "its parameters are shards": any(hasattr(p, "full_tensor") for p in model.parameters()),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"share=True cannot serve this run: {'; '.join(found)}. Pass share=False")


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """Return a Trainer's inputs as a batch of a loss function: tensors alone, under the names that it knows."""
    named = {"label": "labels", "label_ids": "labels"}
    return {named.get(key, key): value for key, value in inputs.items() if isinstance(value, Tensor)}
