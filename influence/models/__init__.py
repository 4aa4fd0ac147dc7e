"""Models: loading one, and finding the blocks of any to attribute to."""

from influence.models.describe import describe, layer_matrices
from influence.models.load import load

__all__ = ["describe", "layer_matrices", "load"]
