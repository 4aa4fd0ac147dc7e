"""Kronecker factors of every block from sums of both sides: what K-FAC, TKFAC and Shampoo share."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from influence.func.numbers import check_number
from influence.func.transform.curvature import Basis, Curvature, decompose
from influence.hessians.factors import Factors
from influence.hessians.method import About, FitSetup, Method, Pass, Summing, Sums
from influence.types import Batch, Params

MAX_SIDE = 8192
"""A side of more entries is kept as a diagonal: a Gram matrix of 8192 entries takes 256 MB."""


def kronecker_method(
    name: str,
    max_side: int,
    sums: Callable[[FitSetup, Params, Batch], Summing],
    assemble: Callable[[About, Sums], Factors],
) -> Method:
    """Return a method of one pass whose factors have two sides per matrix."""
    check_number("max_side", max_side, 0)

    def entries(shape: tuple[int, ...]) -> int:
        if len(shape) != 2:
            return prod(shape)
        return sum(d + d * d if d <= max_side else d for d in shape)

    return Method(name, (Pass(name, sums, assemble),), entries, options={"max_side": max_side}, kronecker=True)


def kronecker_factors(about: About, sums: Sums, divisor: Callable[[str], Tensor | int]) -> Factors:
    """Turn sums of both sides into factors; a covariance that blocks share is decomposed once.

    Args:
        about: what the sums are sums of.
        sums: of each block `left` and `right`, or the `diagonal` of one without factors.
        divisor: what a block's right side is divided by, where it is not zero; the left is a mean over documents.

    Returns:
        The factors.
    """
    made: dict[tuple[int, float], Basis] = {}

    def basis(total: Tensor, by: Tensor | int, what: str) -> Basis:
        key = (id(total), float(by))
        if key not in made:
            made[key] = decompose(total / by, what)
        return made[key]

    blocks = {}
    for name, shape in about.shapes.items():
        mine, what = sums.blocks[name], f"block {name!r}"
        if "left" not in mine or "right" not in mine:
            total = mine.get("diagonal")  # none, where no gradient reached the block
            values = torch.zeros(prod(shape)) if total is None else total / sums.documents
            blocks[name] = Curvature(shape, (decompose(values, what),))
            continue
        by = divisor(name)
        left = basis(mine["left"], sums.documents, f"{what} (left)")
        right = basis(mine["right"], by if by > 0 else by + 1, f"{what} (right)")
        blocks[name] = Curvature(shape, (left, right))
    return about.factors(sums, blocks)
