"""The overdamped samplers are one step with different metrics: SGLD, RMSprop-SGLD, Adam-SGLD."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.samplers.langevin import (
    Info,
    Sampler,
    box,
    check_step,
    drift,
    fitted,
    gaussian_noise,
    has_prior,
    langevin,
    per_chain,
    restrict,
    start,
)
from influence.sgmcmc.samplers.target import Hyper, Setting, Target, gradient
from influence.types import Batch, Params

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


class State(NamedTuple):
    """A chain.

    Attributes:
        params: the parameters that move.
        setting: what it runs with.
        aux: the metric's own state.
    """

    params: Params
    setting: Any
    aux: Any


class Metric(NamedTuple):
    """A diagonal metric adapted to gradients.

    Attributes:
        init: `params -> aux`.
        update: `(grads, aux, own) -> (numerators, G, aux)`; numerators take the gradients' place in the drift.
        own: its hyper-parameters, which it finds in the setting.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, dict[str, Tensor]], tuple[Params, Params, Any]]
    own: dict[str, Hyper]


def build(target: Target, lr: Hyper, bounding_box: float | None, metric: Metric | None, metrics: bool) -> Sampler:
    """Return the sampler of a metric; `None` is the identity."""
    check_step(lr, bounding_box)
    own = {} if metric is None else metric.own
    prior = has_prior(target)

    def init(params: Params, noise: Params, group: int = 0) -> State:
        setting = target.setting(lr, own, group)
        w = start(target, params, noise, setting)
        return State(w, setting, () if metric is None else metric.init(w))

    def step(state: State, batch: Batch, noise: Params) -> tuple[State, Info]:
        scalars = fitted(state.setting, state.params)
        loss, grads = gradient(target, state.params, batch)
        if metric is None:
            pulls, scales, aux = grads, dict[str, Tensor](), state.aux
        else:
            pulls, scales, aux = metric.update(grads, state.aux, state.setting.own)
        moved: Params = {}
        for name, w in state.params.items():
            s, anchor = scalars[w.dtype, w.ndim], target.anchor[name]
            d = drift(w, pulls[name], anchor, s, prior)
            new = langevin(w, d, noise[name], s.lr, scales.get(name))
            moved[name] = restrict(box(new, anchor, bounding_box), w, state.setting.mask.get(name))
        terms: dict[str, Tensor] = {}
        if metrics:
            terms = step_terms(state.params, grads, pulls, noise, scales, target.anchor, state.setting)
        return State(moved, state.setting, aux), Info(loss, terms)

    return Sampler(target, init, step, gaussian_noise(target))
