"""Inner products of query rows with training rows as the training batches stream by, for every method here."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from tqdm import tqdm

from influence.func.engine.per_example import per_example_grads_fn
from influence.func.fold import Sink, fold
from influence.func.loss.losses import widen
from influence.func.similarity import dot
from influence.func.transform.chain import Transform
from influence.types import Batch, LossFn, Params, Rows

SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that give another order each time."""


class Products(NamedTuple):
    """Scores of one pass.

    Attributes:
        values: the products.
        ids: the training examples' ids.
        queries: the queries' ids.
        own: each training example's product with itself, if it was asked for.
    """

    values: Float[Tensor, "q n"]
    ids: Int[Tensor, " n"]
    queries: Int[Tensor, " q"]
    own: Float[Tensor, " n"] | None


def products(
    loss_fn: LossFn,
    params: Params,
    train: Iterable[Batch],
    queries: Iterable[Batch],
    sides: tuple[Transform, Transform],
    own: Transform | None = None,
    progress: bool = True,
) -> Products:
    """Return `⟨query row, training row⟩` for all pairs; the queries' rows are held, the training rows stream by.

    Args:
        loss_fn: the loss function.
        params: the parameters.
        train: the training batches.
        queries: the queries' batches.
        sides: the transforms of the queries' rows and of the training rows.
        own: a transform under which an example's squared norm is its score for itself; `None` leaves that out.
        progress: show bars where there is a terminal.
    """
    asked, query_ids = gathered(planned(loss_fn, params, sides[0]), queries, "queries", progress)
    rows_of = planned(loss_fn, params, sides[1])
    own_of = rows_of if own is not None and own.fingerprint == sides[1].fingerprint else None
    if own is not None and own_of is None:
        own_of = planned(loss_fn, params, own)

    def step(batch: Batch) -> Rows:
        rows = rows_of(batch)
        found = {"values": dot(asked, rows).mT}
        if own_of is not None:
            found["own"] = _squared(rows if own_of is rows_of else own_of(batch))
        return found

    scored, ids = gathered(step, train, "scores", progress)
    return Products(scored["values"].mT.contiguous(), ids, query_ids, scored.get("own"))


def planned(loss_fn: LossFn, params: Params, transform: Transform) -> Callable[[Batch], Rows]:
    """Return a function from a batch to its rows, planned on the first batch that it sees."""
    plans: list[Callable[[Params, Batch], Rows]] = []

    def rows_of(batch: Batch) -> Rows:
        if not plans:
            plans.append(per_example_grads_fn(loss_fn, params, batch, transform=transform))
        return plans[0](params, batch)

    return rows_of


def batches_of(data: Batch | Iterable[Batch], what: str) -> Iterable[Batch]:
    """Return batches that can be seen several times, with the same examples in the same place.

    Args:
        data: batches, or one of them: a mapping, a tensor, a tuple of tensors.
        what: what an error calls them.

    Raises:
        ValueError: if they can be seen only once, or come in another order each time and do not say who they are.
    """
    if isinstance(data, Mapping | Tensor) or (isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data)):
        return [data]
    if iter(data) is iter(data):
        raise ValueError(f"{what} is seen more than once: pass a list, a DataLoader, or anything iterable again")
    if isinstance(data, DataLoader) and isinstance(data.sampler, SHUFFLED):
        first = next(iter(data), None)
        if not (isinstance(first, Mapping) and "index" in first):
            raise ValueError(
                f"{what} is a shuffled DataLoader whose batches do not say which examples they hold: pass "
                'shuffle=False, or give each batch an "index", the examples\' rows in the dataset'
            )
    return data


def gathered(
    step: Callable[[Batch], Rows], batches: Iterable[Batch], what: str, progress: bool
) -> tuple[Rows, Int[Tensor, " n"]]:
    """Return a step's values of all batches, joined along their first axis on the CPU, and the examples' ids.

    Raises:
        ValueError: if there is no batch.
    """
    size = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    shown = tqdm(batches, desc=what, total=size, unit="batch", disable=None if progress else True)

    def update(state: list[Any], index: Int[Tensor, " n"], value: Rows) -> list[Any]:
        return [*state, (index.cpu(), {name: row.detach().cpu() for name, row in value.items()})]

    everything = Sink(list, update, lambda a, b: a + b, lambda state: state)
    pieces = fold(step, shown, {"all": everything})["all"]
    if not pieces:
        raise ValueError(f"{what}: there is no batch (an iterator that was used up holds none)")
    joined = {name: torch.cat([value[name] for _, value in pieces]) for name in pieces[0][1]}
    return joined, torch.cat([index for index, _ in pieces])


def _squared(rows: Rows) -> Float[Tensor, " n"]:
    """Return each row's squared norm over all blocks."""
    return torch.stack([widen(row).flatten(1).square().sum(1) for row in rows.values()]).sum(0)
