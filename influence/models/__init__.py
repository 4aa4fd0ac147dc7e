"""Models: loading them, and finding in any of them the blocks to attribute to."""

from influence.models.describe import describe
from influence.models.load import load
from influence.models.targets import layer_matrices

__all__ = ["describe", "layer_matrices", "load"]
