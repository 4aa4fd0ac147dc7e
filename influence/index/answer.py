"""What an index says of queries: the rows that score highest and lowest, all scores, and their parts by block.

Nothing is computed before it is asked for, and a search holds no matrix of all scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.similarity import Nearest
from influence.index import scan
from influence.index.columns import Chosen, Piece
from influence.index.rows import Index
from influence.visible import visible

SHOWN = 10
"""Queries, and hits of a query, that a table shows."""
WIDTH = 60
"""Characters of a text that a table shows."""

Search = Callable[[Tensor, Chosen, int, bool], Nearest]
"""A search that may miss neighbours: `(queries, columns, k, smallest first) -> values and rows`."""


@dataclass(frozen=True, repr=False, eq=False)
class Hits:
    """The rows at one end of the scores of each query, in order; equal scores by row. `print` it for a table.

    Attributes:
        values: the scores; positive where the row helps the query.
        indices: numbers of rows in the index; summed by document, the documents.
        ids: the row of the dataset that each is from: for a chunk its first document, for a token its own.
        positions: of tokens, the position in the example's `input_ids`.
        texts: what the examples say, a list for each query; `None` where it is not known.

    Example:
        >>> import torch
        >>> Hits(torch.tensor([[0.5, -1.0]]), torch.tensor([[7, 2]]), torch.tensor([[70, 20]]))
        query  rank    score  row  document
            0     0      0.5    7        70
            0     1       -1    2        20
    """

    values: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]
    ids: Int[Tensor, "q k"]
    positions: Int[Tensor, "q k"] | None = None
    texts: list[list[str]] | None = None

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
            "document": self.ids.flatten().tolist(),
        }
        if self.positions is not None:
            columns["position"] = self.positions.flatten().tolist()
        if self.texts is not None:
            columns["text"] = [text for texts in self.texts for text in texts]
        return columns

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
        cells = [[_cell(value) for value in row.values()] for row in shown]
        widths = [max(len(line[c]) for line in [header, *cells]) for c in range(len(header))]
        widths[2] = max(widths[2], 7)
        lines = []
        for line in [header, *cells]:
            numbers = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            lines.append("  ".join(numbers if self.texts is None else [*numbers[:-1], line[-1]]))
        more = "" if q <= SHOWN and k <= SHOWN else f"\n… of {q} queries with {k} hits each"
        return "\n".join(lines) + more


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    line = visible(value, lines=False)
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


@dataclass(frozen=True, repr=False, eq=False)
class Answer:
    r"""The scores of an index's rows for some queries; `print` it for the best rows of each.

    $$s_{qn} = \langle g_q, g_n \rangle, \qquad
    \text{or, as cosines,} \quad \frac{\langle g_q, g_n \rangle}{\|g_q\| \, \|g_n\|}$$

    over the blocks that were asked for. Each method passes over the stored rows once.

    Attributes:
        index: the rows.
        queries: the query rows over the chosen blocks; of cosines, of norm one.
        columns: the chosen blocks.
        weights: of cosines, one over the norm of each row; 0 for a row of zeros.
        summed: whether scores are summed by document.
        search: a search that may miss neighbours, for `top` and `bottom`; `None` scans all rows.
        examples: what the examples say, by their row in the dataset.
    """

    index: Index
    queries: Float[Tensor, "q d"]
    columns: Chosen
    weights: Float[Tensor, " n"] | None = None
    summed: bool = False
    search: Search | None = None
    examples: Sequence[str] | None = None

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    @property
    def ids(self) -> Int[Tensor, " n"]:
        """What each column of `all()` is: the row of the dataset that a row is from, or the document."""
        return self.index.documents[0] if self.summed else self.index.document

    def top(self, k: int | None = 5) -> Hits:
        """Return the rows with the largest scores, best first: those that help each query most.

        Args:
            k: how many; `None` for all.

        Returns:
            The hits, a line of them per query.

        Raises:
            ValueError: if `k` is out of range, or a score is not finite.
        """
        return self._end(k, False)

    def bottom(self, k: int | None = 5) -> Hits:
        """Return the rows with the smallest scores, smallest first: those that hurt each query most; see `top`."""
        return self._end(k, True)

    def all(self) -> Float[Tensor, "q n"]:
        """Return every score, in the order of the index (by document: of `ids`)."""
        if not self.summed:
            return scan.scores(self._pieces(), self.queries, self.columns).cpu()
        documents, groups = self.index.documents
        return scan.summed(self._pieces(), self.queries, self.columns, groups, len(documents)).cpu()

    def by_block(self) -> dict[str, Float[Tensor, "q n"]]:
        """Return each block's part of every score: `{block: [q, n]}`, which sum to `all()`."""
        parts = scan.block_scores(self._pieces(), self.queries, self.columns)
        if not self.summed:
            return {name: part.cpu() for name, part in parts.items()}
        documents, groups = self.index.documents
        sums = {name: part.new_zeros(len(part), len(documents)) for name, part in parts.items()}
        return {name: sums[name].index_add_(1, groups.to(part.device), part).cpu() for name, part in parts.items()}

    def by_document(self) -> "Answer":
        """Return the same scores summed by document: of tokens, or of chunks by their first document.

        Raises:
            ValueError: if they are cosines of several rows of one document.
        """
        if self.weights is not None and len(self.index.documents[0]) != len(self.index):
            raise ValueError(
                "the cosine of a document is not the sum of its rows' cosines: ask with cosine=False, or build an "
                "index with a row for every document"
            )
        return replace(self, summed=True)

    def _end(self, k: int | None, smallest: bool) -> Hits:
        count, what = (len(self.index.documents[0]), "documents") if self.summed else (len(self.index), "rows")
        if k is not None and not 1 <= k <= count:
            raise ValueError(f"k must be from 1 to the number of {what}, {count:,}; got {k}. k=None returns all")
        if self.summed or k is None:
            found = scan.ranked(self.all(), k, smallest)
        elif self.search is not None:
            found = self.search(self.queries, self.columns, k, smallest)
        else:
            found = scan.scan(self._pieces(), self.queries, self.columns, k, smallest)
        values, indices = found.values.cpu(), found.indices.cpu()
        ids = self.ids[indices]
        positions = self.index.position[indices] if self.index.per_token and not self.summed else None
        texts = None
        if self.examples is not None:
            texts = [[self.examples[number] for number in numbers] for numbers in ids.tolist()]
        return Hits(values, ids if self.summed else indices, ids, positions, texts)

    def _pieces(self) -> Iterator[Piece]:
        """Yield the stored rows; of cosines, with one over their norms in their scales."""
        for piece in self.index.pieces(scan.rows_a_piece(len(self.queries))):
            if self.weights is None:
                yield piece
                continue
            weights = self.weights[piece.begin : piece.begin + len(piece.values), None]
            yield piece._replace(scale=weights if piece.scale is None else piece.scale * weights)

    def __repr__(self) -> str:
        """Return the best rows as a table."""
        what = f"{len(self)} queries over {len(self.ids):,} {'documents' if self.summed else 'rows'}"
        shown = min(5, len(self.ids))
        return f"{what}; the best of each:\n{self.top(shown)}" if shown else what


def inverse_norms(index: Index, columns: Chosen) -> Float[Tensor, " n"]:
    """Return `1 / ‖g_n‖` over some blocks, in float64; 0 for a row of zeros."""
    squares = scan.squared_norms(index.pieces(scan.rows_a_piece()), columns, torch.float64)
    return squares.rsqrt().where(squares > 0, 0.0)
