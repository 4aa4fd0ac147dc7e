"""Both sides of a score: transforms of queries and of training rows that together apply the inverse once."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from influence.func.similarity import dot
from influence.func.transform.chain import CollectedRows, Transform, chain
from influence.func.transform.precondition import BlockCurvature, fitted_under, precondition
from influence.func.transform.project import project
from influence.func.transform.scale import unit_norm
from influence.types import Rows


class Sides(NamedTuple):
    """The transforms of both sides of a score, which together apply `H^{-1}` once.

    Attributes:
        query: for query rows.
        train: for training rows.
    """

    query: Transform
    train: Transform

    def scores(self, queries: Rows, train: Rows, unchecked: bool = False) -> Float[Tensor, "q n"]:
        """Return the inner products of query rows and training rows, each collected under its own side.

        Args:
            queries: rows collected under `query`.
            train: rows collected under `train`.
            unchecked: accept rows that do not say how they were made (a slice, or from elsewhere) as they are.

        Returns:
            `⟨query, train⟩`, positive where the example helps the query.

        Raises:
            ValueError: if rows do not say how they were made, or were made by another transform.
        """
        for rows, side, name in ((queries, self.query, "query"), (train, self.train, "train")):
            made = rows.transform if isinstance(rows, CollectedRows) else None
            if made is None and not unchecked:
                raise ValueError(
                    f"the {name} rows do not say how they were made; collect them with transform=sides.{name}, or pass "
                    "unchecked=True if you are sure that they are of this side"
                )
            if made is not None and made.fingerprint != side.fingerprint:
                raise ValueError(f"the {name} rows were made by {made}; this side is {side}")
        return dot(queries, train)


def one_sided(
    factors: BlockCurvature,
    damping: float = 0.1,
    inversion: str = "damped",
    dim: int | None = None,
    seed: int = 0,
    missing: str = "error",
    transform: Transform | None = None,
) -> Sides:
    """Return `H^{-1}` on the query and nothing on the training side: `g_q^T H^{-1} g_t`.

    Args:
        factors: the factors; their transform comes first on both sides.
        damping: `c`.
        inversion: the inversion.
        dim: project both sides after that; the query's whole gradient is formed, the training side folds. The sketch's
            noise grows with `‖H^{-1} g_q‖ ‖g_t‖`: `two_sided`, or `eigen_whiten` on both, need a smaller `dim`.
        seed: of the projection.
        missing: as in `precondition`.
        transform: the transform the factors were fitted under, where a loaded file could not restore it.

    Returns:
        Both sides.
    """
    start, end = _around(factors, dim, seed, transform)
    inverse = precondition(factors, power=-1.0, damping=damping, inversion=inversion, missing=missing)
    return Sides(chain(start, inverse, end), chain(start, end))


def two_sided(
    factors: BlockCurvature,
    damping: float = 0.1,
    inversion: str = "damped",
    dim: int | None = None,
    seed: int = 0,
    missing: str = "error",
    transform: Transform | None = None,
) -> Sides:
    """Return `H^{-1/2}` on both sides, then unit norm: the cosine in the metric of `H^{-1}`.

    Args:
        factors: the factors; their transform comes first on both sides.
        damping: `c`.
        inversion: the inversion; `"factored"` folds into the probe.
        dim: project after whitening, before the norm is taken.
        seed: of the projection.
        missing: as in `precondition`.
        transform: the transform the factors were fitted under, where a loaded file could not restore it.

    Returns:
        Both sides, which are the same.
    """
    start, end = _around(factors, dim, seed, transform)
    root = precondition(factors, power=-0.5, damping=damping, inversion=inversion, missing=missing)
    both = chain(start, root, end, unit_norm())
    return Sides(both, both)


def _around(
    factors: BlockCurvature, dim: int | None, seed: int, transform: Transform | None
) -> tuple[Transform, Transform]:
    return fitted_under(factors, transform), Transform() if dim is None else project(dim, seed=seed)
