r"""Sketches: the random matrices that projections are made of.

They come from torch's CPU generator keyed by (block, side, seed), row after row: the same on every device and in every
dtype, and nested, so the `p = 8` matrix is the first half of the `p = 16` one up to its scale. The scale is
Johnson-Lindenstrauss's, `E[L^T L] = I`: inner products of projected rows are unbiased.
"""

import hashlib
import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

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
