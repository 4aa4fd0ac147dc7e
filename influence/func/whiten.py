r"""Whitening: inverse powers of a curvature as transforms of rows.

`precondition` applies `H^r` block by block. Where the power separates, as K-FAC's `factored` inversion does at every
`r`, it folds into the probe: `L G R^T` with `L = S_c^r`, `R = A_c^r`, and a projection behind it folds too, so whitened
and projected rows cost what projected rows cost. Elsewhere it is a map of the block's own gradient.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from influence.func.curvature import Curvature, Weights, check_inversion, inverse_weights
from influence.func.fingerprint import fingerprint
from influence.func.folding import Block, Folded, block_with_sides, with_rows
from influence.func.normalize import unit_norm
from influence.func.project import project
from influence.func.similarity import dot
from influence.func.transform import BLOCKS_AT_HAND, CollectedRows, Step, Transform, chain
from influence.types import Rows


@runtime_checkable
class BlockCurvature(Protocol):
    """What a fit of `hessians` returns, as far as a transform needs it."""

    method: str
    blocks: Mapping[str, Curvature]
    under: str
    description: str
    transform: Transform | None

    @property
    def digest(self) -> str:
        """A hash of every number."""
        ...


ONCE = "H is applied once: give one transform the whole power"
AFTER = {"precondition": ONCE, "eigen_whiten": ONCE}


def precondition(
    factors: BlockCurvature,
    power: float = -1.0,
    damping: float = 0.1,
    inversion: str = "damped",
    missing: str = "error",
) -> Transform:
    r"""Apply an inverse power of the curvature to every block, `vec(G) ← H^r vec(G)`.

    With `λ` the eigenvalues and `c` the damping the multiplier is `1/(λ + c λ̄)` for `"damped"`, `1/(λ + c)` for
    `"absolute"`, `λ/(λ² + (cλ̄)²)` for `"tikhonov"`, `1/λ` where `λ > cλ̄` for `"pseudoinverse"`, and the separable
    `1/((λ_S + √δ/π)(λ_A + π√δ))`, `δ = cλ̄`, for `"factored"`, all to the power `-r`. The separable one folds into the
    probe; the others cost two rotations of a whole gradient, `4 o i (o + i)` FLOPs per example and block.

    Args:
        factors: what a fit returned.
        power: `r` in [-1, 0].
        damping: `c ≥ 0`, relative to the block's mean eigenvalue (`"absolute"`: as it is).
        inversion: how small eigenvalues are met.
        missing: `"error"`, or `"identity"`, which lets blocks without curvature through as they are.

    Returns:
        The transform; rows must have come through the transform which the factors were fitted under.

    Raises:
        ValueError: if an option is out of range, or (when bound) blocks have no curvature or other rows.

    Example:
        >>> import torch
        >>> from influence import as_blocks, hessians, per_example_grads, precondition, chain
        >>> ell, w, x = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}, torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> factors = hessians.autocorrelation.fit(ell, w, [x], transform=as_blocks())
        >>> inverse = chain(as_blocks(), precondition(factors, damping=0.0))
        >>> per_example_grads(ell, w, x, transform=inverse)["w"]
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    check_inversion(power, damping, inversion)
    if missing not in ("error", "identity"):
        raise ValueError(f"missing must be 'error' or 'identity'; got {missing!r}")
    made: dict[str, Weights] = {}

    def weights(name: str) -> Weights:
        if name not in made:
            made[name] = inverse_weights(factors.blocks[name], power, damping, inversion, f"block {name!r}")
        return made[name]

    def extend(folded: Folded) -> Folded:
        covered = coherent(factors, folded, missing)
        for name in covered:
            weights(name)
        if folded.finish:
            maps = {name: Powered(factors.blocks[name], weights(name).grid) for name in covered}
            return with_rows(folded, lambda rows: {n: maps[n](row) if n in maps else row for n, row in rows.items()})
        return replace(folded, blocks=tuple(_power(block, covered) for block in folded.blocks))

    def _power(block: Block, covered: frozenset[str]) -> Block:
        if block.into not in covered:
            return block
        curvature, mine = factors.blocks[block.into], weights(block.into)
        if mine.sides is None or len(curvature.bases) != len(curvature.shape):
            return replace(block, linear=(*block.linear, Powered(curvature, mine.grid)))
        sides = tuple(_matrix(b.vectors, w) for b, w in zip(curvature.bases, mine.sides, strict=True))
        return block_with_sides(block, sides[0], sides[1] if len(sides) == 2 else None)

    settings = {
        "factors": f"{factors.method}:{factors.digest[:16]}",
        "power": float(power),
        "damping": float(damping),
        "inversion": inversion,
        "missing": missing,
    }
    return Transform((Step("precondition", settings, extend, AFTER, needs=("as_blocks",)),))


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
    full dimension, in expectation over seeds with `dim`. Whitening before projecting is what keeps the ranking: after
    it, every direction matters alike, and a random projection loses little. Folds into the probe: collection costs what
    `project(dim)` costs.

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
    corrected spectra (EK-FAC), and costs what `project(dim)` costs.

    Args:
        factors: factors with two sides per matrix.
        dim: eigenvectors kept per side; `None` keeps all.
        damping: `c`.
        inversion: how small eigenvalues are met.
        power: -1/2 for whitening.
        missing: as in `precondition`.

    Returns:
        The transform.
    """
    check_inversion(power, damping, inversion)
    if dim is not None and dim < 1:
        raise ValueError(f"eigen_whiten(dim={dim}): dim must be at least 1")
    if missing not in ("error", "identity"):
        raise ValueError(f"missing must be 'error' or 'identity'; got {missing!r}")

    def extend(folded: Folded) -> Folded:
        covered = coherent(factors, folded, missing)
        if folded.finish:
            raise ValueError("eigen_whiten folds into the sides of a block, so it comes before unit_norm")
        return replace(folded, blocks=tuple(_turn(block, covered) for block in folded.blocks))

    def _turn(block: Block, covered: frozenset[str]) -> Block:
        if block.into not in covered:
            return block
        curvature = factors.blocks[block.into]
        grid = inverse_weights(curvature, power, damping, inversion, f"block {block.into!r}").grid
        if len(curvature.bases) != len(curvature.shape):
            return replace(block, linear=(*block.linear, Powered(curvature, grid)))
        kept = strongest(curvature, damping, inversion, dim)
        sides = [_rows_of(b.vectors, k, b.values) for b, k in zip(curvature.bases, kept, strict=True)]
        turned = block_with_sides(block, sides[0], sides[1] if len(sides) == 2 else None)
        for axis, k in enumerate(kept):
            grid = grid.index_select(axis, k.to(grid.device))
        return replace(turned, linear=(*turned.linear, Scaled(grid)))

    settings = {
        "factors": f"{factors.method}:{factors.digest[:16]}",
        "dim": dim,
        "power": float(power),
        "damping": float(damping),
        "inversion": inversion,
        "missing": missing,
    }
    refuses = AFTER | {"project": "the eigenbasis is that of whole rows", "unit_norm": "whitening comes before it"}
    return Transform((Step("eigen_whiten", settings, extend, refuses, needs=("as_blocks",)),))


def strongest(curvature: Curvature, damping: float, inversion: str, dim: int | None) -> list[Tensor]:
    """Return, per side, the eigenvectors with the most whitened energy `Σ λ m`, strongest first."""
    energy = whitened_energy(curvature, damping, inversion)
    kept = []
    for axis in range(energy.ndim):
        along = energy.sum([other for other in range(energy.ndim) if other != axis])
        count = along.shape[0] if dim is None else min(dim, along.shape[0])
        kept.append(along.argsort(descending=True, stable=True)[:count])
    return kept


def whitened_energy(curvature: Curvature, damping: float, inversion: str) -> Tensor:
    """Return `λ m` for every eigenvector: how much of `E‖H^{-1/2} g‖²` lies along it."""
    return curvature.eigenvalues.double() * inverse_weights(curvature, -1.0, damping, inversion).grid


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
        A share in [0, 1] per block.
    """
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


class Sides(NamedTuple):
    """The transforms of both sides of a score, which together apply `H^{-1}` once.

    Attributes:
        query: for query rows.
        train: for training rows.
    """

    query: Transform
    train: Transform

    def scores(self, queries: Rows, train: Rows) -> Float[Tensor, "q n"]:
        """Return the inner products of query rows and training rows, each collected under its own side.

        Args:
            queries: rows collected under `query`.
            train: rows collected under `train`.

        Returns:
            `⟨query, train⟩`, positive where the example helps the query.

        Raises:
            ValueError: if rows do not say how they were made, or were made by another transform.
        """
        for rows, side, name in ((queries, self.query, "query"), (train, self.train, "train")):
            made = rows.transform if isinstance(rows, CollectedRows) else None
            if made is None:
                raise ValueError(
                    f"the {name} rows do not say how they were made; collect them with transform=sides.{name}"
                )
            if made.fingerprint != side.fingerprint:
                raise ValueError(f"the {name} rows were made by {made}; this side is {side}")
        return dot(queries, train)


def one_sided(
    factors: BlockCurvature, damping: float = 0.1, inversion: str = "damped", dim: int | None = None, seed: int = 0
) -> Sides:
    """Return `H^{-1}` on the query and nothing on the training side: `g_q^T H^{-1} g_t`.

    Args:
        factors: the factors; their transform comes first on both sides.
        damping: `c`.
        inversion: the inversion.
        dim: project both sides after that; the query's whole gradient is formed, the training side folds.
        seed: of the projection.

    Returns:
        Both sides.
    """
    start, end = _around(factors, dim, seed)
    inverse = precondition(factors, power=-1.0, damping=damping, inversion=inversion)
    return Sides(chain(start, inverse, end), chain(start, end))


def two_sided(
    factors: BlockCurvature, damping: float = 0.1, inversion: str = "damped", dim: int | None = None, seed: int = 0
) -> Sides:
    """Return `H^{-1/2}` on both sides, then unit norm: the cosine in the metric of `H^{-1}`.

    Args:
        factors: the factors; their transform comes first on both sides.
        damping: `c`.
        inversion: the inversion; `"factored"` folds into the probe.
        dim: project after whitening, before the norm is taken.
        seed: of the projection.

    Returns:
        Both sides, which are the same.
    """
    start, end = _around(factors, dim, seed)
    root = precondition(factors, power=-0.5, damping=damping, inversion=inversion)
    both = chain(start, root, end, unit_norm())
    return Sides(both, both)


def _around(factors: BlockCurvature, dim: int | None, seed: int) -> tuple[Transform, Transform]:
    if factors.transform is None:
        raise ValueError(
            f"these factors were loaded from a file, and their transform {factors.description} cannot be restored from "
            "it: chain it with precondition(…) yourself"
        )
    return factors.transform, Transform() if dim is None else project(dim, seed=seed)


def coherent(factors: BlockCurvature, folded: Folded, missing: str) -> frozenset[str]:
    """Return the rows that have curvature, having checked that it is theirs.

    Raises:
        ValueError: if the rows came through another transform, are of other shapes, or have no curvature.
    """
    if folded.made != (BLOCKS_AT_HAND,):
        made = fingerprint([[name, settings] for name, settings in folded.made])
        if made != factors.under:
            steps = ", ".join(repr(Step(name, settings, lambda f: f, {})) for name, settings in folded.made)
            raise ValueError(
                f"the factors were fitted under {factors.description}; these rows come from chain({steps}). Curvature "
                "belongs to the rows it was fitted on: fit it under this chain, or precondition where it was fitted"
            )
    shapes = folded.row_shapes
    absent = [name for name in shapes if name not in factors.blocks]
    if absent and (missing == "error" or len(absent) == len(shapes)):
        raise ValueError(
            f"{len(absent)} of {len(shapes)} blocks have no curvature in these factors ({', '.join(absent[:5])}); they "
            f"have {', '.join(list(factors.blocks)[:5])}…. Are they another model's? Otherwise fit these blocks too, "
            "leave them out (exclude=…), or pass missing='identity'"
        )
    for name, shape in shapes.items():
        if name in factors.blocks and prod(factors.blocks[name].shape) != prod(shape):
            raise ValueError(
                f"block {name!r} has rows of shape {list(shape)}, and the factors' are of "
                f"{list(factors.blocks[name].shape)}: they are another model's, or the bias was in one alone"
            )
    return frozenset(shapes) - frozenset(absent)


def _matrix(vectors: Tensor | None, weights: Float[Tensor, " d"]) -> Shaped[Tensor, "d *d"]:
    """Return `Q diag(w) Q^T`, or the diagonal, in float64."""
    if vectors is None:
        return weights.double()
    q = vectors.double()
    return (q * weights.double()) @ q.mT


def _rows_of(vectors: Tensor | None, kept: Tensor, values: Tensor) -> Float[Tensor, "p d"]:
    """Return the chosen eigenvectors as rows."""
    if vectors is None:
        return torch.eye(values.shape[0], dtype=torch.float64, device=values.device)[kept]
    return vectors.double().mT[kept]


class Powered:
    """A power of a block's curvature, as a map of its rows."""

    def __init__(self, curvature: Curvature, weights: Tensor) -> None:
        """Hold the curvature and the weights of its eigenvectors."""
        self.curvature, self.weights = curvature, weights

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Apply it."""
        return self.curvature.apply(rows, self.weights)


class Scaled:
    """Weights of eigenvectors, on rows in the eigenbasis."""

    def __init__(self, weights: Tensor) -> None:
        """Hold the weights."""
        self.weights = weights

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Scale the rows."""
        return rows * self.weights.to(rows)
