"""Methods at one set of weights: influence functions (EK-FAC and its kin), TrackStar, cosines."""

from collections.abc import Iterable
from typing import Any

from influence import hessians
from influence.attribute.scores import Scores
from influence.attribute.scoring import batches_of, products
from influence.func.transform.blocks import as_blocks
from influence.func.transform.chain import Transform, chain
from influence.func.transform.precondition import fitted_under, precondition
from influence.func.transform.project import project
from influence.func.transform.scale import unit_norm
from influence.func.transform.whiten import eigen_whiten
from influence.hessians import Factors
from influence.types import Batch, LossFn, Params


def ekfac(
    loss_fn: LossFn,
    params: Params,
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    factors: Factors | None = None,
    labels: str = "sampled",
    seed: int = 0,
    damping: float = 0.1,
    inversion: str = "damped",
    compress: int | None = None,
    self_influence: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Score training examples by influence functions: query gradient, inverse curvature, training gradient.

    $$\text{score}(q, n) = g_q^\top (H + \lambda)^{-1} g_n$$

    with EK-FAC for `H` (Grosse et al., arXiv 2308.03296), or any factors. Positive helps: training more on the example
    lowers the query's loss. `influence ekfac` does the same for a language model and a corpus on disk.

    Costs three passes over `train` (two for the fit) and one over `queries`; the queries' whole gradients are held,
    `queries × parameters` numbers, unless `compress` keeps fewer.

    Args:
        loss_fn: what `functionalize` returns, or a pure function `(params, batch) -> losses[n]`.
        params: the trained parameters whose gradients count.
        train: the training batches, as a DataLoader gives them; seen several times.
        queries: the batches to explain, or one batch.
        factors: curvature that is fitted already, of any kind; default EK-FAC, fitted to `train`.
        labels: whose gradients the fit takes: `"sampled"`, `"data"` or `"exact"`.
        seed: of the sampled labels.
        damping: what is added to each block's spectrum, relative to its mean.
        inversion: how small eigenvalues are met; see `precondition`.
        compress: keep so many whitened directions of each side of a block, on both sides of the score.
        self_influence: also score each training example for itself, which takes another pass.
        progress: show bars where there is a terminal.

    Returns:
        The scores, in the batches' order.

    Raises:
        ValueError: if batches can be seen only once, or do not say who they are.

    Example:
        >>> import torch
        >>> from influence import attribute, functionalize
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
        >>> scores = attribute.ekfac(loss_fn, params, train=(x, y), queries=(x[:1], y[:1]), labels="exact")
        >>> scores.top(1).ids
        tensor([[0]])
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    if factors is None:
        factors = hessians.ekfac.fit(
            loss_fn, params, train, transform=as_blocks(), labels=labels, seed=seed, progress=progress
        )
    start = fitted_under(factors, None)
    root = chain(start, precondition(factors, power=-0.5, damping=damping, inversion=inversion))
    if compress is None:
        sides = chain(start, precondition(factors, power=-1.0, damping=damping, inversion=inversion)), start
    else:
        root = chain(start, eigen_whiten(factors, compress, damping, inversion))
        sides = root, root
    settings: dict[str, Any] = {
        "method": factors.method,
        "labels": factors.labels.source,
        "damping": damping,
        "inversion": inversion,
    }
    if compress is not None:
        settings["compress"] = compress
    found = products(loss_fn, params, train, queries, sides, root if self_influence else None, progress)
    return Scores(found.values, found.ids, found.queries, "ekfac", settings, found.own)


def trackstar(
    loss_fn: LossFn,
    params: Params,
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    dim: int = 16,
    seed: int = 0,
    components: int = 1000,
    mix: bool = True,
    damping: float = 0.1,
    self_influence: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Score training examples as TrackStar does: cosines in the metric of a mixed curvature.

    $$\text{score}(q, n) = \cos\bigl(H^{-1/2} P g_q,\; H^{-1/2} P g_n\bigr), \qquad
    H = w\, H_\text{queries} + (1 - w)\, H_\text{train}$$

    Chang et al., arXiv 2410.17413: directions that all queries share are played down.

    Args:
        loss_fn: as in `ekfac`.
        params: the parameters.
        train: the training batches; seen twice.
        queries: the batches to explain; seen twice.
        dim: numbers that each side of a block is projected to.
        seed: of the projection.
        components: how many directions that the queries share to play down.
        mix: mix the queries' curvature into the training examples'.
        damping: what is added to each block's spectrum, relative to its mean.
        self_influence: also score each training example for itself: its squared norm before it is divided by it.
        progress: show bars where there is a terminal.

    Returns:
        The scores: cosines.

    Raises:
        ValueError: as in `ekfac`.
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    plain = chain(as_blocks(), project(dim, seed=seed))
    fit = hessians.autocorrelation.fit
    factors = fit(loss_fn, params, train, transform=plain, progress=progress)
    if mix:
        asked = fit(loss_fn, params, queries, transform=plain, progress=progress)
        factors = hessians.mix(asked, factors, components=components)
    white = chain(plain, precondition(factors, power=-0.5, damping=damping))
    both = chain(white, unit_norm())
    settings = {"dim": dim, "seed": seed, "components": components, "mix": mix, "damping": damping}
    own = white if self_influence else None
    found = products(loss_fn, params, train, queries, (both, both), own, progress)
    return Scores(found.values, found.ids, found.queries, "trackstar", settings, found.own)


def cosine(
    loss_fn: LossFn,
    params: Params,
    *,
    train: Batch | Iterable[Batch],
    queries: Batch | Iterable[Batch],
    dim: int | None = 16,
    seed: int = 0,
    self_influence: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Score training examples by the cosine of their gradients with the query's: the baseline without curvature.

    Args:
        loss_fn: as in `ekfac`.
        params: the parameters.
        train: the training batches.
        queries: the batches to explain.
        dim: numbers that each side of a block is projected to; `None` keeps whole gradients.
        seed: of the projection.
        self_influence: also return each training example's squared norm.
        progress: show bars where there is a terminal.

    Returns:
        The scores: cosines.

    Raises:
        ValueError: as in `ekfac`.

    Example:
        >>> import torch
        >>> from influence import attribute
        >>> loss_fn = lambda params, x: x @ params["w"]
        >>> train = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> scores = attribute.cosine(loss_fn, {"w": torch.zeros(2)}, train=train, queries=train[:1], dim=None)
        >>> scores.values
        tensor([[1., 0.]])
    """
    train, queries = batches_of(train, "train"), batches_of(queries, "queries")
    plain = as_blocks() if dim is None else chain(as_blocks(), project(dim, seed=seed))
    both = chain(plain, unit_norm())
    own: Transform | None = plain if self_influence else None
    found = products(loss_fn, params, train, queries, (both, both), own, progress)
    return Scores(found.values, found.ids, found.queries, "cosine", {"dim": dim, "seed": seed}, found.own)
