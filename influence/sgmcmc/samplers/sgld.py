r"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), localised (Lau et al. 2023)."""

from influence.sgmcmc.samplers import overdamped
from influence.sgmcmc.samplers.langevin import Sampler
from influence.sgmcmc.samplers.overdamped import State
from influence.sgmcmc.samplers.target import Hyper, Target

__all__ = ["State", "build"]


def build(target: Target, lr: Hyper, bounding_box: float | None = None, *, metrics: bool = False) -> Sampler:
    r"""Return SGLD.

    $$w' = w - \tfrac{ε}{2}\bigl(nβ\,∇L_b(w) + γ(w - w^*) + λ w\bigr) + \sqrt{ε}\;η, \qquad η \sim N(0, I)$$

    For a quadratic loss with curvature `h` its stationary variance is `1 / (P (1 - εP/4))`, `P = nβ h + γ + λ`: stable
    for `εP < 4`, and too wide by a factor `1 + εP/4` (`theory.sgld_llc`).

    Args:
        target: what to draw from.
        lr: `ε`.
        bounding_box: clamp every entry to its anchor ± this, after the noise.
        metrics: return the size of every term (`metrics.NAMES`) with each step.

    Returns:
        The sampler. Its noise is a dict of standard normals shaped like the parameters that move.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: w["w"].square().sum() / 2, {"w": torch.ones(1)}, n_beta=10.0)
        >>> sampler = sgmcmc.sgld.build(target, lr=0.1)
        >>> state = sampler.init({"w": torch.ones(1)}, sampler.noise(0, 0, 0))
        >>> state, info = sampler.step(state, None, {"w": torch.zeros(1)})
        >>> state.params["w"], info.loss
        (tensor([0.5000]), tensor(0.5000))
    """
    return overdamped.build(target, lr, bounding_box, None, metrics)
