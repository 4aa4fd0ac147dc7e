"""Methods that sum over the checkpoints of a training run: TRAK, TracIn, LESS."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from influence import hessians
from influence.attribute.scores import Scores
from influence.attribute.scoring import Products, batches_of, gathered, planned, products
from influence.func.numbers import check_number
from influence.func.transform.blocks import as_blocks
from influence.func.transform.chain import Transform, chain
from influence.func.transform.precondition import precondition
from influence.func.transform.project import project
from influence.train.adam_update import adam_update
from influence.train.optimizer import OptimizerState
from influence.train.trajectory import Checkpoint, subtask_means
from influence.train.trajectory import less as best_subtask
from influence.types import Batch, LossFn, Params


def trak(
    loss_fn: LossFn,
    checkpoints: Params | Sequence[Params],
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    dim: int = 2048,
    seed: int = 0,
    damping: float = 0.1,
    self_influence: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Score training examples as TRAK does, as a mean over checkpoints.

    $$\tau(q, n) = \frac1C \sum_c \phi_c(q)^\top \Bigl(\tfrac1N \Phi_c^\top \Phi_c + \lambda\Bigr)^{-1} \phi_c(n)$$

    Park et al., arXiv 2303.14186. `\phi` is the gradient of `loss_fn` under one projection of all blocks together; TRAK
    takes log-odds: `functionalize(model, loss="log_odds")`.

    Args:
        loss_fn: the loss function, which serves every checkpoint.
        checkpoints: the parameters of each; those of one will do.
        train: the training batches; seen twice for each checkpoint.
        queries: the batches to explain.
        dim: numbers that a gradient is projected to.
        seed: of the projection.
        damping: what is added to the spectrum, relative to its mean.
        self_influence: also score each training example for itself.
        progress: show bars where there is a terminal.

    Returns:
        The scores.

    Raises:
        ValueError: if there is no checkpoint, or batches can be seen only once.
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    checkpoints = _several(checkpoints)
    plain = chain(as_blocks(), project(dim, seed=seed, target="global"))

    def at(params: Params, number: int) -> Products:
        gram = hessians.autocorrelation.fit(loss_fn, params, train, transform=plain, progress=progress)
        whole, half = (chain(plain, precondition(gram, power=power, damping=damping)) for power in (-1.0, -0.5))
        own = half if self_influence else None
        return products(loss_fn, params, train, queries, (whole, plain), own, progress)

    count = len(checkpoints)
    settings = {"dim": dim, "seed": seed, "damping": damping, "checkpoints": count}
    return _summed("trak", settings, checkpoints, [1 / count] * count, at)


def tracin(
    loss_fn: LossFn,
    checkpoints: Params | Sequence[Params],
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    rates: Sequence[float],
    transform: Transform | None = None,
    self_influence: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Score training examples as TracIn does: gradient products, summed over checkpoints with their learning rates.

    $$\text{score}(q, n) = \sum_k \eta_k\, \langle \nabla \ell(q; \theta_k), \nabla \ell(n; \theta_k) \rangle$$

    Pruthi et al., arXiv 2002.08484.

    Args:
        loss_fn: the loss function, which serves every checkpoint.
        checkpoints: the parameters of each; those of one will do.
        train: the training batches.
        queries: the batches to explain.
        rates: each checkpoint's learning rate: how far training went from it, per unit of gradient.
        transform: what is compared of each gradient; default whole blocks.
        self_influence: also score each training example for itself.
        progress: show bars where there is a terminal.

    Returns:
        The scores.

    Raises:
        ValueError: if there is no checkpoint, or not one rate for each.

    Example:
        >>> import torch
        >>> from influence import attribute
        >>> loss_fn = lambda params, x: x @ params["w"]
        >>> x, w = torch.tensor([[3.0, 4.0]]), {"w": torch.zeros(2)}
        >>> attribute.tracin(loss_fn, [w, w], train=x, queries=x, rates=[0.1, 0.3]).values
        tensor([[10.]])
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    side = as_blocks() if transform is None else transform
    checkpoints = _several(checkpoints)
    _check_rates(rates, checkpoints)

    def at(params: Params, number: int) -> Products:
        return products(loss_fn, params, train, queries, (side, side), side if self_influence else None, progress)

    return _summed("tracin", {"rates": list(rates), "transform": str(side)}, checkpoints, rates, at)


def less(
    loss_fn: LossFn,
    checkpoints: Params | Sequence[Params],
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    rates: Sequence[float],
    optimizers: Sequence[OptimizerState],
    dim: int = 8192,
    seed: int = 0,
    subtask: Int[Tensor, " q"] | None = None,
    progress: bool = True,
) -> Scores:
    r"""Score training examples as LESS does: cosines of Adam's updates with a task's gradients, over a warm-up.

    $$\text{score}(n) = \max_j \sum_k \eta_k
    \cos\bigl(\overline{\nabla \ell}(D_j; \theta_k), \Gamma(n; \theta_k)\bigr)$$

    Xia et al., arXiv 2402.04333. `\Gamma` is Adam's update for the example alone, `D_j` the subtasks of the queries.

    Args:
        loss_fn: the loss function, which serves every checkpoint.
        checkpoints: the parameters of each; those of one will do.
        train: the batches to choose from.
        queries: examples of what is wanted.
        rates: each checkpoint's learning rate.
        optimizers: each checkpoint's Adam, as `train.read_optimizer` returns it.
        dim: numbers that a gradient is projected to.
        seed: of the projection.
        subtask: which subtask each query is of, from 0; default all are of one.
        progress: show bars where there is a terminal.

    Returns:
        The scores: one row, of the best subtask.

    Raises:
        ValueError: if there is no checkpoint, or not one rate and one optimizer for each.
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    checkpoints = _several(checkpoints)
    _check_rates(rates, checkpoints)
    if len(optimizers) != len(checkpoints):
        raise ValueError(f"{len(optimizers)} optimizers came for {len(checkpoints)} checkpoints: give one for each")
    sketch = project(dim, seed=seed, target="global")
    found, ids = [], torch.zeros(0, dtype=torch.int64)
    for params, rate, state in zip(checkpoints, rates, optimizers, strict=True):
        asked, number = gathered(planned(loss_fn, params, chain(as_blocks(), sketch)), queries, "queries", progress)
        wanted = subtask_means(asked, torch.zeros_like(number) if subtask is None else subtask)
        update = planned(loss_fn, params, chain(as_blocks(), adam_update(state), sketch))
        rows, ids = gathered(update, train, "updates", progress)
        found.append(Checkpoint(rows, wanted, rate))
    settings = {"dim": dim, "seed": seed, "rates": list(rates)}
    return Scores(best_subtask(found)[None], ids, torch.zeros(1, dtype=torch.int64), "less", settings)


def _summed(
    method: str,
    settings: dict[str, Any],
    checkpoints: Sequence[Params],
    weights: Sequence[float],
    at: Callable[[Params, int], Products],
) -> Scores:
    """Return the weighted sum of every checkpoint's products."""
    every = [at(params, number) for number, params in enumerate(checkpoints)]
    first = every[0]
    for other in every[1:]:
        if not (torch.equal(first.ids, other.ids) and torch.equal(first.queries, other.queries)):
            raise ValueError("train and queries came in another order at another checkpoint: pass them unshuffled")
    values = torch.stack([w * each.values for w, each in zip(weights, every, strict=True)]).sum(0)
    own = None
    if first.own is not None:
        own = torch.stack([w * each.own for w, each in zip(weights, every, strict=True) if each.own is not None]).sum(0)
    return Scores(values, first.ids, first.queries, method, settings, own)


def _several(checkpoints: Params | Sequence[Params]) -> Sequence[Params]:
    """Return checkpoints as a list, also of one."""
    several = [checkpoints] if isinstance(checkpoints, Mapping) else list(checkpoints)
    if not several:
        raise ValueError("there is no checkpoint: pass the parameters of one at least")
    return several


def _check_rates(rates: Sequence[float], checkpoints: Sequence[Params]) -> None:
    """Refuse rates that are no rates, or not one for each checkpoint."""
    if len(rates) != len(checkpoints):
        raise ValueError(f"{len(rates)} rates came for {len(checkpoints)} checkpoints: give one for each, in order")
    for number, rate in enumerate(rates):
        check_number(f"the rate of checkpoint {number}", rate, 0)
