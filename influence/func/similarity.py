r"""Similarity of rows, and exact inner products of gradients that were never formed.

For a linear map `G_n = Σ_s δ_{ns} x_{ns}^T`, so `⟨G_n, G_m⟩ = Σ_{s,s'} ⟨δ_{ns}, δ_{ms'}⟩ ⟨x_{ns}, x_{ms'}⟩`: cheaper
than forming `G` where `s² (o + i) < s · o · i` (a *ghost* product; Goodfellow 2015).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import einsum, reduce
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from influence.func.engine.batched import Scene
from influence.func.engine.ops import linear
from influence.func.engine.ops.linear import Dense
from influence.func.engine.plan import EngineError, make_plan
from influence.func.engine.sums import BlockSums, Gather, GatherPlan, Pair, make_gather, watched
from influence.func.loss.losses import widen
from influence.func.numbers import check_number
from influence.func.transform.chain import CollectedRows
from influence.func.transform.folding import flat, same_dtype, vectors
from influence.types import Batch, LossFn, Params, Rows


def dot(a: Rows, b: Rows) -> Float[Tensor, "n m"]:
    """Return inner products of rows, summed over blocks, in at least float32.

    Args:
        a: rows `[n, …]`.
        b: rows `[m, …]` of the same blocks.

    Returns:
        The products.

    Raises:
        ValueError: if the blocks differ, or both sides went through the whole inverse of a curvature.

    Example:
        >>> import torch
        >>> dot({"w": torch.eye(2)}, {"w": torch.tensor([[1.0, 2.0]])})
        tensor([[1.],
                [2.]])
    """
    shapes = [{name: tuple(row.shape[1:]) for name, row in rows.items()} for rows in (a, b)]
    if shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:4]
        raise ValueError(f"rows of different blocks have no inner product; they differ in {differing}")
    _check_powers(a, b)
    left, right = same_dtype(flat(a), flat({name: b[name] for name in a}))
    return left @ right.mT


def _check_powers(a: Rows, b: Rows) -> None:
    """Refuse rows which together went through more than one inverse of a curvature.

    Raises:
        ValueError: naming both transforms.
    """
    steps = [rows.transform.steps if isinstance(rows, CollectedRows) else () for rows in (a, b)]
    powers = [sum(step.settings.get("power", 0.0) for step in made) for made in steps]
    if sum(powers) < -1:
        raise ValueError(
            f"this product would apply an inverse more than once: powers {powers[0]:g} and {powers[1]:g} of a "
            "curvature. Put the whole inverse on one side, or its root on either, as one_sided and two_sided do"
        )


def cosine(a: Rows, b: Rows, eps: float = 1e-12) -> Float[Tensor, "n m"]:
    """Return cosines of rows over all blocks together; a zero row has cosine 0.

    Args:
        a: rows `[n, …]`.
        b: rows `[m, …]` of the same blocks.
        eps: smallest norm that is divided by.

    Returns:
        The cosines.

    Example:
        >>> import torch
        >>> cosine({"w": torch.eye(2)}, {"w": torch.tensor([[3.0, 4.0]])})
        tensor([[0.6000],
                [0.8000]])
    """
    check_number("eps", eps, 0)
    norms = [flat(rows).norm(dim=1).clamp_min(eps) for rows in (a, b)]
    return dot(a, b) / norms[0][:, None] / norms[1][None]


class Nearest(NamedTuple):
    """The nearest rows of each query, best first."""

    values: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]


def nearest(queries: Rows, rows: Rows, k: int = 5, *, metric: str = "dot") -> Nearest:
    """Return the `k` rows with the largest similarity to each query.

    Args:
        queries: rows `[q, …]`.
        rows: rows `[n, …]`.
        k: how many.
        metric: `"dot"` or `"cosine"`.

    Returns:
        Values and indices.

    Raises:
        ValueError: if `k` is not between 1 and the number of rows, or the metric is unknown.

    Example:
        >>> import torch
        >>> nearest({"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[0.0, 1.0], [2.0, 0.0]])}, k=1).indices
        tensor([[1]])
    """
    if metric not in ("dot", "cosine"):
        raise ValueError(f"metric must be 'dot' or 'cosine'; got {metric!r}")
    n = next(iter(rows.values())).shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of rows, {n}; got {k}")
    scores = (dot if metric == "dot" else cosine)(queries, rows)
    return Nearest(*scores.topk(k, dim=1))


def squared_norms(loss_fn: LossFn, params: Params, batch: Batch) -> Float[Tensor, " n"]:
    r"""Return `‖g_n‖²` of every example's gradient, exact, forming no gradient where a ghost product is cheaper.

    Args:
        loss_fn: the loss function.
        params: the parameters.
        batch: the batch.

    Returns:
        The squared norms.

    Example:
        >>> import torch
        >>> squared_norms(lambda p, x: (x @ p["w"]).sum((1, 2)), {"w": torch.eye(2)}, torch.ones(1, 3, 2))
        tensor([36.])
    """
    found = _gradients(loss_fn, params, batch)
    total: Tensor | None = None
    for left, right in found.factors.values():
        s, o, i = left.shape[1], left.shape[2], right.shape[2]
        if s * (o + i) < o * i:
            part = einsum(left @ left.mT, right @ right.mT, "n s t, n s t -> n")
        else:
            part = reduce((left.mT @ right).square(), "n o i -> n", "sum")
        total = part if total is None else total + part
    for row in found.rows.values():
        part = vectors(row).square().sum(1)
        total = part if total is None else total + part
    assert total is not None
    return total


def products(loss_fn: LossFn, params: Params, batch: Batch, other: Batch | None = None) -> Float[Tensor, "n m"]:
    r"""Return `⟨g_n, g_m⟩` for the examples of two batches, exact, by ghost products where they are cheaper.

    Args:
        loss_fn: the loss function.
        params: the parameters.
        batch: a batch of `n` examples.
        other: a batch of `m` examples; default the same.

    Returns:
        The products.

    Example:
        >>> import torch
        >>> products(lambda p, x: (x @ p["w"]).sum((1, 2)), {"w": torch.eye(2)}, torch.ones(1, 3, 2))
        tensor([[36.]])
    """
    a = _gradients(loss_fn, params, batch)
    b = a if other is None else _gradients(loss_fn, params, other)
    total: Tensor | None = None
    for name, (left, right) in a.factors.items():
        part = _product((left, right), b.factors[name])
        total = part if total is None else total + part
    for name, row in a.rows.items():
        part = vectors(row) @ vectors(b.rows[name]).mT
        total = part if total is None else total + part
    assert total is not None
    return total


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Float[Tensor, "n m"]:
    (n, s, o), (m, t, i) = a[0].shape, b[1].shape
    ghost = n * m * s * t * (o + i)
    formed = (n * s + m * t) * o * i + n * m * o * i
    if ghost < formed:
        lefts, rights = (einsum(x, y, "n s d, m t d -> n m s t") for x, y in zip(a, b, strict=True))
        return einsum(lefts, rights, "n m s t, n m s t -> n m")
    return einsum(a[0].mT @ a[1], b[0].mT @ b[1], "n o i, m o i -> n m")


class _Gradients(NamedTuple):
    """Gradients of a batch: as factors where every use of a parameter is a linear map, as rows elsewhere.

    Attributes:
        factors: `{parameter: (left [n, s, o], right [n, s, i])}`; several uses lie side by side along `s`.
        rows: `{parameter: [n, *block]}`.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rows: Rows


class _Both(Gather):
    """The watcher of a run that keeps both factors, and the rows of what has none."""

    def __init__(self, plan: GatherPlan, scene: Scene) -> None:
        super().__init__(plan, _side_by_side, None, scene)
        self.rows: Rows = {}

    def row(self, name: str, row: Shaped[Tensor, "n ..."]) -> None:
        """Keep a block's rows."""
        self.rows[name] = widen(row)


def _side_by_side(pairs: Sequence[Pair]) -> BlockSums:
    """Return the factors of all uses of one block, side by side."""
    found = {"left": [pair.left for pair in pairs], "right": [pair.right for pair in pairs]}
    return {name: widen(torch.cat([f.x for f in sides if isinstance(f, Dense)], 1)) for name, sides in found.items()}


def _gradients(loss_fn: LossFn, params: Params, batch: Batch) -> _Gradients:
    plan = make_plan(loss_fn, params, batch)
    if plan.batched is None:
        raise EngineError(
            f"ghost products need the batched engine; this function runs by {plan.engine!r}: {plan.notes}"
        )
    routes = plan.batched.routes.items()
    others = {name for key, route in routes if route.family is not linear.FAMILY for name in key.params}
    gather = make_gather(plan.batched, max_side=0)
    rows = {name: "not only linear" for name in gather.uses if name in others}
    uses = {name: count for name, count in gather.uses.items() if name not in others}
    gather = gather._replace(uses=uses, rows={**gather.rows, **rows})
    with torch.enable_grad():
        watcher = partial(_Both, gather)
        losses, _, run = watched(plan.batched, watcher, lambda p, b: (loss_fn(p, b), None), params, batch)
        run.backward(losses, torch.ones_like(losses), retain=False)
    return _Gradients({name: (run.sums[name]["left"], run.sums[name]["right"]) for name in uses}, run.rows)
