"""The loss of a batch under a target, and its gradient: of one chain, or of stacked chains by one `vmap`."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_map

from influence.func.engine.attention import under_vmap
from influence.func.engine.batch import batch_size, chunks
from influence.func.loss.losses import widen
from influence.func.loss.module_loss import weighted
from influence.sgmcmc.samplers.target import Loss, Target, local_posterior
from influence.types import Batch, Params


class PerChain(NamedTuple):
    """A batch with a chain axis before the examples': every chain has its own."""

    batch: Batch


def position_losses(loss_fn: Loss, params: Params, batch: Batch) -> tuple[Float[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """Return the loss of every position, weights included, and which count; a loss per example has one position.

    Raises:
        ValueError: if the loss has another shape.
    """
    if getattr(loss_fn, "positional", hasattr(loss_fn, "positions")):
        losses, labelled = loss_fn.positions(params, batch)  # type: ignore[attr-defined]
        return weighted(widen(losses).mT, batch).mT, labelled
    said = loss_fn(params, batch)
    losses, given = said if isinstance(said, tuple) else (said, None)
    losses = widen(losses)
    losses = losses.reshape(-1, 1) if losses.ndim < 2 else losses
    n = 1 if batch is None else batch_size(batch)
    if losses.ndim != 2 or losses.shape[0] != n:
        raise ValueError(
            f"the loss of a batch of {n} examples has shape {list(losses.shape)}; expected [n] or [n, t] (or a number, "
            "where there is no data): one loss per example or position, not their mean"
        )
    labelled = torch.ones_like(losses, dtype=torch.bool) if given is None else given.bool().reshape(losses.shape)
    return losses, labelled


def total_loss(target: Target, params: Params, batch: Batch) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
    """Return the sum of a batch's losses over labelled positions, and how many there are.

    Parameters with a chain axis give one of each per chain, by one `vmap`: of a shared batch, or of a `PerChain` one.
    """
    name = next(iter(params))
    if params[name].ndim == target.anchor[name].ndim:
        return _total_of_one(target, params, batch)
    axis, data = (0, batch.batch) if isinstance(batch, PerChain) else (None, batch)
    with under_vmap():
        return torch.vmap(partial(_total_of_one, target), in_dims=(0, axis))(params, data)


def _total_of_one(target: Target, params: Params, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    cast = {name: p.to(target.anchor[name].dtype) for name, p in params.items()}
    losses, labelled = position_losses(target.loss_fn, {**target.frozen, **cast}, batch)
    return (losses * labelled).sum(), labelled.sum().to(losses.dtype)


def mean_loss(target: Target, params: Params, batch: Batch) -> Float[Tensor, "*c"]:
    """Return the mean loss of a batch over labelled positions, of each chain where there are several."""
    total, count = total_loss(target, params, batch)
    return total / count


def gradient(target: Target, params: Params, batch: Batch) -> tuple[Float[Tensor, "*c"], Params]:
    """Return the mean loss of a batch, and its gradient with the control variate where the target has one."""
    loss, grads = _gradient(target, params, batch)
    if target.full_gradient is None:
        return loss, grads
    anchor = {name: widen(p) for name, p in target.anchor.items()}
    if isinstance(batch, PerChain):
        anchor = {name: p.expand(params[name].shape) for name, p in anchor.items()}
    _, there = _gradient(target, anchor, batch)
    return loss, {name: g - there[name] + target.full_gradient[name] for name, g in grads.items()}


def gradient_at(loss_fn: Loss, params: Params, batches: Iterable[Batch]) -> Params:
    """Return the gradient of the mean loss over all batches, for `local_posterior(full_gradient=…)`.

    Args:
        loss_fn: the loss.
        params: the trained weights.
        batches: all data, in pieces of any size.

    Returns:
        The gradient.

    Example:
        >>> import torch
        >>> gradient_at(lambda w, x: w["w"] * x, {"w": torch.tensor(1.0)}, [torch.ones(3), torch.tensor([5.0])])
        {'w': tensor(2.)}
    """
    target = local_posterior(loss_fn, params, 1.0)
    total: Params | None = None
    counted = torch.zeros(())
    for batch in batches:
        (_, count), grads = _summed(target, {name: widen(p) for name, p in target.anchor.items()}, batch)
        total = grads if total is None else {name: total[name] + g for name, g in grads.items()}
        counted = counted + count
    if total is None:
        raise ValueError("there are no batches to take the gradient of")
    return {name: g / counted for name, g in total.items()}


def _gradient(target: Target, params: Params, batch: Batch) -> tuple[Float[Tensor, "*c"], Params]:
    if target.accumulate == 1 or batch is None:
        return _value_and_gradient(lambda w: (mean_loss(target, w, batch),) * 2, params)
    parts = [_summed(target, params, piece) for piece in _pieces(batch, target.accumulate)]
    count = torch.stack([count for (_, count), _ in parts]).sum(0)
    loss = torch.stack([total for (total, _), _ in parts]).sum(0) / count

    def mean_of(grads: list[Tensor]) -> Tensor:
        total = torch.stack(grads).sum(0)
        return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))

    return loss, {name: mean_of([grads[name] for _, grads in parts]) for name in params}


def _pieces(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield a batch in pieces, of examples that may lie behind a chain axis."""
    if not isinstance(batch, PerChain):
        yield from chunks(batch, -(-batch_size(batch) // count))
        return
    first = tree_map(lambda x: x.transpose(0, 1) if isinstance(x, Tensor) else x, batch.batch)
    for piece in chunks(first, -(-batch_size(first) // count)):
        yield PerChain(tree_map(lambda x: x.transpose(0, 1) if isinstance(x, Tensor) else x, piece))


def _summed(target: Target, params: Params, batch: Batch) -> tuple[tuple[Tensor, Tensor], Params]:
    (summed, count), grads = _value_and_gradient(partial(_total_twice, target, batch), params)
    return (summed.detach(), count.detach()), grads


def _total_twice(target: Target, batch: Batch, params: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    summed, count = total_loss(target, params, batch)
    return summed, (summed, count)


def _value_and_gradient(function: Callable[[Params], tuple[Tensor, Any]], params: Params) -> tuple[Any, Params]:
    """Return what a function says beside its value (or values of chains), and its gradient.

    By autograd, which runs models whose own functions know no transform, and goes backward through a `vmap` of the
    forward pass at no further cost; by `func` where the whole step is under `vmap`.
    """
    if any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in params.values()):
        grads, said = torch.func.grad(function, has_aux=True)(params)
        return tree_map(torch.Tensor.detach, said), grads
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        value, said = function(leaves)
        found = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    return tree_map(torch.Tensor.detach, said), dict(zip(leaves, found, strict=True))
