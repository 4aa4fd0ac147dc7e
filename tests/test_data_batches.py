"""Packing and batches: every document once, the budget kept, the same bytes at any world size."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from influence import functionalize, per_example_grads
from influence.data import TextFormat, Tokenized, batches, collate, load, pack, shards, stream, tokenize
from tests import tokenizers_zoo as zoo

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=60)
"""One document, equal lengths, empty ones: hypothesis tries all of them."""


def documents(lengths: list[int], seed: int = 0, **more: Any) -> Tokenized:
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(1, 1000, (int(offsets[-1]),), generator=draw, dtype=torch.int32)
    labels = torch.where(ids % 3 > 0, ids, -100)
    return Tokenized(ids, labels, offsets, torch.arange(len(lengths)), **more)


def same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    return len(got) == len(expected) and all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(got, expected, strict=True)
    )


@given(LENGTHS, st.integers(30, 120), st.none() | st.integers(1, 5))
def test_every_document_once_and_the_budget_kept(lengths: list[int], budget: int, most: int | None) -> None:
    length = torch.tensor(lengths)
    packed = pack(length, budget, most)
    assert sorted(torch.cat(packed).tolist()) == list(range(len(lengths)))
    for rows in packed:
        assert 0 < len(rows) <= (most or len(lengths))
        assert len(rows) * max(1, int(length[rows].max())) <= budget
        assert rows.tolist() == sorted(rows.tolist())


@given(LENGTHS, st.integers(30, 120))
def test_longest_first_and_no_batch_could_take_one_more(lengths: list[int], budget: int) -> None:
    length = torch.tensor(lengths).clamp_min(1)
    packed = pack(length, budget)
    for rows, following in pairwise(packed):
        assert length[rows].min() >= length[following].max()
        assert (len(rows) + 1) * int(length[rows].max()) > budget


def test_packing_by_hand() -> None:
    # two wide ones fill 2 · 10; then 5 wide: 4 of them
    packed = pack(torch.tensor([10, 7, 7, 5, 3, 2, 1, 0]), 20)
    assert [rows.tolist() for rows in packed] == [[0, 1], [2, 3], [4, 5, 6, 7]]


@settings(max_examples=40)
@given(LENGTHS, st.integers(30, 90), st.integers(1, 70), st.integers(1, 5))
def test_any_world_size_makes_the_same_batches(lengths: list[int], budget: int, size: int, world: int) -> None:
    # what a resumed run or another number of processes writes must be the same to the bit
    data = documents(lengths)
    alone = [list(batches(shard, budget, prefetch=0)) for shard in shards(data, size)]
    for rank in range(world):
        mine = [list(batches(s, budget, prefetch=0)) for s in shards(data, size, rank=rank, world=world)]
        assert len(mine) == len(alone[rank::world])
        assert all(same(got, expected) for got, expected in zip(mine, alone[rank::world], strict=True))
    rows = [row for shard in alone for batch in shard for row in batch["index"].tolist()]
    assert sorted(rows) == list(range(len(lengths)))


@settings(max_examples=40)
@given(LENGTHS, st.integers(30, 90), st.integers(1, 70))
def test_a_batch_holds_its_documents_and_padding(lengths: list[int], budget: int, size: int) -> None:
    data = documents(lengths, pad=7)
    assert data.labels is not None
    for batch in batches(shards(data, size), budget, prefetch=0):
        assert batch["input_ids"].numel() <= budget
        for row, ids, mask, labels in zip(
            *(batch[k] for k in ("index", "input_ids", "attention_mask", "labels")), strict=True
        ):
            own = slice(int(data.offsets[row]), int(data.offsets[row + 1]))
            n = lengths[int(row)]
            assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
            assert ids.tolist() == data.ids[own].tolist() + [7] * (len(ids) - n)
            assert labels.tolist() == data.labels[own].tolist() + [-100] * (len(labels) - n)


def test_a_batch_is_what_the_contract_says() -> None:
    batch = next(batches(documents([3, 1], weight=torch.ones(2, dtype=torch.float64)), 10))
    assert {key: (value.dtype, list(value.shape)) for key, value in batch.items()} == {
        "input_ids": (torch.int64, [2, 3]),
        "attention_mask": (torch.int64, [2, 3]),
        "labels": (torch.int64, [2, 3]),
        "index": (torch.int64, [2]),
        "weight": (torch.float64, [2]),
    }


def test_shards_are_contiguous_views_dealt_in_turn() -> None:
    data = documents([2, 0, 5, 1, 3, 4, 2])
    mine = shards(data, 2, rank=1, world=2)
    assert [shard.index.tolist() for shard in mine] == [[2, 3], [6]]
    assert mine[0].ids.data_ptr() == data.ids[2:].data_ptr()
    assert mine[0].lengths.tolist() == [5, 1]
    assert shards(data, 100, rank=1, world=2) == []


@pytest.mark.parametrize("engine", ["loop", "vmap", "batched"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_of_empty_and_one_token_documents_are_zero(engine: str, attention: str) -> None:
    # a row of padding alone: attention over nothing must not make NaN of it
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=32)
    config._attn_implementation = attention
    data = tokenize(load([{"input_ids": ids} for ids in ([5, 6, 7, 8], [], [9], [3, 4])]))
    loss_fn, params = functionalize(LlamaForCausalLM(config))
    rows = per_example_grads(loss_fn, params, next(batches(data, 100)), engine=engine)
    for block in rows.values():
        assert block.isfinite().all()
        assert (block[1:3] == 0).all()


# Prefetch


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch_changes_nothing(prefetch: int) -> None:
    data = documents([k % 13 for k in range(200)])
    expected = [collate(shard, rows) for shard in shards(data, 32) for rows in pack(shard.lengths, 40)]
    assert same(list(batches(shards(data, 32), 40, prefetch=prefetch)), expected)


def running() -> int:
    return sum(thread.name == "influence.data.batches" for thread in threading.enumerate())


def test_the_thread_ends_with_its_reader() -> None:
    # a loop that breaks off must not leave a thread waiting for room in the queue
    made = batches(shards(documents([5] * 500), 100), 5, prefetch=2)
    next(made)
    assert running() == 1
    made.close()  # type: ignore[attr-defined]
    assert running() == 0


def test_no_thread_without_a_reader() -> None:
    batches(documents([5]), 5)
    assert running() == 0


def test_the_thread_is_at_most_so_far_ahead() -> None:
    seen: list[int] = []

    def counted() -> Iterator[Tokenized]:
        for shard in shards(documents([5] * 20), 1):
            seen.append(int(shard.index[0]))
            yield shard

    made = batches(counted(), 5, prefetch=2)
    next(made)
    time.sleep(0.2)
    assert len(seen) <= 4  # one served, two waiting, one in the hand
    made.close()  # type: ignore[attr-defined]


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    def broken() -> Iterator[Tokenized]:
        yield documents([5])
        raise ValueError("the disk is gone")

    made = batches(broken(), 5)
    next(made)
    with pytest.raises(ValueError, match="the disk is gone"):
        next(made)
    assert running() == 0


def test_no_global_randomness_is_touched() -> None:
    before = torch.get_rng_state()
    list(batches(shards(documents([3, 2, 1]), 2), 10))
    assert torch.equal(before, torch.get_rng_state())


# Streams

TEXTS = [{"text": " ".join(["hi", "ok", "yes", "", "a"][: k % 6]), "w": float(k)} for k in range(23)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunk_length": 3},
        {"advantage_column": "w"},
        {"max_tokens": 20},
        {"max_tokens": 20, "chunk_length": 3},
        {"max_tokens": 1000, "advantage_column": "w"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_stream_has_the_shards_of_the_whole(world: int, settings: dict[str, Any], size: int) -> None:
    whole = tokenize(load(TEXTS), zoo.bpe(bos=True), **settings)
    rows = load(TEXTS, streaming=True)
    for rank in range(world):
        expected = shards(whole, size, rank=rank, world=world)
        got = list(stream(rows, zoo.bpe(bos=True), shard_size=size, rank=rank, world=world, **settings))
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert same(list(batches(a, 40)), list(batches(b, 40)))
            assert (a.document is None) == (b.document is None)
            assert a.document is None or b.document is None or torch.equal(a.document, b.document)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 60}], ids=str)
def test_a_stream_compares_answers_that_are_shards_apart(world: int, settings: dict[str, Any]) -> None:
    rows = [{"p": "ab"[k % 2], "c": "hi", "r": None if k == 4 else float(k)} for k in range(13)]
    tokenizer, form = zoo.bpe(chat=zoo.CHAT), TextFormat("p", "c")
    settings = {"reward_column": "r", "skip_nan_rewards": True, **settings}
    whole = tokenize(load(rows), tokenizer, form, **settings)
    assert whole.weight is not None
    assert len({*whole.weight.tolist()}) > 5
    data = load(rows, streaming=True)
    for rank in range(world):
        got = list(stream(data, tokenizer, form, shard_size=2, rank=rank, world=world, **settings))
        expected = shards(whole, 2, rank=rank, world=world)
        assert same(list(batches(got, 40)), list(batches(expected, 40)))


def test_a_stream_that_does_not_repeat_has_no_rewards() -> None:
    import datasets

    draws = iter(range(100))

    def rows() -> Iterator[dict[str, Any]]:
        for _ in range(3):
            yield {"p": "a", "c": "hi", "r": float(next(draws))}

    data = datasets.IterableDataset.from_generator(rows)
    shard = stream(data, zoo.bpe(chat=zoo.CHAT), TextFormat("p", "c"), shard_size=2, reward_column="r")
    with pytest.raises(ValueError, match="rows from 0 on have other rewards when read again"):
        next(shard)


@pytest.mark.parametrize("size", range(1, 9))
def test_the_last_shard_of_a_stream_counts_the_remainder(size: int) -> None:
    # also where the chunks fill their shards exactly
    whole = tokenize(load(TEXTS), zoo.bpe(), chunk_length=8)
    got = list(stream(load(TEXTS, streaming=True), zoo.bpe(), shard_size=size, chunk_length=8))
    assert not any(shard.counts.remainder for shard in got[:-1])
    assert got[-1].counts.remainder == whole.counts.remainder > 0


def test_a_stream_may_hold_arrays() -> None:
    import datasets
    import numpy as np

    row = {"input_ids": np.array([0, 5, 6]), "attention_mask": np.array([0, 1, 1]), "w": np.float32(2)}
    data = datasets.IterableDataset.from_generator(lambda: iter([row]))
    (shard,) = stream(data, shard_size=2, advantage_column="w")
    assert shard.ids.tolist() == [5, 6]
    assert shard.weight is not None
    assert shard.weight.tolist() == [2.0]


def test_a_stream_is_read_as_it_is_used() -> None:
    import datasets

    seen: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for k in range(1000):
            seen.append(k)
            yield {"text": "hi"}

    data = datasets.IterableDataset.from_generator(rows)
    next(stream(data, zoo.bpe(), shard_size=10))
    assert len(seen) < 30


DIES = """
import torch
from influence.data import Tokenized, batches

def shards():
    x = torch.ones(1000, 1000)
    while True:
        yield Tokenized(torch.ones(5).int(), None, torch.tensor([0, 5]), torch.tensor([0]))
        x @ x

stream = batches(shards(), 5, prefetch=10**6)
for batch in stream:
    raise ValueError("the reader is gone")
"""


def test_a_process_that_dies_of_an_error_ends_by_it() -> None:
    """The thread was inside torch when the interpreter ended, which ended the process by SIGABRT."""
    ran = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True)
    assert ran.stderr.endswith("ValueError: the reader is gone\n")
    assert ran.returncode == 1
