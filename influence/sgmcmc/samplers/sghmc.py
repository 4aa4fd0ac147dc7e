r"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin 2014)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.samplers.langevin import (
    Info,
    Leaf,
    Sampler,
    box,
    check_step,
    drift,
    fitted,
    gaussian_noise,
    has_prior,
    moving,
    per_chain,
    restrict,
    start,
)
from influence.sgmcmc.samplers.target import Hyper, Setting, Target, check_range, gradient
from influence.types import Batch, Params


class State(NamedTuple):
    """A chain.

    Attributes:
        params: the parameters that move.
        setting: what it runs with.
        momenta: `v`, per entry: the last step.
    """

    params: Params
    setting: Setting
    momenta: Params


def build(target: Target, lr: Hyper, bounding_box: float | None = None, *, friction: Hyper = 0.1) -> Sampler:
    r"""Return SGHMC.

    $$v' = (1 - a)\,v - ε\,∇U_b(w) + \sqrt{2 a ε}\;η, \qquad w' = w + v', \qquad
      ∇U_b = nβ\,∇L_b + γ(w - w^*) + λ w$$

    `v` starts as `√ε η`. At large friction it is SGLD with `ε_SGLD = 2ε / a`. The stationary variance on a quadratic
    is `theory.sghmc_variance`.

    Args:
        target: what to draw from.
        lr: `ε`, the square of the time step.
        bounding_box: clamp every entry to its anchor ± this, and turn its momentum round where it hit.
        friction: `a`, in (0, 1].

    Returns:
        The sampler; each step says its temperature `mean(v²) / ε`, about one.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.ones(1)}, n_beta=1.0)
        >>> sampler = sgmcmc.sghmc.build(target, lr=0.25, friction=0.5)
        >>> state = sampler.init({"w": torch.ones(1)}, {"w": torch.ones(1)})
        >>> sampler.step(state, None, {"w": torch.zeros(1)})[0].params["w"]  # 1 + 0.5 · 0.5 - 0.25
        tensor([1.])
    """
    check_step(lr, bounding_box)
    check_range("friction", friction, 0, above=True)
    if torch.as_tensor(friction).max() > 1:
        raise ValueError(f"friction must be at most 1; got {friction}")
    prior = has_prior(target)

    def init(params: Params, noise: Params, group: int = 0) -> State:
        setting = target.setting(lr, {"friction": friction}, group)
        momenta = first_momenta(noise, setting)
        return State(start(target, params, noise, setting), setting, momenta)

    def step(state: State, batch: Batch, noise: Params) -> tuple[State, Info]:
        scalars = fitted(state.setting, state.params)
        loss, grads = gradient(target, state.params, batch)
        moved, momenta = {}, {}
        for name, w in state.params.items():
            s, anchor = scalars[w.dtype, w.ndim], target.anchor[name]
            a = s.own["friction"]
            pull = s.lr * drift(w, grads[name], anchor, s, prior)
            v = (1 - a) * state.momenta[name] - pull + (2 * a * s.lr).sqrt() * noise[name]
            new, v = bounce(w + v, v, anchor, bounding_box)
            mask = state.setting.mask.get(name)
            moved[name], momenta[name] = restrict(new, w, mask), restrict(v, torch.zeros_like(v), mask)
        after = State(moved, state.setting, momenta)
        return after, Info(loss, {"temperature": mean_square(momenta, after.setting) / after.setting.lr})

    return Sampler(target, init, step, gaussian_noise(target))


def first_momenta(noise: Params, setting: Setting) -> Params:
    """Return momenta at temperature one, zero where nothing moves."""
    zero = {name: torch.zeros_like(x) for name, x in noise.items()}
    root = setting.lr.sqrt()
    return {name: restrict(root.to(x.dtype) * x, zero[name], setting.mask.get(name)) for name, x in noise.items()}


def bounce(w: Leaf, v: Leaf, anchor: Tensor, size: float | None) -> tuple[Leaf, Leaf]:
    """Return a parameter clamped to the anchor ± size, and its momentum turned round where it hit."""
    if size is None:
        return w, v
    inside = box(w, anchor, size)
    return inside, torch.where(inside == w, v, -v)


def mean_square(momenta: Params, setting: Setting) -> Float[Tensor, "*c"]:
    """Return the mean square of a chain's momenta that move."""
    total = torch.stack([per_chain(v.double().square(), setting) for v in momenta.values()]).sum(0)
    return total / moving(momenta, setting)
