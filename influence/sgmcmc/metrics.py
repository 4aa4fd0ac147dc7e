r"""How large each term of a step is: `Δw = -(gradient + localization + weight decay) + noise`, before the box."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.langevin import fitted, per_chain
from influence.sgmcmc.target import Setting
from influence.types import Params

NAMES = (
    *("scaled_grad", "unscaled_grad", "localization", "weight_decay", "noise", "distance"),
    *("dot_grad_prior", "dot_grad_noise", "dot_prior_noise"),
)


def step_terms(
    params: Params,
    grads: Params,
    pulls: Params,
    noise: Params,
    scales: Mapping[str, Tensor],
    anchor: Params,
    setting: Setting,
) -> dict[str, Float[Tensor, "*c"]]:
    r"""Return norms and inner products of the terms of a step, over all moving entries.

    $$‖\tfrac{ε}{2} G nβ g‖,\; ‖\tfrac{ε}{2} nβ g‖,\; ‖\tfrac{ε}{2} G γ(w - w^*)‖,\; ‖\tfrac{ε}{2} G λ w‖,\;
      ‖\sqrt{εG}\,η‖,\; ‖w - w^*‖$$

    All but `unscaled_grad` and `distance` are of what the mask lets move; `distance` is before the step.

    Args:
        params: parameters before the step.
        grads: gradients of the mean loss.
        pulls: what took their place in the drift.
        noise: standard normals.
        scales: `G`, where it is not one.
        anchor: `w^*`.
        setting: what the chain, or each of stacked chains, runs with.

    Returns:
        The terms, by the names in `NAMES`.
    """
    scalars = fitted(setting, params)
    found = {name: torch.zeros((), dtype=torch.float64) for name in NAMES}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = found[name].to(x.device) + per_chain(x.double() * y.double(), setting)

    for name, w in params.items():
        s, g, at = scalars[w.dtype, w.ndim], scales.get(name), setting.mask.get(name)
        half, root = (s.lr / 2, s.lr.sqrt()) if g is None else (s.lr / 2 * g, s.lr.sqrt() * g.sqrt())
        away, plain = w - anchor[name], s.lr / 2 * s.n_beta * grads[name]
        parts = (
            half * s.n_beta * pulls[name],
            half * s.localization * away,
            half * s.weight_decay * w,
            root * noise[name],
        )
        grad, local, decay, kick = parts if at is None else (x * at for x in parts)
        for key, x, y in (
            ("scaled_grad", grad, grad),
            ("unscaled_grad", plain, plain),
            ("localization", local, local),
            ("weight_decay", decay, decay),
            ("noise", kick, kick),
            ("distance", away, away),
            ("dot_grad_prior", grad, local + decay),
            ("dot_grad_noise", grad, kick),
            ("dot_prior_noise", local + decay, kick),
        ):
            add(key, x, y)
    return {name: x if name.startswith("dot") else x.sqrt() for name, x in found.items()}
