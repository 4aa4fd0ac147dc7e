r"""Langevin dynamics whose step size biases no quadratic (Leimkuhler & Matthews 2013)."""

from typing import NamedTuple

from influence.sgmcmc.samplers.langevin import (
    Info,
    Sampler,
    box,
    check_step,
    drift,
    fitted,
    gaussian_noise,
    has_prior,
    restrict,
    start,
)
from influence.sgmcmc.samplers.target import Hyper, Setting, Target, gradient
from influence.types import Batch, Params


class State(NamedTuple):
    """A chain.

    Attributes:
        params: the parameters that move.
        setting: what it runs with.
        noise: the noise of the step before.
    """

    params: Params
    setting: Setting
    noise: Params


def build(target: Target, lr: Hyper, bounding_box: float | None = None) -> Sampler:
    r"""Return the Leimkuhler-Matthews sampler, at SGLD's cost and one more copy of the noise.

    $$w' = w - \tfrac{ε}{2}\,∇U_b(w) + \tfrac{\sqrt ε}{2}\,(η_t + η_{t+1}), \qquad
      ∇U_b = nβ\,∇L_b + γ(w - w^*) + λ w$$

    For a quadratic its stationary variance is `1/P` exactly, at any stable `ε`, where SGLD's is `1/(P(1 - εP/4))`;
    elsewhere its bias is of second order in `ε`. Gradient noise biases it as it does SGLD.

    Args:
        target: what to draw from.
        lr: `ε`.
        bounding_box: clamp every entry to its anchor ± this.

    Returns:
        The sampler.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.zeros(1)}, n_beta=1.0)
        >>> sampler = sgmcmc.leimkuhler_matthews.build(target, lr=4.0)
        >>> state = sampler.init({"w": torch.zeros(1)}, {"w": torch.ones(1)})
        >>> sampler.step(state, None, {"w": torch.ones(1)})[0].params["w"]
        tensor([2.])
    """
    check_step(lr, bounding_box)
    prior = has_prior(target)

    def init(params: Params, noise: Params, group: int = 0) -> State:
        setting = target.setting(lr, {}, group)
        return State(start(target, params, noise, setting), setting, noise)

    def step(state: State, batch: Batch, noise: Params) -> tuple[State, Info]:
        scalars = fitted(state.setting, state.params)
        loss, grads = gradient(target, state.params, batch)
        moved: Params = {}
        for name, w in state.params.items():
            s, anchor = scalars[w.dtype, w.ndim], target.anchor[name]
            d = drift(w, grads[name], anchor, s, prior)
            new = w - s.lr / 2 * d + s.lr.sqrt() / 2 * (state.noise[name] + noise[name])
            moved[name] = restrict(box(new, anchor, bounding_box), w, state.setting.mask.get(name))
        return State(moved, state.setting, noise), Info(loss, {})

    return Sampler(target, init, step, gaussian_noise(target))
