r"""Curvature of one block in its eigenbasis, and its inverse powers.

A block's curvature is `H = (⊗ Q_k) diag(λ) (⊗ Q_k)^T`, one orthonormal basis per axis of a row. Without a correction
`λ` is the product of the sides' eigenvalues, as in K-FAC; with one (EK-FAC) it is any grid. A dense curvature is the
case of one axis, the flattened row; a diagonal one is that without vectors.
"""

from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

INVERSIONS = ("damped", "absolute", "tikhonov", "pseudoinverse", "factored")


class Basis(NamedTuple):
    """An eigendecomposition of one axis: orthonormal columns, or `None` for the coordinates themselves."""

    vectors: Float[Tensor, "d d"] | None
    values: Float[Tensor, " d"]


@dataclass(frozen=True)
class Curvature:
    """The curvature of one block.

    Attributes:
        shape: shape of a row.
        bases: one per axis of the row; a single one for a whole row of several axes is a dense curvature.
        corrected: eigenvalues in the product of the bases, where they were measured there.
    """

    shape: tuple[int, ...]
    bases: tuple[Basis, ...]
    corrected: Tensor | None = None

    @property
    def kind(self) -> str:
        """`kronecker`, `corrected`, `dense` or `diagonal`."""
        if self.corrected is not None:
            return "corrected"
        if len(self.bases) > 1:
            return "kronecker"
        return "diagonal" if self.bases[0].vectors is None else "dense"

    @property
    def eigenvalues(self) -> Shaped[Tensor, "..."]:
        """The eigenvalues, a grid with one axis per basis."""
        if self.corrected is not None:
            return self.corrected
        return outer_all([basis.values for basis in self.bases])

    def moment(self, power: int) -> float:
        """Return `Σ λ^power`, forming no grid where the sides tell."""
        if self.corrected is not None:
            return float(self.corrected.double().pow(power).sum())
        return prod(float(basis.values.double().pow(power).sum()) for basis in self.bases)

    @property
    def mean(self) -> float:
        """The mean eigenvalue, which damping is relative to."""
        return self.moment(1) / max(prod(self.shape), 1)

    @property
    def effective_rank(self) -> float:
        """The participation ratio of the spectrum, `(Σ λ)² / Σ λ²`."""
        squares = self.moment(2)
        return self.moment(1) ** 2 / squares if squares > 0 else 0.0

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        grids = [self.corrected] if self.corrected is not None else [basis.values for basis in self.bases]
        return prod(float(g.min()) for g in grids), prod(float(g.max()) for g in grids)

    @property
    def condition(self) -> float:
        """The largest eigenvalue over the smallest; infinite where that is zero up to rounding."""
        low, high = self.extremes
        return high / low if low > rounding_of(self) * high else float("inf")

    def rotate(self, rows: Shaped[Tensor, "n ..."], back: bool = False) -> Shaped[Tensor, "n ..."]:
        """Take rows `[n, *shape]` into the eigenbasis, `[n, *grid]`, or back."""
        dims = tuple(basis.values.shape[0] for basis in self.bases)
        rows = rows.reshape(rows.shape[0], *dims)
        for axis, basis in enumerate(self.bases, start=1):
            if basis.vectors is not None:
                vectors = basis.vectors.to(rows)
                turned = rows.movedim(axis, -1) @ (vectors.mT if back else vectors)
                rows = turned.movedim(-1, axis)
        return rows.reshape(rows.shape[0], *self.shape) if back else rows

    def apply(self, rows: Shaped[Tensor, "n ..."], weights: Shaped[Tensor, "..."]) -> Shaped[Tensor, "n ..."]:
        """Apply the operator with these weights in the eigenbasis to rows `[n, *shape]`, in at least float32."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return self.rotate(self.rotate(wide) * weights.to(wide), back=True).to(rows.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Curvature":
        """Return the curvature on a device, in a dtype."""
        bases = tuple(
            Basis(None if b.vectors is None else b.vectors.to(device, dtype), b.values.to(device, dtype))
            for b in self.bases
        )
        return Curvature(self.shape, bases, None if self.corrected is None else self.corrected.to(device, dtype))

    def dense(self) -> Float[Tensor, "d d"]:
        """Return `H` itself over the flattened row, in float64."""
        eye = torch.eye(prod(self.shape), dtype=torch.float64, device=self.bases[0].values.device)
        return self.apply(eye.reshape(-1, *self.shape), self.eigenvalues.double()).flatten(1)


def outer_all(values: list[Tensor]) -> Shaped[Tensor, "..."]:
    """Return the outer product of vectors."""
    out = values[0]
    for value in values[1:]:
        out = out[..., None] * value
    return out


def decompose(covariance: Shaped[Tensor, "d *d"], name: str) -> Basis:
    """Return the eigendecomposition of a covariance, or of a diagonal one given as a vector.

    It is symmetrised and decomposed in float64. Rounding makes a semidefinite matrix's zeros slightly negative: those
    are set to zero; anything more negative than rounding explains is refused.

    Args:
        covariance: the matrix `[d, d]`, or its diagonal `[d]`.
        name: what it is, for the error.

    Returns:
        Eigenvectors as columns and eigenvalues, ascending; in the covariance's dtype, at least float32.

    Raises:
        ValueError: if it is not finite, or not positive semidefinite.

    Example:
        >>> import torch
        >>> decompose(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), "x").values
        tensor([1., 3.])
    """
    wide = covariance.double()
    if not bool(torch.isfinite(wide).all()):
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"the covariance of {name} is not finite ({bad} of {wide.numel()} entries): some example's gradient or "
            "activation overflowed. Look for it with per_example_grads, or compute in a wider dtype"
        )
    dtype = covariance.dtype if covariance.dtype == torch.float64 else torch.float32
    vectors, values = None, wide
    if wide.ndim == 2:
        values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
        vectors = vectors.to(dtype)
    # a diagonal is a sum of squares; a matrix's zeros come out as rounding of its largest eigenvalue
    tolerance = 0.0 if wide.ndim == 1 else 10 * wide.shape[0] ** 0.5 * torch.finfo(dtype).eps
    rounding = tolerance * float(values.abs().max()) if values.numel() else 0.0
    lowest = float(values.min()) if values.numel() else 0.0
    if lowest < -rounding:
        raise ValueError(
            f"the covariance of {name} is no covariance: its smallest eigenvalue is {lowest:.3g}, the largest "
            f"{float(values.max()):.3g}. If sums were subtracted or merged with weights, a weight was negative"
        )
    return Basis(vectors, values.clamp_min(0).to(dtype))


class Weights(NamedTuple):
    """What an inverse power multiplies eigenvectors by: one vector per side where it separates, else a grid."""

    sides: tuple[Tensor, ...] | None
    unseparable: Tensor | None = None

    @property
    def grid(self) -> Tensor:
        """The weight of every eigenvector."""
        if self.unseparable is not None:
            return self.unseparable
        assert self.sides is not None
        return outer_all(list(self.sides))


def inverse_weights(
    curvature: Curvature, power: float, damping: float, inversion: str, name: str = "this block"
) -> Weights:
    r"""Return the weights of `H^power` in the eigenbasis, in float64, with `c` the damping and `λ̄` the mean eigenvalue.

    | inversion | weight for power -1 |
    |---|---|
    | `damped` | `1 / (λ + c λ̄)` |
    | `absolute` | `1 / (λ + c)` |
    | `tikhonov` | `λ / (λ² + (c λ̄)²)` |
    | `pseudoinverse` | `1 / λ` where `λ > c λ̄` and above rounding, else 0 |
    | `factored` | `1 / ((λ_S + √δ/π)(λ_A + π √δ))`, `δ = c λ̄`, `π = √(λ̄_A / λ̄_S)` (Martens & Grosse 2015) |

    Another power `r` in [-1, 0] takes the weight to the power `-r`. With one side `factored` is `damped`.

    Args:
        curvature: the block's curvature.
        power: `r`.
        damping: `c ≥ 0`.
        inversion: which row of the table.
        name: the block's name, for errors.

    Returns:
        The weights.

    Raises:
        ValueError: if an option is out of range, an eigenvalue would be divided by zero, or the spectrum is corrected
            and the inversion needs it not to be.

    Example:
        >>> import torch
        >>> spectrum = Curvature((3,), (Basis(None, torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)),))
        >>> inverse_weights(spectrum, -1.0, 0.1, "damped").grid
        tensor([0.2400, 0.8571, 6.0000], dtype=torch.float64)
    """
    check_inversion(power, damping, inversion)
    if power == 0:
        return Weights(tuple(torch.ones_like(basis.values, dtype=torch.float64) for basis in curvature.bases))
    mean = curvature.mean
    if mean <= 0 and inversion not in ("absolute", "pseudoinverse"):
        raise ValueError(
            f"the curvature of {name} is zero: no gradient reached it, so damping={damping} relative to its mean "
            "eigenvalue is zero too. Leave it out of the targets (exclude=…), or use inversion='absolute'"
        )
    if inversion == "factored" and len(curvature.bases) == 2:
        return Weights(_factored(curvature, power, damping * mean, name))
    values = curvature.eigenvalues.double()
    shift = {"damped": damping * mean, "factored": damping * mean, "absolute": damping, "pseudoinverse": 0.0}
    if inversion == "tikhonov":
        _check_invertible(values + damping * mean, curvature, 0.0, inversion, name)
        weight = values / (values.square() + (damping * mean) ** 2)
    elif inversion == "pseudoinverse":
        kept = (values > damping * mean) & (values > rounding_of(curvature) * values.max())
        weight = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    else:
        _check_invertible(values + shift[inversion], curvature, shift[inversion], inversion, name)
        weight = 1 / (values + shift[inversion])
    powered = weight.pow(-power)
    return Weights((powered,)) if len(curvature.bases) == 1 else Weights(None, powered)


def check_inversion(power: float, damping: float, inversion: str) -> None:
    """Refuse options that make no inverse power.

    Raises:
        ValueError: naming the option.
    """
    if inversion not in INVERSIONS:
        raise ValueError(f"inversion must be one of {', '.join(INVERSIONS)}; got {inversion!r}")
    if not -1 <= power <= 0:
        raise ValueError(f"power must lie in [-1, 0]; got {power}")
    if not (damping >= 0 and damping < float("inf")):
        raise ValueError(f"damping must be a finite number, at least 0; got {damping}")


def _factored(curvature: Curvature, power: float, delta: float, name: str) -> tuple[Tensor, Tensor]:
    if curvature.corrected is not None:
        raise ValueError(
            f"inversion='factored' needs Kronecker factors, and the spectrum of {name} was corrected (EK-FAC), so it "
            "is no product of two sides any more. Use inversion='damped', or the uncorrected K-FAC factors"
        )
    left, right = (basis.values.double() for basis in curvature.bases)
    ratio = sqrt(float(right.mean()) / float(left.mean()))
    damped = (left + sqrt(delta) / ratio, right + ratio * sqrt(delta))
    for side in damped:
        _check_invertible(side, curvature, delta, "factored", name)
    return damped[0].pow(power), damped[1].pow(power)


def rounding_of(curvature: Curvature) -> float:
    """Return the share of the largest eigenvalue below which an eigenvalue is rounding."""
    return max(curvature.shape, default=1) * torch.finfo(curvature.bases[0].values.dtype).eps


def _check_invertible(damped: Tensor, curvature: Curvature, shift: float, inversion: str, name: str) -> None:
    """Refuse to divide by zero, or by what is zero up to the rounding of the covariance."""
    rounding = 0.0 if shift else rounding_of(curvature)
    smallest, largest = float(damped.min()), float(damped.max())
    if smallest <= rounding * largest:
        raise ValueError(
            f"the curvature of {name} has no inverse without damping (inversion={inversion!r}): its {damped.numel()} "
            f"eigenvalues span {smallest:.3g} to {largest:.3g}, so some directions have no data. Raise damping (0.1 is "
            "a common choice), or use inversion='pseudoinverse'"
        )


def replaced(curvature: Curvature, corrected: Tensor) -> Curvature:
    """Return the curvature with eigenvalues that were measured in its basis."""
    dims = tuple(basis.values.shape[0] for basis in curvature.bases)
    return replace(curvature, corrected=corrected.reshape(dims))
