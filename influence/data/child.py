"""A child process runs a stranger's function on items, within limits of time, memory and size.

A sandbox keeps a template from Python, not from looping for ever; a process can be ended.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
"""Linux's number for: send this process a signal when its parent ends."""


class Limits(NamedTuple):
    """The limits of one item.

    Attributes:
        seconds: processor time.
        memory: bytes beyond those of this process.
        result: characters of the result as JSON.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    result: int = 1 << 27


LIMITS = Limits()


class ItemError(ValueError):
    """A function failed on an item, whose number is `item`."""

    def __init__(self, item: int, message: str) -> None:
        """Store the item's number beside the message."""
        super().__init__(message)
        self.item = item


def in_child(function: Callable[[T], Any], items: Sequence[T], what: str, limits: Limits | None = None) -> list[Any]:
    """Return a function's results for items, computed in a forked child, which is ended at the limits (`LIMITS`).

    The child starts with a copy of this process's memory. Results must fit JSON; `what` names the function in messages.
    Without `fork` (Windows) the function is called here, without limits.

    Raises:
        ItemError: at the first item that fails, with the function's own message if it raised a ValueError, or with the
            limit.

    Example:
        >>> in_child(lambda text: text.upper(), ["a", "b"], "the template")
        ['A', 'B']
    """
    if not items:
        return []
    limits = LIMITS if limits is None else limits
    if not hasattr(os, "fork"):
        return [_unwrap(number, _result_of(function, item, limits), what) for number, item in enumerate(items)]
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads end there: the child has need of none
        child = os.fork()
    if not child:
        _work(function, items, limits, reader, writer)
    ended = True
    try:
        os.close(writer)
        with open(reader, encoding="ascii") as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        ended = False
    finally:
        if ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = [_unwrap(number, line, what) for number, line in enumerate(lines)]
    if len(found) < len(items):
        raise ItemError(len(found), _ending(what, status, limits))
    return found


def one_by_one(function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """Return a function's results for items, computed here without limits, with the errors of `in_child`.

    Raises:
        ItemError: at the first item that the function refuses.
    """
    found = []
    for number, item in enumerate(items):
        try:
            found.append(function(item))
        except ValueError as error:
            raise ItemError(number, str(error)) from error
    return found


def _unwrap(number: int, line: Any, what: str) -> Any:
    """Return an item's result, or raise its error."""
    kind, value = line
    if kind == "made":
        return value
    raise ItemError(number, value if kind == "refused" else f"{what} failed: {value}")


def _ending(what: str, status: int, limits: Limits) -> str:
    """Return why a child ended before its time."""
    if status == -signal.SIGPROF:
        return f"{what} was stopped after {limits.seconds:g} seconds: does it loop without an end?"
    return f"{what} ended its process (status {status}): is what it makes too large, or without an end?"


def _result_of(function: Callable[[T], Any], item: T, limits: Limits) -> list[Any]:
    """Return `[kind, value]`: a function's result for an item, or why there is none."""
    try:
        made = function(item)
        size = len(json.dumps(made))
    except MemoryError:
        return ["failed", f"it needs more than {limits.memory:,} bytes"]
    except ValueError as error:
        return ["refused", str(error)]
    except Exception as error:  # a program of somebody else's may raise anything; here it becomes a message
        return ["failed", f"{type(error).__name__}: {error}"]
    return ["made", made] if size <= limits.result else ["failed", f"it makes more than {limits.result:,} characters"]


def _work(function: Callable[[T], Any], items: Sequence[T], limits: Limits, reader: int, writer: int) -> NoReturn:
    """Do the child's work: a line of JSON for each item, up to the first that fails."""
    try:
        os.close(reader)
        gc.disable()  # what was collected here belongs to the parent: a graphics card's memory, say
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        _end_with_parent()
        _limit(limits.memory)
        with open(writer, "w", encoding="ascii") as out:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, limits.seconds)
                line = _result_of(function, item, limits)
                _write(out, line)
                if line[0] != "made":
                    break
    finally:
        os._exit(0)


def _write(out: IO[str], line: list[Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def _end_with_parent() -> None:
    """Have the child end when its parent is killed, so that no one holds the parent's locks (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(memory: int) -> None:
    """Limit this process to `memory` bytes more than it has, if the system says how many those are."""
    import resource

    place = Path("/proc/self/statm")
    if place.exists():
        has = int(place.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
