"""The encoder turns marked texts into token ids and labels, with special tokens added once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from influence.data.chat import Span, SpannedText
from influence.func.loss.losses import IGNORED


class TokenLists(NamedTuple):
    """Documents as tokens.

    Attributes:
        ids: token ids of each document.
        labels: as long, with -100 where there is none; `None` where every token is its own label.
        cut: how many documents were truncated.
    """

    ids: list[list[int]]
    labels: list[list[int]] | None
    cut: int


class SpecialTokens(NamedTuple):
    """The special tokens that a tokenizer puts around a text."""

    prefix: list[int]
    suffix: list[int]


def special_tokens_of(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens that a tokenizer puts around a text.

    Raises:
        ValueError: if it does more than to put tokens around, or knows no word.
    """
    plain = sorted({*range(min(64, len(tokenizer)))} - {*tokenizer.all_special_ids})
    words = ("a", "0", ".", *(tokenizer.decode([i]) for i in plain))
    for word in words:
        inner = tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = tokenizer(word)["input_ids"]
        for k in range(len(whole) - len(inner) + 1 if inner else 0):
            if whole[k : k + len(inner)] == inner:
                return SpecialTokens(whole[:k], whole[k + len(inner) :])
    if not any(tokenizer(word, add_special_tokens=False)["input_ids"] for word in words):
        raise ValueError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no token for any of {len(words)} words, its own among "
            "them: Transformers loads some model types' (Qwen2's) as that type's own, whatever was saved. Copy the "
            "tokenizer's files into a folder without the model, and pass that folder as the tokenizer (--tokenizer)"
        )
    raise ValueError("the tokenizer's special tokens are not a prefix and a suffix: pass rows with input_ids instead")


def encoder(
    tokenizer: Any, limit: int | None, end_of_turn: bool, separator: int | None = None
) -> Callable[[Sequence[SpannedText | None]], TokenLists]:
    """Return the function from marked texts to tokens; an empty document, `None`, gets no special token either.

    Documents are cut to `limit` tokens, closing special tokens included. `end_of_turn` labels the special token that
    ends a labelled turn; `separator` is put after each plain text that does not end in it.

    Raises:
        ValueError: if the tokenizer cannot say which characters a token came from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token came from: use a fast tokenizer "
            "(AutoTokenizer.from_pretrained), or pass rows with input_ids and labels"
        )
    frame = special_tokens_of(tokenizer)
    around = len(frame.prefix) + len(frame.suffix)
    if limit is not None and limit <= around:
        raise ValueError(f"max_length={limit} leaves no room beside the tokenizer's {around} special tokens")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}

    def encode(texts: Sequence[SpannedText | None]) -> TokenLists:
        said = [text for text in texts if text is not None]
        spanned = any(text.spans is not None for text in said)
        if not said:
            return TokenLists([[] for _ in texts], None, 0)
        got = tokenizer(
            [text.text for text in said],
            add_special_tokens=False,
            return_offsets_mapping=spanned,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = iter(got["offset_mapping"] if spanned else [[]] * len(said))
        bodies, cut = iter(got["input_ids"]), 0
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for text in texts:
            body, where = ([], []) if text is None else (next(bodies), next(offsets))
            if text is None or not body:
                ids.append([])
                labels.append([])
                continue
            if text.spans is None:
                marked, last = [True] * len(body) if spanned else [], True
            else:
                marked = _mark_tokens(text, body, where, special, end_of_turn)
                last = end_of_turn and bool(text.spans) and text.spans[-1].end == len(text.text)
            prefix, suffix = frame if text.bare else SpecialTokens([], [])
            prefix = [] if body[: len(prefix)] == prefix else prefix
            closing = [last] * len(suffix)
            if suffix and body[-len(suffix) :] == suffix:  # it stays at the end when the text is cut
                closing, marked, body = marked[-len(suffix) :], marked[: -len(suffix)], body[: -len(suffix)]
            if separator is not None and text.spans is None and [*body, *suffix][-1:] != [separator]:
                suffix, closing = [*suffix, separator], [*closing, last]
            room = len(body) if limit is None else limit - len(prefix) - len(suffix)
            cut += len(body) > room
            tokens = [*prefix, *body[:room], *suffix]
            ids.append(tokens)
            if spanned:
                keep = [*[text.spans is None] * len(prefix), *marked[:room], *closing]
                labels.append([token if kept else IGNORED for token, kept in zip(tokens, keep, strict=True)])
        return TokenLists(ids, labels if spanned else None, cut)

    return encode


def _mark_tokens(
    text: SpannedText, ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: set[int], end_of_turn: bool
) -> list[bool]:
    """Return which tokens are labelled: those with a character in a span, and the special token that ends it.

    A turn ends with the first special token of its tail that has nothing but whitespace before it, or else with one
    that a span has among its last; a span that may be closed has that one first.
    """
    marked, begin = [False] * len(ids), 0
    reach = _reach(offsets)
    for span in text.spans or ():
        while begin < len(ids) and reach[begin][1] <= span.begin:
            begin += 1
        end = begin
        while end < len(ids) and max(reach[end][0], span.begin) < span.end:  # none of an empty span
            end += 1
        inner = _inner_closing(text.text, ids, reach, begin, end, special)
        outer = _outer_closing(text.text, ids, reach, end, span, special)
        if inner is not None and (span.closed or outer is None):
            end = end if end_of_turn else inner
        elif outer is not None and end_of_turn:
            end = outer + 1
        marked[begin:end] = [True] * (end - begin)
    return marked


def _reach(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return each token's range of characters; one whose whitespace was trimmed to nothing gets it back."""
    reach, before = [], 0
    for begin, end in offsets:
        reach.append((begin, end) if begin < end else (min(begin, before), end))
        before = end
    return reach


def _inner_closing(
    text: str, ids: Sequence[int], reach: Sequence[tuple[int, int]], begin: int, end: int, special: set[int]
) -> int | None:
    """Return the first of the special tokens that end a span; whitespace between them doesn't count."""
    found = None
    for k in range(end - 1, begin - 1, -1):
        if ids[k] in special:
            found = k
        elif text[slice(*reach[k])].strip():
            break
    return found


def _outer_closing(
    text: str, ids: Sequence[int], reach: Sequence[tuple[int, int]], end: int, span: Span, special: set[int]
) -> int | None:
    """Return the special token that ends a turn after its span."""
    for k in range(end, len(ids)):
        if reach[k][1] > span.stop:
            return None
        if ids[k] in special:
            return k
        if text[slice(*reach[k])].strip():
            return None
    return None
