r"""Convolutions over a batch: `conv1d`, `conv2d`, `conv3d`, seen as linear maps of patches.

$$G_n = \sum_s g_{ns} x_{ns}^\top$$

with the patch `x` that output position `s` reads. In a grouped convolution a group's outputs see their own patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from influence.func.engine.batched import (
    Backward,
    Contributions,
    Factor,
    Family,
    Feed,
    Route,
    Saved,
    Scene,
    Use,
    add_pieces,
    outer_products,
    right_side,
    vector_pieces,
)
from influence.func.engine.ops.linear import Dense, late
from influence.func.engine.trace import Axis, Call, Probe, TracedUse, base_name
from influence.func.loss.losses import widen
from influence.func.transform.folding import Side

SETTINGS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
"""What decides which patches are read, and what torch takes where it is not given."""


def arguments(call: Call) -> dict[str, Any]:
    """Return the arguments by name."""
    return call.arguments(("input", "weight", "bias", *SETTINGS), SETTINGS)


def serves(use: TracedUse) -> bool:
    """Whether the kernel is a parameter, and examples are the first axis."""
    named = arguments(use.call)
    x, weight, bias = named["input"], named["weight"], named["bias"]
    if base_name(weight) is None or (isinstance(bias, Probe) and base_name(bias) is None):
        return False
    return use.axis(x) == Axis(0) and x.ndim == weight.value.ndim


def layout(use: TracedUse) -> dict[str, dict[str, Any]]:
    """Return what a use tells of its kernel."""
    named = arguments(use.call)
    name = base_name(named["weight"])
    assert name is not None
    return {name: {"family": "conv", "groups": named["groups"], "bias": base_name(named["bias"])}}


def see(call: Call, route: Route, scene: Scene) -> Use:
    """Return one use: patches came in, on the right side."""
    named = arguments(call)
    name, bias, groups = base_name(named["weight"]), base_name(named["bias"]), int(named["groups"])
    assert name is not None
    if scene.keep is not None:
        raise ValueError(f"{name}: a convolution has no token positions; leave it out with exclude=[...]")
    if scene.mask is not None:
        raise ValueError(
            f"{name} is a convolution over padded examples: its patches mix tokens and padding. Fit on batches "
            "without padding, or leave it out (exclude=…)"
        )
    kernel = scene.values[name]
    x = named["input"].detach().to(kernel.dtype)
    patches = Patches(x, tuple(kernel.shape[1:]), {key: named[key] for key in SETTINGS})
    factor = late if groups == 1 else partial(_late_groups, name, groups)
    return Use(name, bias, patches, False, lambda g: g.flatten(2).mT, factor)


def rows(call: Call, route: Route, scene: Scene) -> tuple[Saved, Backward]:
    """Serve the rows of a use; the left side of a grouped one comes after the product, since it may mix groups."""
    use = see(call, route, scene)
    assert isinstance(use.known, Patches)
    groups = int(use.known.settings["groups"])
    if groups == 1:
        return outer_products(use, scene)
    feeds, bias, arrange = scene.feeds.get(use.weight, []), use.bias, use.arrange
    known, forgotten = use.known, use.known.forget()

    def backward(saved: Sequence[Tensor], gs: Sequence[Tensor]) -> Contributions:
        g = arrange(gs[0])
        by_group = rearrange(g, "n s (g e) -> n g e s", g=groups)
        found: Contributions = {}
        for feed, memory in zip(feeds, saved, strict=True):
            right = right_side(feed)
            patches = memory if right.dense else right.apply(forgotten._replace(x=memory).unfold())
            whole = rearrange(by_group @ rearrange(patches, "n (g s) q -> n g s q", g=groups), "n g e q -> n (g e) q")
            found[feed.slot] = feed.part.left.apply(whole.mT).mT
        return add_pieces(found, vector_pieces(bias, g.sum(-2), scene) if bias else {})

    return [known.through(right_side(feed)) if right_side(feed).dense else known.memory for feed in feeds], backward


FAMILY = Family("conv", ("conv1d", "conv2d", "conv3d"), serves, see, rows, layout, channel=1)


class Patches(NamedTuple):
    """The patches a convolution reads, `[n, groups · positions, channels · kernel]`: a side is a convolution.

    Attributes:
        x: the input; its patches are unfolded when they are needed.
        kernel: channels of a group, and the kernel's own shape.
        settings: stride, padding, dilation, groups.
    """

    x: Float[Tensor, "n c *space"]
    kernel: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def memory(self) -> Tensor:
        """The input."""
        return self.x

    def forget(self) -> "Patches":
        """Return a factor that keeps nothing alive."""
        return self._replace(x=torch.empty(0, 0))

    def through(self, side: Side) -> Tensor:
        """Return the patches behind a side: a convolution with the side's rows as kernels."""
        assert side.matrix is not None
        if side.stop - side.start != side.source:
            return side.apply(self.unfold())
        groups, q = self.settings["groups"], side.matrix.shape[0]
        kernels = side.matrix.reshape(q, *self.kernel).repeat(groups, *(1 for _ in self.kernel))
        convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(self.kernel) - 1]
        out = convolve(self.x, kernels, None, **self.settings)
        return rearrange(out, "n (g q) ... -> n (g ...) q", g=groups)

    def meet(self, side: Side, memory: Tensor, other: Tensor, constant: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        patches = self._replace(x=memory).unfold()
        return Dense(patches).meet(side, patches, other, constant)

    def factor(self, side: Side, bias: Feed | None, max_side: int) -> Factor:
        """Return the patches themselves behind a side."""
        return Dense(self.unfold()).factor(side, bias, max_side)

    def unfold(self) -> Float[Tensor, "n gs ck"]:
        """Return the patches themselves."""
        rank, kernel = len(self.kernel) - 1, self.kernel[1:]
        stride, dilation = (_expand(self.settings[key], rank) for key in ("stride", "dilation"))
        pad = self.settings["padding"]
        if pad == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            widths = [(t // 2, t - t // 2) for t in totals]
        else:
            widths = [(p, p) for p in _expand(0 if pad == "valid" else pad, rank)]
        x = F.pad(self.x, [w for pair in reversed(widths) for w in pair])
        for i in range(rank):
            span = dilation[i] * (kernel[i] - 1) + 1
            x = x.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
        space, inside = " ".join("xyz"[:rank]), " ".join("ijk"[:rank])
        return rearrange(x, f"n (g c) {space} {inside} -> n (g {space}) (c {inside})", g=self.settings["groups"])


def _expand(value: int | tuple[int, ...] | list[int], rank: int) -> tuple[int, ...]:
    """Return a per-dimension setting as a tuple."""
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) if len(value) == rank else (value[0],) * rank


def _late_groups(name: str, groups: int, g: Float[Tensor, "n s o"], side: Side, max_side: int) -> Factor:
    """Return the factor of a grouped convolution's output gradients behind a side that does not mix groups."""
    if not side.trivial and side.dense:
        raise ValueError(
            f"{name} is a grouped convolution, whose groups see inputs of their own: after a matrix on its "
            "output side it has no Kronecker factors. Fit before the projection, or leave it out (exclude=…)"
        )
    return Groups(rearrange(side.apply(g), "n s (g e) -> n g s e", g=groups), side.size > max_side)


class Groups(NamedTuple):
    """Output gradients of a grouped convolution: their second moment is block-diagonal.

    Attributes:
        x: the gradients, group by group.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n g s e"]
    diagonal: bool = False

    @property
    def positions(self) -> int:
        """How many positions count, in each group for itself."""
        return self.x.shape[0] * self.x.shape[1] * self.x.shape[2]

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, group by group."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None, None]
        if self.diagonal:
            return reduce(weighted * x, "n g s e -> (g e)", "sum")
        a, b = (rearrange(y, "n g s e -> g (n s) e") for y in (weighted, x))
        return torch.block_diag(*(a.mT @ b))

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return widen(self.x).square().sum((1, 2, 3))
