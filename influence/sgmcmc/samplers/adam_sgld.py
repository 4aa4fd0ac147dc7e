r"""SGLD with Adam's numerator and denominator (Hitchcock & Hoogland 2025)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.samplers import overdamped, rmsprop_sgld
from influence.sgmcmc.samplers.langevin import Sampler, fit
from influence.sgmcmc.samplers.overdamped import Metric, State
from influence.sgmcmc.samplers.target import Hyper, Target, check_range
from influence.types import Params

__all__ = ["State", "build"]


class Averages(NamedTuple):
    """Running means of gradients and of their squares.

    Attributes:
        first: `m`, per entry.
        power: `β₁^t`.
        squares: `V` and `β₂^t`.
    """

    first: Params
    power: Float[Tensor, "*c"]
    squares: rmsprop_sgld.Squares


def build(
    target: Target,
    lr: Hyper,
    bounding_box: float | None = None,
    *,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.99,
    eps: Hyper = 0.1,
    metrics: bool = False,
) -> Sampler:
    r"""Return Adam-SGLD.

    $$m_t = β_1 m_{t-1} + (1-β_1) g_t, \quad V_t = β_2 V_{t-1} + (1-β_2) g_t^2, \quad
      \hat m = \frac{m_t}{1-β_1^{t+1}}, \quad G = \frac{1}{\sqrt{V_t / (1-β_2^{t+1})} + e}$$
    $$w' = w - \tfrac{ε}{2}\,G\,\bigl(nβ\,\hat m + γ(w - w^*) + λ w\bigr) + \sqrt{ε G}\;η$$

    with `m_{-1} = 0`, `V_{-1} = 1`. The prior enters neither mean. The lagging `m̂` and the moving `G` leave the
    invariant law approximate.

    Args:
        target: what to draw from.
        lr: `ε`.
        bounding_box: clamp every entry to its anchor ± this.
        beta1: `β₁`.
        beta2: `β₂`.
        eps: `e`.
        metrics: return the size of every term with each step.

    Returns:
        The sampler.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> target = sgmcmc.local_posterior(lambda w, _: 3 * w["w"].sum(), {"w": torch.zeros(1)}, n_beta=1.0)
        >>> sampler = sgmcmc.adam_sgld.build(target, lr=2.0, beta2=0.0, eps=1.0)  # V = g², so G = 1 / (3 + 1)
        >>> state = sampler.init({"w": torch.zeros(1)}, sampler.noise(0, 0, 0))
        >>> sampler.step(state, None, {"w": torch.zeros(1)})[0].params["w"]
        tensor([-0.7500])
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check_range(name, value, 0)
        if torch.as_tensor(value).max() >= 1:
            raise ValueError(f"{name} must be below 1; got {value}")
    check_range("eps", eps, 0, above=True)

    def first(params: Params) -> Averages:
        squares = rmsprop_sgld.initial(params, 1.0)
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return Averages(zeros, torch.ones_like(squares.power), squares)

    def update(grads: Params, aux: Averages, own: dict[str, Tensor]) -> tuple[Params, Params, Averages]:
        squares = rmsprop_sgld.follow(aux.squares, grads, own["beta2"])
        power = aux.power * own["beta1"]
        means: Params = {}
        for name, m in aux.first.items():
            b = fit(own["beta1"], m)
            means[name] = b * m + (1 - b) * grads[name]
        pulls = {name: m / fit(1 - power, m) for name, m in means.items()}
        return pulls, rmsprop_sgld.scale(squares, own["eps"], True), Averages(means, power, squares)

    own = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return overdamped.build(target, lr, bounding_box, Metric(first, update, own), metrics)
