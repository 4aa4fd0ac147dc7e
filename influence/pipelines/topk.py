"""The best examples of each query as a sink: a heap instead of a full matrix of scores."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.fold import Sink
from influence.func.top import Top, merge, start


def best(k: int, queries: int, reverse: bool = False) -> Sink:
    """Return a sink of scores `[n, q]` that keeps the k best of each query; equal ones in the dataset's order.

    Args:
        k: how many, at most as many as there are examples.
        queries: how many queries there are.
        reverse: keep the lowest instead.

    Returns:
        The sink, whose result is a `Top` of the scores.

    Raises:
        ValueError: if `k` is less than 1.

    Example:
        >>> heap = best(1, 2)
        >>> heap.update(heap.init(), torch.tensor([7, 8]), torch.tensor([[1.0, 4.0], [2.0, 3.0]])).indices.tolist()
        [[8], [7]]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    sign = -1 if reverse else 1

    def update(state: Top, index: Int[Tensor, " n"], scores: Float[Tensor, "n q"]) -> Top:
        seen = Top(sign * scores.mT.cpu(), index[None].expand(queries, -1))
        return merge(state._replace(values=state.values.to(seen.values.dtype)), seen)

    def finalize(state: Top) -> Top:
        return state._replace(values=sign * state.values)

    return Sink(lambda: start(torch.zeros(queries, 1), k), update, merge, finalize)
