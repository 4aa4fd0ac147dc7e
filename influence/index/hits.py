"""What a search found: a value that reads as a table and turns into one."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

SHOWN = 10
"""Queries, and hits of a query, that `repr` shows."""


@dataclass(frozen=True, repr=False)
class Hits:
    """The rows that were found for each query, best first (with `reverse`, worst first); equal scores by row.

    Attributes:
        values: the scores; positive where the row helps the query.
        indices: numbers of rows in the index; summed by document, the documents.
        documents: the row of the dataset that each is from: for a chunk its first document, for a token its own.
        positions: of tokens, the position in the example's `input_ids`.

    Example:
        >>> import torch
        >>> Hits(torch.tensor([[0.5, -1.0]]), torch.tensor([[7, 2]]), torch.tensor([[70, 20]]))
        query  rank    score  row  document
            0     0      0.5    7        70
            0     1       -1    2        20
    """

    values: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]
    documents: Int[Tensor, "q k"]
    positions: Int[Tensor, "q k"] | None = None

    def __len__(self) -> int:
        """Return the number of queries."""
        return self.values.shape[0]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return columns, one entry per query and hit: `pandas.DataFrame(hits.to_dict())`."""
        q, k = self.values.shape
        columns: dict[str, list[Any]] = {
            "query": [query for query in range(q) for _ in range(k)],
            "rank": [*range(k)] * q,
            "score": self.values.flatten().tolist(),
            "row": self.indices.flatten().tolist(),
            "document": self.documents.flatten().tolist(),
        }
        return columns if self.positions is None else columns | {"position": self.positions.flatten().tolist()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per query and hit."""
        columns = self.to_dict()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def __repr__(self) -> str:
        """Return the first hits as a table."""
        q, k = self.values.shape
        if not q or not k:
            return f"no hits ({q} queries, k = {k})"
        shown = [row for row in self.rows() if row["query"] < SHOWN and row["rank"] < SHOWN]
        header = list(shown[0])
        cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in shown]
        widths = [max(len(line[c]) for line in [header, *cells]) for c in range(len(header))]
        widths[2] = max(widths[2], 7)
        lines = ["  ".join(map(str.rjust, line, widths)) for line in [header, *cells]]
        more = "" if q <= SHOWN and k <= SHOWN else f"\n… of {q} queries with {k} hits each"
        return "\n".join(lines) + more
