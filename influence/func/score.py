"""Both sides of a score: transforms of queries and of training rows that together apply the inverse once."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from influence.func.normalize import unit_norm
from influence.func.precondition import BlockCurvature, precondition
from influence.func.project import project
from influence.func.similarity import dot
from influence.func.transform import CollectedRows, Transform, chain
from influence.types import Rows


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
