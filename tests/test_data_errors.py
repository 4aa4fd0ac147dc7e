"""Bad input: what came, what was expected, what to do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch

from influence.data import TextFormat, Tokenized, batches, load, pack, shards, stream, tokenize
from tests import tokenizers_zoo as zoo

TEXT = [{"text": "hi ok yes"}, {"text": "a"}, {"text": "hi ok"}]
PLAIN = TextFormat()
PAIR = TextFormat("p", "c")
TURNS = TextFormat(conversation_column="m")
LONG = Tokenized(torch.zeros(9, dtype=torch.int32), None, torch.tensor([0, 1, 9]), torch.arange(2))


def tokens(rows: Any = TEXT, form: TextFormat = PLAIN, tokenizer: Any = None, **settings: Any) -> Any:
    return tokenize(load(rows), tokenizer or zoo.bpe(chat=zoo.CHAT), form, **settings)


def talk(chat: str) -> Any:
    roles = ("user", "assistant", "user", "assistant")
    return tokens([{"m": [{"role": role, "content": "ok"} for role in roles]}], TURNS, zoo.bpe(chat=chat))


class Slow:
    is_fast = False
    chat_template = None
    eos_token_id = None
    model_max_length = 10


class Bad(NamedTuple):
    name: str
    call: Callable[[], Any]
    words: tuple[str, ...]


CASES = [
    Bad(
        "a missing column",
        lambda: tokens([{"body": "a", "title": "b"}]),
        ("no column 'text'; the dataset has 'body', 'title': pass prompt_column",),
    ),
    Bad("a missing completion", lambda: tokens([{"p": "a"}], PAIR), ("no column 'c'; the dataset has 'p'",)),
    Bad("a missing conversation", lambda: tokens(TEXT, TURNS), ("no column 'm'", "pass conversation_column")),
    Bad("a missing reward", lambda: tokens([{"p": "a", "c": "b"}], PAIR, reward_column="r"), ("no column 'r'", "'p'")),
    Bad("no rows", lambda: load([]), ("the dataset is empty",)),
    Bad(
        "a stream without rows",
        lambda: stream(datasets.IterableDataset.from_generator(lambda: iter(())), zoo.bpe(), shard_size=2),
        ("the dataset is empty",),
    ),
    Bad(
        "over-long documents",
        lambda: tokens(max_length=1),
        ("2 of 3 documents are longer than max_length=1", "row 0, has 3", "truncation=True", "chunk_length="),
    ),
    Bad(
        "over-long for the tokenizer",
        lambda: tokens(tokenizer=zoo.bpe(model_max_length=2)),
        ("1 of 3 documents are longer than max_length=2",),
    ),
    Bad(
        "over-long in a stream",
        lambda: list(stream(load(TEXT, streaming=True), zoo.bpe(), shard_size=2, max_length=1)),
        ("1 of 2 documents are longer than max_length=1", "row 0"),
    ),
    Bad(
        "longer than the budget",
        lambda: batches(shards(LONG, 1), 4),
        ("1 of 1 examples have more than token_budget=4 tokens (the longest has 8)", "at least 8", "truncation=True"),
    ),
    Bad("no budget", lambda: pack(torch.tensor([1]), 0), ("must be at least 1; got 0 and None",)),
    Bad("no shard", lambda: shards(LONG, 0), ("at least 1 example; got 0",)),
    Bad("no such rank", lambda: shards(LONG, 1, rank=2, world=2), ("0 to world - 1; got rank=2 of world=2",)),
    Bad("truncation to nothing known", lambda: tokens(truncation=True), ("truncation=True needs max_length",)),
    Bad("both cuts", lambda: tokens(truncation=True, max_length=2, chunk_length=2), ("not both",)),
    Bad(
        "a chunk too long",
        lambda: tokens(max_length=2, chunk_length=3),
        ("chunk_length=3 is longer than max_length=2",),
    ),
    Bad("a chunk of one", lambda: tokens(chunk_length=1), ("at least 2",)),
    Bad("no chunk filled", lambda: tokens(chunk_length=50), ("together have 9 tokens, less than chunk_length=50",)),
    Bad(
        "no chunk filled by a stream",
        lambda: list(stream(load(TEXT, streaming=True), zoo.bpe(), shard_size=2, chunk_length=50)),
        ("together have 9 tokens, less than chunk_length=50",),
    ),
    Bad(
        "weighted chunks",
        lambda: tokens([{"text": "a", "r": 1.0}], chunk_length=2, advantage_column="r"),
        ("several documents", "column 'r'"),
    ),
    Bad(
        "no room beside special tokens",
        lambda: tokens(tokenizer=zoo.wordpiece(), max_length=2, truncation=True),
        ("max_length=2 leaves no room beside the tokenizer's 2 special tokens",),
    ),
    Bad("max_tokens of nothing", lambda: tokens(max_tokens=2), ("max_tokens=2 keeps no token",)),
    Bad("no max_length", lambda: tokens(max_length=0), ("at least 1; got 0",)),
    Bad("text without a tokenizer", lambda: tokenize(load(TEXT)), ("text in 'text' needs a tokenizer",)),
    Bad(
        "a slow tokenizer",
        lambda: tokens(tokenizer=Slow()),
        ("Slow does not say which characters", "use a fast tokenizer"),
    ),
    Bad("no text", lambda: tokens([{"text": 3}]), ("row 0: column 'text' must hold text; it has 3, a int",)),
    Bad("no list of messages", lambda: tokens([{"m": "hi"}], TURNS), ("row 0", "must hold lists of messages")),
    Bad(
        "a message without content",
        lambda: tokens([{"m": [{"role": "user"}]}], TURNS),
        ("row 0", "'role' and 'content', both text; got {'role': 'user'}"),
    ),
    Bad("content twice", lambda: talk(zoo.TWICE), ("row 0", "message 1 ('ok')", "{% generation %}")),
    Bad("content that changes the rest", lambda: talk(zoo.COUNTING), ("message 1 ('ok')", "with the rest unchanged")),
    Bad(
        "an answer that says more than its content",  # a call of a tool, a thought: it had no labels
        lambda: tokens(
            [{"m": [{"role": "assistant", "content": "ok", "calls": "yes"}]}], TURNS, zoo.bpe(chat=zoo.CALLING)
        ),
        ("row 0", "message 0 ('ok')", "also puts its calls", "{% generation %}"),
    ),
    Bad("content forgotten", lambda: talk(zoo.FORGETTING), ("row 0", "message 1 ('ok')", "{% generation %}")),
    Bad(
        "a chat template that refuses",
        lambda: talk(zoo.REFUSING),
        ("row 0: the chat template: a system message first",),
    ),
    Bad("a chat template that is none", lambda: talk("{% if"), ("row 0: the chat template: unexpected",)),
    Bad("template and columns", lambda: tokens(TEXT, TextFormat("text", template="multiple_choice")), ("not both",)),
    Bad("turns and columns", lambda: tokens(TEXT, TextFormat("text", conversation_column="m")), ("not both",)),
    Bad(
        "rewards and advantages",
        lambda: tokens(TEXT, reward_column="r", advantage_column="r"),
        ("reward_column or advantage_column, not both",),
    ),
    Bad("nothing to skip", lambda: tokens(skip_nan_rewards=True), ("for reward_column, which is not given",)),
    Bad(
        "a stream of no rows with names",
        lambda: list(
            stream(load([{"text": ""}], streaming=True).filter(lambda row: row["text"]), zoo.bpe(), shard_size=2)
        ),
        ("the dataset is empty",),
    ),
    Bad(
        "rewards of plain text",
        lambda: tokens([{"text": "a", "r": 1.0}], reward_column="r"),
        ("plain text has none: pass completion_column",),
    ),
    Bad(
        "rewards of tokens without labels",
        lambda: tokenize(load([{"input_ids": [1], "r": 1.0}]), reward_column="r"),
        ("tokenised rows need labels",),
    ),
    Bad(
        "rewards that are no numbers",
        lambda: tokens([{"p": "a", "c": "b", "r": "high"}], PAIR, reward_column="r"),
        ("column 'r' must hold numbers; row 0 has 'high'",),
    ),
    Bad(
        "labels of another length",
        lambda: tokenize(load([{"input_ids": [1, 2], "labels": [1]}])),
        ("row 0: input_ids, labels must be of one length; got [2, 1]",),
    ),
    Bad(
        "tokens in a batch of one",  # as return_tensors="pt" makes them
        lambda: tokenize(load([{"input_ids": [[1, 2, 3]]}])),
        ("row 0: input_ids must be the flat list of one document's whole numbers; got [[1, 2, 3]]",),
    ),
    Bad("a hole in the tokens", lambda: tokenize(load([{"input_ids": [1, None]}])), ("row 0: input_ids", "[1, None]")),
    Bad("half a token", lambda: tokenize(load([{"input_ids": [1.5]}])), ("row 0: input_ids", "got [1.5]")),
    Bad("a token alone", lambda: tokenize(load([{"input_ids": 1}])), ("row 0: input_ids", "got 1")),
    Bad(
        "the label of a class",
        lambda: tokenize(load([{"input_ids": [1, 2], "labels": 1}])),
        ("row 0: labels must be the flat list", "got 1"),
    ),
    Bad("no such split", lambda: load(TEXT, split="test"), ("no split 'test'; there are train (3 rows)",)),
    Bad(
        "several splits",
        lambda: load(datasets.DatasetDict(a=datasets.Dataset.from_list(TEXT), b=datasets.Dataset.from_list(TEXT))),
        ("the dataset has the splits a, b: pass split=",),
    ),
    Bad("a slice of a stream", lambda: load("x/y", split="train[:1]", streaming=True), (".skip(n).take(m)",)),
    Bad("rows of something else", lambda: load([1, 2]), ("dictionaries only; got a int",)),
    Bad("columns for rows", lambda: load({"text": ["a"]}), ("a list of dictionaries, one a row; got a dict",)),
    Bad("a list that was not loaded", lambda: tokenize(TEXT, zoo.bpe()), ("as load returns; got a list",)),
    Bad(
        "splits that were not chosen from",
        lambda: tokenize(datasets.DatasetDict(train=datasets.Dataset.from_list(TEXT)), zoo.bpe()),
        ("as load returns; got a DatasetDict",),
    ),
    Bad(
        "a transform on the way",  # it was passed over, and the rows below it read
        lambda: tokenize(datasets.Dataset.from_list(TEXT).with_transform(lambda rows: {"text": ["ok"]}), zoo.bpe()),
        ("with_transform", "use dataset.map"),
    ),
    Bad("a source of something else", lambda: load(3), ("source must be a Hub id", "got a int")),
    Bad("subset of memory", lambda: load(TEXT, subset="en"), ("arguments of datasets.load_dataset",)),
    Bad("data_kwargs that are none", lambda: load("x/y", data_kwargs="a=1,b=2"), ("must be a mapping", "a=1,b=2")),
    Bad(
        "data_kwargs of load's own",
        lambda: load("x/y", data_kwargs={"split": "a"}),
        ("data_kwargs has split", "to load"),
    ),
    Bad("data_kwargs that do not parse", lambda: load("x/y", data_kwargs="{a: ["), ("no JSON or YAML",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_message_says_what_came_and_the_way_out(case: Bad) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        case.call()
    missing = [word for word in case.words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*rows\.csv"):
        load(tmp_path / "rows.csv")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load(tmp_path / "rows")
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.csv", ""), ("a.txt", ""), ("a.csv", "text\n")])
def test_files_without_a_row(tmp_path: Path, name: str, text: str) -> None:
    # datasets answers with a StopIteration, or that it could not generate
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"the dataset is empty: .*{name} has no"):
        load(tmp_path / name, data_kwargs={"cache_dir": str(tmp_path / "cache")})


def test_upstream_says_that_a_file_has_no_row(tmp_path: Path) -> None:
    """The words by which `load` knows that a file with a header has nothing below it."""
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match="corresponds to no data"):
        datasets.load_dataset("csv", data_files=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("text\nhi\n")
    with pytest.raises(ValueError, match=r"no reader for .*rows\.tsv; there is one for \.csv, \.json"):
        load(tmp_path / "rows.tsv")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_of_sequence() -> None:
    got = tokens([{"text": "hi ok"}, {"text": "a"}], tokenizer=zoo.bpe(pad=False))
    assert next(batches(got, 10))["input_ids"].tolist() == [[40, 43], [10, 1]]
    assert next(batches(tokenize(load([{"input_ids": [5, 6]}, {"input_ids": [7]}])), 10))["input_ids"][1, 1] == 0


def test_tokens_that_a_model_does_not_know() -> None:
    """A Qwen2 with a tokenizer of one's own is loaded with a padding token more than it has: an IndexError."""
    from types import SimpleNamespace

    from influence.pipelines.frame.tokens import vocabulary_of, within

    config = SimpleNamespace(vocab_size=9)
    assert vocabulary_of(SimpleNamespace(get_text_config=lambda: config)) == vocabulary_of(config) == 9
    assert vocabulary_of(SimpleNamespace()) is vocabulary_of(None) is None
    tokens = replace(tokenize(load([{"input_ids": [3, 8, 1]}, {"input_ids": [2, 2]}])), pad=9)
    assert within(tokens, 9).pad == 0
    assert within(tokens, 10) is within(tokens, None) is tokens
    (batch,) = batches([within(tokens, 9)], 100)
    assert int(batch["input_ids"].max()) == 8
    with pytest.raises(
        ValueError, match="the data have the token 8, and the model knows 8, 0 to 7: pass the tokenizer"
    ):
        within(tokens, 8)


def test_a_tokenizer_that_its_model_type_made_another_kind_of_knows_no_word(tmp_path: Path) -> None:
    """Every text was empty, and the message spoke of special tokens."""
    from transformers import AutoTokenizer, Qwen2Config

    from notebooks.make_corpus import make_tokenizer

    saved = make_tokenizer(["owls sing at night", "cows eat grass"])
    for folder in ("model", "alone"):
        saved.save_pretrained(tmp_path / folder)
    Qwen2Config(vocab_size=len(saved)).save_pretrained(tmp_path / "model")
    rows = [{"text": "owls eat grass"}]
    with pytest.raises(ValueError, match=r"a Qwen2Tokenizer\w*, has no token for any of .* folder without the model"):
        tokens(rows, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert len(tokens(rows, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "alone")).ids) == 3


def test_importing_the_room_imports_neither_datasets_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, influence.data; print({'datasets', 'transformers', 'jinja2', 'yaml'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "datasets" not in out.stdout
    assert "transformers" not in out.stdout
