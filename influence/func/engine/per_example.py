"""Per-example gradients, or any linear view of them: for one batch, or planned once for a loop."""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.engine.batch import batch_size, check_independence, chunks
from influence.func.engine.batched import batched_rows
from influence.func.engine.compiled import Compiled
from influence.func.engine.plan import EngineError, Plan, Planned, Program, make_plan
from influence.func.engine.reference import explain_torch, loop_both, vmap_both
from influence.func.transform.chain import CollectedRows, Transform
from influence.func.transform.folding import vectors
from influence.types import Batch, LossFn, Params, Rows

GUARDED = 3
"""Examples that the plan's guard sees at the least: with one, a misplaced example axis does not show."""
LOSSES = "(losses)"
"""Where a step puts the losses of the same forward, beside the rows: no parameter has such a name."""


def per_example_grads(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    transform: Transform | None = None,
    engine: str = "auto",
    chunk_size: int | None = None,
    check: bool = False,
    nonfinite: str = "error",
) -> Rows:
    r"""Compute the gradient of every example's own loss, or a transform of it.

    $$G_n = \nabla_\theta\, \ell_n(\theta), \qquad \ell(\theta, \text{batch}) \in \mathbb{R}^n$$

    The same as `per_example_grads_fn(loss_fn, params, batch, …)(params, batch)`: it plans anew at every call. In a
    loop, plan once.

    Args:
        loss_fn: a pure function `(params, batch) -> losses[n]`; example i's loss depends on example i alone.
        params: the parameters to differentiate, by name.
        batch: a pytree of tensors with the example axis first.
        transform: what is wanted of the gradients, as in `chain(as_blocks(), project(16))`.
        engine: `"vmap"` (the definition), `"batched"` (one forward, one backward), `"loop"` (one example at a time)
            or `"auto"`.
        chunk_size: examples computed at a time, to bound memory.
        check: verify that no example's loss moves when another example is exchanged (one forward per example).
        nonfinite: `"error"` names the example and block of a row that is not finite; `"zero"` sets the whole example's
            row to zero and warns with the count.

    Returns:
        Rows: `{parameter name: [n, *parameter shape]}`, or `{block: [n, …]}` after a transform.

    Example:
        >>> import torch
        >>> from influence import per_example_grads
        >>> rows = per_example_grads(
        ...     lambda params, batch: (batch["x"] @ params["w"] - batch["y"]) ** 2 / 2,
        ...     {"w": torch.tensor([1.0, 2.0])},
        ...     {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "y": torch.tensor([0.0, 0.0])},
        ... )
        >>> rows["w"]
        tensor([[1., 0.],
                [0., 2.]])
    """
    planned = per_example_grads_fn(
        loss_fn,
        params,
        batch,
        transform=transform,
        engine=engine,
        chunk_size=chunk_size,
        check=check,
        nonfinite=nonfinite,
    )
    return planned(params, batch)


def per_example_grads_fn(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    transform: Transform | None = None,
    engine: str = "auto",
    compile: bool = False,
    chunk_size: int | None = None,
    check: bool = False,
    nonfinite: str = "error",
) -> "PlannedRows":
    """Plan per-example gradients once, for use in a loop.

    Args:
        loss_fn: a pure function `(params, batch) -> losses[n]`.
        params: the parameters to differentiate.
        batch: a first batch: the plan is checked on it. Later batches may have other sizes and lengths.
        transform: what is wanted of the gradients.
        engine: `"vmap"`, `"batched"`, `"loop"` or `"auto"`.
        compile: compile the whole step, once per batch shape; what it returns is compared with the eager step on the
            first batch of each shape, and the eager step is kept, with a warning, where they differ.
        chunk_size: examples computed at a time.
        check: verify on the first batch that no example's loss moves when another example is exchanged.
        nonfinite: `"error"` or `"zero"`.

    Returns:
        A pure function `(params, batch) -> rows`, with its `plan`, which prints itself.

    Raises:
        ValueError: if an option is unknown or does not fit the plan.
    """
    if nonfinite not in ("error", "zero"):
        raise ValueError(f"nonfinite must be 'error' or 'zero'; got {nonfinite!r}")
    batch_size(batch)
    if check:
        check_independence(loss_fn, params, batch)
    first = next(chunks(batch, None if chunk_size is None else max(chunk_size, GUARDED)))

    def planned(params: Params, batch: Batch) -> Program:
        plan = make_plan(loss_fn, params, batch, transform, engine)
        if compile and plan.engine == "loop":
            notes = "\n".join(plan.notes)
            raise ValueError(f"compile=True needs engine 'batched' or 'vmap'; this plan loops:\n{notes}")
        step = eager_step(loss_fn, plan)
        return Program(plan, Compiled(step)) if compile else Program(plan, step, shown_step(loss_fn, plan))

    return PlannedRows(Planned(loss_fn, planned, params, first), chunk_size, nonfinite)


def explain(
    loss_fn: LossFn, params: Params, batch: Batch, transform: Transform | None = None, engine: str = "auto"
) -> Plan:
    """Return the plan of a computation: block, shape, route, folded or not, FLOPs and bytes per example.

    Args:
        loss_fn: a pure function `(params, batch) -> losses[n]`.
        params: the parameters to differentiate.
        batch: a batch.
        transform: what is wanted of the gradients.
        engine: the engine asked for.

    Returns:
        The plan; print it.

    Example:
        >>> import torch
        >>> from influence import as_blocks, explain, functionalize
        >>> loss_fn, params = functionalize(torch.nn.Linear(3, 2), loss=lambda y, batch: y.sum(-1))
        >>> explain(loss_fn, params, (torch.eye(3), torch.zeros(3)), transform=as_blocks(bias=True)).engine
        'batched'
    """
    return make_plan(loss_fn, params, batch, transform, engine)


class PlannedRows:
    """Planned per-example gradients: call it with parameters and a batch.

    Attributes:
        planned: the plans, and when they are checked again.
    """

    def __init__(self, planned: Planned, chunk_size: int | None, nonfinite: str) -> None:
        self.planned, self._chunk_size, self._nonfinite = planned, chunk_size, nonfinite

    @property
    def plan(self) -> Plan:
        """The first plan; `print` it."""
        return self.planned.plan

    @property
    def step(self) -> Callable[[Params, Batch], Rows]:
        """What executes the first plan."""
        return self.planned.plans[0].step

    def __call__(self, params: Params, batch: Batch) -> CollectedRows:
        """Return the rows of a batch."""
        return self.with_losses(params, batch)[0]

    def with_losses(self, params: Params, batch: Batch) -> tuple[CollectedRows, Float[Tensor, " n"]]:
        """Return the rows of a batch, and its losses from the same forward."""
        plan = self.plan
        pieces = [self.planned(params, chunk) for chunk in chunks(batch, self._chunk_size)]
        found = pieces[0] if len(pieces) == 1 else {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}
        rows = {name: row for name, row in found.items() if name != LOSSES}
        finite = finite_rows(rows, batch, self._nonfinite)
        return CollectedRows(finite, plan.transform, plan.layout), found[LOSSES]

    def __repr__(self) -> str:
        """Return the plan."""
        return f"rows_of(params, batch)\n{self.plan}"


def eager_step(loss_fn: LossFn, plan: Plan) -> Callable[[Params, Batch], Rows]:
    """Return the pure function a plan describes: rows, and the losses under `LOSSES`."""
    shown = shown_step(loss_fn, plan)
    if shown is not None:
        return lambda params, batch: shown(params, batch)[0]
    both = vmap_both if plan.engine == "vmap" else loop_both

    def step(params: Params, batch: Batch) -> Rows:
        try:
            grads, losses = both(loss_fn, params, batch)
        except RuntimeError as error:
            meaning = explain_torch(str(error))
            raise EngineError(f"engine={plan.engine!r} failed on this batch: {meaning}") from error
        return {**plan.folded.rows(grads), LOSSES: losses}

    return step


def shown_step(loss_fn: LossFn, plan: Plan) -> Callable[[Params, Batch], tuple[Rows, Rows]] | None:
    """Return the batched engine's step which also returns the linear part of the rows; `None` for other engines."""
    batched = plan.batched
    if batched is None:
        return None

    def shown(params: Params, batch: Batch) -> tuple[Rows, Rows]:
        rows, losses = batched_rows(batched, loss_fn, params, batch)
        return {**plan.folded.finish_rows(rows), LOSSES: losses}, rows

    return shown


def finite_rows(rows: Rows, batch: Batch, policy: str) -> Rows:
    """Refuse rows that are not finite, or set them to zero and say so.

    Raises:
        ValueError: naming the example, the block and the value.
    """
    sums = {
        name: vectors(row).sum(1, dtype=torch.promote_types(row.dtype, torch.float32)) for name, row in rows.items()
    }
    suspects = ~torch.isfinite(torch.stack([s.double() for s in sums.values()]).sum(0))
    if not suspects.any():
        return rows
    bad = torch.zeros_like(suspects)
    first: tuple[int, str, float] | None = None
    for name, row in rows.items():
        broken = ~torch.isfinite(vectors(row)) & suspects[:, None]
        bad |= broken.any(1)
        if first is None and broken.any():
            i = int(broken.any(1).nonzero()[0])
            first = (i, name, float(vectors(row)[i][broken[i]][0]))
    if first is None:
        return rows
    index = batch.get("index") if isinstance(batch, dict) else None
    labels = [int(index[i]) if index is not None else int(i) for i in bad.nonzero().flatten().tolist()]
    if policy == "zero":
        warnings.warn(
            f"{len(labels)} of {len(bad)} rows were not finite and were set to zero: {labels[:10]}", stacklevel=3
        )
        keep = ~bad
        return {name: torch.where(keep.reshape(-1, *[1] * (row.ndim - 1)), row, 0) for name, row in rows.items()}
    i, name, value = first
    label = f"example {int(index[i])} of the dataset (row {i} of the batch)" if index is not None else f"example {i}"
    raise ValueError(
        f"the row of {label} is not finite: block {name!r} holds {value}; {len(labels)} of {len(bad)} examples are "
        "affected. Look at that example's loss, compute in a wider dtype, or pass nonfinite='zero'"
    )
