"""What the rows of a dataset say, for people: text as the run read it, chunks decoded from their tokens."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from influence.data import Tokenized
from influence.data.documents import Document, read_documents, reader
from influence.data.sources import column_names
from influence.pipelines.frame.configs import DataConfig
from influence.pipelines.frame.tokens import load_rows, text_format, tokens_of
from influence.visible import visible


def texts_of(
    config: DataConfig, tokenizer: Any, model: Any, strict: bool = False
) -> Callable[[Sequence[int]], list[str]]:
    """Return a function from rows of a run's dataset to what they say.

    Numbers are those of the run: of chunks where there were chunks, of the dataset's rows otherwise, also where the run
    used some of them only. A dataset that is gone says so, and nothing else fails.

    Args:
        config: the run's data.
        tokenizer: the run's tokenizer.
        model: transformers' config of the model.
        strict: let a dataset that is gone be an error.

    Returns:
        The function.
    """

    @lru_cache
    def rows() -> Any:
        return load_rows(config)

    @lru_cache
    def tokens() -> Tokenized:
        return tokens_of(config, rows(), tokenizer, model)

    def texts(numbers: Sequence[int]) -> list[str]:
        try:
            return _read(numbers)
        except (OSError, ValueError) as error:
            return [f"(its text cannot be read: {' '.join(str(error).split())[:120]})"] * len(numbers)

    def _read(numbers: Sequence[int]) -> list[str]:
        if config.chunk_length is not None:
            whole = tokens()
            return [tokenizer.decode(whole.take(n, n + 1).ids.tolist()) for n in numbers]
        found = [rows()[int(n)] for n in numbers]
        columns = column_names(rows())
        if "input_ids" in columns and config.prompt_column is None and config.template is None:
            ids = [row["input_ids"] or [] for row in found]
            return [str(row) if tokenizer is None else tokenizer.decode(row) for row in ids]
        form = text_format(config)
        _, document_of = reader(form, columns)
        return [_said(document) for document in read_documents(document_of, found, form)]

    return _read if strict else texts


def _said(document: Document) -> str:
    if document.text is not None:
        return document.text
    return "\n".join(f"{message['role']}: {message['content']}" for message in document.messages)


def highlighted(
    config: DataConfig, tokenizer: Any, model: Any, around: int = 12
) -> Callable[[Sequence[int], Sequence[int]], list[str]]:
    """Return a function from examples and positions to the text around each token, the token in «».

    Args:
        config: the run's data.
        tokenizer: the run's tokenizer.
        model: transformers' config of the model.
        around: tokens on either side that are shown.

    Returns:
        The function.
    """

    @lru_cache
    def whole() -> Tokenized:
        return tokens_of(config, load_rows(config), tokenizer, model)

    def marked(examples: Sequence[int], positions: Sequence[int]) -> list[str]:
        try:
            found = whole()
            return [_marked(found.take(n, n + 1).ids.tolist(), p) for n, p in zip(examples, positions, strict=True)]
        except (OSError, ValueError) as error:
            return [f"(its text cannot be read: {' '.join(str(error).split())[:120]})"] * len(examples)

    def _marked(ids: list[int], at: int) -> str:
        begin, end = max(0, at - around), at + around + 1
        before, token, after = map(tokenizer.decode, (ids[begin:at], ids[at], ids[at + 1 : end]))
        return f"{'…' * (begin > 0)}{before} «{token.strip()}» {after}{'…' * (end < len(ids))}".strip()

    return marked


def token_texts(config: DataConfig, tokenizer: Any, model: Any) -> Callable[[Sequence[int]], list[list[str]]]:
    """Return a function from examples to their tokens' texts, white space included: joined, they are the text.

    Args:
        config: the run's data.
        tokenizer: the run's tokenizer.
        model: transformers' config of the model.

    Returns:
        The function.
    """

    @lru_cache
    def whole() -> Tokenized:
        return tokens_of(config, load_rows(config), tokenizer, model)

    @lru_cache(1 << 16)
    def alone(number: int) -> str:
        return str(tokenizer.decode([number])).strip()

    def pieces(numbers: Sequence[int]) -> list[list[str]]:
        found = []
        for number in numbers:
            ids = whole().take(number, number + 1).ids.tolist()
            found.append(cut(str(tokenizer.decode(ids)), [alone(one) for one in ids]))
        return found

    return pieces


def cut(text: str, tokens: Sequence[str]) -> list[str]:
    """Return a text in as many pieces as it has tokens, cut behind each token where it is found in the text.

    A token that is not found in its place, such as a byte of a letter, has an empty piece; its text is with the next.

    Args:
        text: the text.
        tokens: what each token says alone, without white space.

    Returns:
        The pieces; joined, they are the text.

    Example:
        >>> cut("to be ...", ["to", "be", "\ufffd", "..."])
        ['to', ' be', '', ' ...']
    """
    pieces, at = [], 0
    for token in tokens:
        found = text.find(token, at)
        near = found >= 0 and not text[at:found].strip() if token else False
        end = found + len(token) if near else at
        pieces.append(text[at:end])
        at = end
    if pieces:
        pieces[-1] += text[at:]
    return pieces


def by_part(begins: Sequence[int], parts: Sequence[Callable[..., list[str]]]) -> Callable[..., list[str]]:
    """Return a function of numbers over several datasets, one behind the other, as appending makes them.

    Args:
        begins: the number of each dataset's first example.
        parts: for each, a function of its own numbers (and of whatever goes with each).

    Returns:
        The function of all numbers.

    Example:
        >>> by_part([0, 10], [lambda numbers: ["a"], lambda numbers: [f"b{n}" for n in numbers]])([11, 2])
        ['b1', 'a']
    """

    def texts(numbers: Sequence[int], *more: Sequence[int]) -> list[str]:
        places = [bisect_right(begins, number) - 1 for number in numbers]
        found: dict[int, str] = {}
        for part in dict.fromkeys(places):
            own = [k for k, place in enumerate(places) if place == part]
            asked = [numbers[k] - begins[part] for k in own]
            found |= zip(own, parts[part](asked, *([values[k] for k in own] for values in more)), strict=True)
        return [found[k] for k in range(len(numbers))]

    return texts


def short(text: str, most: int) -> str:
    """Return a text in one line of at most so many characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
