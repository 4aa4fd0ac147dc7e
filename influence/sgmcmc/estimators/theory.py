r"""Closed forms to calibrate and test with: learning coefficients, finite-step Langevin, Gaussian covariances.

`K(w)` is the excess of the mean loss; `λ` and `m` are its learning coefficient and multiplicity, with
`E[nβ K] = λ - (m - 1) / log nβ + …` under `exp(-nβ K)` times a prior (Watanabe 2009).
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Coefficient(NamedTuple):
    """A learning coefficient.

    Attributes:
        llc: `λ`.
        multiplicity: `m`.
    """

    llc: float
    multiplicity: int

    def at(self, n_beta: float) -> float:
        """Return `λ - (m - 1) / log nβ`, the leading terms of `E[nβ K]`."""
        return self.llc - (self.multiplicity - 1) / float(torch.tensor(n_beta, dtype=torch.float64).log())


def even_powers(powers: Sequence[int]) -> float:
    r"""Return `λ = Σ 1/p_i` of `K = ½ Σ |w_i|^{p_i}`: `E[nβ K]` exactly, at every `nβ`, without a prior.

    Example:
        >>> even_powers([2, 2, 4])
        1.25
    """
    return sum(1 / p for p in powers)


def normal_crossing(powers: Sequence[int]) -> Coefficient:
    r"""Return `λ = min 1/(2 k_i)` of `K ∝ Π w_i^{2 k_i}`, and how many reach it.

    Example:
        >>> normal_crossing([1, 2, 2])
        Coefficient(llc=0.25, multiplicity=2)
    """
    most = max(powers)
    return Coefficient(1 / (2 * most), list(powers).count(most))


def normal_crossing_energy(powers: Sequence[int], n_beta: float, localization: float = 1.0) -> float:
    r"""Return `E[nβ K]` of `K = Π w_i^{2 k_i}` under a Gaussian prior, by quadrature in `log w`.

    $$E[nβ K] = \frac{\int nβ K\,e^{-nβ K - \frac γ2 ‖w‖²} dw}{\int e^{-nβ K - \frac γ2 ‖w‖²} dw}$$

    Args:
        powers: `k`, two of them or one.
        n_beta: `nβ`.
        localization: `γ`.

    Example:
        >>> round(normal_crossing_energy([1, 1], 1000.0), 4)
        0.3903
    """
    top = float(torch.tensor(12 / localization**0.5).log())
    u = torch.linspace(-40.0, top, 1500, dtype=torch.float64)
    axes = torch.meshgrid(*[u] * len(powers), indexing="ij")
    energy = n_beta * sum(2 * k * axis for k, axis in zip(powers, axes, strict=True)).exp()  # type: ignore[union-attr]
    prior = sum(axis - localization / 2 * (2 * axis).exp() for axis in axes)
    weight = (prior - energy).exp()
    return float((weight * energy).sum() / weight.sum())


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> Coefficient:
    r"""Return the coefficient of reduced-rank regression (Aoyagi & Watanabe 2005).

    $$λ = \frac{-(H+r)² - M² - N² + 2(H+r)(M+N) + 2MN}{8}$$

    where no side is short (and 1/8 more, with `m = 2`, where `M+H+N+r` is odd); the other cases are those of one matrix
    smaller than the rest.

    Args:
        inputs: `M`.
        hidden: `H`.
        outputs: `N`.
        rank: `r` of the true product.

    Example:
        >>> reduced_rank(5, 3, 5, 0)
        Coefficient(llc=6.5, multiplicity=2)
    """
    M, H, N, r = inputs, hidden, outputs, rank
    if H + r > M + N:
        return Coefficient(M * N / 2, 1)
    if N + r > M + H:
        return Coefficient((H * M - H * r + N * r) / 2, 1)
    if M + r > N + H:
        return Coefficient((H * N - H * r + M * r) / 2, 1)
    q = -((H + r) ** 2) - M**2 - N**2 + 2 * (H + r) * (M + N) + 2 * M * N
    odd = (M + H + N + r) % 2
    return Coefficient((q + odd) / 8, 1 + odd)


def deep_linear(widths: Sequence[int], rank: int) -> Coefficient:
    r"""Return the coefficient of a deep linear network (Aoyagi 2024).

    With `D` the sorted `n_i - r`, and `k = l + 1` the number of the smallest for which `S = Σ_{i≤k} D_i` has
    `S ≥ l D_k` and `S < l D_{k+1}`:

    $$λ = \frac{r(n_0 + n_L) - r²}{2} + \frac{a(l-a)}{4l} - \frac{l(l-1)}{4}\Bigl(\frac Sl\Bigr)² +
      \frac12 \sum_{i<j≤k} D_i D_j, \qquad a = S - (\lceil S/l \rceil - 1)\,l, \qquad m = a(l-a) + 1$$

    Args:
        widths: of all layers, inputs first.
        rank: `r` of the true product.

    Raises:
        ValueError: if the rank exceeds a width.

    Example:
        >>> deep_linear([10, 10, 10, 10], 0), deep_linear([6, 5, 4, 7], 2)
        (Coefficient(llc=33.5, multiplicity=3), Coefficient(llc=14.0, multiplicity=2))
    """
    if rank > min(widths):
        raise ValueError(f"a product through widths {list(widths)} has rank {min(widths)} at most; got rank={rank}")
    D = sorted(width - rank for width in widths)
    count = len(D)
    for k in range(2, count + 1):
        total, l = sum(D[:k]), k - 1  # noqa: E741
        if total >= l * D[k - 1] and (k == count or total < l * D[k]):
            break
    a = total - (ceil(total / l) - 1) * l
    pairs = sum(D[i] * D[j] for i in range(k) for j in range(i + 1, k))
    regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
    llc = regular + a * (l - a) / (4 * l) - l * (l - 1) / 4 * (total / l) ** 2 + pairs / 2
    return Coefficient(llc, a * (l - a) + 1)


def sgld_variance(precision: Float[Tensor, "*d"], lr: float) -> Float[Tensor, "*d"]:
    r"""Return the stationary variance of SGLD on a quadratic, `1 / (P (1 - εP/4))`, for `εP < 4`.

    Example:
        >>> import torch
        >>> sgld_variance(torch.tensor([1.0, 2.0]), lr=1.0)
        tensor([1.3333, 1.0000])
    """
    return 1 / (precision * (1 - lr * precision / 4))


def sghmc_variance(precision: float, lr: float, friction: float) -> float:
    r"""Return the stationary variance of SGHMC on a quadratic: of `w` in `Σ = A Σ A^T + 2aε 1 1^T`.

    $$A = \begin{pmatrix} 1 - εP & 1 - a \\ -εP & 1 - a \end{pmatrix}$$

    Example:
        >>> round(sghmc_variance(2.0, lr=1e-6, friction=0.1), 4)
        0.5
    """
    p, b = lr * precision, 1 - friction
    A = torch.tensor([[1 - p, b], [-p, b]], dtype=torch.float64)
    kick = torch.full((4, 1), 2 * friction * lr, dtype=torch.float64)
    return float(torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(A, A), kick)[0])


def sgld_llc(
    curvature: Float[Tensor, " d"],
    n_beta: float,
    localization: float,
    lr: float,
    *,
    weight_decay: float = 0.0,
    steps: int | None = None,
    burn_in: int = 0,
    leimkuhler_matthews: bool = False,
) -> float:
    r"""Return the expected LLC estimate on `K = ½ Σ h_i w_i²` around zero, started there, with full batches.

    $$E\hatλ =
      \frac12 \sum_i \frac{nβ h_i}{P_i (1 - εP_i/4)} \Bigl(1 - a_i^{2b}\,\frac{1 - a_i^{2S}}{S(1 - a_i²)}\Bigr),
      \qquad P = nβ h + γ + λ, \quad a = 1 - εP/2$$

    Args:
        curvature: `h`.
        n_beta: `nβ`.
        localization: `γ`.
        lr: `ε`.
        weight_decay: `λ`.
        steps: `S` recorded steps, before each update; `None` is the stationary law.
        burn_in: `b` steps before them.
        leimkuhler_matthews: of the stationary law of that sampler, `½ Σ nβ h_i / P_i`.

    Example:
        >>> import torch
        >>> h = torch.tensor([1, 2, 0.5, 0.1], dtype=torch.float64)
        >>> [round(sgld_llc(h, 10, 1, 0.05, **kept), 6) for kept in ({"steps": 200}, {"steps": 200, "burn_in": 50}, {})]
        [1.848563, 1.879474, 1.879552]
    """
    h = curvature.double()
    P = n_beta * h + localization + weight_decay
    if leimkuhler_matthews:
        return float((n_beta * h / P).sum() / 2)
    each = n_beta * h * sgld_variance(P, lr) / 2
    if steps is not None:
        square = (1 - lr * P / 2).square()
        each = each * (1 - square**burn_in * (1 - square**steps) / (steps * (1 - square)))
    return float(each.sum())


def sgld_llc_deviation(
    curvature: Float[Tensor, " d"], n_beta: float, localization: float, lr: float, steps: int, burn_in: int = 0
) -> float:
    r"""Return the exact standard deviation of one chain's LLC estimate, as `sgld_llc` has its mean.

    Each coordinate is a Gaussian chain, so `Cov(w_s², w_t²) = 2 Cov(w_s, w_t)²`.

    Example:
        >>> import torch
        >>> w_is_noise = sgld_llc_deviation(torch.ones(1), 10.0, 0.0, 0.2, steps=1, burn_in=1)
        >>> round(w_is_noise, 6)  # w² = ε η², so (10/2) · 0.2 · √2
        1.414214
    """
    h = curvature.double()
    P = n_beta * h + localization
    a = 1 - lr * P / 2
    t = torch.arange(burn_in, burn_in + steps, dtype=torch.float64)
    total = 0.0
    for h_i, P_i, a_i in zip(h, P, a, strict=True):
        variance = sgld_variance(P_i, lr) * (1 - a_i ** (2 * t))
        lag = (t[:, None] - t).abs()
        covariance = torch.minimum(variance[:, None], variance) * a_i**lag
        total += float((n_beta * h_i / 2) ** 2 * 2 * covariance.square().mean())
    return total**0.5


def gaussian_covariance(
    gradients: Float[Tensor, "n p"], hessians: Float[Tensor, "n p p"], sigma: Float[Tensor, "p p"]
) -> Float[Tensor, "n n"]:
    r"""Return the covariances of quadratic losses under a Gaussian around their expansion point.

    $$\mathrm{Cov}(\ell_i, \ell_j) = g_i^T Σ g_j + \tfrac12 \mathrm{tr}(A_i Σ A_j Σ)$$

    Example:
        >>> import torch
        >>> gaussian_covariance(torch.ones(1, 1), 2 * torch.ones(1, 1, 1), torch.ones(1, 1))
        tensor([[3.]])
    """
    smoothed = hessians @ sigma
    return gradients @ sigma @ gradients.T + torch.einsum("iab,jba->ij", smoothed, smoothed) / 2


class GaussianSusceptibility(NamedTuple):
    """A susceptibility in closed form.

    Attributes:
        covariance: `Cov_C(φ, L - ℓ_b)`.
        shift: `E_C φ (E_C - E_F)(L - ℓ_b)`.
        total: their sum.
    """

    covariance: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]
    total: Float[Tensor, " n"]


def gaussian_susceptibility(
    gradients: Float[Tensor, "n p"],
    hessians: Float[Tensor, "n p p"],
    sigma: Float[Tensor, "p p"],
    restricted: Float[Tensor, "u u"],
    moving: Bool[Tensor, " p"],
) -> GaussianSusceptibility:
    r"""Return susceptibilities of quadratic losses, with `L` their mean and the anchor its minimum.

    Args:
        gradients: `∇ℓ_b` at the anchor.
        hessians: `∇²ℓ_b`.
        sigma: covariance of the full chain.
        restricted: covariance of the restricted chain, over what moves in it.
        moving: which coordinates those are.
    """
    g, A = gradients.mean(0) - gradients, hessians.mean(0) - hessians
    H = hessians.mean(0)[moving][:, moving]
    inner = A[:, moving][:, :, moving] @ restricted
    covariance = torch.einsum("ab,nba->n", H @ restricted, inner) / 2
    covariance = covariance + g[:, moving] @ restricted @ gradients.mean(0)[moving]
    phi = torch.trace(H @ restricted) / 2
    there = torch.einsum("naa->n", inner) / 2
    shift = phi * (there - torch.einsum("naa->n", A @ sigma) / 2)
    return GaussianSusceptibility(covariance, shift, covariance + shift)
