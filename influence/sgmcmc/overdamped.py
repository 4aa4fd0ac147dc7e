"""The overdamped samplers are one step with different metrics: SGLD, RMSprop-SGLD, Adam-SGLD."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from influence.sgmcmc.gradients import gradient
from influence.sgmcmc.langevin import (
    Info,
    Sampler,
    box,
    check_step,
    drift,
    fitted,
    gaussian_noise,
    has_prior,
    langevin,
    restrict,
    start,
)
from influence.sgmcmc.metrics import step_terms
from influence.sgmcmc.target import Hyper, Target
from influence.types import Batch, Params


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
            moved[name] = box(restrict(new, w, state.setting.mask.get(name)), anchor, bounding_box)
        terms: dict[str, Tensor] = {}
        if metrics:
            terms = step_terms(state.params, grads, pulls, noise, scales, target.anchor, state.setting)
        return State(moved, state.setting, aux), Info(loss, terms)

    return Sampler(target, init, step, gaussian_noise(target))
