r"""Likelihoods: what a loss says of the labels a model would give, which curvature needs.

A likelihood sees a model's outputs `z [n, t, v]`. Its Fisher information in `z`, `F_z = E_{y~p(z)} ∇ℓ ∇ℓ^T`, is the
Hessian of its loss in `z`, so that `J^T F_z J` is at once the model's Fisher information and its generalised
Gauss-Newton matrix.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from influence.func.loss.losses import widen

Uniform = Callable[[int], Tensor]
"""`width -> [n, t, width]`, numbers in (0, 1) keyed by example, position and draw."""


class Natural(NamedTuple):
    """What a likelihood sees of a batch: `ℓ_n = Σ_t weight_nt · nll(outputs_nt)`.

    Attributes:
        outputs: the model's outputs.
        weight: the weight of each position, zero where there is no label.
    """

    outputs: Float[Tensor, "n t v"]
    weight: Float[Tensor, "n t"]


class Likelihood(NamedTuple):
    """A model of labels given outputs: four pure functions.

    Attributes:
        name: `categorical` or `gaussian`.
        sample: `(outputs, uniform) -> labels`, drawn from the model.
        gradient: `(outputs, labels) -> [n, t, v]`, the gradient of minus the log-likelihood in the outputs.
        expectation: `outputs -> v roots [n, t, v]`, whose outer products sum to `F_z`.
        curvature: `(outputs, u) -> F_z u`.
    """

    name: str
    sample: Callable[[Tensor, Uniform], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    expectation: Callable[[Tensor], Iterator[Tensor]]
    curvature: Callable[[Tensor, Tensor], Tensor]


def categorical() -> Likelihood:
    r"""Return the likelihood of cross-entropy: `p = softmax(z)`, `F_z = diag(p) - p p^T`.

    Example:
        >>> import torch
        >>> categorical().curvature(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]))
        tensor([[[ 0.2500, -0.2500]]])
    """

    def sample(outputs: Float[Tensor, "n t v"], uniform: Uniform) -> Int[Tensor, "n t"]:
        at = uniform(1)
        labels = [  # one example at a time: the cumulative sums are as large as the outputs
            torch.searchsorted(widen(z).softmax(-1).cumsum(-1), u.to(widen(z).dtype))
            for z, u in zip(outputs, at, strict=True)
        ]
        return torch.stack(labels)[..., 0].clamp_max(outputs.shape[-1] - 1)

    def gradient(outputs: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        p = widen(outputs).softmax(-1)
        return p.scatter_add(-1, labels[..., None], torch.full_like(p[..., :1], -1.0))

    def expectation(outputs: Float[Tensor, "n t v"]) -> Iterator[Float[Tensor, "n t v"]]:
        p = widen(outputs).softmax(-1)
        for c in range(p.shape[-1]):
            root = -p * p[..., c : c + 1].sqrt()
            root[..., c] += p[..., c].sqrt()
            yield root

    def curvature(outputs: Float[Tensor, "n t v"], u: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
        p = widen(outputs).softmax(-1)
        return p * (u - (p * u).sum(-1, keepdim=True))

    return Likelihood("categorical", sample, gradient, expectation, curvature)


def gaussian() -> Likelihood:
    """Return the likelihood of the squared error `‖z - y‖² / 2`: unit variance, `F_z` the identity.

    Example:
        >>> import torch
        >>> gaussian().curvature(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]))
        tensor([[[1., 0.]]])
    """

    def sample(outputs: Float[Tensor, "n t v"], uniform: Uniform) -> Float[Tensor, "n t v"]:
        return widen(outputs) + torch.special.ndtri(uniform(outputs.shape[-1])).to(widen(outputs))

    def gradient(outputs: Float[Tensor, "n t v"], labels: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
        return widen(outputs) - labels

    def expectation(outputs: Float[Tensor, "n t v"]) -> Iterator[Float[Tensor, "n t v"]]:
        for c in range(outputs.shape[-1]):
            root = torch.zeros_like(widen(outputs))
            root[..., c] = 1
            yield root

    def curvature(outputs: Float[Tensor, "n t v"], u: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
        return u

    return Likelihood("gaussian", sample, gradient, expectation, curvature)


def keyed_uniform(key: int, index: Int[Tensor, " n"], place: Int[Tensor, "n t"], width: int) -> Float[Tensor, "n t w"]:
    """Return numbers in (0, 1) that depend on the key, the example's row and the place alone.

    A counter-based generator (SplitMix64's finaliser, Steele et al. 2014): the same on every device, in any batch.

    Args:
        key: 63 bits.
        index: rows of the dataset.
        place: places within an example.
        width: numbers per place.

    Returns:
        The numbers, in float64.
    """
    lanes = torch.arange(width, device=place.device)
    x = _mix(_mix(torch.full_like(index, key), index)[:, None], place)
    x = _mix(x[..., None], lanes)
    return ((_shift(x, 11)).double() + 0.5) * 2.0**-53


def _mix(state: Shaped[Tensor, "..."], counter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    x = state + (counter + 1) * -0x61C8864680B583EB  # the golden ratio, as every constant here in two's complement
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Shaped[Tensor, "..."], by: int) -> Shaped[Tensor, "..."]:
    """Shift right, filling with zeros: torch's own shift of a signed integer repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
