"""Random projection: each side of a block by a sketch of its own, or all blocks together."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from influence.func.transform.chain import Step, Transform
from influence.func.transform.folding import Block, Folded, Part, with_rows, with_sides
from influence.types import Rows

KINDS = ("rademacher", "normal", "sparse", "srht")
NESTING = ("rademacher", "normal")
CHUNK = 1 << 22
"""Entries of a dense global sketch that are alive at once."""


def key_of(*parts: object) -> int:
    """Return a 63-bit key of anything that prints the same everywhere."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sketch(
    name: str, side: str, p: int, size: int, seed: int = 0, kind: str = "rademacher", signs: int = 1
) -> Float[Tensor, "p size"]:
    """Return the sketch matrix of one side of a block, in float64 on the CPU.

    Args:
        name: the block.
        side: `"left"` (output), `"right"` (input), or another name for another use.
        p: rows.
        size: columns.
        seed: the seed.
        kind: the kind of sketch.
        signs: non-zeros per column of a sparse one.

    Returns:
        The matrix, JL-scaled.
    """
    generator = torch.Generator().manual_seed(key_of(name, side, seed, kind))
    if kind == "rademacher":
        rows = [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8, device="cpu") for _ in range(p)]
        return (2.0 * torch.stack(rows).double() - 1) / math.sqrt(p)
    if kind == "normal":
        rows = [torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") for _ in range(p)]
        return torch.stack(rows) / math.sqrt(p)
    out = torch.zeros(p, size, dtype=torch.float64, device="cpu")
    if kind == "sparse":
        places, values = sparse_columns(p, size, generator, signs)
        return out.scatter_(0, places.T, values.T)
    rows_at, row_signs, flips = hadamard_choice(p, size, generator)
    columns = torch.arange(size, device="cpu")
    bits = rows_at[:, None] & columns[None]
    parity = torch.zeros_like(bits)
    while bool(bits.any()):
        parity ^= bits & 1
        bits = bits >> 1
    return (1.0 - 2.0 * parity) * row_signs[:, None] * flips[:size] / math.sqrt(p)


def sparse_columns(
    p: int, size: int, generator: torch.Generator, signs: int
) -> tuple[Int[Tensor, "size signs"], Float[Tensor, "size signs"]]:
    """Return the places and values of a sparse sketch's non-zeros: each column has one in each of `signs` bands."""
    edges = [k * p // signs for k in range(signs + 1)]
    places = [torch.randint(low, high, (size,), generator=generator, device="cpu") for low, high in pairwise(edges)]
    return torch.stack(places, 1), coins(signs * size, generator).reshape(size, signs) / math.sqrt(signs)


def coins(size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
    """Return random signs."""
    return 2.0 * torch.randint(0, 2, (size,), generator=generator, device="cpu").double() - 1


def hadamard_choice(
    p: int, size: int, generator: torch.Generator
) -> tuple[Int[Tensor, " p"], Float[Tensor, " p"], Float[Tensor, " width"]]:
    """Return which rows of a Hadamard matrix are sampled, their signs, and the signs of the columns.

    Rows are drawn without replacement up to the matrix's width, then over again. Without signs of their own every
    sketch would begin with the same column.
    """
    width = 1 << max(size - 1, 1).bit_length()
    flips = coins(width, generator)
    order = [torch.randperm(width, generator=generator, device="cpu") for _ in range(-(-p // width))]
    return torch.cat(order)[:p], coins(p, generator), flips


def hadamard(x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Return `x H`, unnormalised, for a power-of-two width, by butterflies."""
    n, width = x.shape
    step = 1
    while step < width:
        x = x.reshape(n, width // (2 * step), 2, step)
        x = torch.stack((x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]), 2)
        step *= 2
    return x.reshape(n, width)


class GlobalSketch:
    """One block's share of a global sketch, `[n, ...] -> [n, p]`, in at least float32.

    It never holds a `p × parameters` matrix: dense kinds are drawn piece by piece at every call; the sparse kind keeps
    five bytes per parameter and sign (where, and which sign), the Hadamard kind one.
    """

    def __init__(self, name: str, dim: int, seed: int, kind: str, signs: int) -> None:
        """Hold the settings; what is drawn depends on them alone."""
        self.name, self.dim, self.seed, self.kind, self.signs = name, dim, seed, kind, signs
        self.drawn: tuple[Tensor, ...] | None = None

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n p"]:
        """Return the sketch of the block's gradient."""
        flat = rows.flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        if self.kind in NESTING:
            return self._dense(flat)
        drawn = self._draw(flat.shape[1], flat.device)
        if self.kind == "srht":
            rows_at, row_signs, flips = drawn
            wide = torch.nn.functional.pad(flat, (0, flips.shape[0] - flat.shape[1])) * flips
            return hadamard(wide)[:, rows_at] * row_signs / math.sqrt(self.dim)
        places, values = drawn
        out = flat.new_zeros(flat.shape[0], self.dim)
        for k in range(self.signs):
            out = out.index_add(1, places[k], flat * values[k])
        return out / math.sqrt(self.signs)

    def _draw(self, size: int, device: torch.device) -> tuple[Tensor, ...]:
        if self.drawn is None or self.drawn[0].device != device:
            generator = torch.Generator().manual_seed(key_of(self.name, "global", self.seed, self.kind))
            if self.kind == "srht":
                places, *signs = hadamard_choice(self.dim, size, generator)
            else:
                places, *signs = (x.mT.contiguous() for x in sparse_columns(self.dim, size, generator, self.signs))
            self.drawn = (places.to(device, torch.int32), *(x.sign().to(device, torch.int8) for x in signs))
        return self.drawn

    def _dense(self, flat: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        out = flat.new_zeros(flat.shape[0], self.dim)
        width = max(CHUNK // self.dim, 1)
        for piece, begin in enumerate(range(0, flat.shape[1], width)):
            columns = flat[:, begin : begin + width]
            name = f"{self.name}/{piece}"
            matrix = sketch(name, "global", self.dim, columns.shape[1], self.seed, self.kind)
            out = out + columns @ matrix.to(flat).mT
        return out


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

    return Transform((Step("project", settings, extend, kind="sketch", needs_blocks=True),))


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
