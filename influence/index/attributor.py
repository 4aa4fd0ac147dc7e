"""Asking an index which training examples made a model behave as it did."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.func.engine.per_example import per_example_grads
from influence.func.loss.losses import IGNORED
from influence.func.transform.chain import CollectedRows, Transform
from influence.func.transform.layout import Layout
from influence.func.transform.precondition import BlockCurvature
from influence.func.transform.scale import Moments
from influence.index import scan
from influence.index.columns import Chosen, choose
from influence.index.faiss_search import FaissConfig, Neighbours, approximate, neighbours_of
from influence.index.matching import matched, query_matrix
from influence.index.provenance import Fingerprint, check, fingerprint_of
from influence.index.recipe import loss_of, rebuild
from influence.index.rows import Index, Piece, open_index
from influence.types import Batch, LossFn, Params, Rows

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


def as_batch(texts: Sequence[str], tokenizer: Any) -> Batch:
    """Return texts as one batch, padded on the right, every token labelled.

    Args:
        texts: the texts.
        tokenizer: as `transformers` loads it.

    Returns:
        `{"input_ids", "attention_mask", "labels"}`.

    Raises:
        ValueError: if there is no tokenizer, no text, or one of fewer than two tokens.
    """
    if tokenizer is None:
        raise ValueError("texts need tokenizer=, or tokenize=: a function from texts to a batch")
    if not texts:
        raise ValueError("the query is empty: it has no text")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    short = [i for i, tokens in enumerate(ids) if len(tokens) < 2]
    if short:
        raise ValueError(
            f"text {short[0]}, {texts[short[0]]!r}, has {len(ids[short[0]])} tokens: a language model's loss needs two"
        )
    fill = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    lengths = torch.tensor([len(tokens) for tokens in ids])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.full(real.shape, fill)
    padded[real] = torch.tensor([number for tokens in ids for number in tokens])
    return {"input_ids": padded, "attention_mask": real.long(), "labels": padded.where(real, IGNORED)}


@dataclass(frozen=True)
class Attributor:
    """An index that can be asked; nothing is read until it is.

    Attributes:
        source: a run directory, or an index.
        device: where products are computed; rows go there piece by piece.
        faiss: answer searches by FAISS, whose index is built at the first one and kept beside the run; `None` scans all
            rows, which is exact.
        transform: what the rows went through, where their recipe cannot be followed without it; checked.
        factors: curvature that the recipe needs.
        moments: an optimizer's moments that the recipe needs.

    Example:
        >>> import torch
        >>> from influence import Attributor, as_blocks, build, per_example_grads
        >>> ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}
        >>> index = build(ell, w, [torch.eye(2), 3 * torch.eye(2)], transform=as_blocks())
        >>> Attributor(index).trace((ell, w), torch.tensor([[2.0, 0.0]]), k=2)
        query  rank    score  row  document
            0     0        6    2         2
            0     1        2    0         0
    """

    source: str | Path | Index
    device: str = "cpu"
    faiss: FaissConfig | None = None
    transform: Transform | None = None
    factors: Sequence[BlockCurvature] = ()
    moments: Moments | None = None

    @cached_property
    def index(self) -> Index:
        """The index, opened when it is first asked for."""
        return self.source if isinstance(self.source, Index) else open_index(self.source)

    def search(
        self,
        query: Rows,
        k: int | None = 5,
        blocks: str | Sequence[str] | None = None,
        reverse: bool = False,
        fingerprint: Fingerprint | None = None,
        unchecked: bool = False,
        *,
        force: bool = False,
        by_document: bool = False,
    ) -> Hits:
        r"""Return the rows with the largest scores `⟨query, row⟩`.

        Args:
            query: rows collected as the index's were, or by the query's side of `one_sided`; at a smaller or larger
                projection dim if it nests.
            k: how many; `None` for all.
            blocks: names or globs: score these blocks alone.
            reverse: the smallest scores, smallest first.
            fingerprint: what the query rows are: `provenance(loss_fn, params, rows)`. Rows that come straight from
                `per_example_grads` know their transform, but not the model's weights.
            unchecked: take the weights on trust, and rows that do not even know their transform as they are.
            force: warn where fingerprints do not fit, instead of refusing.
            by_document: sum the scores of a document's rows: tokens, or chunks by their first document.

        Returns:
            The hits.

        Raises:
            FingerprintError: if the query is not of this index, naming the field and both values.
            ValueError: if a query is empty or not finite, blocks are unknown, or k is out of range.
        """
        chosen, matrix = self._asked(query, blocks, fingerprint, unchecked, force)
        documents, groups = self._documents if by_document else (None, None)
        count = len(self.index) if documents is None else len(documents)
        if k is not None and not 1 <= k <= count:
            what = "rows" if documents is None else "documents"
            raise ValueError(f"k must be from 1 to the number of {what}, {count:,}; got {k}. k=None returns all")
        if documents is not None and groups is not None:
            sums = scan.summed(self._pieces(len(matrix)), matrix, chosen, groups, count)
            found = scan.ranked(sums, k, reverse)
            named = documents[found.indices]
            return Hits(found.values, named, named)
        if k is None:
            found = scan.ranked(scan.scores(self._pieces(len(matrix)), matrix, chosen), None, reverse)
        elif self.faiss is not None:
            found = approximate(self.index, self._neighbours, matrix, chosen, k, reverse, self.faiss.nprobe)
        else:
            found = scan.scan(self._pieces(len(matrix)), matrix, chosen, k, reverse)
        indices = found.indices.cpu()
        positions = self.index.position[indices] if self.index.per_token else None
        return Hits(found.values.cpu(), indices, self.index.document[indices], positions)

    def scores(
        self,
        query: Rows,
        blocks: str | Sequence[str] | None = None,
        fingerprint: Fingerprint | None = None,
        unchecked: bool = False,
        *,
        force: bool = False,
    ) -> Float[Tensor, "q n"]:
        """Return the score of every row; arguments as in `search`.

        Returns:
            `⟨query, row⟩`, in the order of the index.
        """
        chosen, matrix = self._asked(query, blocks, fingerprint, unchecked, force)
        return scan.scores(self._pieces(len(matrix)), matrix, chosen).cpu()

    def block_scores(
        self,
        query: Rows,
        blocks: str | Sequence[str] | None = None,
        fingerprint: Fingerprint | None = None,
        unchecked: bool = False,
        *,
        force: bool = False,
    ) -> dict[str, Float[Tensor, "q n"]]:
        """Return each block's part of the score of every row; arguments as in `search`.

        Returns:
            `{block: [q, n]}`, which sum to `scores`.
        """
        chosen, matrix = self._asked(query, blocks, fingerprint, unchecked, force)
        parts = scan.block_scores(self._pieces(len(matrix)), matrix, chosen)
        return {name: part.cpu() for name, part in parts.items()}

    def document_scores(
        self,
        query: Rows,
        blocks: str | Sequence[str] | None = None,
        fingerprint: Fingerprint | None = None,
        unchecked: bool = False,
        *,
        force: bool = False,
    ) -> tuple[Int[Tensor, " m"], Float[Tensor, "q m"]]:
        """Return scores summed by document: tokens, or chunks by their first; arguments as in `search`.

        Returns:
            The documents, by their row in the dataset, and the sums.
        """
        chosen, matrix = self._asked(query, blocks, fingerprint, unchecked, force)
        documents, groups = self._documents
        return documents, scan.summed(self._pieces(len(matrix)), matrix, chosen, groups, len(documents)).cpu()

    def self_influence(
        self, inverse: Transform | None = None, blocks: str | Sequence[str] | None = None
    ) -> Float[Tensor, " n"]:
        r"""Return each row's score with itself, `⟨g_n, H^{-1} g_n⟩`.

        Rows that went through `H^{-1/2}` need nothing more: it is their squared norm, and 1 for unit vectors. Rows of
        the training side of `one_sided` need `inverse`.

        Args:
            inverse: what the query's side has on top of the stored rows', as `precondition(factors)`.
            blocks: names or globs: of these blocks alone.

        Returns:
            The self-influence.

        Example:
            >>> import torch
            >>> from influence import Attributor, as_blocks, build, hessians, precondition
            >>> ell, w, x = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}, torch.tensor([[2.0, 0], [0, 4]])
            >>> factors = hessians.autocorrelation.fit(ell, w, [x], transform=as_blocks())
            >>> attr = Attributor(build(ell, w, [x], transform=as_blocks()))
            >>> attr.self_influence(), attr.self_influence(precondition(factors, damping=0.0))
            (tensor([ 4., 16.]), tensor([2., 2.]))
        """
        chosen = choose(self.index.blocks, blocks)
        if inverse is None:
            return scan.squared_norms(self._pieces(), chosen, self._dtype)
        whole, found = choose(self.index.blocks), [torch.zeros(0, dtype=self._dtype)]
        made = self._known
        for rows, scale in scan.all_decoded(self._pieces(), whole, self._dtype, torch.device("cpu")):
            plain = whole.rows(rows if scale is None else rows * scale)
            other = inverse.apply(plain if made is None else CollectedRows(plain, made, Layout()), Layout())
            found.append((chosen.matrix(plain) * chosen.matrix(other)).sum(1))
        return torch.cat(found)

    def trace(
        self,
        model: nn.Module | tuple[LossFn, Params],
        batch: Batch,
        k: int | None = 5,
        blocks: str | Sequence[str] | None = None,
        reverse: bool = False,
        *,
        transform: Transform | None = None,
        force: bool = False,
        by_document: bool = False,
    ) -> Hits:
        """Return the rows that made a model behave as it does on a batch.

        The batch's gradients are taken of the stored loss under the stored transform. The model is not touched.

        Args:
            model: the model that the index is of, or a loss function and its parameters, which may measure another
                loss.
            batch: what the model sees.
            k: as in `search`.
            blocks: as in `search`.
            reverse: as in `search`.
            transform: another side's, as the query's of `one_sided`.
            force: as in `search`.
            by_document: as in `search`.

        Returns:
            The hits, one line of them per example of the batch.

        Raises:
            FingerprintError: if it is another model.
            ValueError: if the loss or the transform cannot be made from what is stored.
        """
        loss_fn, params = model if isinstance(model, tuple) else self.loss_of(model)
        rows = per_example_grads(loss_fn, params, batch, transform=transform or self.made_by)
        shapes = {name: tuple(row.shape[1:]) for name, row in rows.items()}
        mine = fingerprint_of(loss_fn, params, transform or self.made_by, shapes)
        return self.search(rows, k, blocks, reverse, mine, force=force, by_document=by_document)

    def query(
        self,
        texts: str | Sequence[str],
        model: nn.Module | tuple[LossFn, Params],
        tokenizer: Any = None,
        k: int | None = 5,
        blocks: str | Sequence[str] | None = None,
        reverse: bool = False,
        *,
        tokenize: Callable[[Sequence[str]], Batch] | None = None,
        transform: Transform | None = None,
        force: bool = False,
        by_document: bool = False,
    ) -> Hits:
        """Return the rows that made a model say what it says about texts.

        Args:
            texts: one text or several.
            model: as in `trace`.
            tokenizer: the model's tokenizer, as `transformers` loads it; each text is tokenised as it does by default,
                all of its tokens labelled.
            k: as in `search`.
            blocks: as in `search`.
            reverse: as in `search`.
            tokenize: how texts become a batch, instead: chats, prompts and completions.
            transform: as in `trace`.
            force: as in `search`.
            by_document: as in `search`.

        Returns:
            The hits, one line of them per text.

        Raises:
            ValueError: if a text has fewer than two tokens, and so no loss.
        """
        said = [texts] if isinstance(texts, str) else list(texts)
        batch = as_batch(said, tokenizer) if tokenize is None else tokenize(said)
        return self.trace(model, batch, k, blocks, reverse, transform=transform, force=force, by_document=by_document)

    @cached_property
    def made_by(self) -> Transform:
        """The transform of the stored rows, from their recipe.

        Raises:
            ValueError: if it needs factors or moments that are not at hand, or another transform was given.
        """
        steps = self.index.fingerprint.recorded.get("steps")
        if self.transform is not None:
            stored = self.index.fingerprint
            weights = stored.must_match.get("weights")
            check(fingerprint_of(None, None, self.transform, self.index.blocks, weights=weights), stored)
            return self.transform
        if steps is None:
            raise ValueError("the index does not say how its rows were made: pass transform=")
        return rebuild(steps, self.factors, self.moments)

    def loss_of(self, model: nn.Module) -> tuple[LossFn, Params]:
        """Return a model's loss function and parameters, as the index's were.

        Raises:
            ValueError: if the loss was a function of the user's, or needs another model.
        """
        return loss_of(model, self.index.fingerprint.recorded)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.index.dtype == "float64" else torch.float32

    @property
    def _known(self) -> Transform | None:
        """The transform of the stored rows, if it can be had."""
        try:
            return self.made_by
        except ValueError:
            return None

    @cached_property
    def _documents(self) -> tuple[Tensor, Tensor]:
        """The documents, and the place of each row's among them."""
        documents, groups = torch.unique(self.index.document, return_inverse=True)
        return documents, groups

    def _pieces(self, queries: int = 1) -> Iterable[Piece]:
        return self.index.pieces(scan.rows_a_piece(queries))

    def _asked(
        self,
        query: Rows,
        blocks: str | Sequence[str] | None,
        fingerprint: Fingerprint | None,
        unchecked: bool,
        force: bool,
    ) -> tuple[Chosen, Float[Tensor, "q d"]]:
        """Return the chosen blocks and the query's columns of them, having checked that they belong here."""
        chosen = choose(self.index.blocks, blocks)
        rows = matched(query, self.index.fingerprint, chosen, fingerprint, unchecked, force)
        matrix = query_matrix(rows, chosen)
        return chosen, matrix.to(self.device, torch.promote_types(matrix.dtype, self._dtype))

    @cached_property
    def _neighbours(self) -> Neighbours:
        assert self.faiss is not None
        return neighbours_of(self.index, self.faiss)
