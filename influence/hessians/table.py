"""The table of curvature methods by name: the command line's choices and the conformance tests follow from it."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from influence.hessians import autocorrelation, ekfac, kfac, shampoo, tkfac
from influence.hessians.method import Method

METHODS: Mapping[str, Callable[..., Method]] = {
    "kfac": kfac.build,
    "ekfac": ekfac.build,
    "tkfac": tkfac.build,
    "shampoo": shampoo.build,
    "autocorrelation": autocorrelation.build,
}
"""The builder of each method. A new method is a new file and a line here."""


def build(method: str, **options: Any) -> Method:
    """Return a method by its name, for command lines and settings in files.

    Args:
        method: a name of `METHODS`.
        **options: arguments of its builder. A `base` is given by name; it takes the options besides.

    Returns:
        The method.

    Raises:
        ValueError: if there is no such method, or it has no such option.

    Example:
        >>> from influence import hessians
        >>> hessians.build("ekfac", base="shampoo", max_side=512)
        ekfac(base='shampoo', max_side=512)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    builder = METHODS[method]
    takes = signature(builder).parameters
    if "base" in takes:
        return builder(build(options.pop("base", "kfac"), **options))
    for option in options:
        if option not in takes:
            known = f"its options are {', '.join(takes)}" if takes else "it has none"
            raise ValueError(f"{option} is no option of {method}, {known}: leave it out, or choose another method")
    return builder(**options)
