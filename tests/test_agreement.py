"""The judge of closed forms sees a bias that every row hides, errors that are too large, and what is no number."""

import pytest
import torch

from tests.agreement import Group, Row, drawn, exact, survival, worst


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 10.827566), (2, 13.815511), (6, 22.457744), (27, 55.476020)], ids=str
)
def test_the_law_of_the_sum_of_squares_has_its_tabled_quantiles(degrees: int, quantile: float) -> None:
    assert survival(quantile, degrees) == pytest.approx(0.001, rel=1e-6)


def rows(*z: float) -> list[Row]:
    return [drawn("", 1.0, 1.0 + each / 10, 0.1) for each in z]


def test_a_bias_within_four_errors_of_every_row_is_seen() -> None:
    """Influences centred chain by chain were 7 % low: six rows, the furthest of which was 3.4 errors off."""
    biased = Group(rows(-3.42, 2.52, -0.01, -2.89, 0.73, 0.01))
    assert all(row.agrees for row in biased.rows)
    assert len(biased.faults()) == 1
    assert "χ²" in biased.faults()[0]
    assert not Group(rows(-1.4, 0.5, -0.01, -1.9, 0.73, 0.01)).faults()
    assert Group(rows(0.01, 0.01, -0.01, 0.02, 0.01, 0.01)).faults()  # errors ten times too large
    uncounted = [row._replace(counted=False) for row in biased.rows]
    assert not Group(uncounted).faults()


def test_rows_of_the_same_draws_count_once() -> None:
    tied = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    together = Group(rows(2.9, 2.9), tied)
    assert together.chi_square()[0] == pytest.approx(2.9**2 * 2 / 1.999)
    assert not together.faults()
    assert Group(rows(2.9, 2.9)).faults()
    assert Group(rows(2.0, -2.0), tied).faults()  # the same draws cannot be off in both directions


def test_what_is_off_or_no_number_is_a_fault() -> None:
    for row in (
        drawn("", 1.0, 1.41, 0.1),
        exact("", 1.0, 1.1, 0.09),
        exact("", 1.0, float("nan"), 9.0),
        exact("", 1.0, 1.0 + 1e-15, 0.0),
        drawn("", 1.0, 9.0, float("inf")),
        drawn("", 1.0, 1.0, float("nan")),
        worst("", torch.tensor([100.0, 0.001]), torch.tensor([100.5, 0.1]), 0.01, 0.0),  # the smaller gap is too large
        worst("", {"a": torch.zeros(3)}, {"a": torch.tensor([0.0, float("nan"), 5.0])}, 0.1, 0.1),
        worst("", [torch.ones(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)], 0.0, 0.0),
    ):
        assert Group([row]).faults(), row
    assert not Group([exact("", 1.0, 1.0, 0.0)]).faults()
    found = worst("", torch.tensor([1.0, 100.0]), torch.tensor([1.01, 100.1]), 0.01, 0.001)
    assert found.measured == pytest.approx(1.01)
    assert found.error == pytest.approx(0.011)
