"""Conversations become text with the spans that the assistant says, for labels.

A span comes from the template itself: from its `{% generation %}` blocks or, without any, as the part of the text that
changes when the turn's content is replaced by a character that occurs nowhere else. The text is never searched for the
content: a template may strip it, and another turn may have the same.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from influence.data.documents import Document, Message

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The block by which a template marks what the model generates."""

PRIVATE = "\ue000\ue001\ue002\ue003"
"""Characters without a meaning: one that a conversation doesn't use stands for a turn's content."""


class Span(NamedTuple):
    """A labelled part of a text.

    Attributes:
        begin: its first character.
        end: the character after its last.
        stop: where the turn ends: the token that closes it lies between `end` and `stop`, if there is one.
        closed: whether a token that closes it may lie before `end` instead, though there is another after it.
    """

    begin: int
    end: int
    stop: int
    closed: bool = False


class SpannedText(NamedTuple):
    """A text and its labelled spans.

    Attributes:
        text: the text.
        spans: its labelled parts, in order; `None` for all of it.
        bare: whether it lacks the special tokens that the tokenizer puts around a text.
    """

    text: str
    spans: tuple[Span, ...] | None
    bare: bool


def spanned_from(parts: list[Any] | None) -> SpannedText | None:
    """Return a marked text from its JSON."""
    if parts is None:
        return None
    text, spans, bare = parts
    return SpannedText(text, None if spans is None else tuple(Span(*span) for span in spans), bare)


Render: TypeAlias = Callable[[Sequence[Message]], tuple[str, list[tuple[int, int]]]]
"""Messages to their text and the `{% generation %}` blocks in it."""


def marker(tokenizer: Any) -> tuple[Callable[[Document], SpannedText], bool]:
    """Return the function from documents to marked texts, and whether it renders a chat template (in a child, then).

    Without a chat template the turns are concatenated as they are, with the tokenizer's end-of-sequence token after
    each of the assistant's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return lambda document: _concatenated(document, tokenizer.eos_token or ""), False
    source = tokenizer.get_chat_template()
    generated = GENERATION.search(source) is not None

    def render(messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        # apply_chat_template(return_assistant_tokens_mask=True) drops every span after one that begins with a character
        # the tokenizer drops, and runs to the end where one ends so; its character spans are right
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                chat_template=source,
                return_assistant_tokens_mask=generated,
                **tokenizer.special_tokens_map,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template: {error}") from error
        texts, blocks = rendered
        return texts[0], list(blocks[0]) if generated else []

    import transformers.utils.chat_template_utils  # noqa: F401 (before the process that renders begins)

    @functools.cache
    def spans() -> Callable[[Sequence[Message], Render], SpannedText]:
        # this renders, so it waits until there is a document
        return _by_blocks if generated and _in_place(render) else _by_difference

    def mark(document: Document) -> SpannedText:
        if document.text is not None:
            return SpannedText(document.text, None, bare=True)
        return spans()(document.messages, render)

    return mark, True


def _in_place(render: Render) -> bool:
    """Whether the places of a template's blocks are right: transformers loses those that Jinja captures first."""
    answer = PRIVATE[0]
    try:
        text, blocks = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
    except ValueError:  # a template that wants other messages
        return True
    return answer not in text or any(answer in text[begin:end] for begin, end in blocks)


def _by_blocks(messages: Sequence[Message], render: Render) -> SpannedText:
    """Take the spans from the template's own blocks."""
    text, blocks = render(messages)
    tails: dict[int, str] = {}
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            shorter, inner = render(messages[: k + 1])
            tails |= {len(inner) - 1: shorter[inner[-1][1] :]} if inner else {}
    ends = [end + _common(text[end:], tails.get(number, "")) for number, (_, end) in enumerate(blocks)]
    spans = [Span(begin, end, stop, closed=True) for (begin, end), stop in zip(blocks, ends, strict=True)]
    return SpannedText(text, tuple(spans), bare=False)


def _by_difference(messages: Sequence[Message], render: Render) -> SpannedText:
    """Take the part that changes with a turn's content as its span.

    Raises:
        ValueError: if the template does more with a content than to put it, stripped or not, in one place, or the turn
            says more than its content.
    """
    text = render(messages)[0]
    spans = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        around = _around(messages, k, render)
        if around is None or not _fits(text, *around):
            raise ValueError(
                f"the chat template does not put the content of message {k} ({message['content'][:40]!r}) into the "
                "text in one place with the rest unchanged, so its tokens cannot be told apart: give the template "
                "{% generation %} … {% endgeneration %} around what the assistant says, or pass rows with input_ids "
                "and labels"
            )
        bare = {"role": message["role"], "content": message["content"]}
        if message != bare and render([*messages[:k], bare, *messages[k + 1 :]])[0] != text:
            raise ValueError(
                f"of message {k} ({message['content'][:40]!r}) the chat template also puts its "
                f"{', '.join(key for key in message if key not in bare)} into the text, which would have no labels: "
                "give the template {% generation %} … {% endgeneration %} around all that the assistant says"
            )
        head, tail = around
        end = len(text) - len(tail)
        if k + 1 < len(messages):
            alone = _around(messages[: k + 1], k, render)
            tail = tail[: _common(tail, alone[1] if alone else "")]
        spans.append(Span(len(head), end, end + len(tail)))
    return SpannedText(text, tuple(spans), bare=False)


def _around(messages: Sequence[Message], k: int, render: Render) -> tuple[str, str] | None:
    """Return the text before and after the content of turn `k`, if the content occurs once."""
    said = "".join(message["content"] for message in messages)
    mark = next((character for character in PRIVATE if character not in said), PRIVATE[0])
    pieces = render([*messages[:k], {**messages[k], "content": mark}, *messages[k + 1 :]])[0].split(mark)
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _fits(text: str, head: str, tail: str) -> bool:
    return len(head) + len(tail) <= len(text) and text.startswith(head) and text.endswith(tail)


def _concatenated(document: Document, closing: str) -> SpannedText:
    """Join turns without a template."""
    if document.text is not None:
        return SpannedText(document.text, None, bare=True)
    text, spans = "", []
    for message in document.messages:
        begin, text = len(text), text + message["content"]
        if message["role"] == "assistant":
            ending = "" if closing and text.endswith(closing) else closing
            spans.append(Span(begin, len(text), len(text) + len(ending)))
            text += ending
    return SpannedText(text, tuple(spans), bare=True)


def _common(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
