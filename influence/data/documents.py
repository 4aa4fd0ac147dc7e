"""Documents: which columns of a row hold the text, and who speaks in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from influence.data import templates
from influence.data.child import in_child, one_by_one
from influence.data.templates import Template

Message: TypeAlias = dict[str, Any]
"""A turn of a conversation: `role`, `content`, and whatever else the chat template reads."""


@dataclass(frozen=True)
class TextFormat:
    """Which columns hold the text, and what of it is labelled.

    With nothing given: already tokenised rows where there is a column `input_ids`, the column `text` otherwise.

    Attributes:
        prompt_column: plain text, every token labelled; with a completion, its prompt.
        completion_column: what answers the prompt; only it is labelled.
        conversation_column: a list of messages with `role` and `content`; only the assistant's turns are labelled.
        template: a `Template`, a YAML file, or `"multiple_choice"`: makes the text, or prompt and completion.
        end_of_turn: label the token that ends a labelled turn too.
    """

    prompt_column: str | None = None
    completion_column: str | None = None
    conversation_column: str | None = None
    template: Template | str | Path | None = None
    end_of_turn: bool = True


class Document(NamedTuple):
    """The text of a row.

    Attributes:
        text: plain text, or `None`.
        messages: the turns of a conversation; empty for plain text.
    """

    text: str | None
    messages: tuple[Message, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is no text."""
        return not self.text and not any(message["content"] for message in self.messages)

    @property
    def bytes(self) -> int:
        """The bytes of the text, or of all turns."""
        parts = [self.text or "", *(message["content"] for message in self.messages)]
        return sum(len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass")) for part in parts)

    def prompt(self) -> str:
        """Return all turns before the last answer: answers to equal prompts have rewards that can be compared."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=0)
        return json.dumps(self.messages[:last], sort_keys=True, default=str)


def reader(form: TextFormat, columns: list[str]) -> tuple[list[str], Callable[[Mapping[str, Any]], Document]]:
    """Return the columns to read, and the function from a row to its document.

    Raises:
        ValueError: if a column is not there, or settings of the format exclude one another.

    Example:
        >>> read = reader(TextFormat("q", "a"), ["q", "a"])[1]
        >>> read({"q": "1 + 1 =", "a": " 2"}).messages
        ({'role': 'user', 'content': '1 + 1 ='}, {'role': 'assistant', 'content': ' 2'})
    """
    if form.template is not None:
        if form.prompt_column or form.completion_column or form.conversation_column:
            raise ValueError("a template makes prompt and completion itself: pass template or columns, not both")
        template = form.template if isinstance(form.template, Template) else templates.read(form.template)
        return columns, lambda row: _dialogue(*template.render(row))
    if form.conversation_column is not None:
        if form.prompt_column or form.completion_column:
            raise ValueError("pass conversation_column, or prompt_column and completion_column, not both")
        name = form.conversation_column
        return require_columns([name], columns, "conversation_column"), lambda row: Document(
            None, _messages(row[name], name)
        )
    prompt, completion = form.prompt_column or "text", form.completion_column
    if completion is None:
        return require_columns([prompt], columns, "prompt_column"), lambda row: Document(_text(row[prompt], prompt))
    named = require_columns([prompt, completion], columns, "prompt_column and completion_column")
    return named, lambda row: _dialogue(_text(row[prompt], prompt), _text(row[completion], completion))


def read_documents(
    document_of: Callable[[Mapping[str, Any]], Document], rows: Sequence[Mapping[str, Any]], form: TextFormat
) -> list[Document]:
    """Return the documents of rows by `reader`'s function; a template runs in a child process.

    Raises:
        ItemError: at the first row that has no document.
    """
    if form.template is None:
        return one_by_one(document_of, rows)
    return [Document(text, tuple(messages)) for text, messages in in_child(document_of, rows, "the template")]


def require_columns(names: list[str], columns: list[str], argument: str) -> list[str]:
    """Return names of columns, refusing those that are missing.

    Raises:
        ValueError: listing the columns.
    """
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(
            f"no column {', '.join(map(repr, missing))}; the dataset has {', '.join(map(repr, columns))}: "
            f"pass {argument}"
        )
    return names


def _text(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {name!r} must hold text; it has {value!r}, a {type(value).__name__}")
    return value or ""


def _dialogue(prompt: str, completion: str | None) -> Document:
    """Return a prompt and its completion as two turns; without a completion, plain text."""
    if completion is None:
        return Document(prompt)
    return Document(None, ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}))


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """Return the messages of a conversation, without the keys that only other rows have."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"column {name!r} must hold lists of messages; it has {value!r}")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message of column {name!r} must have 'role' and 'content', both text; got {message!r}")
    return tuple({key: part for key, part in message.items() if part is not None} for message in value)
