"""The table of steps: every step by its name, for whatever makes one from stored settings or from a flag."""

from collections.abc import Callable, Mapping

from influence.func.transform.blocks import as_blocks, split_heads
from influence.func.transform.chain import Transform
from influence.func.transform.precondition import precondition
from influence.func.transform.project import project
from influence.func.transform.scale import scale_by_adafactor, scale_by_adam, unit_norm
from influence.func.transform.whiten import eigen_whiten

FACTORIES: tuple[Callable[..., Transform], ...] = (
    as_blocks,
    split_heads,
    scale_by_adam,
    scale_by_adafactor,
    precondition,
    eigen_whiten,
    project,
    unit_norm,
)

STEPS: Mapping[str, Callable[..., Transform]] = {factory.__name__: factory for factory in FACTORIES}
"""Each factory by its name. `STEPS[step.name](**step.settings)` makes a step again, with the tensors it needs."""
