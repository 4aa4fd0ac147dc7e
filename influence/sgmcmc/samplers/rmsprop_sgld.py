r"""SGLD preconditioned by root mean squares of gradients (Li et al. 2016), in both published forms."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.samplers import overdamped
from influence.sgmcmc.samplers.langevin import Sampler, fit
from influence.sgmcmc.samplers.overdamped import Metric, State
from influence.sgmcmc.samplers.target import Hyper, Target, check_range
from influence.types import Params

__all__ = ["State", "build"]


class Squares(NamedTuple):
    """Running mean of squared gradients.

    Attributes:
        second: `V`, per entry.
        power: `α^t`, what is left of the start.
    """

    second: Params
    power: Float[Tensor, "*c"]


def build(
    target: Target,
    lr: Hyper,
    bounding_box: float | None = None,
    *,
    alpha: Hyper = 0.99,
    eps: Hyper = 0.1,
    init: float = 0.0,
    bias_correction: bool = False,
    metrics: bool = False,
) -> Sampler:
    r"""Return RMSprop-SGLD.

    $$V_t = α V_{t-1} + (1-α)\,g_t^2, \qquad G = \frac{1}{\sqrt{\hat V_t} + e}, \qquad
      w' = w - \tfrac{ε}{2}\,G\,\bigl(nβ\,g_t + γ(w - w^*) + λ w\bigr) + \sqrt{ε G}\;η$$

    `g` is the gradient of the mean loss: no `nβ`, no prior, no mask. The metric's divergence is left out, as in both
    published forms, so the invariant law is approximate.

    | form | `init` `V_{-1}` | `bias_correction` | first steps |
    |---|---|---|---|
    | devinterp, and the default | 0 | no: `V̂ = V` | up to `1/e` times too long: a kick |
    | Hitchcock & Hoogland 2025 | 1 | yes: `V̂ = V / (1 - α^{t+1})` | tiny |

    Args:
        target: what to draw from.
        lr: `ε`.
        bounding_box: clamp every entry to its anchor ± this.
        alpha: `α`.
        eps: `e`.
        init: `V_{-1}`.
        bias_correction: divide `V` by `1 - α^{t+1}`.
        metrics: return the size of every term with each step.

    Returns:
        The sampler.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> squares = Squares({"w": torch.zeros(1)}, torch.ones(()))
        >>> squares = follow(squares, {"w": torch.tensor([3.0])}, torch.tensor(0.99))
        >>> scale(squares, torch.tensor(0.1), False)["w"]
        tensor([2.5000])
    """
    _check(alpha, eps, init, bias_correction)

    def first(params: Params) -> Squares:
        return initial(params, init)

    def update(grads: Params, aux: Squares, own: dict[str, Tensor]) -> tuple[Params, Params, Squares]:
        aux = follow(aux, grads, own["alpha"])
        return grads, scale(aux, own["eps"], bias_correction), aux

    return overdamped.build(target, lr, bounding_box, Metric(first, update, {"alpha": alpha, "eps": eps}), metrics)


def initial(params: Params, value: float) -> Squares:
    """Return the running mean before any gradient."""
    return Squares({name: torch.full_like(p, value) for name, p in params.items()}, torch.ones((), dtype=torch.float64))


def follow(aux: Squares, grads: Params, alpha: Float[Tensor, "*c"]) -> Squares:
    """Return `V` after a gradient, `α V + (1 - α) g²`."""
    second: Params = {}
    for name, v in aux.second.items():
        a = fit(alpha, v)
        second[name] = a * v + (1 - a) * grads[name].square()
    return Squares(second, aux.power * alpha)


def scale(aux: Squares, eps: Float[Tensor, "*c"], bias_correction: bool) -> Params:
    """Return the metric, `1 / (√V̂ + e)`."""
    left = 1 - aux.power if bias_correction else torch.ones_like(aux.power)
    return {name: 1 / ((v / fit(left, v)).sqrt() + fit(eps, v)) for name, v in aux.second.items()}


def _check(alpha: Hyper, eps: Hyper, init: float, bias_correction: bool) -> None:
    for name, value in (("alpha", alpha), ("init", init)):
        check_range(name, value, 0)
    check_range("eps", eps, 0, above=True)
    most = torch.as_tensor(alpha, dtype=torch.float64).max()
    if most > 1 or (bias_correction and most >= 1):
        raise ValueError(f"alpha must be at most 1, and below 1 with bias_correction; got {alpha}")
