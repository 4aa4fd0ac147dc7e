"""Sums over the checkpoints of a training run: TracIn and LESS, as recipes over rows or indexes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.loss.losses import widen
from influence.func.numbers import check_number
from influence.func.transform.folding import flat
from influence.index import Index, columns_of
from influence.train.order import Visits
from influence.types import Rows

ROWS = 1024
"""Rows of an index that are read at once."""


class Checkpoint(NamedTuple):
    """One checkpoint of a run.

    Attributes:
        train: rows of the training examples at it, at hand or in an index; every checkpoint has the same examples.
        queries: rows of the queries at it, of the same blocks.
        rate: its learning rate: how far training went from it, per unit of gradient.
    """

    train: Index | Rows
    queries: Rows
    rate: float


def tracin(checkpoints: Iterable[Checkpoint]) -> Float[Tensor, "n q"]:
    r"""Return how much each training example lowered each query's loss along the way, to first order.

    $$\text{score}(z_n, q) = \sum_k \eta_k\, \langle \nabla \ell(q; \theta_k), \nabla \ell(z_n; \theta_k) \rangle$$

    Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", arXiv 2002.08484, eq. 3. Positive
    helps the query. With a checkpoint at every visit, and SGD, the scores of all visits add up to the query's whole
    loss decrease, but for `O(η²)`.

    Args:
        checkpoints: the checkpoints.

    Returns:
        The scores.

    Raises:
        ValueError: if there is no checkpoint, or they do not fit together.

    Example:
        >>> import torch
        >>> row = {"w": torch.tensor([[3.0, 4.0]])}
        >>> tracin([Checkpoint(row, row, 0.1), Checkpoint(row, row, 0.3)])
        tensor([[10.]])
    """
    return _summed(checkpoints, cosine=False)


def less(checkpoints: Iterable[Checkpoint]) -> Float[Tensor, " n"]:
    r"""Return how useful each training example is for the task whose subtasks are the queries.

    $$\text{score}(z_n) =
    \max_j \sum_k \eta_k \cos\bigl(\overline{\nabla \ell}(D_j; \theta_k), \Gamma(z_n; \theta_k)\bigr)$$

    Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv 2402.04333, section 4. The
    training side is collected under `chain(as_blocks(), adam_update(state), project(8192, target="global"))`, the
    queries without `adam_update`, and each subtask's rows are averaged (`subtask_means`).

    Args:
        checkpoints: the checkpoints of a warm-up.

    Returns:
        The scores; choose the largest.

    Raises:
        ValueError: as `tracin`.

    Example:
        >>> import torch
        >>> train, subtasks = {"w": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, {"w": torch.eye(2)}
        >>> less([Checkpoint(train, subtasks, 1.0)])
        tensor([1.0000, 0.7071])
    """
    return _summed(checkpoints, cosine=True).amax(1)


def subtask_means(rows: Rows, subtask: Int[Tensor, " n"]) -> Rows:
    """Return the mean row of each subtask, `[number of subtasks, …]`.

    Args:
        rows: rows of the examples that show what is wanted.
        subtask: which subtask each shows, from 0.

    Raises:
        ValueError: if a subtask has no example.
    """
    counts = torch.bincount(subtask)
    if not bool((counts > 0).all()):
        raise ValueError(f"subtasks {(counts == 0).nonzero().flatten().tolist()} have no example: number them from 0")
    one_hot = torch.nn.functional.one_hot(subtask)
    return {name: torch.tensordot((one_hot / counts).T.to(widen(row)), widen(row), 1) for name, row in rows.items()}


def epoch_rates(order: Visits) -> list[float]:
    """Return the mean learning rate of each epoch: LESS's weight of the checkpoint at its end."""
    return [float(order.rate[order.epoch == epoch].mean()) for epoch in order.epoch.unique().tolist()]


def _summed(checkpoints: Iterable[Checkpoint], cosine: bool) -> Float[Tensor, "n q"]:
    total: Tensor | None = None
    for number, checkpoint in enumerate(checkpoints):
        check_number(f"the rate of checkpoint {number}", checkpoint.rate, 0)
        scores = checkpoint.rate * _products(checkpoint, cosine, number)
        if total is not None and total.shape != scores.shape:
            raise ValueError(
                f"checkpoint {number} has {list(scores.shape)} training examples and queries, and those before it "
                f"{list(total.shape)}: all are rows of the same examples and the same queries"
            )
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("there is no checkpoint: pass one Checkpoint(train, queries, rate) at least")
    return total


def _products(checkpoint: Checkpoint, cosine: bool, number: int) -> Float[Tensor, "n q"]:
    """Return the inner products of one checkpoint, or their cosines over all blocks together."""
    train, queries = checkpoint.train, checkpoint.queries
    blocks = train.blocks if isinstance(train, Index) else dict(columns_of(train).shapes)
    theirs = dict(columns_of(queries).shapes)
    if blocks != theirs:
        differing = sorted(set(blocks.items()) ^ set(theirs.items()), key=str)[:2]
        raise ValueError(
            f"checkpoint {number}: the queries' rows have other blocks than the training rows ({differing}): collect "
            "both with the same targets and the same projection"
        )
    wanted = flat({name: queries[name] for name in blocks})
    wanted = _unit(wanted) if cosine else wanted
    found = []
    for piece in _matrices(train):
        rows = _unit(piece) if cosine else piece
        dtype = torch.promote_types(rows.dtype, wanted.dtype)
        found.append(rows.to(dtype) @ wanted.to(dtype).mT)
    return torch.cat(found)


def _matrices(train: Index | Rows) -> Iterator[Float[Tensor, "r d"]]:
    if not isinstance(train, Index):
        yield flat(train)
        return
    for begin in range(0, len(train), ROWS):
        yield train.matrix(begin, begin + ROWS)


def _unit(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    """Return rows of norm one; zero stays zero."""
    size = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(size > 0, size, torch.ones_like(size))
