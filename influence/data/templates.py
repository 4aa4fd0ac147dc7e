"""Templates: YAML with Jinja that turns a row into text, rendered in a sandbox.

The sandbox keeps a template from Python, not from looping for ever: whoever reads a dataset renders `in_child`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from influence.data.parsing import shortly, text_of, yaml_of

FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice")


@dataclass(frozen=True)
class Template:
    """A recipe that turns a row into text.

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


def _sandbox() -> Any:
    """Return the sandbox: it changes no row and reaches no Python attribute; names must exist, and may be None."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda value: "" if value is None else value
    )


@lru_cache(maxsize=64)
def compiled(source: str) -> Any:
    """Return a compiled Jinja template; each source is compiled once, not once a row."""
    return _sandbox().from_string(source)


def read(source: str | Path) -> Template:
    """Return the template in a YAML file, or the package's own by name: `"multiple_choice"`.

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
    """Return the template in a YAML text with `doc_to_text`, and optionally `doc_to_target` and `doc_to_choice`.

    Raises:
        ValueError: saying what is wrong with it, and in which line; `name` is what it calls the template.

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
            _sandbox().parse(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{name}: {field}, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ValueError(f"{name}: {field} is nested too deeply") from error
    return template
