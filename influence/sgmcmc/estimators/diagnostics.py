"""Have chains mixed, and how many independent draws are they worth: split R-hat, effective sample size, drift."""

import torch
from jaxtyping import Float
from torch import Tensor


def rhat(x: Float[Tensor, "c d"]) -> float:
    r"""Return split R-hat (Gelman et al. 2013): about 1 where chains, cut in halves, agree.

    $$\hat R = \sqrt{\frac{\frac{d-1}{d} W + \frac1d B}{W}}$$

    with `W` the mean variance within the `2c` halves of length `d`, and `B/d` the variance of their means.

    Args:
        x: a quantity along chains.

    Returns:
        R-hat; NaN for fewer than 4 draws, 1 where nothing varies.

    Example:
        >>> import torch
        >>> one = torch.tensor([0.0, 1, 0, 1])
        >>> round(rhat(torch.stack([one, one])), 3), rhat(torch.stack([one, one + 8])) > 3
        (0.707, True)
    """
    half = x.shape[1] // 2
    if half < 2:
        return float("nan")
    parts = torch.cat([x[:, :half], x[:, -half:]]).double()
    within = parts.var(1).mean()
    between = parts.mean(1).var()
    if float(within) == 0:
        return 1.0 if float(between) == 0 else float("inf")
    return float((((half - 1) / half * within + between) / within).sqrt())


def ess(x: Float[Tensor, "c d"]) -> float:
    r"""Return the effective sample size of a mean over all chains' draws (Geyer 1992; Vehtari et al. 2021).

    $$n_{\text{eff}} = \frac{c\,d}{-1 + 2\sum_{k} \hat P_k}, \qquad \hat P_k = \hat ρ_{2k} + \hat ρ_{2k+1},
      \qquad \hat ρ_t = 1 - \frac{W - \bar γ_t}{\hat V}$$

    summed while `P_k > 0`, made monotone; `V̂ = (d-1)/d W + B/d` includes the variance between chains, so chains that
    disagree count for little.

    Args:
        x: a quantity along chains.

    Returns:
        The effective sample size, at most `c d log10(c d)`; `c d` where nothing varies; NaN for fewer than 4 draws.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> 3000 < ess(x) < 5000, ess(x.cumsum(1)) < 20
        (True, True)
    """
    c, d = x.shape
    if d < 4:
        return float("nan")
    x = x.double()
    centred = x - x.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * d)
    autocovariance = torch.fft.irfft(spectrum.abs().square(), 2 * d)[:, :d] / d
    within = float(autocovariance[:, 0].mean() * d / (d - 1))
    total = within * (d - 1) / d + (float(x.mean(1).var()) if c > 1 else 0.0)
    if total == 0:
        return float(c * d)
    rho = 1 - (within - autocovariance.mean(0) * d / (d - 1)) / total
    rho[0] = 1.0
    pairs = rho[: d // 2 * 2].reshape(-1, 2).sum(1)
    negative = (pairs <= 0).nonzero()
    pairs = pairs[: int(negative[0])] if len(negative) else pairs
    time = float(-1 + 2 * torch.cummin(pairs, 0).values.sum())
    most = c * d * float(torch.tensor(float(c * d)).log10())
    return min(c * d / max(time, 1e-12), most)


def standard_error(x: Float[Tensor, "c d"]) -> float:
    """Return the standard error of the mean over all chains' draws: `sd / √ess`, the spread between chains included.

    For fewer than 4 draws it is the spread of the chains' means.
    """
    c, d = x.shape
    x = x.double()
    if d < 4:
        return float(x.mean(1).std() / c**0.5) if c > 1 else float("nan")
    within = x.var(1).mean() * (d - 1) / d
    between = x.mean(1).var() if c > 1 else torch.zeros((), dtype=torch.float64)
    return float(((within + between) / ess(x)).sqrt())


def drift(x: Float[Tensor, "c d"]) -> float:
    """Return how many standard errors the second half of the draws lies above the first (Geweke 1992)."""
    half = x.shape[1] // 2
    if half < 4:
        return float("nan")
    first, second = x[:, :half].double(), x[:, -half:].double()
    error = (standard_error(first) ** 2 + standard_error(second) ** 2) ** 0.5
    gap = float(second.mean() - first.mean())
    return gap / error if error > 0 else 0.0
