"""Templates are programs of whoever wrote them: they run in a process apart, which has limits of time and memory."""

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
"""What Linux calls the signal that a process gets when its parent ends."""


class Limits(NamedTuple):
    """What one item may take.

    Attributes:
        seconds: of a processor.
        memory: bytes beyond what this process has.
        result: characters of what is made of it.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    result: int = 1 << 27


LIMITS = Limits()


class ItemError(ValueError):
    """Something could not be made of an item.

    Attributes:
        item: its number.
    """

    def __init__(self, item: int, message: str) -> None:
        """Say of which item."""
        super().__init__(message)
        self.item = item


def apart(function: Callable[[T], Any], items: Sequence[T], what: str, limits: Limits | None = None) -> list[Any]:
    """Return what a function makes of items, in a child of this process, which is ended if it takes too much.

    The child has this process's memory as it is now, and nothing that it does to it is seen here. Where processes have
    no children of this kind (Windows), the function is called here, without a limit.

    Args:
        function: from an item to what JSON holds.
        items: the items.
        what: whose program it is, for messages.
        limits: what one item may take; default `LIMITS`.

    Returns:
        For each item, what the function returned.

    Raises:
        ItemError: at the first item of which nothing could be made: with the function's own message if it raised a
            ValueError, or with the limit.

    Example:
        >>> apart(lambda text: text.upper(), ["a", "b"], "the template")
        ['A', 'B']
    """
    if not items:
        return []
    limits = LIMITS if limits is None else limits
    if not hasattr(os, "fork"):
        return [_raised(number, _told(function, item, limits), what) for number, item in enumerate(items)]
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
    found = [_raised(number, line, what) for number, line in enumerate(lines)]
    if len(found) < len(items):
        raise ItemError(len(found), _why(what, status, limits))
    return found


def each(function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """Return what a function of ours makes of items, here and without a limit; errors are those of `apart`.

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


def _raised(number: int, line: Any, what: str) -> Any:
    """Return an item's result, or raise its error."""
    kind, value = line
    if kind == "made":
        return value
    raise ItemError(number, value if kind == "refused" else f"{what} failed: {value}")


def _why(what: str, status: int, limits: Limits) -> str:
    if status == -signal.SIGPROF:
        return f"{what} was stopped after {limits.seconds:g} seconds: does it loop without an end?"
    return f"{what} ended its process (status {status}): is what it makes too large, or without an end?"


def _told(function: Callable[[T], Any], item: T, limits: Limits) -> list[Any]:
    """Return what a function makes of an item, or why it makes nothing."""
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
                line = _told(function, item, limits)
                _write(out, line)
                if line[0] != "made":
                    break
    finally:
        os._exit(0)


def _write(out: IO[str], line: list[Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def _end_with_parent() -> None:
    """See that a parent which is killed leaves nobody behind who holds its locks, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(memory: int) -> None:
    """Let this process have so much more memory than it has, where the system says how much it has."""
    import resource

    place = Path("/proc/self/statm")
    if place.exists():
        has = int(place.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
