"""The two engines that need no trace: `vmap(grad)`, which is the definition, and a loop, which is the last resort."""

import torch
from torch import Tensor

from influence.func.attention import under_vmap
from influence.func.batches import batch_size, split_leaves, take
from influence.types import Batch, LossFn, Params, Rows


def vmap_rows(loss_fn: LossFn, params: Params, batch: Batch) -> Rows:
    r"""Per-example gradients by definition: `vmap(grad(ℓ))`, each example a batch of one.

    Args:
        loss_fn: `(params, batch) -> losses[n]`.
        params: the parameters.
        batch: the batch.

    Returns:
        `{name: [n, *shape]}`.
    """
    leaves, rebuild = split_leaves(batch)

    def one(p: Params, example: list[Tensor]) -> Tensor:
        return loss_fn(p, rebuild([leaf.unsqueeze(0) for leaf in example])).squeeze(0)

    plain = {name: p.detach() for name, p in params.items()}
    with torch.no_grad(), under_vmap():
        return torch.func.vmap(torch.func.grad(one), (None, 0), randomness="error")(plain, leaves)


def loop_rows(loss_fn: LossFn, params: Params, batch: Batch) -> Rows:
    """Per-example gradients by plain autograd, one example at a time.

    Args:
        loss_fn: `(params, batch) -> losses[n]`.
        params: the parameters.
        batch: the batch.

    Returns:
        `{name: [n, *shape]}`.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(batch_size(batch)):
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss = loss_fn(leaves, take(batch, slice(i, i + 1))).sum()
            names = list(leaves)
            grads = (
                torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
                if loss.requires_grad
                else [None] * len(names)
            )
        for name, grad in zip(names, grads, strict=True):
            found[name].append(torch.zeros_like(params[name]) if grad is None else grad)
    return {name: torch.stack(rows) for name, rows in found.items()}
