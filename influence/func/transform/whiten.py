r"""Whitening: `H^{-1/2}` of rows, and the projection that it goes into.

Whitened rows have inner products `g^T H^{-1} h`. The whitening goes into the projection, `R cov^{-1/2}` per side, so
both fold into the probe. `R` may be random, which is unbiased, or the strongest eigenvectors, which rank better at the
same size: docs/curvature.md has the measurements.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from influence.func.transform.chain import Step, Transform, chain
from influence.func.transform.curvature import Curvature, check_inversion, inverse_weights
from influence.func.transform.folding import Block, Folded, LinearMap, SideMap, block_with_sides, with_rows
from influence.func.transform.precondition import BlockCurvature, Powered, coherent, precondition
from influence.func.transform.project import project


def kfac_whiten(
    factors: BlockCurvature,
    damping: float = 0.1,
    dim: int | None = None,
    seed: int = 0,
    kind: str = "rademacher",
    missing: str = "error",
) -> Transform:
    r"""Whiten each side of a block, `G ← S_c^{-1/2} G A_c^{-1/2}`, and project what is whitened.

    $$L = P_S (S + \sqrt\delta/\pi\, I)^{-1/2}, \quad R = P_A (A + \pi\sqrt\delta\, I)^{-1/2}, \quad \delta = c λ̄$$

    so that `⟨white(g), white(h)⟩ = g^T H^{-1} h` with `H^{-1}` the `factored` inversion at the same damping: exactly at
    full dimension, in expectation over seeds with `dim`, and readable at a smaller `dim` by `down_project`. Whitening
    makes every direction matter alike, so a random sketch needs a large `dim`: `eigen_whiten` ranks better at the same
    one. Folds into the probe: collection costs what `project(dim)` costs.

    Args:
        factors: Kronecker factors with their own spectrum (K-FAC, TKFAC, Shampoo).
        damping: `c`.
        dim: sketch each side to this size; `None` keeps everything. A side that is smaller is kept exact.
        seed: of the sketch.
        kind: `"rademacher"`, `"normal"`, `"sparse"` or `"srht"`.
        missing: as in `precondition`.

    Returns:
        The transform, `precondition(power=-1/2, inversion="factored")` and, with `dim`, `project(dim)`.

    Raises:
        ValueError: if the spectrum was corrected, which does not separate.
    """
    corrected = [name for name, c in factors.blocks.items() if c.corrected is not None]
    if corrected:
        raise ValueError(
            f"kfac_whiten needs Kronecker factors, and the spectrum of {len(corrected)} blocks was corrected (EK-FAC: "
            f"{', '.join(corrected[:3])}), so it does not separate into the sides of a projection. Use "
            "chain(precondition(factors, power=-0.5), project(dim)), which is exact and forms whole gradients, "
            "eigen_whiten(factors, dim), which keeps the strongest eigenvectors and folds, or the uncorrected factors"
        )
    white = precondition(factors, power=-0.5, damping=damping, inversion="factored", missing=missing)
    return white if dim is None else chain(white, project(dim, seed=seed, kind=kind))


def eigen_whiten(
    factors: BlockCurvature,
    dim: int | None = None,
    damping: float = 0.1,
    inversion: str = "damped",
    power: float = -0.5,
    missing: str = "error",
) -> Transform:
    r"""Rotate into the eigenbasis, keep its strongest directions, and whiten them there.

    $$P_n = (U_S^\top G_n U_A) \odot m^{1/2}, \qquad m = \text{the inversion's multiplier at power } {-1}$$

    `U_S [o, p]` and `U_A [i, p]` hold the eigenvectors that carry most of the whitened energy `E‖H^{-1/2} g‖² = Σ λ m`:
    the least biased `p × p` corner of the exact inner product, where a random sketch is unbiased and noisy. It serves
    corrected spectra (EK-FAC), and costs what `project(dim)` costs. After `unit_norm` it is a map of whole rows, and
    wants the curvature of unit rows, as every form of whitening does.

    Args:
        factors: factors with two sides per matrix.
        dim: eigenvectors kept per side; `None` keeps all.
        damping: `c`.
        inversion: how small eigenvalues are met: `"damped"`, `"absolute"`, `"tikhonov"`, `"pseudoinverse"` or
            `"factored"`, as in `precondition`.
        power: -1/2 for whitening.
        missing: `"error"` or `"identity"`, as in `precondition`.

    Returns:
        The transform.
    """
    check_inversion(power, damping, inversion)
    if dim is not None and dim < 1:
        raise ValueError(f"eigen_whiten(dim={dim}): dim must be at least 1")
    if missing not in ("error", "identity"):
        raise ValueError(f"missing must be 'error' or 'identity'; got {missing!r}")

    def extend(folded: Folded) -> Folded:
        covered = coherent(factors, folded, missing, inversion)
        if not folded.finish:
            return replace(folded, blocks=tuple(_turn(block, covered) for block in folded.blocks))
        maps = {name: _of_rows(name) for name in covered}
        return with_rows(folded, lambda rows: {n: maps[n](row) if n in maps else row for n, row in rows.items()})

    def _directions(name: str) -> tuple[tuple[Tensor, Tensor | None] | None, LinearMap]:
        """Return the sides that turn a row into its strongest eigenvectors, if it has two, and the map after them."""
        curvature = factors.blocks[name]
        grid = inverse_weights(curvature, power, damping, inversion, f"block {name!r}").grid
        if len(curvature.bases) != len(curvature.shape):
            return None, Powered(curvature, grid)
        kept = strongest(curvature, damping, inversion, dim)
        sides = [_rows_of(b.vectors, k, b.values) for b, k in zip(curvature.bases, kept, strict=True)]
        for axis, k in enumerate(kept):
            grid = grid.index_select(axis, k.to(grid.device))
        return (sides[0], sides[1] if len(sides) == 2 else None), Scaled(grid)

    def _turn(block: Block, covered: frozenset[str]) -> Block:
        if block.into not in covered:
            return block
        sides, last = _directions(block.into)
        turned = block if sides is None else block_with_sides(block, *sides)
        return replace(turned, linear=(*turned.linear, last))

    def _of_rows(name: str) -> LinearMap:
        sides, last = _directions(name)
        return last if sides is None else lambda row: last(SideMap(*sides)(row))

    settings = {
        "factors": f"{factors.method}:{factors.digest[:16]}",
        "dim": dim,
        "power": float(power),
        "damping": float(damping),
        "inversion": inversion,
        "missing": missing,
    }
    return Transform((Step("eigen_whiten", settings, extend, kind="curvature", needs_blocks=True),))


def strongest(curvature: Curvature, damping: float, inversion: str, dim: int | None) -> list[Tensor]:
    """Return, per side, the eigenvectors with the most whitened energy `Σ λ m`, strongest first."""
    energy = whitened_energy(curvature, damping, inversion)
    kept = []
    for axis in range(energy.ndim):
        along = energy.movedim(axis, 0).reshape(energy.shape[axis], -1).sum(1)
        count = along.shape[0] if dim is None else min(dim, along.shape[0])
        kept.append(along.argsort(descending=True, stable=True)[:count])
    return kept


def whitened_energy(curvature: Curvature, damping: float, inversion: str) -> Tensor:
    """Return `λ m` for every eigenvector: how much of `E‖H^{-1/2} g‖²` lies along it; zeros for a zero curvature."""
    values = curvature.eigenvalues.double()
    if curvature.moment(1) == 0:
        return torch.zeros_like(values)
    return values * inverse_weights(curvature, -1.0, damping, inversion).grid


def kept_energy(factors: BlockCurvature, dim: int, damping: float = 0.1, inversion: str = "damped") -> dict[str, float]:
    """Return the share of the whitened energy `E‖H^{-1/2} g‖² = Σ λ m` that `eigen_whiten(dim)` keeps, per block.

    A random sketch keeps all of it in expectation; there the share says how far `dim × dim` falls short of the
    directions that matter, so how noisy the sketch is.

    Args:
        factors: the factors.
        dim: eigenvectors kept per side.
        damping: `c`.
        inversion: the inversion.

    Returns:
        A share in [0, 1] per block; 0 for a block without curvature.

    Raises:
        ValueError: if `dim` is less than 1.
    """
    if dim < 1:
        raise ValueError(f"kept_energy(dim={dim}): dim must be at least 1")
    shares = {}
    for name, curvature in factors.blocks.items():
        energy = whitened_energy(curvature, damping, inversion)
        corner = energy
        if energy.ndim == len(curvature.shape):
            for axis, kept in enumerate(strongest(curvature, damping, inversion, dim)):
                corner = corner.index_select(axis, kept)
        whole = float(energy.sum())
        shares[name] = float(corner.sum()) / whole if whole > 0 else 0.0
    return shares


def _rows_of(vectors: Tensor | None, kept: Tensor, values: Tensor) -> Float[Tensor, "p d"]:
    """Return the chosen eigenvectors as rows."""
    if vectors is None:
        rows = torch.zeros(len(kept), len(values), dtype=torch.float64, device=values.device)
        return rows.scatter_(1, kept[:, None], 1.0)
    return vectors.double().mT[kept]


@dataclass(frozen=True)
class Scaled:
    """Weights of eigenvectors, on rows in the eigenbasis."""

    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Scaled":
        """Return the weights where rows are."""
        return Scaled(self.weights.to(device, dtype))

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Scale the rows."""
        return rows * self.weights.to(rows)
