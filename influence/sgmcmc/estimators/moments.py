r"""Streaming first and second moments, per chain, in float64, mergeable.

For vectors `x [p]` and `y [q]` over draws, with the state of `n` draws and a block of `B`:

$$n' = n + B, \quad δ = \bar x_B - \bar x, \quad
  \bar x' = \bar x + \frac{B}{n'} δ, \quad
  C' = C + \sum_{b}(x_b - \bar x_B)(y_b - \bar y_B)^T + \frac{nB}{n'}\,δ_x δ_y^T$$
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """Moments of two vectors along chains.

    Attributes:
        draws: how many, of each chain.
        x: means.
        y: means.
        xx: sums of squares about the mean.
        yy: the same.
        xy: sums of products about the means.
    """

    draws: Float[Tensor, " c"]
    x: Float[Tensor, "c p"]
    y: Float[Tensor, "c q"]
    xx: Float[Tensor, "c p"]
    yy: Float[Tensor, "c q"]
    xy: Float[Tensor, "c p q"]


def init(chains: int, p: int, q: int) -> Moments:
    """Return the moments of no draws."""
    zeros = torch.zeros((chains, p + q), dtype=torch.float64)
    x, y = zeros.split((p, q), 1)
    return Moments(zeros.new_zeros(chains), x, y, x.clone(), y.clone(), zeros.new_zeros(chains, p, q))


def update(
    state: Moments, x: Float[Tensor, "c d p"], y: Float[Tensor, "c d q"], alive: Bool[Tensor, " c"] | None = None
) -> Moments:
    """Fold a block of draws in.

    Args:
        state: the moments so far.
        x: draws of the first vector.
        y: draws of the second.
        alive: chains that take part; the others' draws may be anything.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [2.0], [6.0]]])
        >>> m = update(update(init(1, 1, 1), x[:, :1], x[:, :1]), x[:, 1:], x[:, 1:])
        >>> float(m.x), float(covariance(m))
        (3.0, 7.0)
    """
    x, y = x.double(), y.double()
    if alive is not None:
        x, y = (torch.where(alive[:, None, None], each, 0.0) for each in (x, y))
    count = torch.full_like(state.draws, x.shape[1])
    mean_x, mean_y = x.mean(1), y.mean(1)
    if not bool(mean_x.isfinite().all() & mean_y.isfinite().all()):
        raise ValueError(
            "a draw holds a number that is not finite, and all moments would be NaN: leave its chain out by alive"
        )
    dx, dy = x - mean_x[:, None], y - mean_y[:, None]
    block = Moments(count, mean_x, mean_y, dx.square().sum(1), dy.square().sum(1), dx.mT @ dy)
    merged = merge(state, block)
    if alive is None:
        return merged
    pairs = zip(merged, state, strict=True)
    return Moments(*(torch.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs))


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the draws of both: associative, and no order matters."""
    count = a.draws + b.draws
    share = torch.where(count > 0, b.draws / count, 0.0)
    weight = a.draws * share
    dx, dy = b.x - a.x, b.y - a.y
    return Moments(
        count,
        a.x + share[:, None] * dx,
        a.y + share[:, None] * dy,
        a.xx + b.xx + weight[:, None] * dx.square(),
        a.yy + b.yy + weight[:, None] * dy.square(),
        a.xy + b.xy + weight[:, None, None] * dx[:, :, None] * dy[:, None, :],
    )


def stacked(state: Moments) -> Moments:
    """Return the moments of all chains' draws as if they were one chain's."""
    total = Moments(*(each[:1] for each in state))
    for c in range(1, state.draws.shape[0]):
        total = merge(total, Moments(*(each[c : c + 1] for each in state)))
    return total


def covariance(state: Moments, pooling: str = "stacked") -> Float[Tensor, "p q"]:
    r"""Return the covariance of `x` and `y` over chains.

    $$\text{within: } \frac{\sum_c C_c}{\sum_c (n_c - 1)}, \qquad
      \text{stacked: } \frac{\sum_c C_c + \sum_c n_c (\bar x_c - \bar x)(\bar y_c - \bar y)^T}{\sum_c n_c - 1}$$

    Args:
        state: the moments.
        pooling: `"stacked"` takes all draws for one chain's; `"within"` centres each chain by itself, which a distance
            between chains does not touch, and is low by what a chain's own mean varies.

    Raises:
        ValueError: if there are too few draws, or the pooling is unknown.
    """
    if pooling == "within":
        freedom = float((state.draws - 1).clamp_min(0).sum())
        sums = state.xy.sum(0)
    elif pooling == "stacked":
        one = stacked(state)
        freedom, sums = float(one.draws[0]) - 1, one.xy[0]
    else:
        raise ValueError(f"pooling must be 'within' or 'stacked'; got {pooling!r}")
    if freedom < 1:
        raise ValueError(
            f"a covariance needs at least two draws; there are {state.draws.long().tolist()} per chain: raise num_draws"
        )
    return sums / freedom
