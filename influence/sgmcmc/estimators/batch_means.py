r"""Standard errors of covariances and correlations of draws that depend on one another, by the method of batch means.

Products of two losses along a chain are cut into batches long beside the time in which they forget; the batches' means
are then nearly independent, and their spread says how uncertain the mean of all is. The shape of the losses'
distribution and their dependence are in it, without a model of either: losses at a minimum are quadratic in the
weights, so their tails are heavy, and the formula for Gaussian variables is too small.

Pieces of a chain shorter than that time say too little: so the chains themselves are batches too, and the larger of the
two errors counts. One chain has only its pieces.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from influence.sgmcmc.estimators.moments import Moments

BATCHES = 20


def of_draws(
    x: Float[Tensor, "n t r"],
    y: Float[Tensor, "m u r"],
    value: Float[Tensor, "n m t u"],
    chains: int,
    correlation: bool,
) -> Float[Tensor, "n m t u"]:
    r"""Return the standard errors of products of centred draws, one chain after the other.

    $$\mathrm{s.e.}^2 = \frac{1}{B (B-1)} \sum_b \big(\bar p_b - \bar p\big)^2, \qquad
      p = x y \ \text{ or, of a correlation, } \ x y - \tfrac{ρ}{2} (x^2 + y^2)$$

    over `B` batches: the chains themselves, or where there are fewer than 20 the pieces of chains cut to at least as
    many, whichever gives the larger error. A correlation's second term is that of its deviations, `x` and `y` having
    the variance one.

    Args:
        x: draws of the first axis.
        y: draws of the second.
        value: the statistic.
        chains: how many.
        correlation: whether it is one.

    Returns:
        The errors; NaN where one chain has fewer than four draws. Where it forgets in more than a twentieth of them the
        error is too small, and several chains tell.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, -1.0, 3.0, -3.0]]])  # two chains, whose mean squares are 1 and 9
        >>> float(of_draws(x, x, torch.full((1, 1, 1, 1), 5.0), 2, correlation=False))
        4.0
    """
    found = None
    for pieces in _pieces(x.shape[2] // chains, chains):
        batches = _batches(x.shape[2], chains, pieces)
        error = _spread(_products(x[..., b], y[..., b], value, correlation) for b in batches)
        found = error if found is None else torch.maximum(found, error)
    assert found is not None
    return found


def of_moments(state: Moments, value: Float[Tensor, "n m"], within: bool, correlation: bool) -> Float[Tensor, "n m"]:
    """Return the standard errors of a statistic of streamed co-moments, whose batches are the chains.

    Args:
        state: co-moments of the same losses on both sides.
        value: their covariance or correlation.
        within: whether chains are centred by themselves.
        correlation: whether it is one.

    Returns:
        The errors; NaN of one chain.
    """
    living = (state.draws > 0).nonzero()[:, 0].tolist()
    centre = (state.x * state.draws[:, None]).sum(0) / state.draws.sum()

    def of(chain: int) -> Tensor:
        away = torch.zeros_like(centre) if within else state.x[chain] - centre
        return state.xy[chain] / state.draws[chain] + away[:, None] * away

    if not correlation:
        return _spread(map(of, living))
    deviation = (sum((of(chain).diagonal() for chain in living), torch.zeros_like(centre)) / len(living)).sqrt()

    def scaled(chain: int) -> Tensor:
        p = of(chain) / deviation[:, None] / deviation
        return p - value / 2 * (p.diagonal()[:, None] + p.diagonal())

    return _spread(map(scaled, living))


def _pieces(length: int, chains: int) -> list[int]:
    """Return into how many pieces, at least two draws long, every chain is cut: one way, or finely and not at all."""
    fine = max(1, min(-(-BATCHES // chains), length // 2))
    return [fine] if chains == 1 or fine == 1 else [fine, 1]


def _batches(draws: int, chains: int, pieces: int) -> Iterator[slice]:
    """Cut every chain into equal pieces."""
    length = draws // chains
    for chain in range(chains):
        bounds = [chain * length + length * piece // pieces for piece in range(pieces + 1)]
        yield from (slice(*pair) for pair in pairwise(bounds))


def _products(x: Tensor, y: Tensor, value: Tensor, correlation: bool) -> Tensor:
    p = (x.flatten(0, 1) @ y.flatten(0, 1).T / x.shape[2]).view(*x.shape[:2], *y.shape[:2]).permute(0, 2, 1, 3)
    if correlation:
        p -= value / 2 * (x.square().mean(2)[:, None, :, None] + y.square().mean(2)[None, :, None, :])
    return p


def _spread(means: Iterator[Tensor]) -> Tensor:
    """Return the standard error of the mean of batches, which come one at a time (Welford); NaN of one batch."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for p in means:
        count += 1
        away = p - mean
        mean = mean + away / count
        squares = squares + away * (p - mean)
    if count < 2:
        return torch.full_like(mean, torch.nan)
    return (squares / (count * (count - 1))).sqrt()
