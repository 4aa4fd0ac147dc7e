r"""Linear maps: `linear(x, W, b)`, `addmm(b, x, W)`, `x @ W`; and vectors, the factors of their gradients.

$$G_n = \sum_s g_{ns} x_{ns}^\top$$

with inputs `x` and output gradients `g`; the transpose where the weight is stored `[i, o]`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from influence.func.engine.batched import (
    Factor,
    Family,
    Feed,
    Route,
    Scene,
    Use,
    column,
    outer,
    right_side,
)
from influence.func.engine.trace import (
    NO_POSITION,
    Axis,
    Call,
    Expr,
    Probe,
    TracedUse,
    base_name,
    op_name,
    positions,
)
from influence.func.loss.losses import widen
from influence.func.transform.folding import Side


def arguments(call: Call) -> tuple[Any, Any, Any, bool]:
    """Return `(x, weight, bias, whether the weight is [i, o])`."""
    op = op_name(call.func)
    if op == "linear":
        named = call.arguments(("input", "weight", "bias"))
        return named["input"], named["weight"], named["bias"], False
    if op == "addmm":
        named = call.arguments(("input", "mat1", "mat2"))
        return named["mat1"], named["mat2"], named["input"], True
    named = call.arguments(("input", "other"))
    return named["input"], named["other"], None, True


def matrix_source(leaf: Any) -> tuple[str, bool] | None:
    """Return `(parameter, flipped)` if a leaf is a 2-D parameter or its transpose."""
    if not isinstance(leaf, Probe) or leaf.value.ndim != 2:
        return None
    source, flipped = leaf.source, False
    while isinstance(source, Expr):
        inner = source.leaves[0]
        if op_name(source.func) not in ("t", "__get__.T", "__get__.mT", "transpose") or not isinstance(inner, Probe):
            return None
        if inner.value.ndim != 2:
            return None
        source, flipped = inner.source, not flipped
    return source, flipped


def serves(use: TracedUse) -> bool:
    """Whether features are the last axis, the weight is a parameter or its transpose, and nothing is scaled."""
    x, weight, bias, _ = arguments(use.call)
    if isinstance(x, Probe) or matrix_source(weight) is None:
        return False
    if isinstance(bias, Probe) and base_name(bias) is None:
        return False
    if op_name(use.call.func) == "addmm" and len(use.call.leaves) != 3:
        return False
    axis = use.axis(x)
    return axis is not None and axis.dim < x.ndim - 1


def layout(use: TracedUse) -> dict[str, dict[str, Any]]:
    """Return what a use tells of its weight."""
    _, weight, bias, stored_in_out = arguments(use.call)
    source = matrix_source(weight)
    assert source is not None
    return {source[0]: {"family": "linear", "transposed": stored_in_out != source[1], "bias": base_name(bias)}}


def see(call: Call, route: Route, scene: Scene) -> Use:
    """Return one use: inputs came in, on the right side unless the block is the transpose of what multiplies."""
    x, weight, bias, stored_in_out = arguments(call)
    source = matrix_source(weight)
    assert source is not None
    name, flipped = source
    axis, out_axis = route.inputs[call.place(x)], route.outputs[0]
    assert axis is not None
    assert out_axis is not None
    n, keep = scene.n, scene.keep
    real = tokens(x, axis, scene, name)
    inputs = positions(x.detach().to(scene.values[name].dtype), axis, n, keep)

    def arrange(g: Tensor) -> Tensor:
        arranged = positions(g, out_axis, n, keep)
        return arranged if real is None else arranged * real[..., None]

    known_is_left = (stored_in_out != flipped) != scene.params[name].transposed
    return Use(name, base_name(bias), Dense(inputs, real), known_is_left, arrange, late, x)


FAMILY = Family("linear", ("linear", "addmm", "matmul", "__matmul__", "mm"), serves, see, layout=layout)


def tokens(x: Shaped[Tensor, "..."], axis: Axis, scene: Scene, what: str) -> Bool[Tensor, "n s"] | None:
    """Return which positions of a tensor, arranged as `positions` does, are tokens; `None` where all are.

    Raises:
        ValueError: if padding cannot be told from tokens.
    """
    mask, n = scene.mask, scene.n
    if mask is None or axis.position == NO_POSITION:
        return None
    parts = axis.split(x, n)
    if parts[..., 0].numel() == n:
        return None
    at = None if axis.position is None else axis.position + 1
    if at is None or at >= parts.ndim - 1 or parts.shape[at] != mask.shape[1]:
        raise ValueError(
            f"{what} reads padded examples, and where its positions are cannot be told, so padding would count as "
            "data. Fit on batches without padding, or leave its parameters out (exclude=…)"
        )
    shape = [n, *(parts.shape[dim] if dim == at else 1 for dim in range(1, parts.ndim - 1))]
    return mask.reshape(shape).expand(parts.shape[:-1]).flatten(1)


class Dense(NamedTuple):
    """A factor at hand: vectors `[n, s, d]` or, with positions kept, `[n, s, r, d]`.

    Attributes:
        x: the vectors; behind a side they are zero where a position is padding.
        real: which positions are tokens; `None` for all.
        diagonal: whether only the diagonal of the second moment is kept.
    """

    x: Float[Tensor, "n s *r d"]
    real: Bool[Tensor, "n s"] | None = None
    diagonal: bool = False

    @property
    def memory(self) -> Tensor:
        """The vectors."""
        return self.x

    def forget(self) -> "Dense":
        """Return a factor that keeps nothing alive."""
        return Dense(torch.empty(0, 0, 0))

    def through(self, side: Side) -> Tensor:
        """Return the vectors behind a side."""
        return side.apply(self.x)

    def meet(self, side: Side, memory: Tensor, other: Tensor, constant: Tensor | None = None) -> Tensor:
        """Return the sum of outer products."""
        x = side.apply(memory)
        return outer(x if constant is None else x + constant, other)

    def factor(self, side: Side, bias: Feed | None, max_side: int) -> Factor:
        """Return the factor behind a side; where a bias only puts a one behind each vector, that is never written."""
        real = self.real
        if bias is not None and _puts_one_behind(side, right_side(bias)) and side.size <= max_side:
            x = self.x[..., side.start : side.stop]
            return Affine(x if real is None else x * real[..., None], real)
        x = side.apply(self.x)
        x = x if bias is None else x + column(bias, x)
        return Dense(x if real is None else x * real[..., None], real, x.shape[-1] > max_side)

    @property
    def positions(self) -> int:
        """How many positions count."""
        return self.x.shape[0] * self.x.shape[1] if self.real is None else int(self.real.sum())

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


def late(g: Float[Tensor, "n s o"], side: Side, max_side: int) -> Factor:
    """Return the factor of arranged output gradients behind a side."""
    return Dense(side.apply(g), None, side.size > max_side)


def _puts_one_behind(side: Side, beside: Side) -> bool:
    """Whether a bias's side only puts a one behind what a weight's side only selects."""
    return side.selects and beside.selects and (side.before, side.after) == (0, 1) and beside.after == 0


class Affine(NamedTuple):
    """Vectors `[n, s, d]` with a one behind each, which is never written there.

    Attributes:
        x: the vectors; zero where a position is padding.
        real: which positions count; `None` for all.
    """

    x: Float[Tensor, "n s d"]
    real: Bool[Tensor, "n s"] | None

    @property
    def positions(self) -> int:
        """How many positions count."""
        return Dense(self.x, self.real).positions

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted sum of outer products, `[d + 1, d + 1]`."""
        x = widen(self.x)
        weighted = x if weight is None else x * weight[:, None, None]
        ones = self._ones(x) if weight is None else self._ones(x) * weight
        corner = symmetric_product(weighted.flatten(0, 1), x.flatten(0, 1))
        edge = weighted.sum((0, 1))
        return torch.cat([torch.cat([corner, edge[:, None]], 1), torch.cat([edge, ones.sum()[None]])[None]])

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares, the ones included."""
        x = widen(self.x)
        return x.square().sum((1, 2)) + self._ones(x)

    def _ones(self, like: Tensor) -> Float[Tensor, " n"]:
        n, s = self.x.shape[:2]
        return like.new_full((n,), s) if self.real is None else self.real.sum(1).to(like)


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
