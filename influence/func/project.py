"""Random projection: each side of a block by a sketch of its own, or all blocks together."""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from influence.func.folding import Block, Folded, Part, with_rows, with_sides
from influence.func.sketch import KINDS, GlobalSketch, sketch
from influence.func.transform import Step, Transform
from influence.types import Rows


def project(
    dim: int,
    seed: int = 0,
    kind: str | None = None,
    target: str = "per_block",
    *,
    signs: int = 1,
    reshape_to_square: bool = False,
) -> Transform:
    r"""Project every block to `[p, p]`, or all blocks together to one vector `[p]`.

    Per block, `P_n = L G_n R^T` with `L [p, o]` and `R [p, i]`: separable, so it folds into the probe and costs
    `2 s p (o + i + p)` FLOPs per example instead of `2 s o i`. A side with at most `dim` entries is kept exact. A
    vector becomes `[min(p, d)]`. Globally, `P_n = Σ_blocks S_block vec(G_n)`, generated piece by piece.

    $$\mathbb{E}\,\langle L G R^\top, L H R^\top \rangle = \langle G, H \rangle$$

    Args:
        dim: `p`.
        seed: another seed gives independent matrices.
        kind: `"rademacher"` (±1/√p), `"normal"`, `"sparse"` (`signs` non-zeros ±1/√signs per column: SJLT) or
            `"srht"` (rows of a Hadamard matrix with random signs). Default: rademacher per block, sparse globally.
        target: `"per_block"` or `"global"`.
        signs: non-zeros per column of a sparse sketch.
        reshape_to_square: project far-from-square blocks (LoRA's `[r, i]`) as the most square `[a, b]` with
            `a·b = o·i`; forms the block's gradient.

    Returns:
        The transform.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from influence import project
        >>> project(16).fingerprint == project(16, seed=1).fingerprint
        False
    """
    if target not in ("per_block", "global"):
        raise ValueError(f"project(target={target!r}): expected 'per_block' or 'global'")
    kind = kind or ("sparse" if target == "global" else "rademacher")
    if kind not in KINDS:
        raise ValueError(f"project(kind={kind!r}): expected one of {', '.join(KINDS)}")
    if dim < 1 or signs < 1 or (kind == "sparse" and signs > dim):
        raise ValueError(f"project(dim={dim}, signs={signs}): dim must be at least 1, and signs from 1 to dim")
    if reshape_to_square and target == "global":
        raise ValueError("project(reshape_to_square=True) is for target='per_block': a global sketch has no sides")
    settings: dict[str, Any] = {"dim": dim, "seed": seed, "kind": kind, "target": target}
    settings |= {"signs": signs} if kind == "sparse" else {}
    settings |= {"reshape_to_square": True} if reshape_to_square else {}

    drawn: dict[tuple[str, str, int], Tensor | None] = {}  # a transform bound again draws nothing again

    def extend(folded: Folded) -> Folded:
        if "unit_norm" in folded.history:
            note = "unit_norm comes before project: projected rows no longer have unit norm"
            folded = replace(folded, warnings=(*folded.warnings, note))
        if target == "global":
            return _project_all(folded, dim, seed, kind, signs)
        if reshape_to_square:
            return _project_squares(folded, dim, seed, kind, signs)

        def draw(name: str, side: str, size: int) -> Tensor | None:
            key = (name, side, size)
            if key not in drawn:
                drawn[key] = None if size <= dim else sketch(name, side, dim, size, seed, kind, signs)
            return drawn[key]

        def sides(block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
            left = draw(block.name, "left", block.shape[0])
            return left, draw(block.name, "right", block.shape[1]) if len(block.shape) == 2 else None

        return with_sides(folded, sides)

    refuses = {"project": "rows are projected once; to read them at a smaller dim use down_project"}
    return Transform((Step("project", settings, extend, refuses, needs=("as_blocks",)),))


def _project_all(folded: Folded, dim: int, seed: int, kind: str, signs: int) -> Folded:
    if folded.finish:
        maps = {block.into: GlobalSketch(block.name, dim, seed, kind, signs) for block in folded.blocks}
        return with_rows(folded, lambda rows: {GLOBAL: sum_rows({name: maps[name](row) for name, row in rows.items()})})
    blocks = tuple(
        replace(
            block, shape=(dim,), into=GLOBAL, linear=(*block.linear, GlobalSketch(block.name, dim, seed, kind, signs))
        )
        for block in folded.blocks
    )
    return replace(folded, blocks=blocks)


GLOBAL = "global"
"""Name of the one row of a global projection."""


def sum_rows(rows: Rows) -> Tensor:
    """Return the sum of all blocks' rows."""
    return torch.stack(list(rows.values())).sum(0)


def _project_squares(folded: Folded, dim: int, seed: int, kind: str, signs: int) -> Folded:
    def view(block: Block) -> Block:
        if len(block.shape) != 2:
            return block
        a, b = most_square(block.shape[0] * block.shape[1])
        sides = tuple(
            None if size <= dim else sketch(block.name, side, dim, size, seed, kind, signs)
            for side, size in (("left", a), ("right", b))
        )
        shape = (min(a, dim), min(b, dim))
        return replace(block, shape=shape, linear=(*block.linear, _Square(a, b, *sides)))

    if folded.finish:
        raise ValueError("project(reshape_to_square=True) cannot follow unit_norm: put unit_norm last")
    matrices = replace(folded, blocks=tuple(view(block) for block in folded.blocks))
    vectors = project(dim, seed, kind, signs=signs).steps[0].extend(folded)
    chosen = tuple(
        new if len(old.shape) == 2 else vector
        for old, new, vector in zip(folded.blocks, matrices.blocks, vectors.blocks, strict=True)
    )
    return replace(folded, blocks=chosen)


class _Square:
    """A block's gradient viewed as `[a, b]`, each side projected."""

    def __init__(self, a: int, b: int, left: Tensor | None, right: Tensor | None) -> None:
        self.a, self.b, self.left, self.right = a, b, left, right

    def __call__(self, rows: Shaped[Tensor, "n o i"]) -> Shaped[Tensor, "n p q"]:
        """Return the projected view."""
        square = rows.reshape(rows.shape[0], self.a, self.b)
        square = square if self.right is None else square @ self.right.to(rows).mT
        return square if self.left is None else self.left.to(rows) @ square


def most_square(size: int) -> tuple[int, int]:
    """Return `(a, b)` with `a·b = size`, `a ≤ b`, `a` as large as possible."""
    a = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return a, size // a
