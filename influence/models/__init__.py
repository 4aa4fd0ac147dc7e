"""Models: loading them, and finding in any of them the blocks to attribute to."""

from influence.models.describe import describe, layer_matrices
from influence.models.load import load

__all__ = ["describe", "layer_matrices", "load"]
