"""Texts of a run's examples, for people: as the run read them, chunks decoded from their tokens."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache
from typing import Any

from influence.data import Tokenized
from influence.data.documents import Document, read_documents, reader
from influence.data.sources import column_names
from influence.index import Index
from influence.pipelines.frame import recorded
from influence.pipelines.frame.configs import DataConfig, ModelConfig
from influence.pipelines.frame.loading import load_tokenizer
from influence.pipelines.frame.tokens import load_rows, text_format, tokens_of
from influence.visible import visible


def texts_of_run(
    index: Index, source: str | None = None, per_token: bool = False, trust: bool = False
) -> Callable[[Sequence[int]], list[Any]]:
    """Return a function from numbers of an index's examples to their texts, or to the texts of their tokens.

    Nothing is read before it is called.

    Args:
        index: the index, whose configuration says where its texts are.
        source: another dataset to read them from.
        per_token: return each text as its tokens' texts, if there is a tokenizer.
        trust: run code that comes with the tokenizer; the index cannot allow it.

    Returns:
        The function. It raises a `ValueError` that says what to do where the texts cannot be read.

    Raises:
        ValueError: if the index does not say where its texts are.
    """
    stored = index.about.config
    if not {"model", "data"} <= set(stored) and source is None:
        raise ValueError(
            f"{index.path} was built from Python, so it does not say where its texts are: pass --texts FILE, a dataset "
            "whose rows are numbered as the index's"
        )
    if source is None:
        begins, parts = datasets_of(index, recorded.data_of(stored["data"], index.path))
    else:
        known = DataConfig(source) if "data" not in stored else recorded.data_of(stored["data"], index.path, source)
        begins, parts = [0], [known]
    model = recorded.tokenizer_of(stored["model"], index.path, trust) if "model" in stored else None

    def texts(numbers: Sequence[int]) -> list[Any]:
        try:
            chunks = any(part.chunk_length is not None for part in parts)
            tokenizer, config = _tokenizer(model, needed=chunks or per_token)
            made: list[Callable[..., list[Any]]]
            if per_token and tokenizer is not None:
                made = [token_texts(part, tokenizer, config) for part in parts]
            else:
                made = [texts_of(part, tokenizer, config, strict=True) for part in parts]
            return (made[0] if len(made) == 1 else by_part(begins, made))(numbers)
        except IndexError as error:
            raise ValueError(
                f"examples of {index.path} are numbered up to {max(numbers)}, and {source or 'its dataset'} has fewer "
                "rows: pass --texts FILE, a dataset whose rows are numbered as the index's"
            ) from error
        except (ValueError, OSError) as error:
            raise ValueError(
                f"the texts of {index.path} cannot be read: {' '.join(str(error).split())[:300]}. Pass --texts FILE, "
                "where they are now"
            ) from error

    return texts


def datasets_of(index: Index, own: DataConfig) -> tuple[list[int], list[DataConfig]]:
    """Return the first example and the configuration of each dataset in an index: its own, and what was appended."""
    appended = [change for change in index.about.appended if "data" in change["config"]]
    begins = [0, *(int(index.about.plan["shards"][change["first"]][0]) for change in appended)]
    return begins, [own, *(recorded.data_of(change["config"]["data"], index.path) for change in appended)]


def _tokenizer(model: ModelConfig | None, needed: bool) -> tuple[Any, Any]:
    """Return a model's tokenizer and config; plain texts do without them, so there a model that is gone is no error."""
    if model is None:
        return None, None
    from transformers import AutoConfig

    tokenizer = config = None
    with nullcontext() if needed else suppress(ValueError, OSError):
        tokenizer = load_tokenizer(model)
    with suppress(ValueError, OSError):  # an adapter's folder has none
        config = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code)
    return tokenizer, config


def texts_of(
    config: DataConfig, tokenizer: Any, model: Any, strict: bool = False
) -> Callable[[Sequence[int]], list[str]]:
    """Return a function from row numbers of a run's dataset to their texts.

    Numbers are the run's: of chunks where there were chunks, of the dataset's rows otherwise, also where the run used
    some of them only. A dataset that is gone is an error if `strict`, and otherwise a text that says so. `model` is
    transformers' config of the model.
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
        return [_text(document) for document in read_documents(document_of, found, form)]

    return _read if strict else texts


def _text(document: Document) -> str:
    if document.text is not None:
        return document.text
    return "\n".join(f"{message['role']}: {message['content']}" for message in document.messages)


def highlighted(
    config: DataConfig, tokenizer: Any, model: Any, around: int = 12
) -> Callable[[Sequence[int], Sequence[int]], list[str]]:
    """Return a function from examples and positions to each token in «», with `around` tokens on either side."""

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
    """Return a function from examples to their tokens' texts, white space included: joined, they are the text."""

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
