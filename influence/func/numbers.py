"""Numbers that are options: one that means nothing is refused by its name, before anything is computed."""

import math


def check_number(
    name: str, value: float | int, least: float | int = -math.inf, most: float | int = math.inf, *, above: bool = False
) -> None:
    """Refuse a number that is not finite, or out of range.

    Args:
        name: what the option is called.
        value: the number.
        least: the smallest that is allowed.
        most: the largest.
        above: whether `least` itself is refused too.

    Raises:
        ValueError: naming the option, what it may be and what it is.

    Example:
        >>> check_number("label_smoothing", float("nan"), 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: label_smoothing must be a finite number from 0 to 1; got nan
    """
    if math.isfinite(value) and least <= value <= most and not (above and value == least):
        return
    bound = f" above {least:g}" if above else "" if least == -math.inf else f" of at least {least:g}"
    if most < math.inf:
        bound = f"{bound}, at most {most:g}" if above else f" from {least:g} to {most:g}"
    raise ValueError(f"{name} must be a finite number{bound}; got {value}")
