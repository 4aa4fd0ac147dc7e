r"""Covariates: one factor of a per-example gradient `G_n = Σ_s l_{ns} r_{ns}^T`, and its second moment.

What curvature needs of a factor `x [n, s, d]` is its Gram matrix over positions, weighted by example, and each
example's energy. A factor of one-hot tokens or of a convolution's groups has both without being formed.
"""

from itertools import pairwise
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
        return symmetric_product(weighted.flatten(0, 1), x.flatten(0, 1))

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2))


PANELS = 4
"""Panels of columns in which a symmetric product is formed: `(PANELS + 1) / (2 PANELS)` of the whole one's work."""

WIDE = 768
"""Entries from which on the panels save more than they cost."""


def symmetric_product(a: Float[Tensor, "m d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """Return `a^T b`, which is known to be symmetric, by its lower triangle of panels: torch has no such product.

    Example:
        >>> import torch
        >>> symmetric_product(torch.ones(3, 2), torch.ones(3, 2))
        tensor([[3., 3.],
                [3., 3.]])
    """
    d = a.shape[1]
    if d < WIDE:
        return a.mT @ b
    out = a.new_empty(d, d)
    edges = [d * k // PANELS for k in range(PANELS + 1)]
    for begin, end in pairwise(edges):
        panel = a[:, begin:].mT @ b[:, begin:end]
        out[begin:, begin:end] = panel
        out[begin:end, end:] = panel[end - begin :].mT
    return out


class Affine(NamedTuple):
    """Vectors `[n, s, d]` with a one behind each, which is never written there.

    Attributes:
        x: the vectors; zero where a position is padding.
        real: which positions count; `None` for all.
    """

    x: Float[Tensor, "n s d"]
    real: Bool[Tensor, "n s"] | None

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, `[d + 1, d + 1]`."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None]
        count = self._counts(x) if weight is None else self._counts(x) * weight
        corner = symmetric_product(weighted.flatten(0, 1), x.flatten(0, 1))
        edge = weighted.sum((0, 1))
        return torch.cat([torch.cat([corner, edge[:, None]], 1), torch.cat([edge, count.sum()[None]])[None]])

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares, the ones included."""
        x = widen(self.x)
        return x.square().sum((1, 2)) + self._counts(x)

    def _counts(self, like: Tensor) -> Float[Tensor, " n"]:
        n, s = self.x.shape[:2]
        return like.new_full((n,), s) if self.real is None else self.real.sum(1).to(like)


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
