"""The engines that need no trace, `vmap` (the definition) and `loop`, and torch's errors in plain words."""

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.attention import under_vmap
from influence.func.engine.batch import batch_size, sample, split_leaves, take
from influence.types import Batch, LossFn, Params, Rows


def vmap_rows(loss_fn: LossFn, params: Params, batch: Batch) -> Rows:
    """Return the rows of `vmap_both` alone."""
    return vmap_both(loss_fn, params, batch)[0]


def loop_rows(loss_fn: LossFn, params: Params, batch: Batch) -> Rows:
    """Return the rows of `loop_both` alone."""
    return loop_both(loss_fn, params, batch)[0]


def vmap_both(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Rows, Float[Tensor, " n"]]:
    """Return per-example gradients by definition, `vmap(grad(ℓ))`, each example a batch of one; and the losses."""
    leaves, rebuild = split_leaves(batch)

    def one(p: Params, example: list[Tensor]) -> Tensor:
        return loss_fn(p, rebuild([leaf.unsqueeze(0) for leaf in example])).squeeze(0)

    plain = {name: p.detach() for name, p in params.items()}
    with torch.no_grad(), under_vmap():
        return torch.func.vmap(torch.func.grad_and_value(one), (None, 0), randomness="error")(plain, leaves)


def loop_both(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Rows, Float[Tensor, " n"]]:
    """Return per-example gradients by plain autograd, one example at a time; and the losses."""
    losses: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(batch_size(batch)):
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss = loss_fn(leaves, take(batch, slice(i, i + 1))).sum()
            losses.append(loss.detach())
            names = list(leaves)
            grads = (
                torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
                if loss.requires_grad
                else [None] * len(names)
            )
        for name, grad in zip(names, grads, strict=True):
            found[name].append(torch.zeros_like(params[name]) if grad is None else grad)
    return {name: torch.stack(rows) for name, rows in found.items()}, torch.stack(losses)


def vmap_problem(loss_fn: LossFn, params: Params, batch: Batch) -> str | None:
    """Return why `vmap(grad)` cannot run a function, or `None`."""
    try:
        vmap_rows(loss_fn, params, sample(batch, 2))
    except (RuntimeError, ValueError, TypeError) as error:
        return explain_torch(str(error))
    return None


def explain_torch(message: str) -> str:
    """Translate torch.func's messages into what to do about them."""
    first = message.strip().splitlines()[0] if message.strip() else "no message"
    for upstream, meaning in TORCH_MESSAGES.items():
        if upstream in message:
            return f"{meaning} (torch: {first[:160]})"
    return first[:240]


CHECKPOINTING = (
    "the model recomputes activations in the backward (checkpointing), when a pure call's parameters are gone; "
    "switch it off, as by model.gradient_checkpointing_disable()"
)

TORCH_MESSAGES = {
    "saved tensor hooks": CHECKPOINTING,
    "on device meta": CHECKPOINTING,
    "data-dependent control flow": "the model branches on the values of a tensor, which vmap cannot",
    "randomness": "the function draws random numbers: dropout was left on",
    "setup_context": "the model calls an old-style autograd.Function, which no torch.func transform can run",
    "doesn't match the broadcast shape": "the model writes a batched value into an unbatched tensor in place",
}
