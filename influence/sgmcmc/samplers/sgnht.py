r"""Stochastic gradient Nosé-Hoover thermostat (Ding et al. 2014): friction that adapts to gradient noise."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.samplers.langevin import (
    Info,
    Sampler,
    check_step,
    drift,
    fit,
    fitted,
    gaussian_noise,
    has_prior,
    restrict,
    start,
)
from influence.sgmcmc.samplers.sghmc import bounce, first_momenta, mean_square
from influence.sgmcmc.samplers.target import Hyper, Setting, Target, check_range, gradient
from influence.types import Batch, Params


class State(NamedTuple):
    """A chain.

    Attributes:
        params: the parameters that move.
        setting: what it runs with.
        momenta: `v`, per entry.
        friction: `ξ`.
    """

    params: Params
    setting: Setting
    momenta: Params
    friction: Float[Tensor, "*c"]


def build(target: Target, lr: Hyper, bounding_box: float | None = None, *, diffusion: Hyper = 0.01) -> Sampler:
    r"""Return SGNHT.

    $$v' = (1 - ξ)\bigl(v - ε\,∇U_b(w)\bigr) + \sqrt{2 A ε}\;η, \qquad w' = w + v', \qquad
      ξ' = ξ + \tfrac1d ‖v'‖² - ε$$

    with `v = √ε η` and `ξ = A` at the start, and `d` the number of entries that move. The thermostat absorbs gradient
    noise of any unknown, isotropic size; it needs many entries to be ergodic. Friction multiplies the force too, as in
    the reference implementation, which makes variances too wide by about `A/2`.

    Args:
        target: what to draw from.
        lr: `ε`, the square of the time step.
        bounding_box: clamp every entry to its anchor ± this, and turn its momentum round where it hit.
        diffusion: `A`.

    Returns:
        The sampler; each step says its temperature `‖v'‖² / (d ε)` and its friction.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.ones(1)}, n_beta=1.0)
        >>> sampler = sgmcmc.sgnht.build(target, lr=0.25, diffusion=0.5)
        >>> state = sampler.init({"w": torch.ones(1)}, {"w": torch.ones(1)})
        >>> state, info = sampler.step(state, None, {"w": torch.zeros(1)})
        >>> state.params["w"], round(float(state.friction), 6)  # v' = 0.5 (0.5 - 0.25); ξ' = 0.5 + v'² - 0.25
        (tensor([1.1250]), 0.265625)
    """
    check_step(lr, bounding_box)
    check_range("diffusion", diffusion, 0, above=True)
    prior = has_prior(target)

    def init(params: Params, noise: Params, group: int = 0) -> State:
        setting = target.setting(lr, {"diffusion": diffusion}, group)
        w, v = start(target, params, noise, setting), first_momenta(noise, setting)
        return State(w, setting, v, setting.own["diffusion"].clone())

    def step(state: State, batch: Batch, noise: Params) -> tuple[State, Info]:
        setting, scalars = state.setting, fitted(state.setting, state.params)
        loss, grads = gradient(target, state.params, batch)
        moved, momenta = {}, {}
        for name, w in state.params.items():
            s, anchor, xi = scalars[w.dtype, w.ndim], target.anchor[name], fit(state.friction, w)
            v = state.momenta[name] - s.lr * drift(w, grads[name], anchor, s, prior)
            v = (1 - xi) * v + (2 * s.own["diffusion"] * s.lr).sqrt() * noise[name]
            new, v = bounce(w + v, v, anchor, bounding_box)
            mask = setting.mask.get(name)
            moved[name], momenta[name] = restrict(new, w, mask), restrict(v, torch.zeros_like(v), mask)
        square = mean_square(momenta, setting)
        friction = state.friction + square - setting.lr
        terms = {"temperature": square / setting.lr, "friction": friction}
        return State(moved, setting, momenta, friction), Info(loss, terms)

    return Sampler(target, init, step, gaussian_noise(target))
