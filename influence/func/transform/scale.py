r"""Scales: what the optimizer would have done to a gradient, and unit norm."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.func.transform.chain import Stage, Step, Transform
from influence.func.transform.folding import Block, Folded, Part, apply_part, flat, with_rows, with_sides
from influence.func.transform.layout import ParamLayout
from influence.types import Rows


class Factored(NamedTuple):
    """Adafactor's second moment of a matrix as stored: means over the last axis (`row`) and over the first (`col`).

    Where one parameter holds several experts, of each of their matrices: `[experts, rows]` and `[experts, cols]`.
    """

    row: Float[Tensor, "*experts rows"]
    col: Float[Tensor, "*experts cols"]


class Moments(NamedTuple):
    """Second moments of an optimizer, by parameter name, in the parameter's own shape (Adam) or factored (Adafactor).

    Vectors, biases among them, always have a plain moment.
    """

    second: Mapping[str, Tensor | Factored]

    def to_adafactor(self) -> "Moments":
        """Return every matrix's moment factored: row and column means, the best rank-one fit in generalised KL."""
        return Moments({name: factor(v) for name, v in self.second.items()})

    def to_adam(self) -> "Moments":
        """Return every moment in its parameter's shape, a factored one as `row col^T / mean(row)`."""
        return Moments({name: unfactor(v) for name, v in self.second.items()})


def factor(v: Tensor | Factored, experts: int = 0) -> Tensor | Factored:
    """Return a matrix's moment, or that of each expert's, as row and column means; others as they are."""
    first = 1 if experts else 0
    if isinstance(v, Factored) or v.ndim < first + 2:
        return v
    matrix = v.flatten(first + 1)
    return Factored(matrix.mean(-1), matrix.mean(-2))


def unfactor(v: Tensor | Factored) -> Tensor:
    """Return a moment in full; an all-zero one stays zero."""
    if not isinstance(v, Factored):
        return v
    mean = v.row.mean(-1)[..., None, None]
    return v.row[..., :, None] * v.col[..., None, :] / torch.where(mean > 0, mean, torch.ones_like(mean))


def scale_by_adam(moments: Moments, eps: float = 1e-8) -> Transform:
    r"""Divide elementwise by Adam's denominator, `g / (√v + ε)`.

    Not separable: the block's full gradient is formed, scaled, and taken through the rest of the chain at once, one
    block at a time.

    Args:
        moments: second moments; factored ones are expanded.
        eps: `ε`, outside the root.

    Returns:
        The transform.

    Example:
        >>> import torch
        >>> from influence import Moments, scale_by_adam
        >>> from influence.func.transform.layout import bare_layout
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> scale_by_adam(Moments({"w": w**2}), eps=0.0).apply({"w": w[None]}, bare_layout({"w": w}))["w"]
        tensor([[[1., 1.]]])
    """
    check_number("eps", eps, 0)

    def extend(folded: Folded) -> Folded:
        _covers("scale_by_adam", folded, moments)

        @lru_cache(maxsize=2)  # a weight and its bias, while their heads or experts come one after the other
        def scale_of(source: str) -> Tensor:
            param = folded.layout[source]
            v = unfactor(moments.second[source]).reshape(param.shape)
            return param.orient((1 / (v.double().sqrt() + eps))[None].cpu())

        blocks = []
        for block in folded.blocks:
            total = None
            for part in block.parts:
                piece = apply_part(part, scale_of(part.source))[0]
                total = piece if total is None else total + piece
            assert total is not None
            dtype = folded.layout[block.parts[0].source]
            scale = total.to(dtype.device, dtype.dtype)
            blocks.append(replace(block, linear=(*block.linear, _Scale(scale))))
        return replace(folded, blocks=tuple(blocks))

    return Transform((scale_step("scale_by_adam", {"moments": moments, "eps": eps}, extend),))


def scale_by_adafactor(moments: Moments, eps: float = 1e-30) -> Transform:
    r"""Divide by Adafactor's rank-one denominator; separable, so it folds into the probe.

    $$G_{ij} \leftarrow G_{ij} \sqrt{\bar r}\; r_i^{-1/2} k_j^{-1/2}, \qquad r = \text{row} + ε,\; k = \text{col} + ε$$

    and `g / √(v + ε)` for vectors, biases among them. A head takes its slice of the scale of the whole matrix.

    Args:
        moments: second moments; full ones are factored.
        eps: `ε`, added to the moments.

    Returns:
        The transform.

    Example:
        >>> import torch
        >>> from influence import Moments, scale_by_adafactor
        >>> from influence.func.transform.layout import bare_layout
        >>> v = torch.tensor([[4.0, 1.0], [2.0, 0.5], [1.0, 1.0]])
        >>> scale_by_adafactor(Moments({"w": v})).apply({"w": torch.ones(1, 3, 2)}, bare_layout({"w": v}))["w"]
        tensor([[[0.5210, 0.8718],
                 [0.7368, 1.2329],
                 [0.8238, 1.3784]]])
    """
    check_number("eps", eps, 0)

    def extend(folded: Folded) -> Folded:
        _covers("scale_by_adafactor", folded, moments)
        scales = {name: _scales(moments.second[name], eps, folded.layout[name]) for name in _sources(folded)}

        def sides(block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
            left, right = scales[part.source]
            if right is not None and right.ndim == 2:
                right = right[_expert(block, part, folded.layout[part.source])]
            target = None if part.right is None else torch.ones(part.right.size, dtype=torch.float64)
            placed_left = torch.zeros(part.left.size, dtype=torch.float64)
            placed_left[part.left.before : part.left.size - part.left.after] = left[part.left.start : part.left.stop]
            if right is not None and part.right is not None and target is not None:
                inner = slice(part.right.before, part.right.size - part.right.after)
                target[inner] = right[part.right.start : part.right.stop]
            return placed_left, target

        return with_sides(folded, sides)

    return Transform((scale_step("scale_by_adafactor", {"moments": moments, "eps": eps}, extend),))


def scale_step(name: str, settings: Mapping[str, Any], extend: Callable[[Folded], Folded], **more: Any) -> Step:
    """Return the step of an optimizer's scale, which LESS applies to the training side alone."""
    return Step(name, settings, extend, Stage.SCALE, "scale", "train only", **more)


def _scales(v: Tensor | Factored, eps: float, param: ParamLayout) -> tuple[Tensor, Tensor | None]:
    """Return the scales of the output axis, and of the input axis (of every expert), in block orientation."""
    v = factor(v if isinstance(v, Factored) else v.reshape(param.shape), param.experts)
    if not isinstance(v, Factored):
        return (v.double().flatten().cpu() + eps).rsqrt(), None
    row, col = v.row.double().cpu() + eps, v.col.double().cpu() + eps
    by_row, by_col = row.mean(-1, keepdim=True).sqrt() * row.rsqrt(), col.rsqrt()
    left, right = (by_col, by_row) if param.transposed else (by_row, by_col)
    return left.flatten(), right


def _expert(block: Block, part: Part, param: ParamLayout) -> int:
    """Return the number of a block's expert."""
    outputs = param.one[0]
    if part.left.stop - part.left.start > outputs:
        raise ValueError(
            f"scale_by_adafactor: {block.name!r} holds {param.experts} experts, each with a scale of its own, so it "
            "has no rank-one scale as a whole: put as_blocks() before it, which makes every expert a block"
        )
    return part.left.start // outputs


def unit_norm(eps: float = 1e-12) -> Transform:
    r"""Divide each example's row by its norm over all blocks together, `g / max(‖g‖, ε)`.

    Norms are taken in at least float32; a zero row stays zero.

    Args:
        eps: smallest norm that is divided by.

    Returns:
        The transform.

    Example:
        >>> import torch
        >>> from influence import unit_norm
        >>> from influence.func.transform.layout import bare_layout
        >>> rows = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}
        >>> unit_norm().apply(rows, bare_layout({name: row[0] for name, row in rows.items()}))
        {'a': tensor([[0.6000]]), 'b': tensor([[0.8000]])}
    """
    check_number("eps", eps, 0)

    def normalise(rows: Rows) -> Rows:
        wide = flat(rows)
        largest = wide.abs().amax(1, keepdim=True)
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        norm = (wide / safe).norm(dim=1, keepdim=True)
        shrink = (safe * norm / eps).clamp_max(1) if eps > 0 else torch.ones_like(norm)
        divisor = torch.where(norm > 0, norm, torch.ones_like(norm))

        def unit(row: Tensor) -> Tensor:
            by = [x.reshape(-1, *[1] * (row.ndim - 1)) for x in (safe, divisor, shrink)]
            return (row.to(wide) / by[0] / by[1] * by[2]).to(row.dtype)

        return {name: unit(row) for name, row in rows.items()}

    return Transform((Step("unit_norm", {"eps": eps}, lambda folded: with_rows(folded, normalise), kind="norm"),))


class _Scale:
    """An elementwise scale of a block's rows."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, rows: Tensor) -> Tensor:
        """Scale them."""
        return rows * self.scale


def _covers(verb: str, folded: Folded, moments: Moments) -> None:
    needed = _sources(folded)
    missing = [name for name in needed if name not in moments.second]
    if missing:
        raise ValueError(
            f"{verb}: no second moment for {len(missing)} of {len(needed)} parameters: {', '.join(missing[:5])}. "
            "Add them to the moments, or leave these parameters out of the targets"
        )
    for name in needed:
        v, layout = moments.second[name], folded.layout[name]
        expected = layout.shape
        if isinstance(v, Factored):
            experts, stored = (expected[:1], expected[1:]) if layout.experts else ((), expected)
            got = (tuple(v.row.shape), tuple(v.col.shape))
            whole = ((*experts, stored[0]), (*experts, prod(stored[1:])))
            if got != whole:
                raise ValueError(
                    f"{verb}: moment of {name!r} has rows and columns of shapes {got}; expected {whole}"
                    f"{', factored expert by expert (leave it in full, it is factored here)' if experts else ''}"
                )
        elif tuple(v.shape) not in (expected, (expected[0], prod(expected[1:])) if len(expected) > 1 else expected):
            raise ValueError(
                f"{verb}: moment of {name!r} has shape {list(v.shape)}; the parameter has {list(expected)}"
            )
        check_second(verb, name, v)


def check_second(verb: str, name: str, v: Tensor | Factored) -> None:
    """Refuse a second moment that is no mean of squares.

    Raises:
        ValueError: naming the parameter.
    """
    for part in v if isinstance(v, Factored) else (v,):
        if part.numel() and not (part.amin() >= 0 and part.amax() < float("inf")):  # false of NaN
            bad = int((~(part >= 0) | part.isinf()).sum())
            raise ValueError(
                f"{verb}: the second moment of {name!r} has {bad} of {part.numel()} numbers that are NaN, infinite or "
                "negative, and it is a mean of squares: the training diverged, or the file is damaged. Take an "
                "earlier checkpoint, or leave the parameter out of the targets"
            )


def _sources(folded: Folded) -> list[str]:
    return list(dict.fromkeys(part.source for block in folded.blocks for part in block.parts))
