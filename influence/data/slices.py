"""The slice reader turns slices of a dataset into tokens, by settings checked once."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import compress
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.data.chat import SpannedText, marker, spanned_from
from influence.data.child import ItemError, in_child, one_by_one
from influence.data.documents import Document, TextFormat, read_documents, reader, require_columns
from influence.data.encode import encoder
from influence.data.parsing import LARGEST_ROW
from influence.data.sources import Records, column_names, slices
from influence.data.tokenized import Tokenized, flat
from influence.func.loss.losses import IGNORED

UNLIMITED = 10**9
"""A limit from which on there is none: a tokenizer without a limit says 1e30."""

FROM_PADDING = ("camembert", "data2vec-text", "longformer", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Models that count positions from behind the padding id, and so lose some of their position embeddings."""


def context_length(tokenizer: Any = None, config: Any = None) -> int | None:
    """Return the longest document that a model takes.

    Args:
        tokenizer: its tokenizer, which may know a limit (`model_max_length`).
        config: its config, which may know another (`max_position_embeddings`).

    Returns:
        The smaller of the limits; `None` where there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> context_length(SimpleNamespace(model_max_length=int(1e30)), SimpleNamespace(max_position_embeddings=128))
        128
    """
    limits = [getattr(tokenizer, "model_max_length", None)]
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(inner, "max_position_embeddings", None)
    if positions is not None and getattr(inner, "model_type", None) in FROM_PADDING:
        positions -= (inner.pad_token_id or 0) + 1
    limits.append(positions)
    return min((int(limit) for limit in limits if limit is not None and 0 < limit < UNLIMITED), default=None)


PLAIN = TextFormat()
"""Tokenised rows, or the column `text`."""


TOKENS = ("input_ids", "labels", "attention_mask")
"""The columns that are read of tokenised rows."""

RANGES = {
    "input_ids": (0, math.inf, "token ids, 0 or more"),
    "labels": (0, math.inf, f"token ids, 0 or more, or {IGNORED} for what does not count"),
    "attention_mask": (0, 1, "0 or 1"),
}
"""The range of each column's values, and its meaning."""


class SliceReader(NamedTuple):
    """The functions that turn slices of a dataset into tokens.

    Attributes:
        columns: the columns to read.
        read: from a slice's first row number and its rows to tokens.
        prompts: from rows to the prompt of each one's last answer.
        notice: a message for the user.
    """

    columns: list[str]
    read: Callable[[int, Records], Tokenized]
    prompts: Callable[[Records], list[str]]
    notice: str


def slice_reader(
    dataset: Any,
    tokenizer: Any,
    form: TextFormat,
    limit: int | None,
    separate: bool,
    scored: str | None,
    most: int = LARGEST_ROW,
) -> SliceReader:
    """Return the reader of a dataset's slices.

    Documents are cut to `limit` tokens, and refused above `most` bytes; plain texts end in the end-of-sequence token if
    `separate`; `scored` is a column of numbers to read too.

    Raises:
        ValueError: if a column or the tokenizer is missing.
    """
    columns = column_names(dataset)
    also = [] if scored is None else require_columns([scored], columns, "another name")
    if "input_ids" in columns and form == replace(PLAIN, end_of_turn=form.end_of_turn):
        ready = [name for name in columns if name in TOKENS]
        return SliceReader(_union(ready, also), partial(_read_tokens, limit, pad_of(tokenizer)), _prompt_tokens, "")
    named, document_of = reader(form, columns)
    if tokenizer is None:
        raise ValueError(f"text in {', '.join(map(repr, named))} needs a tokenizer: pass tokenizer=")
    mark, templated = marker(tokenizer)
    encode = encoder(tokenizer, limit, form.end_of_turn, tokenizer.eos_token_id if separate else None)
    pad, notice = pad_of(tokenizer), ""
    if not templated and (form.conversation_column or form.completion_column):
        notice = "the tokenizer has no chat template: turns were concatenated as they are"
        warnings.warn(notice, stacklevel=3)

    def marked_of(document: Document) -> SpannedText | None:
        return None if document.empty else mark(document)

    def within(document: Document) -> Document:
        if (size := document.bytes) > most:
            raise ValueError(
                f"its text has {size:,} bytes, and max_document_bytes={most} is the limit: a tokenizer takes two "
                "hundred times as much memory. Cut the document, or raise it"
            )
        return document

    def read(first: int, rows: Records) -> Tokenized:
        try:
            documents = one_by_one(within, read_documents(document_of, rows, form))
            if templated and any(document.messages for document in documents):
                marked = [spanned_from(parts) for parts in in_child(marked_of, documents, "the chat template")]
            else:
                marked = one_by_one(marked_of, documents)
        except ItemError as error:
            raise ValueError(f"row {first + error.item}: {error}") from error
        encoded = encode(marked)
        tokenized = flat(encoded.ids, encoded.labels, first, pad)
        return replace(tokenized, counts=tokenized.counts._replace(truncated=encoded.cut))

    def prompts(rows: Records) -> list[str]:
        documents = read_documents(document_of, rows, form)
        if any(document.text for document in documents):
            raise ValueError(
                "rewards compare answers to equal prompts, and plain text has none: pass completion_column"
            )
        return [document.prompt() for document in documents]

    return SliceReader(_union(named, also), read, prompts, notice)


def token_slices(
    dataset: Any, how: SliceReader, size: int, max_tokens: int | None, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Records, Tokenized]]:
    """Yield slices `rank`, `rank + world`, … of a dataset: first row number, rows, tokens.

    Stops before the document that would exceed `max_tokens` of all documents together: the last slice may be cut, to no
    row even. Other ranks' slices are tokenised only if tokens are counted.

    Raises:
        ValueError: if there is no row, or not one token fits.
    """
    begin, total = -1, 0
    for number, (begin, rows) in enumerate(slices(dataset, size, how.columns)):
        mine = number % world == rank
        if not mine and max_tokens is None:
            continue
        piece = how.read(begin, rows)
        kept = len(rows) if max_tokens is None else int((piece.offsets[1:] <= max_tokens - total).sum())
        if kept < len(rows):
            rows = rows[:kept]
            piece = how.read(begin, rows)  # again: what is counted is the kept rows alone
            if not total + len(piece.ids):
                raise ValueError(
                    f"max_tokens={max_tokens} keeps no token: the first document with any has more; raise it"
                )
            piece = replace(piece, counts=piece.counts._replace(stopped=begin + kept))
        if mine:
            yield begin, rows, piece
        if piece.counts.stopped:
            return
        total += len(piece.ids)
    if begin < 0:
        raise ValueError("the dataset is empty: it has no row")


def pad_of(tokenizer: Any) -> int:
    """Return the id that fills a batch: it is masked, so any will do if the tokenizer has none."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(number) for number in known if number is not None), 0)


def longest(tokenizer: Any, max_length: int | None, truncation: bool, chunk_length: int | None) -> int | None:
    """Return the most tokens of a document, after a check of the arguments.

    Raises:
        ValueError: if the arguments exclude one another.
    """
    limit = context_length(tokenizer) if max_length is None else max_length
    if limit is not None and limit < 1:
        raise ValueError(f"max_length must be at least 1; got {limit}")
    if truncation and chunk_length is not None:
        raise ValueError(
            "pass truncation=True, which drops what is too long, or chunk_length, which keeps it, not both"
        )
    if truncation and limit is None:
        raise ValueError("truncation=True needs max_length: the tokenizer knows no limit (see context_length)")
    if chunk_length is not None and limit is not None and chunk_length > limit:
        raise ValueError(f"chunk_length={chunk_length} is longer than max_length={limit}")
    return limit


def scores(reward: str | None, advantage: str | None, chunk_length: int | None, skip_nan: bool) -> str | None:
    """Return the column that weighs examples, after a check of the arguments.

    Raises:
        ValueError: if the arguments exclude one another.
    """
    if reward is not None and advantage is not None:
        raise ValueError("pass reward_column or advantage_column, not both")
    if skip_nan and reward is None:
        raise ValueError("skip_nan_rewards=True is for reward_column, which is not given")
    scored = reward or advantage
    if scored is not None and chunk_length is not None:
        raise ValueError(f"a chunk holds several documents and cannot have the weights of column {scored!r}")
    return scored


def none_too_long(tokenized: Tokenized, limit: int | None) -> Tokenized:
    """Return the documents, refused if one is too long.

    Raises:
        ValueError: saying how many are.
    """
    lengths = tokenized.lengths
    if limit is not None and len(lengths) and int(lengths.max()) > limit:
        long, worst = int((lengths > limit).sum()), int(lengths.argmax())
        raise ValueError(
            f"{long} of {len(lengths)} documents are longer than max_length={limit} tokens; the longest, row "
            f"{int(tokenized.index[worst])}, has {int(lengths[worst])}: pass truncation=True to cut them, "
            "chunk_length= to cut all documents into chunks, or a larger max_length if the model can see as much"
        )
    return tokenized


def numbers(rows: Records, name: str, first: int) -> Float[Tensor, " n"]:
    """Return a column of numbers, with NaN for `None` and 1 for true.

    Raises:
        ValueError: if a value is no number.
    """
    values = [row[name] for row in rows]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, Real):
            raise ValueError(f"column {name!r} must hold numbers; row {first + i} has {value!r}")
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def all_finite(values: Float[Tensor, " n"], name: str, first: int = 0) -> Float[Tensor, " n"]:
    """Return the values, refused if one is not finite.

    Raises:
        ValueError: naming the rows whose value is not.
    """
    rows = ((~values.isfinite()).nonzero().flatten() + first).tolist()
    if rows:
        raise ValueError(
            f"column {name!r} has {len(rows)} values that are no finite numbers: rows {rows[:10]}; repair them, or "
            "leave the rows out"
        )
    return values


def _union(names: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys([*names, *more]))


def _read_tokens(limit: int | None, pad: int, first: int, rows: Records) -> Tokenized:
    """Return the tokens of tokenised rows, without padding."""
    kept = [_unpadded(row, first + i) for i, row in enumerate(rows)]
    labels = [parts[-1][:limit] for parts in kept] if rows and "labels" in rows[0] else None
    tokenized = flat([parts[0][:limit] for parts in kept], labels, first, pad)
    cut = sum(limit is not None and len(parts[0]) > limit for parts in kept)
    return replace(tokenized, counts=tokenized.counts._replace(truncated=cut))


def _prompt_tokens(rows: Records) -> list[str]:
    """Return the tokens before the first labelled one."""
    if any("labels" not in row for row in rows):
        raise ValueError("rewards compare answers to equal prompts: tokenised rows need labels, -100 on the prompt")
    found = []
    for i, row in enumerate(rows):
        ids, labels = _unpadded(row, i)
        begin = next((k for k, label in enumerate(labels) if label != IGNORED), len(labels))
        found.append(str(ids[:begin]))
    return found


def _unpadded(row: Mapping[str, Any], number: int) -> list[list[int]]:
    """Return the token ids of a row, and its labels if it has any, without padding."""
    names = [name for name in TOKENS if name in row and not (name == "attention_mask" and row[name] is None)]
    parts = {name: _integers(row[name], name, number) for name in names}
    lengths = {name: len(part) for name, part in parts.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"row {number}: {', '.join(names)} must be of one length; got {[*lengths.values()]}")
    mask = parts.pop("attention_mask", None)
    return [part if mask is None else [*compress(part, mask)] for part in parts.values()]


def _integers(value: Any, name: str, number: int) -> list[int]:
    """Return a list of integers, which in a stream may be an array."""
    listed = value.tolist() if hasattr(value, "tolist") else [] if value is None else value
    if not isinstance(listed, list | tuple) or not all(issubclass(kind, Integral) for kind in {*map(type, listed)}):
        raise ValueError(
            f"row {number}: {name} must be the flat list of one document's whole numbers; got {str(listed)[:80]}"
        )
    least, most, meant = RANGES[name]
    strange = [one for one in {*listed} if not (least <= one <= most or (name == "labels" and one == IGNORED))]
    if strange:
        raise ValueError(
            f"row {number}: {name} has {strange[0]}, and {name} are {meant}: tokenise again, with the model's tokenizer"
        )
    return list(listed)
