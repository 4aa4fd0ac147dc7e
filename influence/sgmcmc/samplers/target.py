r"""What is sampled: a posterior around trained weights, tempered and localised.

$$p(w) \propto \exp\Bigl(-nβ\,L(w) - \tfrac{γ}{2}\,‖w - w^*‖² - \tfrac{λ}{2}\,‖w‖²\Bigr)$$

`L` is the mean loss over labelled positions, so `nβ` means what it means in the literature (Lau et al. 2023).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

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
    partial: dict[str, Tensor] = {}
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
        partial[name] = entries.to(anchor[name].device)
    if len(partial) == len(mask) and not any(bool(entries.any()) for entries in partial.values()):
        raise ValueError(f"the masks of {list(mask)[:3]} are False everywhere: no parameter would move")
    return partial
