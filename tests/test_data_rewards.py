"""Dr. GRPO: advantages by hand, the policy for NaN, and that they arrive in the batch."""

import math

import pytest
import torch

from influence.data import TextFormat, advantages, batches, load, tokenize
from tests import tokenizers_zoo as zoo

ROWS = [
    {"p": "a", "c": "hi", "r": 1.0},
    {"p": "a", "c": "ok", "r": 0.0},
    {"p": "a", "c": "yes", "r": 1.0},
    {"p": "b", "c": "hi", "r": 3.0},
]
PAIR = TextFormat("p", "c")


def test_rewards_minus_the_mean_of_their_prompt() -> None:
    got = advantages(torch.tensor([1.0, 0.0, 1.0, 3.0]), ["a", "a", "a", "b"])
    torch.testing.assert_close(got, torch.tensor([1 / 3, -2 / 3, 1 / 3, 0], dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_nan_reward_left_out_is_no_part_of_the_mean_and_weighs_nothing() -> None:
    nan = math.nan
    got = advantages(torch.tensor([1.0, nan, 0.0, nan]), ["a", "a", "a", "b"], skip_nan=True)
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_groups_do_not_depend_on_the_order() -> None:
    reward, prompts = torch.arange(6.0), ["a", "b", "a", "c", "b", "a"]
    order = [5, 2, 0, 3, 1, 4]
    shuffled = advantages(reward[order], [prompts[k] for k in order])
    assert torch.equal(shuffled, advantages(reward, prompts)[order])


def test_they_arrive_in_the_batch_by_row() -> None:
    tokenized = tokenize(load(ROWS), zoo.bpe(chat=zoo.CHAT), PAIR, reward_column="r")
    expected = torch.tensor([1 / 3, -2 / 3, 1 / 3, 0], dtype=torch.float64)
    for batch in batches(tokenized, 20):
        torch.testing.assert_close(batch["weight"], expected[batch["index"]], rtol=0, atol=1e-15)


def test_the_prompt_of_a_conversation_is_all_before_the_last_answer() -> None:
    def talk(first: str, answer: str, reward: float) -> dict:
        turns = [("user", "a"), ("assistant", first), ("user", "b"), ("assistant", answer)]
        return {"m": [{"role": role, "content": content} for role, content in turns], "r": reward}

    rows = [talk("hi", "x", 1.0), talk("hi", "y", 0.0), talk("ok", "x", 5.0)]
    form = TextFormat(conversation_column="m")
    weight = tokenize(load(rows), zoo.bpe(chat=zoo.CHAT), form, reward_column="r").weight
    assert weight is not None
    assert weight.tolist() == [0.5, -0.5, 0.0]


def test_the_prompt_of_tokens_is_all_before_the_first_label() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "r": 1.0},
        {"input_ids": [1, 2, 4], "labels": [-100, -100, 4], "r": 0.0},
        {"input_ids": [1, 3, 4], "labels": [-100, -100, 4], "r": 7.0},
    ]
    weight = tokenize(load(rows), reward_column="r").weight
    assert weight is not None
    assert weight.tolist() == [0.5, -0.5, 0.0]


def test_padding_on_the_left_is_no_part_of_the_prompt() -> None:
    # as generation pads: the same prompt with an answer of another length was a group of its own
    rows = [
        {"input_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, -100, 3], "r": True},
        {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1], "labels": [-100, -100, 3, 4], "r": False},
    ]
    weight = tokenize(load(rows), reward_column="r").weight
    assert weight is not None
    assert weight.tolist() == [0.5, -0.5]


def test_an_advantage_column_is_taken_as_it_is() -> None:
    weight = tokenize(load(ROWS), zoo.bpe(chat=zoo.CHAT), PAIR, advantage_column="r").weight
    assert weight is not None
    assert weight.tolist() == [1.0, 0.0, 1.0, 3.0]


def test_nan_rewards_are_refused_by_row_or_skipped() -> None:
    rows = [ROWS[0], ROWS[1] | {"r": None}, ROWS[2] | {"r": math.nan}, ROWS[3]]
    tokenizer = zoo.bpe(chat=zoo.CHAT)
    with pytest.raises(ValueError, match=r"2 of 4 rewards are not finite: rows \[1, 2\]\. .*skip_nan_rewards=True"):
        tokenize(load(rows), tokenizer, PAIR, reward_column="r")
    weight = tokenize(load(rows), tokenizer, PAIR, reward_column="r", skip_nan_rewards=True).weight
    assert weight is not None
    assert weight.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r"column 'r' has 2 values that are no finite numbers: rows \[1, 2\]"):
        tokenize(load(rows), tokenizer, PAIR, advantage_column="r")


def test_an_infinite_reward_is_never_skipped() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 rewards are not finite: rows \[1\]"):
        advantages(torch.tensor([1.0, math.inf]), ["a", "a"], skip_nan=True)
