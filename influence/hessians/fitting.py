"""Rows of any labels: what a fit sees of gradients where it needs no layer inputs, by whatever engine serves."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain as joined
from itertools import islice
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from influence.func.engine.batch import batch_size
from influence.func.engine.batched import cotangent_rows, tapped_losses
from influence.func.engine.plan import Plan, Planned
from influence.func.engine.reference import loop_rows, vmap_rows
from influence.func.engine.sums import add_grams, squares
from influence.func.fingerprint import weights_hash
from influence.func.fold import Sink, fold
from influence.func.loss.losses import IGNORED, widen
from influence.func.transform.blocks import as_blocks
from influence.func.transform.chain import Transform, chain
from influence.func.transform.curvature import Basis, Curvature, decompose
from influence.func.transform.project import project
from influence.hessians.factors import Factors
from influence.hessians.labels import Labels
from influence.types import Batch, LossFn, Params, Rows

BlockSums: TypeAlias = dict[str, Tensor]


class Sums(NamedTuple):
    """Sums over documents: what a fit folds. They add, so batches, ranks and resumed runs merge.

    Attributes:
        blocks: sums by block and name.
        positions: real positions by block.
        documents: number of documents.
    """

    blocks: dict[str, BlockSums]
    positions: dict[str, int]
    documents: int


def add(a: Sums, b: Sums) -> Sums:
    """Add two sums; a tensor which blocks share in both stays shared."""
    if not a.documents or not b.documents:
        return a if a.documents else b
    made: dict[tuple[int, int], Tensor] = {}

    def plus(x: Tensor, y: Tensor) -> Tensor:
        key = (id(x), id(y))
        if key not in made:
            made[key] = add_grams(x, y)
        return made[key]

    blocks = {
        name: {
            key: plus(mine[key], theirs[key]) if key in mine and key in theirs else mine.get(key, theirs.get(key))
            for key in (*mine, *(key for key in theirs if key not in mine))
        }
        for name, mine in a.blocks.items()
        for theirs in [b.blocks[name]]
    }
    positions = {name: a.positions.get(name, 0) + b.positions.get(name, 0) for name in {**a.positions, **b.positions}}
    return Sums(blocks, positions, a.documents + b.documents)  # type: ignore[arg-type]


class About(NamedTuple):
    """What sums are sums of."""

    method: str
    transform: Transform
    labels: Labels
    reduction: str
    weights: str
    shapes: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str]
    function: Mapping[str, Any] | None

    def factors(self, sums: Sums, blocks: Mapping[str, Curvature]) -> Factors:
        """Return the factors made of sums; the notes say where they are coarser than their method's."""
        notes = {name: note for name, c in blocks.items() if (note := self._note(name, c, sums.blocks[name]))}
        return Factors(
            self.method,
            blocks,
            sums.documents,
            sums.positions,
            self.reduction,
            self.labels,
            self.transform.fingerprint,
            repr(self.transform),
            self.transform,
            self.weights,
            notes,
            self.function,
        )

    def _note(self, name: str, curvature: Curvature, sums: BlockSums) -> str:
        if curvature.moment(1) == 0:
            return "zero: no gradient reached it"
        if curvature.kind == "diagonal":
            return f"diagonal: {self.notes.get(name, 'a vector')}"
        if len(curvature.bases) == 1:
            return ""
        sides = zip(("left", "right"), curvature.bases, strict=True)
        short = [side for side, basis in sides if basis.vectors is None]
        return f"its {' and '.join(short)} side is a diagonal" if short else ""


def diagonal(shape: tuple[int, ...], total: Tensor | None, documents: int, what: str) -> Curvature:
    """Return the diagonal curvature of a block without factors; zero if no gradient reached it."""
    whole = torch.zeros(prod(shape)) if total is None else total / documents
    return Curvature(shape, (decompose(whole, what),))


def kronecker(about: About, sums: Sums, divisor: Callable[[str], Tensor | int]) -> Factors:
    """Turn sums of both sides into factors; a covariance that blocks share is decomposed once.

    Args:
        about: what the sums are sums of.
        sums: of each block `left` and `right`, or the `diagonal` of one without factors.
        divisor: what a block's right side is divided by, where it is not zero; the left is a mean over documents.

    Returns:
        The factors.
    """
    made: dict[tuple[int, float], Basis] = {}

    def basis(total: Tensor, by: Tensor | int, what: str) -> Basis:
        key = (id(total), float(by))
        if key not in made:
            made[key] = decompose(total / by, what)
        return made[key]

    blocks = {}
    for name, shape in about.shapes.items():
        mine, what = sums.blocks[name], f"block {name!r}"
        if "left" not in mine or "right" not in mine:
            blocks[name] = diagonal(shape, mine.get("diagonal"), sums.documents, what)
            continue
        by = divisor(name)
        left = basis(mine["left"], sums.documents, f"{what} (left)")
        right = basis(mine["right"], by if by > 0 else by + 1, f"{what} (right)")
        blocks[name] = Curvature(shape, (left, right))
    return about.factors(sums, blocks)


Make: TypeAlias = Callable[[Params, Batch], tuple[Plan, Callable[[Params, Batch], Sums]]]


class FitStep:
    """A planned step of a fit: `step(batch) -> Sums`, a pure function of the batch.

    Attributes:
        about: what the sums are sums of.
    """

    def __init__(
        self, loss_fn: LossFn, params: Params, first: Batch, make: Make, about: Callable[[Plan], About]
    ) -> None:
        self._params = params
        self._planned = Planned(loss_fn, make, params, first)
        self.about = about(self.plan)

    @property
    def plan(self) -> Plan:
        """The first plan; `print` it."""
        return self._planned.plan

    def __call__(self, batch: Batch) -> Sums:
        """Return the sums over a batch."""
        return self._planned(self._params, batch)


def sum_sink(about: About, finalize: Callable[[About, Sums], Factors]) -> Sink:
    """Return the sink that folds sums of batches into factors."""

    def finish(sums: Sums) -> Factors:
        if not sums.documents:
            raise ValueError("no batch was seen: pass at least one (an iterator that was used up holds none)")
        return finalize(about, sums)

    return Sink(lambda: Sums({}, {}, 0), lambda state, index, value: add(state, value), add, finish)


def run(
    plan: Callable[[Batch], FitStep],
    sink: Callable[[FitStep], Sink],
    batches: Iterable[Batch],
    progress: bool,
    what: str,
) -> Factors:
    """Plan on the first batch, fold every batch, and return the factors."""
    from tqdm import tqdm

    check_batches(batches)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty: pass at least one batch (an iterator that was used up holds none)")
    step = plan(first)
    size = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    shown = tqdm(joined([first], rest), desc=what, total=size, unit="batch", disable=None if progress else True)
    return fold(step, shown, {"factors": sink(step)})["factors"]


def check_batches(batches: Iterable[Batch]) -> None:
    """Refuse one batch where several are expected.

    Raises:
        ValueError: saying what came.
    """
    one = isinstance(batches, Mapping | Tensor) or (
        isinstance(batches, tuple) and bool(batches) and all(isinstance(item, Tensor) for item in batches)
    )
    if one:
        raise ValueError(f"batches is one batch, a {type(batches).__name__}; pass a list of batches, [batch]")


def default_transform(transform: Transform | None) -> Transform:
    """Return the transform, by default whole blocks with their biases."""
    return as_blocks(bias=True) if transform is None else transform


def checked(transform: Transform) -> Transform:
    """Return the transform under which a plan is checked: small rows, so that no whole gradients are formed for it."""
    made = {step.name for step in transform.steps}
    return transform if "project" in made or "as_blocks" not in made else chain(transform, project(8))


def describe(
    method: str,
    loss_fn: LossFn,
    params: Params,
    transform: Transform,
    labels: Labels,
    shapes: Mapping[str, tuple[int, ...]],
    notes: Mapping[str, str] | None = None,
) -> About:
    """Return what a fit's sums are sums of."""
    reduction = getattr(loss_fn, "reduction", "own")
    notes = {} if notes is None else notes
    function = getattr(loss_fn, "function", None)
    return About(method, transform, labels, reduction, weights_hash(loss_fn, params), shapes, notes, function)


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


def lasts(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last."""
    rest = iter(items)
    held = list(islice(rest, 1))
    for after in rest:
        yield held[0], False
        held = [after]
    for item in held:
        yield item, True


def label_rows(plan: Plan, loss_fn: LossFn, params: Params, batch: Batch, labels: Labels) -> Iterator[Rows]:
    """Yield the rows that each cotangent brings, after the plan's transform.

    Args:
        plan: the plan.
        loss_fn: the loss function.
        params: the parameters.
        batch: the batch.
        labels: where labels come from.

    Yields:
        Rows `{block: [n, …]}`, once for data labels, once per draw for sampled ones.
    """
    if labels.source == "data" and plan.batched is None:
        rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
        yield plan.folded.rows(rows_of(loss_fn, params, batch))
        return
    if plan.batched is None:
        yield from _surrogate_rows(plan, loss_fn, params, batch, labels)
        return
    with torch.enable_grad():
        (out, said), taps = tapped_losses(plan.batched, lambda p, b: labels.head(loss_fn, p, b), params, batch)
        for cotangent, last in lasts(labels.cotangents(loss_fn, said, out, batch)):
            yield plan.folded.finish_rows(cotangent_rows(out, cotangent, taps.zeros, retain=not last))


def _surrogate_rows(plan: Plan, loss_fn: LossFn, params: Params, batch: Batch, labels: Labels) -> Iterator[Rows]:
    """Yield rows of `⟨cotangent, outputs⟩`, a loss like any other, where the batched engine cannot serve."""
    with torch.no_grad():
        out, said = labels.head(loss_fn, params, batch)
        cotangents = list(labels.cotangents(loss_fn, said, out, batch))

    def surrogate(values: Params, both: Any) -> Tensor:
        outputs, _ = labels.head(loss_fn, values, both["batch"])
        return (outputs * both["cotangent"]).sum((1, 2))

    rows_of = vmap_rows if plan.engine == "vmap" else loop_rows
    for cotangent in cotangents:
        yield plan.folded.rows(rows_of(surrogate, params, {"batch": batch, "cotangent": cotangent}))


def sums_of_rows(
    plan: Plan, loss_fn: LossFn, labels: Labels, moments: Callable[[str, Tensor], BlockSums]
) -> Callable[[Params, Batch], Sums]:
    """Return the step that sums moments of a plan's rows, over every cotangent of the labels.

    Args:
        plan: the plan.
        loss_fn: the loss function.
        labels: whose gradients.
        moments: `(block, rows [n, …] in at least float32) -> sums over n`.

    Returns:
        `(params, batch) -> Sums`.
    """

    def sums(params: Params, batch: Batch) -> Sums:
        total: dict[str, BlockSums] = {}
        for rows in label_rows(plan, loss_fn, params, batch, labels):
            for name, row in rows.items():
                mine = total.setdefault(name, {})
                for key, value in moments(name, widen(row)).items():
                    mine[key] = mine[key] + value if key in mine else value
        return Sums(total, {}, batch_size(batch))

    return sums


def squares_of(name: str, row: Tensor) -> BlockSums:
    """Return the sum of a block's squared rows."""
    return {"squares": squares(None, row)}
