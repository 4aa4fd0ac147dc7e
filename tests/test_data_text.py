"""Token ids and labels against ones written out by hand, for each convention of tokenizers and chat templates."""

import json
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.data import TextFormat, load, tokenize
from influence.data.child import one_by_one
from tests import tokenizers_zoo as zoo

NO = -100
PAIR = TextFormat("p", "c")
TURNS = TextFormat(conversation_column="m")
OPEN_PAIR = TextFormat("p", "c", end_of_turn=False)
OPEN_TURNS = TextFormat(conversation_column="m", end_of_turn=False)

ASK = {"p": "ok?", "c": " yes"}
# the answer is in the question, and both answers are the same: a search for texts finds the wrong place
SAME = {
    "m": [
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": " ok "},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": " ok "},
    ]
}


class Golden(NamedTuple):
    name: str
    tokenizer: Any
    row: dict[str, Any]
    form: TextFormat
    ids: list[int]
    labels: list[int]


def all_labelled(name: str, tokenizer: Any, text: str | None, ids: list[int]) -> Golden:
    return Golden(name, tokenizer, {"text": text}, TextFormat(), ids, ids)


CASES = [
    # plain text: each tokenizer's special tokens, once
    all_labelled("no special tokens", zoo.bpe(), "hi ok", [40, 43]),
    all_labelled("BOS", zoo.bpe(bos=True), "hi ok", [0, 40, 43]),
    all_labelled("EOS", zoo.bpe(eos=True), "hi ok", [40, 43, 1]),
    all_labelled("BOS and EOS", zoo.bpe(bos=True, eos=True), "hi ok", [0, 40, 43, 1]),
    all_labelled("a text that brings its BOS", zoo.bpe(bos=True), "<s>hi", [0, 40]),
    all_labelled("a text that brings its EOS", zoo.bpe(bos=True, eos=True), "hi</s>", [0, 40, 1]),
    all_labelled("WordPiece", zoo.wordpiece(), "hi yess", [2, 4, 6, 8, 3]),
    all_labelled("a text that brings [CLS] and [SEP]", zoo.wordpiece(), "[CLS] ok [SEP]", [2, 5, 3]),
    all_labelled("few letters, BOS", zoo.letters("ACGT"), "GAT", [0, 4, 2, 5]),
    all_labelled("an empty text gets no special tokens", zoo.bpe(bos=True, eos=True), "", []),
    all_labelled("no text", zoo.bpe(bos=True), None, []),
    all_labelled("whitespace, which WordPiece drops", zoo.wordpiece(), "  ", []),
    # prompt and completion under a chat template
    Golden(
        "a template with BOS, a tokenizer with BOS",  # <s> <|user|> ok ? <|end|> <|assistant|> Ġyes <|end|>
        zoo.bpe(bos=True, eos=True, chat=zoo.CHAT),
        ASK,
        PAIR,
        [0, 3, 42, 6, 5, 4, 46, 5],
        [NO, NO, NO, NO, NO, NO, 46, 5],
    ),
    Golden(
        "without the end of turn",
        zoo.bpe(bos=True, chat=zoo.CHAT),
        ASK,
        OPEN_PAIR,
        [0, 3, 42, 6, 5, 4, 46, 5],
        [NO, NO, NO, NO, NO, NO, 46, NO],
    ),
    Golden(
        "nothing completed but the turn",
        zoo.bpe(chat=zoo.CHAT),
        {"p": "a", "c": ""},
        PAIR,
        [0, 3, 10, 5, 4, 5],
        [NO, NO, NO, NO, NO, 5],
    ),
    Golden(
        "an answer that ends in a special token of its own",  # as a call of a tool may
        zoo.bpe(chat=zoo.CHAT),
        {"p": "ok?", "c": " yes</s>"},
        PAIR,
        [0, 3, 42, 6, 5, 4, 46, 1, 5],
        [NO, NO, NO, NO, NO, NO, 46, 1, 5],
    ),
    Golden(
        "the same, without the end of turn",
        zoo.bpe(chat=zoo.CHAT),
        {"p": "ok?", "c": " yes</s>"},
        OPEN_PAIR,
        [0, 3, 42, 6, 5, 4, 46, 1, 5],
        [NO, NO, NO, NO, NO, NO, 46, 1, NO],
    ),
    Golden("an empty document", zoo.bpe(chat=zoo.CHAT), {"p": "", "c": None}, PAIR, [], []),
    # conversations
    Golden(
        "the same answer twice",
        zoo.bpe(chat=zoo.CHAT),
        SAME,
        TURNS,
        [0, 3, 42, 5, 4, 43, 7, 5, 3, 42, 5, 4, 43, 7, 5],
        [NO, NO, NO, NO, NO, 43, 7, 5, NO, NO, NO, NO, 43, 7, 5],
    ),
    Golden(
        "a template that strips whitespace",  # <s> u : Ġok Ċ a : Ġok Ġ </s> Ċ, twice
        zoo.bpe(bos=True, chat=zoo.STRIPPING),
        SAME,
        TURNS,
        [0, 30, 9, 43, 8, 10, 9, 43, 7, 1, 8] * 2,
        [NO, NO, NO, NO, NO, NO, NO, 43, 7, 1, NO] * 2,
    ),
    Golden(
        "the same, without the end of turn",
        zoo.bpe(bos=True, chat=zoo.STRIPPING),
        SAME,
        OPEN_TURNS,
        [0, 30, 9, 43, 8, 10, 9, 43, 7, 1, 8] * 2,
        [NO, NO, NO, NO, NO, NO, NO, 43, NO, NO, NO] * 2,
    ),
    Golden(
        "nothing said, in the middle of a token",  # u : Ġok Ċ a : ĠĠ </s> Ċ: a character of nothing is in no token
        zoo.bpe(chat=zoo.STRIPPING),
        {"p": "ok", "c": ""},
        OPEN_PAIR,
        [0, 30, 9, 43, 8, 10, 9, 47, 1, 8],
        [NO] * 10,
    ),
    Golden(
        "offsets without their whitespace",  # as GPT-2's
        zoo.trimming_bpe(chat=zoo.STRIPPING),
        SAME,
        TURNS,
        [0, 30, 9, 43, 8, 10, 9, 43, 7, 1, 8] * 2,
        [NO, NO, NO, NO, NO, NO, NO, 43, 7, 1, NO] * 2,
    ),
    Golden(
        "{% generation %} with the end of turn inside",
        zoo.bpe(bos=True, chat=zoo.GENERATION),
        SAME,
        TURNS,
        [3, 42, 5, 8, 4, 43, 7, 5] * 2,
        [NO, NO, NO, NO, NO, 43, 7, 5] * 2,
    ),
    Golden(
        "the same, without the end of turn",
        zoo.bpe(chat=zoo.GENERATION),
        SAME,
        OPEN_TURNS,
        [3, 42, 5, 8, 4, 43, 7, 5] * 2,
        [NO, NO, NO, NO, NO, 43, 7, NO] * 2,
    ),
    Golden(
        "{% generation %} with the end of turn outside",
        zoo.bpe(chat=zoo.GENERATION_OPEN),
        SAME,
        TURNS,
        [3, 42, 5, 4, 43, 7, 5] * 2,
        [NO, NO, NO, NO, 43, 7, 5] * 2,
    ),
    Golden(
        "the same, without the end of turn",
        zoo.bpe(chat=zoo.GENERATION_OPEN),
        SAME,
        OPEN_TURNS,
        [3, 42, 5, 4, 43, 7, 5] * 2,
        [NO, NO, NO, NO, 43, 7, NO] * 2,
    ),
    Golden(
        "a block that begins with whitespace the tokenizer drops",  # transformers' own mask loses it, and all after it
        zoo.wordpiece(
            chat="{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %} "
            "{{ m.content }}{% endgeneration %}{% else %} {{ m.content }}{% endif %} {% endfor %}"
        ),
        SAME,
        TURNS,
        [11, 10, 5, 12, 10, 5] * 2,
        [NO, NO, NO, NO, NO, 5] * 2,
    ),
    Golden(
        "a template without an end of turn: the next header is none",
        zoo.bpe(chat=zoo.WITHOUT_END),
        SAME,
        TURNS,
        [3, 42, 4, 43, 7] * 2,
        [NO, NO, NO, 43, 7] * 2,
    ),
    Golden(
        "nor is it behind {% generation %}",
        zoo.bpe(chat=zoo.WITHOUT_END_BLOCKS),
        SAME,
        TURNS,
        [3, 42, 4, 43, 7] * 2,
        [NO, NO, NO, 43, 7] * 2,
    ),
    Golden(
        "two blocks a turn and no end of it: the next header is none",
        zoo.bpe(chat=zoo.TWO_BLOCKS),
        SAME,
        TURNS,
        [3, 42, 4, 40, 6, 43, 7] * 2,
        [NO, NO, NO, 40, NO, 43, 7] * 2,
    ),
    Golden(
        "blocks that Jinja captures, which transformers then counts from the wrong place",
        zoo.bpe(chat=zoo.MISPLACED),
        SAME,
        TURNS,
        [0, *[3, 42, 5, 4, 43, 7, 5] * 2],
        [NO, *[NO, NO, NO, NO, 43, 7, 5] * 2],
    ),
    Golden(
        "a token of whitespace alone, whose offsets are empty",  # as GPT-2's
        zoo.trimming_bpe(chat=zoo.CHAT),
        SAME,
        OPEN_TURNS,
        [0, 3, 42, 5, 4, 43, 7, 5, 3, 42, 5, 4, 43, 7, 5],
        [NO, NO, NO, NO, NO, 43, 7, NO, NO, NO, NO, NO, 43, 7, NO],
    ),
    Golden(
        "a template of words alone",
        zoo.wordpiece(chat=zoo.WORDS_ONLY),
        SAME,
        TURNS,
        [11, 10, 5, 12, 10, 5] * 2,
        [NO, NO, NO, NO, NO, 5] * 2,
    ),
    Golden(
        "a template that treats the last turn differently",  # as Qwen3's empty thoughts: no prefix of the whole
        zoo.bpe(chat=zoo.LAST_TURN_DIFFERS),
        SAME,
        TURNS,
        [3, 42, 5, 4, 43, 7, 5, 3, 42, 5, 4, 42, 43, 43, 7, 5],
        [NO, NO, NO, NO, 43, 7, 5, NO, NO, NO, NO, NO, NO, 43, 7, 5],
    ),
    Golden(
        "a template that forgets what was thought before",  # as Qwen3: yes? is thought, ok is said
        zoo.bpe(chat=zoo.THINKING),
        {"m": [{"role": role, "content": "yes?ok"} for role in ("user", "assistant", "user", "assistant")]},
        TURNS,
        [3, 42, 5, 4, 42, 5, 3, 42, 5, 4, 40, 45, 6, 42, 5],
        [NO, NO, NO, NO, 42, 5, NO, NO, NO, NO, NO, 45, 6, 42, 5],
    ),
    Golden(
        "nobody answers",
        zoo.bpe(chat=zoo.CHAT),
        {"m": SAME["m"][:1]},
        TURNS,
        [0, 3, 42, 5],
        [NO] * 4,
    ),
    Golden("no messages", zoo.bpe(chat=zoo.CHAT), {"m": []}, TURNS, [], []),
]

CONCATENATED = [
    Golden("no template, BOS", zoo.bpe(bos=True), ASK, PAIR, [0, 42, 6, 46, 1], [NO, NO, NO, 46, 1]),
    Golden("no template, EOS once", zoo.bpe(eos=True), ASK, PAIR, [42, 6, 46, 1], [NO, NO, 46, 1]),
    Golden("no template, open", zoo.bpe(eos=True), ASK, OPEN_PAIR, [42, 6, 46, 1], [NO, NO, 46, NO]),
    Golden(
        "no template, a completion that brings its EOS",
        zoo.bpe(),
        {"p": "ok?", "c": " yes</s>"},
        PAIR,
        [42, 6, 46, 1],
        [NO, NO, 46, 1],
    ),
    Golden("no template, [SEP]", zoo.wordpiece(), ASK, PAIR, [2, 5, 9, 6, 3], [NO, NO, NO, 6, 3]),
    Golden("no template, [SEP], open", zoo.wordpiece(), ASK, OPEN_PAIR, [2, 5, 9, 6, 3], [NO, NO, NO, 6, NO]),
    Golden(
        "a token across the border",  # h|i: the token holds a character of the completion
        zoo.bpe(),
        {"p": "h", "c": "i"},
        PAIR,
        [40, 1],
        [40, 1],
    ),
    Golden(
        "no template, turns",
        zoo.bpe(),
        SAME,
        TURNS,
        [42, 43, 7, 1, 42, 43, 7, 1],
        [NO, 43, 7, 1, NO, 43, 7, 1],
    ),
]


def tokens(case: Golden, **settings: Any) -> tuple[list[int], list[int]]:
    got = tokenize(load([case.row]), case.tokenizer, case.form, **settings)
    labels = got.ids if got.labels is None else got.labels
    return got.ids.tolist(), labels.tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ids_and_labels_are_those_written_by_hand(case: Golden) -> None:
    assert tokens(case) == (case.ids, case.labels)


@pytest.mark.parametrize("case", CONCATENATED, ids=lambda case: case.name)
def test_without_a_chat_template_turns_are_concatenated_with_a_notice(case: Golden) -> None:
    with pytest.warns(UserWarning, match="no chat template: turns were concatenated"):
        assert tokens(case) == (case.ids, case.labels)


def here(function: Any, items: Any, what: str) -> Any:
    """What `in_child` returns, without a child."""
    return json.loads(json.dumps(one_by_one(function, items)))


@pytest.mark.parametrize("chat", [zoo.CHAT, zoo.CHAT_BLOCKS], ids=["by difference", "by blocks"])
@pytest.mark.parametrize("end_of_turn", [True, False])
@settings(max_examples=50)
@given(
    talk=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("okyes h:?\n", max_size=12)), max_size=6)
)
def test_any_conversation_has_its_answers_labelled(chat: str, end_of_turn: bool, talk: list[tuple[str, str]]) -> None:
    # special tokens part the text, so the whole is the turns' own tokens, one after the other
    tokenizer = zoo.bpe(chat=chat)
    ids, labels = [0], [NO]
    for role, content in talk:
        own = tokenizer(content)["input_ids"]
        ids += [3 if role == "user" else 4, *own, 5]
        labels += [NO] * (len(own) + 2) if role == "user" else [NO, *own, 5 if end_of_turn else NO]
    row = {"m": [{"role": role, "content": content} for role, content in talk]}
    said = any(content for _, content in talk)
    expected = (ids, labels) if said else ([], [])
    form = TextFormat(conversation_column="m", end_of_turn=end_of_turn)
    with mock.patch("influence.data.slices.in_child", here):  # a child for each is slow
        assert tokens(Golden("", tokenizer, row, form, *expected)) == expected


@pytest.mark.parametrize("length", range(1, 15))
def test_a_span_cut_anywhere_keeps_what_is_left_of_its_labels(length: int) -> None:
    # cut half-way, or gone altogether: the labels are those of the whole, cut
    case = next(case for case in CASES if case.name == "the same answer twice")
    assert tokens(case, max_length=length, truncation=True) == (case.ids[:length], case.labels[:length])


def test_truncation_keeps_what_the_tokenizer_puts_at_the_end() -> None:
    got = tokenize(load([{"text": "hi ok yes no"}]), zoo.wordpiece(), max_length=4, truncation=True)
    assert got.ids.tolist() == [2, 4, 5, 3]
    assert got.counts.truncated == 1
    # whoever put it there
    got = tokenize(load([{"text": "hi ok yes no [SEP]"}]), zoo.wordpiece(), max_length=4, truncation=True)
    assert got.ids.tolist() == [2, 4, 5, 3]
    rows = load([{"p": "hi", "c": " ok yes no</s>"}])
    with pytest.warns(UserWarning, match="no chat template"):
        got = tokenize(rows, zoo.bpe(eos=True), PAIR, max_length=3, truncation=True)
    assert got.labels is not None
    assert (got.ids.tolist(), got.labels.tolist()) == ([40, 43, 1], [NO, 43, 1])


def test_a_tokenizer_is_not_changed() -> None:
    tokenizer = zoo.bpe(bos=True, pad=False, chat=zoo.CHAT)
    before = tokenizer.backend_tokenizer.to_str()
    tokenize(load([ASK]), tokenizer, PAIR, max_length=4, truncation=True)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.pad_token is None


def test_empty_and_short_documents_are_counted_and_keep_their_rows() -> None:
    texts = ["hi ok", "", None, "a", "hi"]
    got = tokenize(load([{"text": text} for text in texts]), zoo.bpe())
    assert got.lengths.tolist() == [2, 0, 0, 1, 1]
    assert got.index.tolist() == [0, 1, 2, 3, 4]
    assert got.report() == "5 documents, 4 tokens, the longest has 2; 2 empty; 2 of one token"


def test_what_is_cut_to_its_prompt_is_counted() -> None:
    rows = [ASK, ASK | {"p": "a"}]
    got = tokenize(load(rows), zoo.bpe(chat=zoo.CHAT), PAIR, max_length=6, truncation=True)
    assert "1 without a label to predict; 2 truncated" in got.report()


def test_tokens_as_they_are_without_the_padding_they_bring() -> None:
    rows = [
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [NO, 6, NO]},
        {"input_ids": [0, 7, 8], "attention_mask": [0, 1, 1], "labels": [NO, 7, 9]},
        {"input_ids": [], "attention_mask": [], "labels": []},
    ]
    got = tokenize(load(rows))
    assert got.ids.tolist() == [5, 6, 7, 8]
    assert got.labels is not None
    assert got.labels.tolist() == [NO, 6, 7, 9]
    assert got.offsets.tolist() == [0, 2, 4, 4]


def test_a_document_is_counted_in_one_place() -> None:
    ids = [[5], [], [5, 6], [5, 6]]
    labels = [[5], [], [5, NO], [NO, 6]]
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    counts = tokenize(load(rows)).counts
    assert (counts.documents, counts.empty, counts.single, counts.unlabelled) == (4, 1, 1, 1)


def test_a_column_that_is_named_goes_before_tokens_that_are_there() -> None:
    rows = load([{"input_ids": [9, 9, 9], "text": "hi ok"}])
    assert tokenize(rows, zoo.bpe()).ids.tolist() == [9, 9, 9]
    assert tokenize(rows, zoo.bpe(), TextFormat("text")).ids.tolist() == [40, 43]


def test_tokens_without_labels_are_all_labelled() -> None:
    assert tokenize(load([{"input_ids": [5, 6]}])).labels is None


def test_more_rows_than_a_slice_are_numbered_through() -> None:
    # 1000 rows are tokenised at a time
    got = tokenize(load([{"text": "hi" if k % 7 else ""} for k in range(2500)]), zoo.bpe())
    assert got.index.tolist() == list(range(2500))
    assert got.lengths.tolist() == [int(k % 7 > 0) for k in range(2500)]
    assert got.counts.empty == 358


def test_max_tokens_keeps_the_first_documents_that_fit() -> None:
    rows = load([{"text": "hi ok"}, {"text": ""}, {"text": "hi ok yes"}, {"text": "a"}])
    got = tokenize(rows, zoo.bpe(), max_tokens=4)
    assert got.index.tolist() == [0, 1]
    assert got.report().endswith("1 empty; max_tokens was reached at row 2; the rest is left out")
    assert len(tokenize(rows, zoo.bpe(), max_tokens=6)) == 4
    # what is counted is counted of the kept ones
    got = tokenize(rows, zoo.bpe(), max_tokens=2, max_length=1, truncation=True)
    assert got.report().endswith(
        "1 empty; 2 of one token; 2 truncated; max_tokens was reached at row 3; the rest is left out"
    )
    assert len(tokenize(load([{"text": ""}]), zoo.bpe(), max_tokens=6)) == 1


def test_chunks_hold_every_token_but_the_remainder_and_know_their_documents() -> None:
    # a separator after each document that does not end in it; empty ones add nothing
    rows = load([{"body": text} for text in ("hi ok", "", "a b</s>", "yes")])
    got = tokenize(rows, zoo.bpe(), TextFormat("body"), chunk_length=4)
    assert got.ids.tolist() == [40, 43, 1, 10, 7, 11, 1, 45]
    assert got.document is not None
    assert got.document.tolist() == [0, 0, 0, 2, 2, 2, 2, 3]
    assert got.index.tolist() == [0, 1]
    assert got.report() == (
        "2 chunks of 4 documents, 8 tokens, the longest has 4; 1 empty; 1 tokens at the end filled no chunk and were "
        "dropped"
    )


def test_chunks_keep_labels() -> None:
    got = tokenize(load([ASK, ASK]), zoo.bpe(chat=zoo.CHAT), PAIR, chunk_length=5)
    assert got.ids.tolist() == [0, 3, 42, 6, 5, 4, 46, 5, 0, 3, 42, 6, 5, 4, 46]
    assert got.labels is not None
    assert got.labels.tolist() == [NO, NO, NO, NO, NO, NO, 46, 5, NO, NO, NO, NO, NO, NO, 46]
