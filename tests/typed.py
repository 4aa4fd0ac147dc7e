"""What checks the library in every test: shapes by jaxtyping, types by beartype, at every call of every function.

jaxtyping's own decorator makes two checkers whenever a function is defined, functions inside functions too, and checks
the arguments twice: that took more than half of the suite's time. This one makes one for a function's code, once.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

import jaxtyping

jaxtyped = jaxtyping.jaxtyped
_made: dict[CodeType, list[FunctionType]] = {}


def checked(fn: Any = None, *, typechecker: Any = None) -> Any:
    """Check what a function takes and returns, in a scope of axis names of its own, as `jaxtyping.jaxtyped` does."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if dataclasses.is_dataclass(fn):
        made = vars(fn).get("__init__")
        if isinstance(made, FunctionType) and made.__globals__ is not globals():  # one that is written is wrapped
            fn.__init__ = checked(made, typechecker=typechecker)
        return fn
    if not isinstance(fn, FunctionType) or inspect.isgeneratorfunction(fn) or _quoted(fn):
        return jaxtyped(fn, typechecker=typechecker)  # other classes, what yields, names that are not there at run time
    known = _checker(fn, typechecker)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with jaxtyped("context"):
            return known(*args, **kwargs)

    return call


def _quoted(fn: FunctionType) -> bool:
    return any(isinstance(hint, str) for hint in fn.__annotations__.values())


def _checker(fn: FunctionType, beartype: Callable[[FunctionType], FunctionType]) -> Callable[..., Any]:
    """Return beartype's checker of a function: made once for one that is defined inside another."""
    if "<locals>" not in fn.__qualname__:
        return beartype(fn)
    known = _made.setdefault(fn.__code__, [])
    for made in known:
        if made.__annotations__ == fn.__annotations__:
            return _of(made, fn)
    cells = tuple(CellType() for _ in fn.__closure__ or ())  # what is kept holds nothing of this call
    empty = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
    empty.__annotations__, empty.__kwdefaults__ = fn.__annotations__, fn.__kwdefaults__
    empty.__module__, empty.__qualname__ = fn.__module__, fn.__qualname__
    made = beartype(empty)
    if "__beartype_func" not in (getattr(made, "__kwdefaults__", None) or {}):  # where beartype keeps what it calls
        return beartype(fn)
    known.append(made)
    return _of(made, fn)


def _of(made: FunctionType, fn: FunctionType) -> FunctionType:
    """Return a checker for another function of the same code."""
    other = FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__)
    other.__kwdefaults__ = {**(made.__kwdefaults__ or {}), "__beartype_func": fn}
    return other
