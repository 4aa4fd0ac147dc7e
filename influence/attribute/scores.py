"""Scores of training examples for queries: ranked, tabulated, saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.store import BadFileError, read, write
from influence.store.schema import conform

KIND, SCHEMA = "attribution", 1
SHOWN = 5
"""Examples and queries that a table shows."""


class Ranked(NamedTuple):
    """The examples at one end of each query's scores, strongest first.

    Attributes:
        queries: the queries' ids, a row each.
        ids: the examples' ids.
        values: their scores.
    """

    queries: Int[Tensor, " q"]
    ids: Int[Tensor, "q k"]
    values: Float[Tensor, "q k"]

    def __str__(self) -> str:
        """Return a table: a line for each query."""
        lines = [
            f"query {int(query)}: " + ", ".join(f"{i} ({v:.4g})" for i, v in zip(ids, values, strict=True))
            for query, ids, values in zip(self.queries[:SHOWN], self.ids.tolist(), self.values.tolist(), strict=False)
        ]
        more = len(self.queries) - len(lines)
        return "\n".join([*lines, *([f"… and {more:,} more queries"] if more > 0 else [])])

    def to_pandas(self) -> Any:
        """Return a table with the columns `query`, `rank`, `id` and `score`."""
        import pandas

        q, k = self.ids.shape
        return pandas.DataFrame(
            {
                "query": self.queries.repeat_interleave(k).numpy(),
                "rank": torch.arange(1, k + 1).repeat(q).numpy(),
                "id": self.ids.flatten().numpy(),
                "score": self.values.flatten().numpy(),
            }
        )


class ScoresFacts(NamedTuple):
    """What a file of scores says beside its tensors."""

    method: str
    settings: dict[str, Any]


class Scores(NamedTuple):
    """How much each training example helped each query, by some method.

    Attributes:
        values: the scores; positive helps: training on the example lowers the query's loss.
        ids: the training examples' ids: their `index`, or their place among the batches.
        queries: the queries' ids.
        method: the method's name.
        settings: what it was run with.
        own: each example's score for itself, where it was asked for.
    """

    values: Float[Tensor, "q n"]
    ids: Int[Tensor, " n"]
    queries: Int[Tensor, " q"]
    method: str
    settings: Mapping[str, Any]
    own: Float[Tensor, " n"] | None = None

    def top(self, k: int = 5) -> Ranked:
        """Return the examples that helped each query most.

        Args:
            k: how many; all, if there are fewer.

        Example:
            >>> import torch
            >>> scores = Scores(torch.tensor([[0.1, 3.0, -2.0]]), torch.arange(3), torch.tensor([0]), "cosine", {})
            >>> print(scores.top(2))
            query 0: 1 (3), 0 (0.1)
            >>> print(scores.bottom(1))
            query 0: 2 (-2)
        """
        return self._ranked(k, largest=True)

    def bottom(self, k: int = 5) -> Ranked:
        """Return the examples that hurt each query most, or helped it least; as `top`."""
        return self._ranked(k, largest=False)

    def self_influence(self, k: int | None = None) -> Ranked:
        """Return the examples with the largest score for themselves: unusual or mislabelled ones come first.

        Args:
            k: how many; default all.

        Raises:
            ValueError: if the method was not asked for them.
        """
        if self.own is None:
            raise ValueError(
                f"these scores have no self-influence: run attribute.{self.method}(…, self_influence=True)"
            )
        values, order = self.own.sort(descending=True, stable=True)
        k = len(order) if k is None else k
        return Ranked(torch.tensor([0]), self.ids[order][None, :k], values[None, :k])

    def save(self, path: str | Path) -> None:
        """Write the scores to one checksummed HDF5 file; `attribute.load` reads it.

        Args:
            path: the file; an existing one is replaced.
        """
        arrays = {"values": self.values, "ids": self.ids, "queries": self.queries}
        if self.own is not None:
            arrays["own"] = self.own
        write(path, arrays, {"method": self.method, "settings": dict(self.settings)}, kind=KIND, schema=SCHEMA)

    def to_pandas(self) -> Any:
        """Return a table of all scores: a row for each example, a column for each query."""
        import pandas

        return pandas.DataFrame(self.values.T.numpy(), index=self.ids.numpy(), columns=self.queries.numpy())

    def __repr__(self) -> str:
        q, n = self.values.shape
        head = f"Scores by {self.method}: {q:,} queries, {n:,} examples"
        return f"{head}\n{self.top()}" if q and n else head

    def _ranked(self, k: int, largest: bool) -> Ranked:
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        values, order = self.values.sort(dim=1, descending=largest, stable=True)
        return Ranked(self.queries, self.ids[order[:, :k]], values[:, :k])


def load(path: str | Path) -> Scores:
    """Read scores that `Scores.save` wrote.

    Raises:
        BadFileError: if the file is damaged, or holds something else.
    """
    arrays, about = read(path, kind=KIND, schema=SCHEMA)
    facts = conform(about, ScoresFacts, str(path))
    scores = Scores(
        arrays["values"], arrays["ids"], arrays["queries"], facts.method, facts.settings, dict(arrays).get("own")
    )
    shapes = [list(tensor.shape) for tensor in (scores.values, scores.queries, scores.ids)]
    if shapes[0] != shapes[1] + shapes[2] or (scores.own is not None and list(scores.own.shape) != shapes[2]):
        raise BadFileError(f"{path} is not what it says: scores of shape {shapes[0]} for {shapes[1]} × {shapes[2]}")
    return scores
