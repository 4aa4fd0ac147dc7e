"""The batched engine's run for ghost products: gradients as the factors of linear maps, instead of their product."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import BatchedPlan, Runner, cotangent_rows, tapped_losses
from influence.func.engine.contributions import Route, Scene, positions
from influence.func.engine.rules import linear_input, linear_names
from influence.func.engine.trace import Axis, Call
from influence.types import Batch, LossFn, Params, Rows


class Captured(NamedTuple):
    """Gradients of a batch, as factors where every use of a parameter is a linear map, as rows elsewhere.

    Attributes:
        factors: `{parameter: (left [n, s, o], right [n, s, i])}`; several uses lie side by side along `s`.
        rows: `{parameter: [n, *block]}`.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rows: Rows


class FactorRunner(Runner):
    """The watcher of a run that wants both factors of linear maps instead of their product."""

    def __init__(self, plan: BatchedPlan, scene: Scene, zeros: Rows) -> None:
        """Start a run; parameters with any use that is no linear map get rows."""
        super().__init__(plan, scene, zeros)
        others = {name for key, route in plan.routes.items() if route.rule != "linear" for name in key.params}
        self.excluded = others | {name for key in plan.alone for name in key.params}
        self.taken: list[LinearUse] = []

    def tap(self, call: Call, out: Any, route: Route) -> Any:
        """Add a zero to a linear map's result, whose gradient is the output gradient; the rest as usual."""
        names = linear_names(call) if route.rule == "linear" else None
        if names is None or names[0] in self.excluded:
            return super().tap(call, out, route)
        (axis,) = route.outputs
        assert axis is not None
        zero = out.new_zeros(()).expand(out.shape).requires_grad_()
        weight, bias, x, x_axis, x_is_first = (*names, *linear_input(call, route))
        inputs = positions(x.detach(), x_axis, self.scene.n, None)
        x_is_left = x_is_first != self.scene.params[weight].transposed
        self.taken.append(LinearUse(weight, bias, inputs, x_is_left, zero, axis))
        return out + zero


class LinearUse(NamedTuple):
    """One use of a linear map, remembered until its output gradient is here."""

    weight: str
    bias: str | None
    inputs: Tensor
    inputs_are_left: bool
    zero: Tensor
    axis: Axis


def capture(plan: BatchedPlan, loss_fn: LossFn, params: Params, batch: Batch) -> Captured:
    """Return a batch's gradients as factors where that is possible.

    Args:
        plan: a plan without a transform.
        loss_fn: the loss function.
        params: plain parameters.
        batch: the batch.

    Returns:
        The factors, and the rows of what has none.
    """
    with torch.enable_grad():
        losses, run = tapped_losses(plan, loss_fn, params, batch, FactorRunner)
        assert isinstance(run, FactorRunner)
        zeros, taken = run.zeros, run.taken
        everything = {**zeros, **{f"{i}": use.zero for i, use in enumerate(taken)}}
        found = cotangent_rows(losses, None, everything)
    n = batch_size(batch)
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    rows = {name: found[name] for name in zeros}
    for i, use in enumerate(taken):
        g = positions(found[f"{i}"], use.axis, n, None)
        factors.setdefault(use.weight, []).append((use.inputs, g) if use.inputs_are_left else (g, use.inputs))
        rows.pop(use.weight, None)
        if use.bias is not None and use.bias in rows:
            rows[use.bias] = rows[use.bias] + g.sum(1)
    joined = {
        name: (torch.cat([a for a, _ in uses], 1), torch.cat([b for _, b in uses], 1)) for name, uses in factors.items()
    }
    return Captured(joined, rows)
