"""A closed form beside what was measured: each row within its error, and all of a group as far off as errors allow.

A bias of 6 % may leave every row within four standard errors; six rows of it are no chance. Hence both tests.
"""

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FAR = 4.0  # standard errors
RARE = 0.001


class Row(NamedTuple):
    """One number.

    Attributes:
        name: what it is.
        oracle: what it should be.
        measured: what it is.
        error: its standard error where `random`, otherwise the most that it may be off.
        random: whether it was drawn.
        counted: whether it counts in the χ² of its group: a function of other rows' draws does not.
    """

    name: str
    oracle: float
    measured: float
    error: float
    random: bool = False
    counted: bool = False

    @property
    def off(self) -> float:
        """How far off, in errors."""
        gap = self.measured - self.oracle
        return gap / self.error if self.error > 0 else 0.0 if gap == 0 else float("inf")

    @property
    def agrees(self) -> bool:
        return isfinite(self.error) and abs(self.off) <= (FAR if self.random else 1.0)


class Group(NamedTuple):
    """Rows of one test.

    Attributes:
        rows: the rows.
        correlation: of the counted ones' errors; `None` where they are independent.
    """

    rows: list[Row]
    correlation: Tensor | None = None

    def chi_square(self) -> tuple[float, int]:
        """Return `zᵀ R⁻¹ z` of the counted rows, and how many they are."""
        z = torch.tensor([row.off for row in self.rows if row.counted], dtype=torch.float64)
        if not len(z):
            return 0.0, 0
        whitened = z if self.correlation is None else torch.linalg.solve(self.correlation, z)
        return float(z @ whitened), len(z)

    def chance(self) -> float:
        """Return the probability of a χ² at least as large; NaN without counted rows."""
        value, count = self.chi_square()
        return survival(value, count) if count else float("nan")

    @property
    def plausible(self) -> bool:
        """Whether the χ² is neither too large nor too small for errors so large."""
        return not self.chi_square()[1] or RARE <= self.chance() <= 1 - RARE

    def faults(self) -> list[str]:
        """Return what is wrong: rows that are off, and a χ² that is not plausible."""
        found = [f"{row.name}: {row.measured!r} for {row.oracle!r} ± {row.error!r}" for row in self.rows]
        found = [text for text, row in zip(found, self.rows, strict=True) if not row.agrees]
        if not self.plausible:
            value, count = self.chi_square()
            found.append(f"χ² = {value:.2f} of {count}, which has a chance of {self.chance():.2g}")
        return found


def survival(value: float, degrees: int) -> float:
    """Return `P(χ² > value)`: the regularised upper incomplete gamma function."""
    half = torch.tensor([degrees / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def exact(name: str, oracle: Any, measured: Any, tolerance: float) -> Row:
    """Return the row of a number that no chance is in."""
    return Row(name, float(oracle), float(measured), tolerance)


def drawn(name: str, oracle: Any, measured: Any, error: Any, counted: bool = True) -> Row:
    """Return the row of a number with a standard error."""
    return Row(name, float(oracle), float(measured), float(error), True, counted)


def worst(name: str, oracle: Any, measured: Any, rtol: float, atol: float) -> Row:
    """Return the entry of two trees that is furthest off, in `atol + rtol |oracle|`."""
    assert pytree.tree_structure(oracle) == pytree.tree_structure(measured), name
    pairs = zip(pytree.tree_leaves(oracle), pytree.tree_leaves(measured), strict=True)
    rows = []
    for one, two in pairs:
        expected, found = (torch.as_tensor(x).double().reshape(-1) for x in (one, two))
        assert expected.shape == found.shape, name
        errors = atol + rtol * expected.abs()
        gaps = (found - expected).abs()
        at = int(torch.where(gaps == 0, 0.0, gaps / errors).argmax())  # NaN counts as the largest
        rows.append(Row(name, float(expected[at]), float(found[at]), float(errors[at])))
    return max(rows, key=lambda row: float("inf") if row.off != row.off else abs(row.off))


def check(*groups: Group) -> None:
    """Assert that groups have no faults."""
    for group in groups:
        assert group.rows, "a group without rows shows nothing"
        assert not group.faults(), group.faults()
