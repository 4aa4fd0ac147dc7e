"""The table of steps: every step by its name, for whatever makes one from stored settings or from a flag."""

import ast
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature

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

GIVEN = frozenset({"factors", "moments"})
"""Arguments of factories that hold tensors: a file has their hash, so they must be at hand to make the step again."""


def written_step(text: str) -> Transform:
    """Return a step as it is written and printed, with literals for its settings.

    Raises:
        ValueError: if the table has no such step, or it does not take these settings.

    Example:
        >>> written_step("project(8, seed=1)")
        project(dim=8, seed=1, kind='rademacher', target='per_block')
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError("no call")
        name = call.func.id
        args = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{text!r} is no step: write it as name(setting=value, …), as in project(8, seed=1); the steps are "
            f"{', '.join(STEPS)}"
        ) from error
    if name not in STEPS:
        near = get_close_matches(name, STEPS)
        hint = f"did you mean {near[0]}?" if near else f"the steps are {', '.join(STEPS)}"
        raise ValueError(f"there is no step {name!r}: {hint}")
    if not GIVEN.isdisjoint(signature(STEPS[name]).parameters):
        raise ValueError(f"{name} needs tensors, which cannot be written: use the flags for it, or Python")
    try:
        return STEPS[name](*args, **named)
    except TypeError as error:
        raise ValueError(f"{text!r} does not fit {name}: {error}") from error
