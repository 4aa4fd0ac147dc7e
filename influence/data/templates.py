"""Templates: YAML with Jinja which says how a row becomes text. Rendered in a sandbox.

The sandbox keeps a template from Python, not from looping for ever: whoever reads a dataset renders `apart`.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

from influence.data.parsing import shortly, text_of, yaml_of

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


FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice")


@dataclass(frozen=True)
class Template:
    """How a row becomes text.

    Attributes:
        text: Jinja of the text, or of the prompt where there is a target.
        target: Jinja of the completion, or the column that holds it; `None` for plain text.
        choices: Jinja of each choice, or of all of them, one a line, or the column that holds them. The target is then
            a choice, or its number counted from 0.
        name: what messages call the template.
    """

    text: str
    target: str | None = None
    choices: tuple[str, ...] | str | None = None
    name: str = "template"

    def render(self, row: Mapping[str, Any]) -> tuple[str, str | None]:
        r"""Return a row's text (or prompt), and its completion if there is one.

        Raises:
            ValueError: if the row lacks what the template uses, or its target is no choice.

        Example:
            >>> Template("Q: {{ question }}\nA:", "answer", ("yes", "no")).render({"question": "1 < 2?", "answer": 0})
            ('Q: 1 < 2?\nA:', 'yes')
        """
        text = self._jinja("doc_to_text", self.text, row)
        if self.target is None:
            return text, None
        target = self._value("doc_to_target", self.target, row)
        if self.choices is None:
            return text, "" if target is None else str(target)
        if isinstance(self.choices, str):
            found = self._value("doc_to_choice", self.choices, row)
            choices = found.splitlines() if isinstance(found, str) else [str(choice) for choice in found]
        else:
            choices = [self._jinja("doc_to_choice", choice, row) for choice in self.choices]
        if isinstance(target, str) and target in choices:
            return text, target
        place = int(target) if isinstance(target, bool) else target
        if isinstance(place, int | str) and str(place).isdecimal() and int(place) < len(choices):
            return text, choices[int(place)]
        raise ValueError(
            f"{self.name}: doc_to_target gave {target!r}, which is neither one of the {len(choices)} choices "
            f"{choices} nor its number, 0 to {len(choices) - 1}"
        )

    def _value(self, field: str, source: str, row: Mapping[str, Any]) -> Any:
        """Return what Jinja renders, or the value of a column."""
        if "{{" in source or "{%" in source:
            return self._jinja(field, source, row)
        if source not in row:
            raise ValueError(f"{self.name}: {field} names the column {source!r}; the row has {', '.join(row)}")
        return row[source]

    def _jinja(self, field: str, source: str, row: Mapping[str, Any]) -> str:
        from jinja2 import UndefinedError

        try:
            return str(compiled(source).render(row))
        except UndefinedError as error:
            raise ValueError(f"{self.name}: {field}: {error.message}; the row has {', '.join(row)}") from error
        except MemoryError:
            raise
        except Exception as error:  # whatever an expression may raise
            raise ValueError(f"{self.name}: {field} could not be rendered: {error}") from error


def environment() -> Any:
    """Return the sandbox: no row is changed, no attribute of Python reached; a name must be there, and may be None."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda value: "" if value is None else value
    )


@lru_cache(maxsize=64)
def compiled(source: str) -> Any:
    """Return Jinja ready to render: made once, not once a row."""
    return environment().from_string(source)


def read(source: str | Path) -> Template:
    """Read a template.

    Args:
        source: a YAML file, or the name of a template that ships with the package: `"multiple_choice"`.

    Returns:
        The template.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no template.

    Example:
        >>> read("multiple_choice").target
        'answer'
    """
    path = Path(source)
    shipped = {file.stem: file for file in Path(__file__).parent.glob("*.yaml")}
    if not path.is_file():
        if str(source) not in shipped:
            raise FileNotFoundError(f"no template file {source}; templates of the package: {', '.join(shipped)}")
        path = shipped[str(source)]
    return parse(text_of(path), str(source))


def parse(text: str, name: str = "template") -> Template:
    """Return the template that a YAML text describes.

    Args:
        text: YAML with `doc_to_text`, and optionally `doc_to_target` and `doc_to_choice`.
        name: what messages call it.

    Returns:
        The template.

    Raises:
        ValueError: saying what is wrong with it, and in which line.

    Example:
        >>> parse("doc_to_text: '{{ title }}: {{ body }}'").render({"title": "A", "body": "b"})
        ('A: b', None)
    """
    from jinja2 import TemplateSyntaxError

    fields = yaml_of(text, name)
    if not isinstance(fields, dict) or not isinstance(fields.get("doc_to_text"), str):
        raise ValueError(f"{name} must be a mapping with doc_to_text, a Jinja string, and optionally {FIELDS[1:]}")
    unknown = [str(field) for field in fields if field not in FIELDS]
    if unknown:
        raise ValueError(f"{name} has the unknown fields {', '.join(unknown)}; it may have {', '.join(FIELDS)}")
    target, choices = fields.get("doc_to_target"), fields.get("doc_to_choice")
    if target is None and choices is not None:
        raise ValueError(f"{name} has doc_to_choice but no doc_to_target, which chooses")
    if choices is not None and not isinstance(choices, list | str):
        raise ValueError(f"{name}: doc_to_choice must be a list, Jinja or a column; got {shortly(choices)}")
    each = choices if isinstance(choices, list) else []
    for field, value in ((FIELDS[1], target), *((FIELDS[2], choice) for choice in each)):
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"{name}: {field} must be Jinja, a column or a number; got {shortly(value)}")
    listed = tuple(map(str, choices)) if isinstance(choices, list) else choices
    template = Template(fields["doc_to_text"], None if target is None else str(target), listed, name)
    for field, source in (
        ("doc_to_text", template.text),
        ("doc_to_target", template.target or ""),
        *(("doc_to_choice", choice) for choice in (listed if isinstance(listed, tuple) else (listed or "",))),
    ):
        try:
            environment().parse(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{name}: {field}, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ValueError(f"{name}: {field} is nested too deeply") from error
    return template
