r"""K-FAC: one Kronecker product per block (Martens & Grosse 2015; Grosse et al. 2023 for sequences).

$$H \approx S \otimes A, \qquad A = \frac1T \sum_{n,s} \tilde a_{ns} \tilde a_{ns}^\top, \quad
S = \frac1N \sum_{n,s} g_{ns} g_{ns}^\top$$

with inputs `ã` (a one behind them where the bias belongs to the block), output gradients `g`, `T` real positions and
`N` documents. Exact where positions are independent and `g` does not depend on the input.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import BatchedPlan, make_feeds
from influence.func.engine.per_token import with_positions
from influence.func.engine.plan import EngineError, Plan, make_plan
from influence.func.engine.sums import Gather, GatherPlan, Joint, make_gather, watched
from influence.func.loss.losses import IGNORED
from influence.func.transform.chain import Stage, Transform, chain
from influence.func.transform.project import project
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit as fit_method
from influence.hessians.kronecker import MAX_SIDE, kronecker_factors, kronecker_method
from influence.hessians.label_rows import lasts
from influence.hessians.method import About, FitSetup, Method, Summing, Sums
from influence.types import Batch, LossFn, Params


def build(max_side: int = MAX_SIDE) -> Method:
    r"""Return K-FAC as a value, for `hessians.fit`.

    Args:
        max_side: a side of a block with more entries is kept as a diagonal.

    Returns:
        The method.

    Example:
        >>> from influence import hessians
        >>> hessians.kfac.build(max_side=4096)
        kfac(max_side=4096)
    """
    return kronecker_method("kfac", max_side, partial(gather, "kfac", None, max_side), assemble)


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
    r"""Fit K-FAC factors in one pass: `hessians.fit(loss_fn, params, batches, hessians.kfac.build(max_side), …)`.

    Embeddings have factors too, the side of their tokens being diagonal. Vectors (norms, biases left alone) and
    matrices that no linear map uses get the diagonal of their rows' second moment; `print(factors)` names them.

    Costs `2 (o² + i²)` FLOPs per position and block on top of a forward and a backward without weight gradients;
    layers fed by the same input share one `A`. Keeps `o² + i²` numbers per block.

    Args:
        loss_fn: a loss function; `labels="sampled"` and `"exact"` need its likelihood (`functionalize` gives it).
        params: the parameters.
        batches: batches, seen once; `attention_mask` says which positions are real.
        transform: a separable transform, under whose rows the factors are fitted; default `as_blocks()`.
        labels: `"sampled"` (the Fisher), `"data"` (the empirical Fisher) or `"exact"` (the expectation over labels:
            one backward per position and class, for small outputs).
        seed: of the sampled labels, each keyed by (row of the dataset, position, draw).
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors.

    Raises:
        ValueError: if the transform does not separate, or as in `hessians.fit`.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1))
        >>> hessians.kfac.fit(loss_fn, params, [batch], labels="exact").blocks["weight"].dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    return fit_method(
        loss_fn,
        params,
        batches,
        build(max_side),
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        progress=progress,
    )


def assemble(about: About, sums: Sums) -> Factors:
    """Turn sums into factors; the right side is a mean over positions."""
    return kronecker_factors(about, sums, sums.positions.__getitem__)


def gather(method: str, joint: Joint | None, max_side: int, setup: FitSetup, params: Params, batch: Batch) -> Summing:
    """Plan the sums of both factors of every block: `joint` sums them together, `None` the Gram matrix of each."""
    loss_fn, labels = setup.loss_fn, setup.labels
    plan = make_plan(loss_fn, params, batch, checked(setup.transform), "auto")
    batched = separable(method, plan, setup.transform)
    gathered = make_gather(batched, max_side)
    located: list[GatherPlan] = []  # where positions are, found on the first batch that has padding

    def sums(params: Params, batch: Batch, index: Int[Tensor, " n"] | None) -> Sums:
        n, mask = batch_size(batch), padding(loss_fn, batch)
        if mask is not None and not located:
            placed = with_positions(batched, loss_fn, params, batch, mask.shape[1])
            located.append(gathered._replace(batched=placed))
        here = gathered if mask is None else located[0]
        with torch.enable_grad():
            head = partial(labels.head, loss_fn)
            watcher = partial(Gather, here, joint, mask)
            out, said, found = watched(here.batched, watcher, head, params, batch)
            for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, index)):
                found.backward(out, cotangent, retain=not last)
        return Sums(found.sums, found.positions, n)

    return Summing(plan, sums, gathered.rows)


def checked(transform: Transform) -> Transform:
    """Return the transform under which a plan is checked: small rows, so that no whole gradients are formed for it."""
    sketched = any(step.kind == "sketch" for step in transform.steps)
    blocks = any(step.stage is Stage.BLOCKS for step in transform.steps)
    return transform if sketched or not blocks else chain(transform, project(8))


def padding(loss_fn: LossFn, batch: Batch) -> Bool[Tensor, "n s"] | None:
    """Return which positions of a batch are tokens; `None` where all are.

    Raises:
        ValueError: if an encoder and a decoder have paddings of their own.
    """
    two = getattr(loss_fn, "encoder_decoder", False) or (
        isinstance(batch, Mapping) and any(str(key).startswith("decoder_") for key in batch)
    )
    if two and _padded_streams(batch):
        raise ValueError(
            "an encoder and a decoder have positions of their own, and which of them a layer reads cannot be told, so "
            "padding of one would count as data of the other. Fit on batches whose examples have one length on either "
            "side, without padding (one example a batch will do), or use hessians.shampoo, which needs rows alone"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def _padded_streams(batch: Batch) -> bool:
    masks = [batch.get(key) for key in ("attention_mask", "decoder_attention_mask")]
    labels = batch.get("labels")
    ignored = isinstance(labels, Tensor) and bool((labels == IGNORED).any())
    return ignored or any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in masks)


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
