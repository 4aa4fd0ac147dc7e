r"""The posterior that is sampled, around trained weights, with the loss and the gradient that steps take of it.

$$p(w) \propto \exp\Bigl(-nβ\,L(w) - \tfrac{γ}{2}\,‖w - w^*‖² - \tfrac{λ}{2}\,‖w‖²\Bigr)$$

`L` is the mean loss over labelled positions, so `nβ` means what it means in the literature (Lau et al. 2023).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_map

from influence.func.engine.attention import under_vmap
from influence.func.engine.batch import batch_size, chunks
from influence.func.loss.losses import widen
from influence.func.loss.module_loss import weighted
from influence.types import Batch, Params

Hyper: TypeAlias = float | int | Tensor
"""A hyper-parameter: one number, or a tensor with one entry per group of chains."""

Loss: TypeAlias = Callable[[Params, Batch], Tensor | tuple[Tensor, Tensor]]
"""`(params, batch) -> losses [n] or [n, t]`, or `(losses, labelled)`; without data, `batch` is `None`."""

Mask: TypeAlias = Mapping[str, Tensor | bool | None]
"""Which entries move: a boolean tensor per parameter, or `True` or `None` for all of one. A name left out is frozen."""


class Setting(NamedTuple):
    """What a chain runs with, or stacked chains, with a chain axis. It travels in the state, where `vmap` maps over it.

    Attributes:
        lr: step size `ε`.
        n_beta: `nβ`.
        localization: `γ`.
        weight_decay: `λ`.
        own: what the sampler itself has.
        mask: which entries move, for parameters that do not move as a whole.
    """

    lr: Float[Tensor, ""]
    n_beta: Float[Tensor, ""]
    localization: Float[Tensor, ""]
    weight_decay: Float[Tensor, ""]
    own: dict[str, Tensor]
    mask: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A posterior around trained weights.

    Attributes:
        loss_fn: the loss.
        anchor: the parameters that move, as they were trained.
        frozen: those that do not: closed over, never differentiated.
        n_beta: `nβ`.
        localization: `γ`.
        weight_decay: `λ`.
        mask: boolean tensors of the parameters that move in part, `[*shape]` or `[groups, *shape]`.
        full_gradient: the mean gradient over all data at the anchor, if gradients use it as a control variate.
        accumulate: in how many pieces a batch's gradient is computed.
        init_noise: standard deviation of the start around the given parameters.
    """

    loss_fn: Loss
    anchor: Params
    frozen: Params
    n_beta: Hyper
    localization: Hyper
    weight_decay: Hyper
    mask: dict[str, Tensor]
    full_gradient: Params | None = None
    accumulate: int = 1
    init_noise: float = 0.0

    def setting(self, lr: Hyper, own: Mapping[str, Hyper], group: int) -> Setting:
        """Return what a chain of a group runs with."""
        step, n_beta, pull, decay = (_entry(x, group) for x in (lr, self.n_beta, self.localization, self.weight_decay))
        mask = {name: m[group] if m.ndim > self.anchor[name].ndim else m for name, m in self.mask.items()}
        return Setting(step, n_beta, pull, decay, {name: _entry(x, group) for name, x in own.items()}, mask)


def local_posterior(
    loss_fn: Loss,
    anchor: Params,
    n_beta: Hyper,
    localization: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    *,
    full_gradient: Params | None = None,
    accumulate: int = 1,
    init_noise: float = 0.0,
) -> Target:
    r"""Return the posterior around trained weights that a sampler draws from.

    $$p(w) \propto \exp\Bigl(-nβ\,L(w) - \tfrac{γ}{2}\,‖w - w^*‖² - \tfrac{λ}{2}\,‖w‖²\Bigr)$$

    With `full_gradient` the gradient of a batch is `∇L(w^*) + ∇L_b(w) - ∇L_b(w^*)` (Baker et al. 2019): its noise
    shrinks with the distance to the anchor, at twice the cost.

    Args:
        loss_fn: `(params, batch) -> losses`, `[n]` or `[n, t]`; what `functionalize` returns, or your own. A loss with
            `positions` is averaged over its labelled positions.
        anchor: the trained weights `w^*`.
        n_beta: `nβ`; `default_n_beta(n)` for a dataset of `n`.
        localization: `γ`.
        weight_decay: `λ`; not scaled by `nβ`.
        mask: which entries move; default all.
        full_gradient: `gradient_at(loss_fn, anchor, batches)`.
        accumulate: compute the gradient of a batch in that many pieces.
        init_noise: start chains that far from the given parameters, per entry; the anchor stays.

    Returns:
        The target.

    Raises:
        ValueError: if a number is out of range, or a mask fits no parameter.

    Example:
        >>> import torch
        >>> target = local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.zeros(2)}, n_beta=10.0)
        >>> list(target.anchor), target.frozen
        (['w'], {})
    """
    hypers = {"n_beta": n_beta, "localization": localization, "weight_decay": weight_decay, "init_noise": init_noise}
    for name, value in hypers.items():
        check_range(name, value, 0)
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1; got {accumulate}")
    in_part = _check_mask(anchor, mask)
    moving = list(anchor) if mask is None else [name for name in anchor if name in mask]
    return Target(
        loss_fn,
        {name: anchor[name].detach() for name in moving},
        {name: p.detach() for name, p in anchor.items() if name not in set(moving)},
        n_beta,
        localization,
        weight_decay,
        in_part,
        full_gradient,
        accumulate,
        init_noise,
    )


def default_n_beta(n: int) -> float:
    """Return `n / log n`, the inverse temperature of WBIC (Watanabe 2013) for a *dataset* of `n` examples.

    Raises:
        ValueError: if there are fewer than 2.

    Example:
        >>> round(default_n_beta(1000), 4)
        144.7648
    """
    if n < 2:
        raise ValueError(f"n / log n needs a dataset of at least 2 examples; got {n}: pass n_beta yourself")
    return n / float(torch.tensor(float(n), dtype=torch.float64).log())


def _entry(value: Hyper, group: int) -> Float[Tensor, ""]:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    return tensor[group].clone() if tensor.ndim else tensor.clone()


def check_range(name: str, value: Hyper, least: int, *, above: bool = False) -> None:
    """Refuse a hyper-parameter that is out of range or has more than a group axis.

    Raises:
        ValueError: naming it.
    """
    tensor = torch.as_tensor(value, dtype=torch.float64)
    fits = (tensor > least) if above else (tensor >= least)
    if tensor.ndim > 1 or not bool((fits & tensor.isfinite()).all()):
        bound = f"above {least:g}" if above else f"at least {least:g}"
        raise ValueError(f"{name} must be a finite number {bound}, or a tensor of them, one per group; got {value}")


def _check_mask(anchor: Params, mask: Mask | None) -> dict[str, Tensor]:
    if mask is None:
        return {}
    unknown = [name for name in mask if name not in anchor]
    if unknown:
        raise ValueError(f"the mask names {unknown[:3]}, which are no parameters; there are {list(anchor)[:5]} …")
    if not mask:
        raise ValueError("the mask is empty: no parameter would move")
    in_part: dict[str, Tensor] = {}
    for name, entries in mask.items():
        if entries is False:
            raise ValueError(f"mask[{name!r}] is False: leave the name out, and the parameter is frozen")
        if not isinstance(entries, Tensor):
            continue
        shape = tuple(anchor[name].shape)
        if entries.dtype != torch.bool or (tuple(entries.shape) != shape and tuple(entries.shape[1:]) != shape):
            raise ValueError(
                f"mask[{name!r}] is {entries.dtype} {list(entries.shape)}; expected torch.bool of the parameter's own "
                f"shape {list(shape)} (no broadcasting), or [groups, …] of it"
            )
        in_part[name] = entries.to(anchor[name].device)
    if len(in_part) == len(mask) and not any(bool(entries.any()) for entries in in_part.values()):
        raise ValueError(f"the masks of {list(mask)[:3]} are False everywhere: no parameter would move")
    return in_part


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
