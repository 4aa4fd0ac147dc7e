"""Finite differences: what a step of the weights along a direction does to any loss."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.func.loss.losses import widen
from influence.func.numbers import check_number
from influence.func.transform.chain import unblock
from influence.func.transform.layout import Layout
from influence.types import Batch, LossFn, Params, Rows


class FiniteDiff(NamedTuple):
    r"""A step `h` of the weights along a direction `u`.

    $$\frac{\ell(\theta + h u) - \ell(\theta - h u)}{2h} = \langle \nabla \ell(\theta), u \rangle + O(h^2)$$

    and `(ℓ(θ + hu) - ℓ(θ)) / h`, with an error `O(h)`, if it is not central. Positive: a step along `u` raises the
    loss, so one of gradient descent along `-u` lowers it. Two forwards; no gradient.

    Attributes:
        direction: `u`, by parameter name and in the parameter's shape; what it does not name stays.
        step: `h`; a good one is `step_for(params, direction)`.

    Example:
        >>> import torch
        >>> from influence.train import FiniteDiff
        >>> square = lambda params, x: params["w"].square().sum() * x
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> FiniteDiff({"w": torch.tensor([1.0, 0.0])}, 0.5).effect(square, params, torch.ones(1))
        tensor([6.])
    """

    direction: Params
    step: float

    def moved(self, params: Params, by: float = 1.0) -> Params:
        """Return `θ + by · h · u`, new tensors: the pure form, for `functional_call` or a loss function.

        Raises:
            ValueError: if the direction has a parameter or a shape that the parameters do not have, or the step is
                zero or not finite.
        """
        check_direction(self.direction, params)
        check_number("step", abs(self.step), 0, above=True)
        return {
            name: _plus(p, self.direction[name], by * self.step) if name in self.direction else p
            for name, p in params.items()
        }

    def effect(self, loss_fn: LossFn, params: Params, batch: Batch, central: bool = True) -> Float[Tensor, " n"]:
        """Return the change of each example's loss per unit of step.

        Args:
            loss_fn: any loss function, of whatever else than what the direction is of.
            params: the parameters; they are not written to.
            batch: the examples whose losses are looked at.
            central: whether to step both ways.
        """
        with torch.no_grad():
            ahead = widen(loss_fn(self.moved(params), batch))
            behind = widen(loss_fn(self.moved(params, -1.0) if central else params, batch))
        return (ahead - behind) / (self.step * (2 if central else 1))

    @contextmanager
    def applied(self, model: nn.Module, by: float = 1.0) -> Iterator[nn.Module]:
        """Move a module's own weights while the context lasts, and put back the very bits.

        Whatever aliases them, as `functionalize`'s parameters do, moves along. For what no pure function can run.

        Args:
            model: the module.
            by: how many steps; -1 for one back.
        """
        own = dict(model.named_parameters())
        check_direction(self.direction, own)
        check_number("step", abs(self.step), 0, above=True)
        saved = {name: own[name].detach().clone() for name in self.direction}
        try:
            with torch.no_grad():
                for name, u in self.direction.items():
                    own[name].copy_(_plus(own[name], u, by * self.step))
            yield model
        finally:
            with torch.no_grad():
                for name, before in saved.items():
                    own[name].copy_(before)


def direction_of(rows: Rows, layout: Layout, weights: Float[Tensor, " n"] | None = None) -> Params:
    """Return `Σ_n w_n g_n` of rows that are whole gradients, by parameter name and in the parameter's shape.

    Args:
        rows: raw rows, or blocks after any transform that keeps their size (a scale, unit norm, a preconditioner).
        layout: `loss_fn.layout`, or the plan's.
        weights: of the examples; default one each.

    Returns:
        The direction, in at least float32.

    Raises:
        ValueError: if the rows are projected, or of heads: they are no direction of the weights.
    """
    found = unblock(rows, layout)
    raw = all(name in layout.params and tuple(row.shape[1:]) == layout[name].shape for name, row in rows.items())
    if found is None and not raw:
        raise ValueError(
            f"rows of {', '.join(list(rows)[:3])} are no whole gradients of parameters (projected, or of heads), so "
            "they are no direction of the weights: collect them without project and split_heads"
        )
    grads = rows if raw or found is None else found[0]
    return {
        name: widen(g).sum(0) if weights is None else torch.tensordot(weights.to(widen(g)), widen(g), 1)
        for name, g in grads.items()
    }


def step_for(params: Params, direction: Params, central: bool = True) -> float:
    r"""Return a step that balances rounding and curvature, `h = ε^{1/3} ‖θ‖ / ‖u‖` (`ε^{1/2}` if not central).

    The norms are over the direction's parameters; `ε` is their dtype's.

    Raises:
        ValueError: if the direction is zero.
    """
    check_direction(direction, params)
    size, length = (_norm({name: tree[name] for name in direction}) for tree in (params, direction))
    if length == 0:
        raise ValueError("the direction is zero: there is no step along it")
    eps = max(torch.finfo(params[name].dtype).eps for name in direction)
    return float(eps ** (1 / 3 if central else 1 / 2) * max(size, 1e-6) / length)


def check_direction(direction: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Refuse a direction that is not one of these parameters.

    Raises:
        ValueError: naming the parameter, and both shapes.
    """
    unknown = [name for name in direction if name not in params]
    if unknown or not direction:
        raise ValueError(
            f"the direction is of {', '.join(unknown[:3]) or 'nothing'}, which is none of the {len(params)} parameters "
            f"{', '.join(list(params)[:3])}…"
        )
    for name, u in direction.items():
        if u.shape != params[name].shape:
            raise ValueError(
                f"the direction has shape {list(u.shape)} at {name!r}, and the parameter {list(params[name].shape)}: "
                "pass it in the parameter's own shape, as direction_of returns it"
            )


def _plus(p: Tensor, u: Tensor, step: float) -> Tensor:
    """Return `p + step · u`, added in the wider dtype and rounded once."""
    dtype = torch.promote_types(p.dtype, u.dtype)
    return (p.detach().to(dtype) + step * u.to(p.device, dtype)).to(p.dtype)


def _norm(tree: Mapping[str, Tensor]) -> float:
    return float(sum(float(x.detach().double().square().sum()) for x in tree.values()) ** 0.5)
