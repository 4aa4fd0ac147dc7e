"""Each file describes one family of operations: what its uses add to a per-example gradient."""

from influence.func.engine.batched import Family
from influence.func.engine.ops import conv, elementwise, embedding, linear, norm

FAMILIES: dict[str, Family] = {
    operation: family
    for family in (linear.FAMILY, conv.FAMILY, embedding.FAMILY, norm.FAMILY, elementwise.FAMILY)
    for operation in family.operations
}
"""The family of each torch function, by its name; every other one is served by `ops.any`."""
