r"""Covariates: one factor of a per-example gradient `G_n = Σ_s l_{ns} r_{ns}^T`, and its second moment.

What curvature needs of a factor `x [n, s, d]` is its Gram matrix over positions, weighted by example, and each
example's energy. A factor of one-hot tokens or of a convolution's groups has both without being formed.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from influence.func.losses import widen


def add_grams(a: Shaped[Tensor, "*d"], b: Shaped[Tensor, "*e"]) -> Shaped[Tensor, "*f"]:
    """Add two second moments, either of which may be a diagonal kept as a vector.

    Example:
        >>> import torch
        >>> add_grams(torch.ones(2, 2), torch.tensor([1.0, 2.0]))
        tensor([[2., 1.],
                [1., 3.]])
    """
    if a.ndim == b.ndim:
        return a + b
    whole, diagonal = (a, b) if a.ndim > b.ndim else (b, a)
    return whole + diagonal.diag()


@runtime_checkable
class Covariate(Protocol):
    """One factor at every position of every example."""

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return `Σ_n w_n Σ_s x_{ns} x_{ns}^T`, or its diagonal where only that is kept."""
        ...

    def energy(self) -> Float[Tensor, " n"]:
        """Return `Σ_s ‖x_{ns}‖²`."""
        ...


class Dense(NamedTuple):
    """Vectors `[n, s, d]`; zero where a position is padding.

    Attributes:
        x: the vectors.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n s d"]
    diagonal: bool = False

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None]
        if self.diagonal:
            return (weighted * x).sum((0, 1))
        return weighted.flatten(0, 1).mT @ x.flatten(0, 1)

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2))


class Tokens(NamedTuple):
    """One-hot tokens `[n, s]`, scaled entry by entry: their second moment is exactly diagonal.

    Attributes:
        ids: the tokens.
        scale: what each token's entry is.
        real: which positions count.
    """

    ids: Int[Tensor, "n s"]
    scale: Float[Tensor, " d"]
    real: Bool[Tensor, "n s"]

    def _squares(self) -> Float[Tensor, "n s"]:
        return widen(self.scale).square()[self.ids] * self.real

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted counts of tokens."""
        squares = self._squares() if weight is None else self._squares() * weight[:, None]
        return torch.zeros_like(widen(self.scale)).index_add(0, self.ids.flatten(), squares.flatten())

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return self._squares().sum(1)


class Grouped(NamedTuple):
    """Output gradients of a grouped convolution, `[n, groups, s, d / groups]`: a group's rows see their own patches.

    Their second moment is block-diagonal.

    Attributes:
        x: the gradients.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n g s e"]
    diagonal: bool = False

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, group by group."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None, None]
        if self.diagonal:
            return (weighted * x).sum((0, 2)).flatten()
        a, b = (y.movedim(1, 0).flatten(1, 2) for y in (weighted, x))
        return torch.block_diag(*(a.mT @ b))

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2, 3))
