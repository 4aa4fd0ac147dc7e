"""The layout of a model's parameters: what each of them is, and which way round it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """The map `x[start:stop] -> matrix @ x`, padded with zeros, of one axis of a parameter's gradient.

    `matrix` is `None` (identity), a vector (a diagonal) or a matrix `[p, stop - start]`. The padding places an
    identity or diagonal side inside a larger axis (a bias is the last column of its block); a matrix has none.

    Attributes:
        source: length of the axis that comes in.
        start: first entry that is read.
        stop: one past the last entry that is read.
        matrix: what is applied to the entries read.
        before: zeros in front of the result.
        after: zeros behind the result.
    """

    source: int
    start: int
    stop: int
    matrix: Tensor | None = None
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """Length of the axis that comes out."""
        if self.matrix is not None and self.matrix.ndim == 2:
            return self.matrix.shape[0]
        return self.before + self.stop - self.start + self.after

    @property
    def dense(self) -> bool:
        """Whether the side is a matrix product."""
        return self.matrix is not None and self.matrix.ndim == 2

    @property
    def selects(self) -> bool:
        """Whether the side only selects and places entries, unscaled."""
        return self.matrix is None

    @property
    def trivial(self) -> bool:
        """Whether the side is the identity."""
        return self.matrix is None and self.stop - self.start == self.source and not (self.before or self.after)

    def apply(self, x: Tensor) -> Tensor:
        """Apply the side to the last axis of `x [..., source]`."""
        if x.shape[-1] != self.stop - self.start:
            x = x[..., self.start : self.stop]
        if self.matrix is not None:
            x = multiply(x, self.matrix.mT) if self.dense else x * self.matrix
        return torch.nn.functional.pad(x, (self.before, self.after)) if self.before or self.after else x

    def then_matrix(self, matrix: Float[Tensor, "p b"]) -> "Side":
        """Return this side followed by a matrix."""
        inner = matrix[:, self.before : matrix.shape[1] - self.after]
        if self.matrix is not None:
            inner = inner.to(self.matrix) @ self.matrix if self.dense else inner.to(self.matrix) * self.matrix
        return Side(self.source, self.start, self.stop, inner)

    def then_diagonal(self, diagonal: Float[Tensor, " b"]) -> "Side":
        """Return this side followed by an elementwise scale."""
        inner = diagonal[self.before : diagonal.shape[0] - self.after]
        if self.dense:
            assert self.matrix is not None
            return replace(self, matrix=diagonal.to(self.matrix)[:, None] * self.matrix)
        return replace(self, matrix=inner if self.matrix is None else inner.to(self.matrix) * self.matrix)

    def then_slice(self, start: int, stop: int) -> "Side | None":
        """Return this side followed by `[start:stop]`, or `None` where nothing but padding is left."""
        if self.dense:
            assert self.matrix is not None
            return replace(self, matrix=self.matrix[start:stop])
        length = self.stop - self.start
        low, high = max(start - self.before, 0), min(stop - self.before, length)
        if low >= high:
            return None
        matrix = None if self.matrix is None else self.matrix[low:high]
        return Side(
            self.source,
            self.start + low,
            self.start + high,
            matrix,
            before=self.before + low - start,
            after=stop - self.before - high,
        )

    def padded(self, before: int, after: int) -> "Side":
        """Return this side placed inside a larger axis."""
        if not self.dense:
            return replace(self, before=self.before + before, after=self.after + after)
        assert self.matrix is not None
        return replace(self, matrix=torch.nn.functional.pad(self.matrix, (0, 0, before, after)))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Side":
        """Return the side with its matrix on a device, in a dtype; its transpose is contiguous, for `apply`."""
        if self.matrix is None:
            return self
        moved = self.matrix.to(device, dtype)
        return replace(self, matrix=moved.mT.contiguous().mT if self.dense else moved.contiguous())


def identity(size: int) -> Side:
    """Return the side that changes nothing."""
    return Side(size, 0, size)


def multiply(x: Float[Tensor, "*batch b"], matrix: Float[Tensor, "b p"]) -> Float[Tensor, "*batch p"]:
    """Return `x @ matrix` as one product of two contiguous matrices: thin products are up to twice as fast so."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Heads:
    """How the heads of an attention weight tile one of its axes.

    Attributes:
        count: number of heads (query heads, for a fused weight).
        size: entries of the axis per head.
        axis: `"out"` for query, key, value and fused weights, `"in"` for output projections.
        fused: `None` for a weight of one kind; `"concatenated"` for `[all q | all k | all v]` (GPT-2),
            `"interleaved"` for `[q k v]` per head (GPT-NeoX, BLOOM), `"grouped"` for the query heads of one group
            followed by its key and its value (Falcon).
        kv: number of key/value heads of a fused weight, where it is not `count`.
    """

    count: int
    size: int
    axis: str = "out"
    fused: str | None = None
    kv: int | None = None


@dataclass(frozen=True)
class ParamLayout:
    """What one parameter is.

    Attributes:
        shape: as the module stores it.
        dtype: as the module stores it.
        device: where it lives.
        family: `linear`, `conv`, `embedding`, `norm` or `bare`.
        transposed: whether a matrix is stored `[i, o]` (Hugging Face's `Conv1D`, or `x @ W`).
        bias: name of the bias which belongs to this matrix.
        groups: groups of a convolution.
        heads: attention heads along one axis, where known.
        experts: how many experts are stored one behind the other along a first axis of their own; 0 where there is no
            such axis.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    family: str = "bare"
    transposed: bool = False
    bias: str | None = None
    groups: int = 1
    heads: Heads | None = None
    experts: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter, or each of its experts, forms a matrix `[o, i]`."""
        return len(self.shape) - bool(self.experts) >= 2

    @property
    def one(self) -> tuple[int, ...]:
        """Shape of the gradient of one expert, or of the only matrix or vector, as a block."""
        stored = self.shape[1:] if self.experts else self.shape
        if not self.is_matrix:
            return (prod(stored),)
        o, i = stored[0], prod(stored[1:])
        return (i, o) if self.transposed else (o, i)

    @property
    def oriented(self) -> tuple[int, ...]:
        """Shape of the gradient as a block: `[o, i]`, output first, or `[d]`; the outputs of all experts in a row."""
        first, *rest = self.one
        return ((self.experts or 1) * first, *rest)

    def orient(self, grad: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Turn a gradient `[n, *shape]` into its block form `[n, o, i]` or `[n, d]`."""
        if not self.is_matrix:
            return grad.reshape(grad.shape[0], prod(self.shape))
        grad = grad.flatten(3 if self.experts else 2)
        grad = grad.mT if self.transposed else grad
        return grad.flatten(1, 2) if self.experts else grad

    def restore(self, block: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Undo `orient`."""
        block = block.unflatten(1, (self.experts, -1)) if self.experts else block
        block = block.mT if self.transposed else block
        return block.reshape(block.shape[0], *self.shape)


@dataclass(frozen=True)
class Layout:
    """The layout of every parameter, by name, in the order of `named_parameters()`."""

    params: Mapping[str, ParamLayout] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ParamLayout:
        """Return the layout of one parameter."""
        return self.params[name]

    def restrict(self, names: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of the named parameters only; a bias which is not among them is no partner."""
        unknown = [name for name in names if name not in self.params]
        if unknown:
            raise ValueError(
                f"the layout knows nothing of {unknown[:5]}; params must be a subset of what functionalize returned"
            )
        kept = {}
        for name in names:
            param = self.params[name]
            bias = param.bias if param.bias in names else None
            kept[name] = ParamLayout(**{**param.__dict__, "bias": bias})
        return Layout(kept)


def bare_layout(params: Mapping[str, Tensor]) -> Layout:
    """Return the layout of parameters of which nothing but their shapes is known."""
    return Layout({name: ParamLayout(tuple(p.shape), p.dtype, p.device) for name, p in params.items()})


def block_name(parameter: str) -> str:
    """Return a block's name: its parameter's name without `.weight`."""
    return parameter.removesuffix(".weight") if parameter != "weight" else parameter
