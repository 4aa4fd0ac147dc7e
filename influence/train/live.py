"""Live scaling: the transform of a step under the moments that its update will divide by."""

import torch
from torch import nn

from influence.func.engine.batched import make_feeds
from influence.func.engine.plan import Plan
from influence.func.transform.chain import Stage, Transform
from influence.func.transform.scale import scale_by_adafactor, scale_by_adam
from influence.train.optimizer import EPS, OptimizerState, read_optimizer


def live(
    transform: Transform, model: nn.Module, optimizer: torch.optim.Optimizer, names: list[str], step: int
) -> tuple[Transform, bool]:
    """Return a transform with an optimizer's present scale, and whether it has one: not before its first update.

    Args:
        transform: what is wanted of the gradients, without the scale.
        model: the model that is trained.
        optimizer: its optimizer.
        names: the parameters whose gradients are collected.
        step: updates made so far.

    Raises:
        ValueError: if the optimizer has updated and keeps no second moment; or none of some parameter, naming it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    own = dict(model.named_parameters())
    if not any(inner.state.get(own[name]) for name in names):
        if step:
            raise ValueError(
                f"scale='optimizer': {type(inner).__name__} keeps nothing of {', '.join(names[:3])} after {step} "
                "updates; it scales no gradient by a second moment, or does not train them. Pass scale=None"
            )
        return transform, False
    state = read_optimizer(model, inner, names, copy=False)
    return scaled(transform, scale_by_optimizer(state)), True


def scale_by_optimizer(state: OptimizerState) -> Transform:
    r"""Divide by what the optimizer's next update divides by, before it adds that update's gradient.

    $$g / (\sqrt{\hat v} + \varepsilon)$$

    with Adam's bias correction and the optimizer's own `ε`; Adafactor's rank-one denominator for an Adafactor.

    Args:
        state: what `read_optimizer(model, checkpoint)` returns.

    Returns:
        `scale_by_adam` or `scale_by_adafactor`.

    Raises:
        ValueError: if the parameters' groups have different `ε`.
    """
    moments = state.moments(bias_correction=True)
    if {entry.kind for entry in state.entries.values()} == {"adafactor"}:
        return scale_by_adafactor(moments)
    found = sorted({float(state.settings[name].get("eps", EPS)) for name in state.entries})
    if len(found) > 1:
        raise ValueError(
            f"the optimizer's groups have eps {', '.join(map(str, found))}, and a scale has one: choose targets whose "
            "parameters have the same"
        )
    return scale_by_adam(moments, found[0] if found else EPS)


def scaled(transform: Transform, scale: Transform) -> Transform:
    """Return a transform with a scale where it belongs: after blocks and heads are made, before all else."""
    at = sum(step.stage < Stage.SCALE for step in transform.steps)
    return Transform((*transform.steps[:at], *scale.steps, *transform.steps[at:]))


def rebound(plan: Plan, transform: Transform) -> Plan:
    """Return a plan with another transform: who is used where stays, what is made of it changes."""
    folded = transform.bind(plan.layout)
    batched = plan.batched
    if batched is not None:
        batched = batched._replace(folded=folded, feeds=make_feeds(folded))
    return plan._replace(transform=transform, folded=folded, batched=batched)
