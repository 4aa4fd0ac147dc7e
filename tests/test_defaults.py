"""Defaults meet: no fit, transform, sink or reader refuses another because of a default."""

from tests.defaults import refusals


def test_every_pair_of_defaults_meets() -> None:
    found = refusals()
    assert len(found) > 150
    assert {pair: said for pair, said in found.items() if said} == {}
