"""Where the example axis of a tensor is: found by comparing two runs of different batch size, never assumed."""

from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor


class AnotherPath(ValueError):
    """A batch takes the model along another path than the one that was planned; the message says where."""


class Axis(NamedTuple):
    """The axis of a tensor along which examples lie.

    Attributes:
        dim: the dimension.
        flat: whether it holds `n · k` entries, examples merged with something else (positions, heads).
        inner: whether in such a merged axis the example is the fast index, `(k n)`; otherwise `(n k)`.
        position: the dimension of token positions, where they were looked for; `NO_POSITION` if it has none.
    """

    dim: int
    flat: bool = False
    inner: bool = False
    position: int | None = None

    def split(self, x: Shaped[Tensor, "..."], n: int) -> Shaped[Tensor, "n ..."]:
        """Return `x` with the example axis in front and its own place kept, of size 1 or `k`: `n` batches of one."""
        size = x.shape[self.dim]
        if size % n or (size != n and not self.flat):
            raise AnotherPath(
                f"an axis of {size} entries does not hold {n} examples as it did when the plan was made: the model "
                "takes another path on this batch"
            )
        if not self.flat:
            return x.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        k = x.shape[self.dim] // n
        if self.inner:
            return x.unflatten(self.dim, (k, n)).movedim(self.dim + 1, 0)
        return x.unflatten(self.dim, (n, k)).movedim(self.dim, 0)


NO_POSITION = -1


def find_position(whole: tuple[int, ...], shorter: tuple[int, ...], s: int) -> int | None:
    """Return the dimension of token positions of a tensor seen with `s` positions and with one less.

    `NO_POSITION` if nothing changed; `None` if the shapes do not tell.
    """
    if whole == shorter:
        return NO_POSITION
    changed = [dim for dim, (a, b) in enumerate(zip(whole, shorter, strict=False)) if a != b]
    if len(whole) != len(shorter) or len(changed) != 1:
        return None
    a, b = whole[changed[0]], shorter[changed[0]]
    return changed[0] if a % s == 0 and b == a // s * (s - 1) else None


class Signature(NamedTuple):
    """What is remembered of a tensor: its shape, and along each long axis a weighted sum over the others.

    The weights are no constant: rows of a normalised tensor all have the same plain sum.
    """

    shape: tuple[int, ...]
    sums: dict[int, Tensor]


def signature(x: Tensor, n: int) -> Signature:
    """Return the signature of a tensor seen at batch size `n`."""
    shape = tuple(x.shape)
    merged = [dim for dim, size in enumerate(shape) if size > n and size % n == 0]
    if not merged or x.numel() == 0:
        return Signature(shape, {})
    wide = x.detach().to(torch.float64)
    sums = {}
    for dim in merged:
        rows = wide.movedim(dim, 0).reshape(shape[dim], -1)
        sums[dim] = rows @ torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=x.device).mul(1.7).cos()
    return Signature(shape, sums)


class MixedAxes(ValueError):
    """A tensor which has no single example axis."""


class AlikeExamples(MixedAxes):
    """A merged axis whose order cannot be told from these examples."""


def find_axis(two: Signature, three: Signature) -> Axis | None:
    """Return the example axis of a tensor seen at batch sizes 2 and 3; `None` if it knows no examples.

    Raises:
        MixedAxes: if the shapes do not tell a single axis.
    """
    if two.shape == three.shape:
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if len(two.shape) != len(three.shape) or len(changed) != 1:
        raise MixedAxes(f"shapes {list(two.shape)} at two examples and {list(three.shape)} at three")
    dim = changed[0]
    a, b = two.shape[dim], three.shape[dim]
    if a % 2 or b % 3 or a // 2 != b // 3:
        raise MixedAxes(f"shapes {list(two.shape)} at two examples and {list(three.shape)} at three")
    if a == 2:
        return Axis(dim)
    k, small, large = a // 2, two.sums[dim], three.sums[dim]
    outer = (large[:a] - small).abs().sum()
    inner = (large.view(k, 3)[:, :2] - small.view(k, 2)).abs().sum()
    scale = large.abs().sum()
    if max(inner, outer) <= 1e-6 * scale or not scale > 0:
        raise AlikeExamples("the examples of the first batch are alike, so their order in a merged axis does not show")
    if min(inner, outer) > 1e-2 * scale:
        raise MixedAxes(f"the {b} entries of a merged axis are in no order of examples")
    return Axis(dim, flat=True, inner=bool(inner < outer))


def known_axis(axis: Axis | None) -> Axis:
    """Return an axis that the plan has established."""
    assert axis is not None
    return axis
