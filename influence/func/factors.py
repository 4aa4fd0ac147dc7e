r"""Factors: a per-example gradient as a sum over positions of outer products, before anything is summed.

For a parameter stored as a matrix, `G_n = Σ_s a_{ns} b_{ns}^T`: output gradient and input for a linear map, one-hot
token and output gradient for an embedding, output gradient and unfolded patch for a convolution. Both factors go
through the sides of a block before they meet, so the gradient itself is never formed.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from influence.func.axes import Axis
from influence.func.sides import Side


@runtime_checkable
class Factor(Protocol):
    """One factor of an outer product, `[n, s, d]` or, with positions kept, `[n, s, r, d]`."""

    @property
    def memory(self) -> Tensor:
        """What to remember of a factor that no side makes smaller."""
        ...

    def through(self, side: Side) -> Tensor:
        """Return the factor after a matrix side, `[n, s, p]`."""
        ...

    def forget(self) -> "Factor":
        """Return the factor without its memory."""
        ...

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return `Σ_s (side factor_s + column) ⊗ other_s`, from what was remembered."""
        ...


def positions(x: Shaped[Tensor, "..."], axis: Axis, n: int, keep: int | None) -> Shaped[Tensor, "..."]:
    """Arrange a tensor whose last axis holds features as `[n, s, d]`, or `[n, keep, r, d]` where positions are kept.

    Args:
        x: the tensor.
        axis: its example axis.
        n: number of examples.
        keep: the number of positions, if they must stay apart.

    Returns:
        The rearranged tensor.
    """
    parts = axis.split(x, n)
    if keep is None:
        return parts.flatten(1, -2)
    moved = parts.movedim(position_dim(parts[..., 0], keep, axis), 1)
    return moved.reshape(n, keep, -1, moved.shape[-1])


def position_dim(parts: Shaped[Tensor, "n ..."], keep: int, axis: Axis) -> int:
    """Return the axis of token positions of a split tensor.

    Raises:
        ValueError: if there is none, or more than one that it could be.
    """
    dims = [dim for dim in range(1, parts.ndim) if parts.shape[dim] == keep]
    if axis.position is not None:
        dims = [axis.position + 1] if axis.position + 1 in dims else []
    elif keep == 1:
        dims = dims[:1]
    if len(dims) != 1:
        found = "no axis" if not dims else f"{len(dims)} axes that could be the one"
        raise ValueError(f"{found} of {keep} token positions in a use of shape {list(parts.shape[1:])} per example")
    return dims[0]


class Plain(NamedTuple):
    """A factor at hand."""

    x: Tensor

    @property
    def memory(self) -> Tensor:
        """The factor."""
        return self.x

    def through(self, side: Side) -> Tensor:
        """Return the factor after a side."""
        return side.apply(self.x)

    def forget(self) -> "Plain":
        """Return a factor that keeps nothing alive."""
        return Plain(torch.empty(0))

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        seen = side.apply(memory)
        return outer(seen if column is None else seen + column, other)


class OneHot(NamedTuple):
    """One-hot tokens, never formed: a side is looked up."""

    ids: Int[Tensor, "..."]
    size: int

    @property
    def memory(self) -> Tensor:
        """The tokens."""
        return self.ids

    def through(self, side: Side) -> Tensor:
        """Return the columns of a side's matrix at the tokens."""
        assert side.matrix is not None
        whole = F.pad(side.matrix, (side.start, side.source - side.stop))
        return F.embedding(self.ids, whole.mT)

    def forget(self) -> "OneHot":
        """Return the factor: tokens are small."""
        return self

    def meet(
        self, side: Side, memory: Tensor, other: Float[Tensor, "n ... q"], column: Tensor | None = None
    ) -> Float[Tensor, "n ... q"]:
        """Return `Σ_s (side onehot_s) ⊗ other_s`, `[n, size, q]`, by scattering; an embedding has no bias."""
        assert column is None
        out = other.new_zeros(*other.shape[:-2], self.size, other.shape[-1])
        return side.apply(out.scatter_add(-2, memory[..., None].expand_as(other), other).mT).mT


class Patches(NamedTuple):
    """The patches a convolution reads, `[n, groups · positions, channels · kernel]`: a side is a convolution."""

    x: Float[Tensor, "n c *space"]
    kernel: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def memory(self) -> Tensor:
        """The input, not its patches: they are unfolded when they are needed."""
        return self.x

    def forget(self) -> "Patches":
        """Return a factor that keeps nothing alive."""
        return self._replace(x=torch.empty(0, 0))

    def meet(self, side: Side, memory: Tensor, other: Tensor, column: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        patches = self._replace(x=memory).unfold()
        return Plain(patches).meet(side, patches, other, column)

    def through(self, side: Side) -> Tensor:
        """Return the patches after a side: a convolution with the side's rows as kernels."""
        assert side.matrix is not None
        if side.stop - side.start != side.source:
            return side.apply(self.unfold())
        groups, q = self.settings["groups"], side.matrix.shape[0]
        weight = side.matrix.reshape(q, *self.kernel).repeat(groups, *(1 for _ in self.kernel))
        out = convolve(self.x, weight, self.settings)
        return out.reshape(out.shape[0], groups, q, -1).transpose(2, 3).flatten(1, 2)

    def unfold(self) -> Float[Tensor, "n gs ck"]:
        """Return the patches themselves."""
        rank, kernel = len(self.kernel) - 1, self.kernel[1:]
        stride, dilation = (expand(self.settings[key], rank) for key in ("stride", "dilation"))
        x = self.x
        pad = self.settings["padding"]
        if pad == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            widths = [(t // 2, t - t // 2) for t in totals]
        else:
            widths = [(p, p) for p in expand(0 if pad == "valid" else pad, rank)]
        x = F.pad(x, [w for pair in reversed(widths) for w in pair])
        for i in range(rank):
            span = dilation[i] * (kernel[i] - 1) + 1
            x = x.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
        n, groups = x.shape[0], self.settings["groups"]
        space = x.shape[2 : 2 + rank]
        x = x.reshape(n, groups, self.kernel[0], *space, *kernel)
        x = x.movedim(2, 2 + rank)
        return x.reshape(n, groups * space.numel(), -1)


def convolve(x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """Run the convolution of the weight's rank."""
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[weight.ndim - 2]
    return conv(x, weight, None, **settings)


def expand(value: int | tuple[int, ...] | list[int], rank: int) -> tuple[int, ...]:
    """Return a per-dimension setting as a tuple."""
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) if len(value) == rank else (value[0],) * rank


def outer(left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sum outer products over positions: `[n, s, p] × [n, s, q] -> [n, p, q]`, kept positions stay in front."""
    return left.mT @ right
