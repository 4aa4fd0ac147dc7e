r"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996), and its acceptance as a dial for SGLD."""

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
    generator,
    has_prior,
    langevin,
    normals,
    per_chain,
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
    """

    params: Params
    setting: Setting


class Noise(NamedTuple):
    """What a step needs: normals for the proposal, a uniform for its acceptance."""

    normal: Params
    uniform: Float[Tensor, ""]


def build(target: Target, lr: Hyper) -> Sampler:
    r"""Return MALA: SGLD's step is a proposal, taken with probability

    $$\min\Bigl(1,\, e^{U(w) - U(w')}\, \frac{q(w \mid w')}{q(w' \mid w)}\Bigr), \qquad
      q(w' \mid w) = N\bigl(w - \tfrac{ε}{2} ∇U(w),\, ε I\bigr)$$

    Both potentials are of the same batch, so with all data as the batch the invariant law is exact at any `ε`; with
    minibatches it is exact for none. Two gradients a step.

    Args:
        target: what to draw from.
        lr: `ε`.

    Returns:
        The sampler; each step says its `acceptance` probability.

    Raises:
        ValueError: if the step size is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.zeros(1)}, n_beta=1.0)
        >>> sampler = sgmcmc.mala.build(target, lr=1.0)
        >>> state = sampler.init({"w": torch.zeros(1)}, sampler.noise(0, 0, 0))
        >>> noise = Noise({"w": torch.ones(1)}, torch.tensor(0.5))
        >>> state, info = sampler.step(state, None, noise)  # from 0 to 1: accepted with e^{-ε/8}
        >>> state.params["w"], round(float(info.terms["acceptance"]), 6)
        (tensor([1.]), 0.882497)
    """  # noqa: D415
    check_step(lr, None)
    prior = has_prior(target)

    def init(params: Params, noise: Noise, group: int = 0) -> State:
        setting = target.setting(lr, {}, group)
        return State(start(target, params, noise.normal, setting), setting)

    def noise(key: int, chain: int, step: int) -> Noise:
        source = generator(key, chain, step)
        return Noise(normals(target.anchor, source), torch.rand((), generator=source, dtype=torch.float64))

    def step(state: State, batch: Batch, noise: Noise) -> tuple[State, Info]:
        scalars, mask = fitted(state.setting, state.params), state.setting.mask
        here, slope, loss = potential(target, state.params, batch, state.setting, prior)
        proposed: Params = {}
        for name, w in state.params.items():
            new = langevin(w, slope[name], noise.normal[name], scalars[w.dtype, w.ndim].lr)
            proposed[name] = restrict(new, w, mask.get(name))
        there, back, _ = potential(target, proposed, batch, state.setting, prior)
        log_a = log_acceptance(state.params, slope, here, proposed, back, there, state.setting.lr)
        log_a = log_a.nan_to_num(nan=-torch.inf)  # where the loss is no number there is no density
        taken = noise.uniform.to(log_a.device).log() < log_a
        params = {name: restrict(proposed[name], w, fit(taken, w).bool()) for name, w in state.params.items()}
        return State(params, state.setting), Info(loss, {"acceptance": log_a.exp().clamp(max=1.0)})

    return Sampler(target, init, step, noise)


def potential(
    target: Target, params: Params, batch: Batch, setting: Setting, prior: tuple[bool, bool]
) -> tuple[Float[Tensor, "*c"], Params, Float[Tensor, "*c"]]:
    r"""Return `U = nβ L + (γ/2)‖w - w^*‖² + (λ/2)‖w‖²` over what moves, in float64, its gradient, and the loss."""
    scalars, mask = fitted(setting, params), setting.mask
    loss, grads = gradient(target, params, batch)
    total, slope = setting.n_beta * loss.double(), {}
    for name, w in params.items():
        anchor, at = target.anchor[name], mask.get(name)
        away, size = (w - anchor).double(), w.double()
        if at is not None:
            away, size = away * at, size * at
        total = total + setting.localization / 2 * per_chain(away.square(), setting)
        total = total + setting.weight_decay / 2 * per_chain(size.square(), setting)
        d = drift(w, grads[name], anchor, scalars[w.dtype, w.ndim], prior)
        slope[name] = d if at is None else d * at
    return total, slope, loss


def log_acceptance(
    here: Params,
    slope_here: Params,
    potential_here: Float[Tensor, "*c"],
    there: Params,
    slope_there: Params,
    potential_there: Float[Tensor, "*c"],
    lr: Float[Tensor, "*c"],
) -> Float[Tensor, "*c"]:
    r"""Return the logarithm of the acceptance ratio of a proposal, in float64.

    $$\log a = U(w) - U(w') - \frac{‖w - w' + \frac{ε}{2} ∇U(w')‖² - ‖w' - w + \frac{ε}{2} ∇U(w)‖²}{2ε}$$

    Args:
        here: `w`.
        slope_here: `∇U(w)`.
        potential_here: `U(w)`.
        there: `w'`.
        slope_there: `∇U(w')`.
        potential_there: `U(w')`.
        lr: `ε`.

    Example:
        >>> import torch
        >>> at = lambda *x: {"w": torch.tensor(x)}
        >>> zero, lr = torch.tensor(0.0), torch.tensor(0.1)
        >>> step = at(1.5, 5.5)  # of U = ‖w‖² / 2
        >>> round(float(log_acceptance(at(0.0, 0.0), at(0.0, 0.0), zero, step, step, torch.tensor(16.25), lr).exp()), 6)
        0.666144
    """
    there_given_here = _squared(here, there, slope_here, lr)
    here_given_there = _squared(there, here, slope_there, lr)
    change = potential_here.double() - potential_there.double()
    return change + (there_given_here - here_given_there) / (2 * lr.double())


def _squared(a: Params, b: Params, slope: Params, lr: Float[Tensor, "*c"]) -> Float[Tensor, "*c"]:
    """Return `‖b - a + (ε/2) slope‖²`, of each chain."""
    total = torch.zeros_like(lr, dtype=torch.float64)
    for name in a:
        gap = b[name].double() - a[name].double()
        gap = gap + fit(lr.double() / 2, gap) * slope[name].double()
        total = total + gap.square().reshape(*lr.shape, -1).sum(-1)
    return total
