"""Fit curvature: pass over the batches, fold the sums of a method, and assemble its factors."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain as joined
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from influence.func.engine.batch import batch_size
from influence.func.engine.plan import Plan, Planned
from influence.func.fingerprint import weights_hash
from influence.func.fold import Sink, fold
from influence.func.transform.blocks import as_blocks
from influence.func.transform.chain import Transform
from influence.hessians.factors import Factors
from influence.hessians.labels import Labels, index_of
from influence.hessians.method import About, FitSetup, Method, Pass, Sums, add
from influence.types import Batch, LossFn, Params


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    method: Method,
    *,
    transform: Transform | None = None,
    labels: str | None = None,
    seed: int = 0,
    draws: int = 1,
    progress: bool = True,
) -> Factors:
    r"""Fit curvature by any method: each of its passes is a fold of `step` into its sink.

    Sampled labels are drawn for rows of the dataset. A batch says which rows it holds by `index`, int64 `[n]`; batches
    without one are numbered in the order in which they come.

    Args:
        loss_fn: a loss function; `labels="sampled"` and `"exact"` need its likelihood (`functionalize` gives it).
        params: the parameters.
        batches: batches, seen once, or twice by a method of two passes; `attention_mask` says which positions are real.
        method: what a builder returns: `hessians.kfac.build()`, `hessians.ekfac.build(hessians.tkfac.build())`.
        transform: the transform under whose rows the factors are fitted; default `as_blocks()`.
        labels: `"sampled"` (the Fisher), `"data"` (the empirical Fisher) or `"exact"` (the expectation over labels:
            one backward per position and class, for small outputs); default the method's.
        seed: of the sampled labels, each keyed by (row of the dataset, position, draw).
        draws: labels per position.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors.

    Raises:
        ValueError: if the method does not take the transform, the loss has no likelihood, batches can be seen only once
            and are wanted twice, or labels are drawn for batches without `index` from a loader that shuffles.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1))
        >>> hessians.fit(loss_fn, params, [batch], hessians.ekfac.build(), labels="exact").blocks["weight"].corrected
        tensor([[2., 8.]])
    """
    _check_batches(batches)
    if len(method.passes) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{method} sees the batches twice: pass a list (or anything that can be iterated again), not an iterator"
        )
    setup, factors = _setup(loss_fn, method, transform, labels, seed, draws), None
    for one in method.passes:
        factors = fit_pass(one, setup._replace(factors=factors), params, batches, progress)
    assert factors is not None
    return factors


def step(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    method: Method,
    *,
    number: int = 0,
    factors: Factors | None = None,
    transform: Transform | None = None,
    labels: str | None = None,
    seed: int = 0,
    draws: int = 1,
) -> "FitStep":
    """Plan one pass of a fit on a first batch, for a fold of your own: `step(batch) -> Sums`, folded by `step.sink()`.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batch: a first batch.
        method: what a builder returns.
        number: which of the method's passes.
        factors: what the pass before it fitted; none before the first.
        transform: as in `fit`, like all that follow.
        labels: whose gradients.
        seed: of the sampled labels.
        draws: labels per position.

    Returns:
        The step.

    Example:
        >>> import torch
        >>> from influence import fold, functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batches = [(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 1)), (torch.tensor([[0.0, 4.0]]), torch.zeros(1, 1))]
        >>> step = hessians.step(loss_fn, params, batches[0], hessians.kfac.build(), labels="exact")
        >>> fold(step, batches, {"factors": step.sink()})["factors"].blocks["weight"].dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    setup = _setup(loss_fn, method, transform, labels, seed, draws)
    return FitStep(method.passes[number], setup._replace(factors=factors), params, batch)


def _setup(
    loss_fn: LossFn, method: Method, transform: Transform | None, labels: str | None, seed: int, draws: int
) -> FitSetup:
    chosen = as_blocks() if transform is None else transform
    return FitSetup(loss_fn, chosen, Labels(method.default_labels if labels is None else labels, seed, draws))


class FitStep:
    """A planned pass of a fit: `step(batch) -> Sums`, a pure function of the batch.

    Attributes:
        about: what the sums are sums of.
    """

    def __init__(self, one: Pass, setup: FitSetup, params: Params, first: Batch) -> None:
        """Plan on a first batch."""
        loss_fn, notes = setup.loss_fn, dict[str, str]()
        if setup.factors is not None:
            setup.factors.check_model(loss_fn, params)
        setup.labels.check(loss_fn)

        def make(params: Params, batch: Batch) -> tuple[Plan, Any]:
            planned = one.sums(setup, params, batch)
            notes.update(planned.notes)
            return planned.plan, planned.sums

        self._params, self._pass = params, one
        self._planned = Planned(loss_fn, make, params, first)
        shapes = setup.transform.bind(self.plan.layout).row_shapes
        reduction, function = getattr(loss_fn, "reduction", "own"), getattr(loss_fn, "function", None)
        self.about = About(one.name, setup, reduction, weights_hash(loss_fn, params), shapes, notes, function)

    @property
    def plan(self) -> Plan:
        """The first plan; `print` it."""
        return self._planned.plan

    def __call__(self, batch: Batch, index: Int[Tensor, " n"] | None = None) -> Sums:
        """Return the sums over a batch; `index` numbers its rows where it does not."""
        if self.about.setup.labels.source == "sampled":
            own = index_of(batch, batch_size(batch))
            index = index if own is None else own
        return self._planned(self._params, batch, index)

    def sink(self) -> Sink:
        """Return the sink that folds the sums of batches into factors."""

        def finish(sums: Sums) -> Factors:
            if not sums.documents:
                raise ValueError("no batch was seen: pass at least one (an iterator that was used up holds none)")
            return self._pass.assemble(self.about, sums)

        return Sink(lambda: Sums({}, {}, 0), lambda state, index, value: add(state, value), add, finish)


def fit_pass(one: Pass, setup: FitSetup, params: Params, batches: Iterable[Batch], progress: bool) -> Factors:
    """Plan one pass on the first batch, fold every batch, and return its factors."""
    from tqdm import tqdm

    _check_batches(batches)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty: pass at least one batch (an iterator that was used up holds none)")
    if setup.labels.source == "sampled":
        _check_order(batches, first)
    step = FitStep(one, setup, params, first)
    size = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    shown = tqdm(joined([first], rest), desc=one.name, total=size, unit="batch", disable=None if progress else True)
    return fold(lambda numbered: step(*numbered), _numbered(shown), {"factors": step.sink()})["factors"]


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with the numbers of its rows, counted from 0."""
    seen = 0
    for batch in batches:
        n = batch_size(batch)
        yield batch, torch.arange(seen, seen + n)
        seen += n


def _check_batches(batches: Iterable[Batch]) -> None:
    """Refuse one batch where several are expected.

    Raises:
        ValueError: saying what came.
    """
    one = isinstance(batches, Mapping | Tensor) or (
        isinstance(batches, tuple) and bool(batches) and all(isinstance(item, Tensor) for item in batches)
    )
    if one:
        raise ValueError(f"batches is one batch, a {type(batches).__name__}; pass a list of batches, [batch]")


def _check_order(batches: Iterable[Batch], first: Batch) -> None:
    """Refuse to number what comes in another order in every pass.

    Raises:
        ValueError: if batches without `index` come from a loader that is not known to keep its order.
    """
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return
    sampler: Any = batches.sampler if batches.batch_sampler is None else batches.batch_sampler
    while hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    if not isinstance(sampler, SequentialSampler) and index_of(first, batch_size(first)) is None:
        raise ValueError(
            "labels='sampled' draws each example's labels by its row of the dataset. These batches have no 'index', "
            f"and the {type(sampler).__name__} of their DataLoader may give another order in every pass, so rows "
            "cannot be counted: pass shuffle=False to the DataLoader, or batches that are dictionaries with 'index', "
            "int64 [n] (or use labels='data' or 'exact')"
        )
