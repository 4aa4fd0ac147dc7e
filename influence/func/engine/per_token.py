r"""Per-token gradients, in two meanings.

* `"use"`: the row of position `t` is what the parameters' use at position `t` contributes, `g_t ⊗ x_t` for a linear
  map. It contains, through attention, the influence of later tokens' losses.
* `"loss"`: the row of position `t` is the gradient of that position's own loss.

Either way an example's token rows sum to its row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import BatchedPlan, Route, batched_rows, cotangent_rows, tapped_losses
from influence.func.engine.plan import EngineError, Plan, Planned, Program, make_plan
from influence.func.engine.trace import UseKey, position_axes
from influence.func.transform.chain import Transform
from influence.types import Batch, LossFn, Params, Rows


class TokenRows(NamedTuple):
    """Rows of tokens, ragged.

    Attributes:
        rows: `{block: [total, …]}`, the tokens of example 0, then those of example 1, and so on.
        offsets: `[n + 1]`; example i's tokens are `offsets[i]:offsets[i + 1]`.
        positions: each row's position in its example's `input_ids`.
    """

    rows: Rows
    offsets: Int[Tensor, " n_plus_1"]
    positions: Int[Tensor, " total"]

    def example(self, i: int) -> Rows:
        """Return the token rows of one example."""
        begin, end = (int(self.offsets[j]) for j in (i, i + 1))
        return {name: row[begin:end] for name, row in self.rows.items()}


TokenRowsAndLosses: TypeAlias = tuple[TokenRows, Float[Tensor, " n"]]


def per_token_grads(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    position: str = "use",
    transform: Transform | None = None,
) -> TokenRows:
    """Compute a gradient for every token of every example.

    Args:
        loss_fn: a loss function; `position="loss"` needs one that `functionalize` made.
        params: the parameters to differentiate. With `position="use"` every one must be used position by position.
        batch: a batch; `attention_mask` says which positions are real, by default all.
        position: `"use"` (where the parameter was used) or `"loss"` (whose loss it is; positions without a label
            have no row).
        transform: what is wanted of each token's gradient.

    Returns:
        The token rows.

    Raises:
        ValueError: if positions cannot be told apart.

    Example:
        >>> import torch
        >>> from influence import per_token_grads
        >>> def loss_fn(params, batch):
        ...     return (batch @ params["w"]).square().sum((1, 2)) / 2
        >>> tokens = per_token_grads(loss_fn, {"w": torch.eye(2)}, torch.ones(1, 3, 2))
        >>> tokens.rows["w"].shape, tokens.offsets
        (torch.Size([3, 2, 2]), tensor([0, 3]))
    """
    return per_token_grads_fn(loss_fn, params, batch, position=position, transform=transform)(params, batch)


def per_token_grads_fn(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    position: str = "use",
    transform: Transform | None = None,
) -> "PlannedTokens":
    """Plan per-token gradients once, for use in a loop.

    Args:
        loss_fn: a loss function.
        params: the parameters to differentiate.
        batch: a first batch: the plan is checked on it.
        position: `"use"` or `"loss"`.
        transform: what is wanted of each token's gradient.

    Returns:
        A pure function `(params, batch) -> TokenRows`, with its `plan`.

    Raises:
        ValueError: if positions cannot be told apart.
    """
    if position not in ("use", "loss"):
        raise ValueError(f"position must be 'use' or 'loss'; got {position!r}")
    collect = _at_use if position == "use" else _at_loss

    def planned(params: Params, batch: Batch) -> Program:
        plan = make_plan(loss_fn, params, batch, transform, "auto")
        if plan.batched is None:
            raise EngineError(
                f"per-token gradients need the batched engine; this function runs by {plan.engine!r}: {plan.notes}"
            )

        def found(params: Params, batch: Batch) -> tuple[TokenRowsAndLosses, Rows]:
            rows, kept, losses = collect(plan, loss_fn, params, batch)
            chosen = {name: row[kept] for name, row in rows.items()}
            offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
            return (TokenRows(plan.folded.finish_rows(chosen), offsets, kept.nonzero()[:, 1]), losses), rows

        def shown(params: Params, batch: Batch) -> tuple[TokenRowsAndLosses, Rows]:
            value, rows = found(params, batch)
            return value, {name: row.sum(1) for name, row in rows.items()}

        return Program(plan, lambda params, batch: found(params, batch)[0], shown)

    return PlannedTokens(Planned(loss_fn, planned, params, batch))


class PlannedTokens:
    """Planned per-token gradients: call it with parameters and a batch.

    Attributes:
        planned: the plans, and when they are checked again.
    """

    def __init__(self, planned: Planned) -> None:
        self.planned = planned

    @property
    def plan(self) -> Plan:
        """The first plan; `print` it."""
        return self.planned.plan

    def __call__(self, params: Params, batch: Batch) -> TokenRows:
        """Return the token rows of a batch."""
        return self.with_losses(params, batch)[0]

    def with_losses(self, params: Params, batch: Batch) -> TokenRowsAndLosses:
        """Return the token rows of a batch, and its examples' losses from the same forward."""
        return self.planned(params, batch)


def _at_use(
    plan: Plan, loss_fn: LossFn, params: Params, batch: Batch
) -> tuple[Rows, Bool[Tensor, "n s"], Float[Tensor, " n"]]:
    assert plan.batched is not None
    kept = real_positions(batch)
    try:
        located = with_positions(plan.batched, loss_fn, params, batch, kept.shape[1])
        rows, losses = batched_rows(located, loss_fn, params, batch, keep=kept.shape[1])
    except ValueError as error:
        raise ValueError(f"position='use': {error}. Leave such parameters out with targets or exclude") from error
    return rows, kept, losses


def with_positions(plan: BatchedPlan, loss_fn: LossFn, params: Params, batch: Batch, s: int) -> BatchedPlan:
    """Return a plan whose axes know where token positions are."""
    known = dict.fromkeys(plan.alone, True) | dict.fromkeys(plan.routes, False)
    places = position_axes(loss_fn, params, batch, known, s)

    def located(key: UseKey, route: Route) -> Route:
        inputs, outputs = places[key]
        return route._replace(
            inputs={i: axis and axis._replace(position=inputs[i]) for i, axis in route.inputs.items()},
            outputs=tuple(axis and axis._replace(position=at) for axis, at in zip(route.outputs, outputs, strict=True)),
        )

    return plan._replace(routes={k: located(k, r) if k in places else r for k, r in plan.routes.items()})


def real_positions(batch: Batch) -> Bool[Tensor, "n s"]:
    """Return which positions of a batch are tokens: its attention mask, or all.

    Raises:
        ValueError: if the batch has no position axis.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None:
        return mask.bool()
    first: Any = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    first = first[0] if isinstance(first, tuple | list) else first
    if not isinstance(first, Tensor) or first.ndim < 2:
        raise ValueError("the batch has no axis of positions: expected input_ids [n, s], or a first tensor [n, s, …]")
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def _at_loss(
    plan: Plan, loss_fn: LossFn, params: Params, batch: Batch
) -> tuple[Rows, Bool[Tensor, "n t"], Float[Tensor, " n"]]:
    positions: Any = getattr(loss_fn, "positions", None)
    reduce: Any = getattr(loss_fn, "reduce", None)
    if positions is None or reduce is None:
        raise ValueError(
            "position='loss' needs loss_fn.positions(params, batch) -> (losses [n, t], mask [n, t]) "
            "and loss_fn.reduce, as functionalize makes them"
        )
    assert plan.batched is not None
    found: dict[str, list[Tensor]] = {}
    with torch.enable_grad():
        masks: list[Tensor] = []

        def losses_of(probes: Params, batch: Batch) -> Tensor:
            losses, labelled = positions(probes, batch)
            masks.append(labelled)
            return losses

        losses, run = tapped_losses(plan.batched, losses_of, params, batch)
        (labelled,) = masks
        leaf = losses.detach().requires_grad_()
        reduced = reduce(leaf, labelled, batch)
        (weights,) = torch.autograd.grad(reduced.sum(), leaf)
        for t in range(losses.shape[1]):
            cotangent = torch.zeros_like(losses)
            cotangent[:, t] = weights[:, t]
            for name, row in cotangent_rows(losses, cotangent, run.zeros, retain=True).items():
                found.setdefault(name, []).append(row)
    n = batch_size(batch)
    assert labelled.shape[0] == n
    return {name: torch.stack(rows, dim=1) for name, rows in found.items()}, labelled, reduced.detach()
