"""Independent oracles: written from the formulas, sharing no code with the library they judge."""

from tests.oracles.loop import Truth, Worst, error, per_example

__all__ = ["Truth", "Worst", "error", "per_example"]
