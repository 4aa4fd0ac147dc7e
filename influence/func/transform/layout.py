"""The layout of a model's parameters: what each of them is, and which way round it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

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
        if self.experts:
            return rearrange(grad, "n e i ... -> n (e ...) i" if self.transposed else "n e o ... -> n (e o) (...)")
        return rearrange(grad, "n i ... -> n (...) i" if self.transposed else "n o ... -> n o (...)")

    def restore(self, block: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Undo `orient`."""
        if self.is_matrix and (self.experts or self.transposed):
            stored = "n e i o" if self.transposed else "n e o i"
            block = rearrange(block, f"n (e o) i -> {stored}", e=self.experts or 1)
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
