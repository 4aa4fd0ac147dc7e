"""BM25, the lexical baseline: which documents have a query's words, rare ones first (Robertson & Zaragoza 2009)."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def bm25(queries: Sequence[str], documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> Tensor:
    r"""Return the score of every document for every query, `[q, n]`.

    $$\sum_{w \in q} \log\Bigl(1 + \frac{N - n_w + 1/2}{n_w + 1/2}\Bigr)
      \frac{f_w (k_1 + 1)}{f_w + k_1 (1 - b + b\, |d| / \overline{|d|})}$$

    with `f` the count of a word in the document, `n` the number of documents that have it.
    """
    counts = [Counter(document.split()) for document in documents]
    having: dict[str, list[int]] = {}
    for number, words in enumerate(counts):
        for word in words:
            having.setdefault(word, []).append(number)
    lengths = [words.total() for words in counts]
    mean = sum(lengths) / len(lengths)
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for row, query in enumerate(queries):
        for word in query.split():
            found = having.get(word, [])
            rarity = math.log(1 + (len(documents) - len(found) + 0.5) / (len(found) + 0.5))
            for number in found:
                f = counts[number][word]
                scores[row, number] += rarity * f * (k1 + 1) / (f + k1 * (1 - b + b * lengths[number] / mean))
    return scores
