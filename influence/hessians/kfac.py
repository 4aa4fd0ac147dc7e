r"""K-FAC: one Kronecker product per block (Martens & Grosse 2015; Grosse et al. 2023 for sequences).

$$H \approx S \otimes A, \qquad A = \frac1T \sum_{n,s} \tilde a_{ns} \tilde a_{ns}^\top, \quad
S = \frac1N \sum_{n,s} g_{ns} g_{ns}^\top$$

with inputs `ã` (a one behind them where the bias belongs to the block), output gradients `g`, `T` real positions and
`N` documents. Exact where positions are independent and `g` does not depend on the input.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import BatchedPlan, make_feeds
from influence.func.engine.per_token import with_positions
from influence.func.engine.plan import EngineError, Plan, make_plan
from influence.func.engine.sums import Gather, GatherPlan, Joint, make_gather, watched
from influence.func.fold import Sink
from influence.func.numbers import check_number
from influence.func.transform.chain import Transform
from influence.hessians.factors import Factors
from influence.hessians.fitting import (
    About,
    FitStep,
    Sums,
    checked,
    default_transform,
    describe,
    kronecker,
    lasts,
    padding,
    run,
    sum_sink,
)
from influence.hessians.labels import Labels
from influence.types import Batch, LossFn, Params

MAX_SIDE = 8192
"""A side of more entries is kept as a diagonal: a Gram matrix of 8192 entries takes 256 MB."""


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    labels: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    max_side: int = MAX_SIDE,
    progress: bool = True,
) -> Factors:
    r"""Fit K-FAC factors in one pass: a fold of `step` into `sink`.

    Embeddings have factors too, the side of their tokens being diagonal. Vectors (norms, biases left alone) and
    matrices that no linear map uses get the diagonal of their rows' second moment; `print(factors)` names them.

    Costs `2 (o² + i²)` FLOPs per position and block on top of a forward and a backward without weight gradients;
    layers fed by the same input share one `A`. Keeps `o² + i²` numbers per block.

    Args:
        loss_fn: a loss function; `labels="sampled"` and `"exact"` need its likelihood (`functionalize` gives it).
        params: the parameters.
        batches: batches, seen once; `attention_mask` says which positions are real.
        transform: a separable transform, under whose rows the factors are fitted; default `as_blocks(bias=True)`.
        labels: `"sampled"` (the Fisher), `"data"` (the empirical Fisher) or `"exact"` (the expectation over labels:
            one backward per position and class, for small outputs).
        seed: of the sampled labels, each keyed by (row of the dataset, position, draw).
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors.

    Raises:
        ValueError: if the transform does not separate, or a batch lacks what the labels need.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = {"input": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "labels": torch.zeros(2, 1)}
        >>> hessians.kfac.fit(loss_fn, params, [batch], labels="exact").blocks["weight"].dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    plan = partial(plan_gather, "kfac", None, loss_fn, params, transform, Labels(labels, seed, draws), max_side)
    return run(plan, sink, batches, progress, "K-FAC")


def step(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    transform: Transform | None = None,
    labels: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    max_side: int = MAX_SIDE,
) -> FitStep:
    """Plan the sums of a batch: `step(batch) -> Sums`, for a fold of your own with `sink(step)`.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batch: a first batch.
        transform: as in `fit`, like all that follow.
        labels: whose gradients.
        seed: of the sampled labels.
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.

    Returns:
        The step.
    """
    return plan_gather("kfac", None, loss_fn, params, transform, Labels(labels, seed, draws), max_side, batch)


def sink(step: FitStep) -> Sink:
    """Return the sink that folds a step's sums into factors."""
    return sum_sink(step.about, finalize)


def finalize(about: About, sums: Sums) -> Factors:
    """Turn sums into factors; the right side is a mean over positions."""
    return kronecker(about, sums, sums.positions.__getitem__)


def plan_gather(
    method: str,
    joint: Joint | None,
    loss_fn: LossFn,
    params: Params,
    transform: Transform | None,
    labels: Labels,
    max_side: int,
    first: Batch,
) -> FitStep:
    """Plan a fit that gathers the factors of every block.

    Args:
        method: its name.
        joint: sums of both factors together; `None` for the Gram matrix of each.
        loss_fn: the loss function.
        params: the parameters.
        transform: a separable transform.
        labels: whose gradients.
        max_side: a side of more entries is kept as a diagonal.
        first: a first batch.

    Returns:
        The step.
    """
    check_number("max_side", max_side, 0)
    chosen = default_transform(transform)
    labels.check(loss_fn)
    notes: dict[str, str] = {}

    def make(params: Params, batch: Batch) -> tuple[Plan, Any]:
        plan = make_plan(loss_fn, params, batch, checked(chosen), "auto")
        batched = separable(method, plan, chosen)
        gathered = make_gather(batched, max_side)
        notes.update(gathered.rows)
        located: list[GatherPlan] = []  # where positions are, found on the first batch that has padding

        def sums(params: Params, batch: Batch) -> Sums:
            n, mask = batch_size(batch), padding(loss_fn, batch)
            if mask is not None and not located:
                placed = with_positions(batched, loss_fn, params, batch, mask.shape[1])
                located.append(gathered._replace(batched=placed))
            here = gathered if mask is None else located[0]
            with torch.enable_grad():
                head = partial(labels.head, loss_fn)
                watcher = partial(Gather, here, joint, mask)
                out, said, found = watched(here.batched, watcher, head, params, batch)
                for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, batch)):
                    found.backward(out, cotangent, retain=not last)
            return Sums(found.sums, found.positions, n)

        return plan, sums

    def about(plan: Plan) -> About:
        shapes = chosen.bind(plan.layout).row_shapes
        return describe(method, loss_fn, params, chosen, labels, shapes, notes)

    return FitStep(loss_fn, params, first, make, about)


def separable(method: str, plan: Plan, transform: Transform) -> BatchedPlan:
    """Return what the batched engine executes under a separable transform.

    Raises:
        EngineError: if the engine cannot serve this function.
        ValueError: if the transform does not separate, or makes no blocks.
    """
    if plan.batched is None:
        stacks = [name for name, param in plan.layout.params.items() if param.experts]
        raise EngineError(
            f"{method} needs layer inputs and output gradients, which the batched engine sees; this function runs by "
            f"{plan.engine!r}: {'; '.join(plan.notes)}"
            f"{f' ({len(stacks)} parameters hold experts: ' + ', '.join(stacks[:3]) + ')' if stacks else ''}. "
            "hessians.shampoo and hessians.autocorrelation need rows alone"
        )
    folded = transform.bind(plan.layout)
    if folded.raw:
        raise ValueError(f"{method} is fitted on blocks: put as_blocks(…) first in {transform}")
    apart = folded.finish or any(block.linear for block in folded.blocks)
    if apart:
        raise ValueError(
            f"{method} needs a separable transform, and {transform} does not separate into the sides of a block. Use "
            "hessians.shampoo or hessians.autocorrelation, which take any, or scale_by_adafactor for scale_by_adam"
        )
    return plan.batched._replace(folded=folded, feeds=make_feeds(folded))
