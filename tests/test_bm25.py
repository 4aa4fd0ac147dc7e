"""BM25 against its formula by hand."""

import math

import pytest
import torch

from notebooks.bm25 import bm25


def test_bm25_of_three_documents() -> None:
    documents = ["a b", "a a c d", "e f g"]  # three words on average
    found = bm25(["a e", "z"], documents, k1=1.2, b=0.75)

    def weight(having: int) -> float:
        return math.log(1 + (3 - having + 0.5) / (having + 0.5))

    def term(count: int, length: int) -> float:
        return count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / 3))

    expected = [weight(2) * term(1, 2), weight(2) * term(2, 4), weight(1) * term(1, 3)]
    assert found[0].tolist() == pytest.approx(expected)
    assert found[1].equal(torch.zeros(3, dtype=torch.float64))
