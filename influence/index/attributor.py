"""Asking an index which training examples made a model behave as it did."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.func.engine.per_example import per_example_grads
from influence.func.loss.losses import IGNORED
from influence.func.similarity import Nearest
from influence.func.transform.chain import CollectedRows, Transform
from influence.func.transform.layout import Layout
from influence.func.transform.precondition import BlockCurvature
from influence.func.transform.scale import Moments
from influence.func.transform.steps import STEPS
from influence.index import scan
from influence.index.answer import Answer, Hits, inverse_norms
from influence.index.columns import Chosen, Piece, choose
from influence.index.faiss_search import FaissConfig, Neighbours, approximate, neighbours
from influence.index.matching import matched, query_matrix
from influence.index.narrowing import narrowed
from influence.index.provenance import Fingerprint, check, fingerprint_of, provenance
from influence.index.recipe import loss_of, rebuild
from influence.index.rows import Index, open_index
from influence.types import Batch, LossFn, Params, Rows


@dataclass(frozen=True)
class Attributor:
    """An index that can be asked; nothing is read until it is.

    Attributes:
        source: a run directory, or an index.
        device: where products are computed; rows go there piece by piece.
        faiss: answer `top` and `bottom` by FAISS, whose index is built at the first search and kept beside the run;
            `None` scans all rows, which is exact.
        transform: what the rows went through, where their recipe cannot be followed without it; checked.
        factors: curvature that the recipe needs.
        moments: an optimizer's moments that the recipe needs.
        texts: what the examples say, by their row in the dataset, to be shown with the hits.

    Example:
        >>> import torch
        >>> from influence import Attributor, as_blocks, build, per_example_grads
        >>> ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}
        >>> data = [torch.eye(2), 3 * torch.eye(2)]
        >>> index = build(ell, w, data, transform=as_blocks(), progress=False)
        >>> Attributor(index).ask(torch.tensor([[2.0, 0.0]])).top(2)
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
    texts: Sequence[str] | None = None

    @cached_property
    def index(self) -> Index:
        """The index, opened when it is first asked for."""
        return self.source if isinstance(self.source, Index) else open_index(self.source)

    def ask(
        self,
        query: Batch | Rows,
        model: nn.Module | tuple[LossFn, Params] | None = None,
        *,
        blocks: str | Sequence[str] | None = None,
        cosine: bool = False,
        transform: Transform | None = None,
        tokenizer: Any = None,
        fingerprint: Fingerprint | None = None,
        unchecked: bool = False,
        force: bool = False,
    ) -> Answer:
        r"""Ask which rows helped a model with a query, and which hurt it: `⟨g_query, g_row⟩`, positive helps.

        Args:
            query: a batch, as the loss function takes it; or texts, one or several; or rows: collected as the index's
                were, or by the query's side of `one_sided`, at a smaller or larger projection dim if it nests.
            model: the model, under the index's loss; or `(loss_fn, params)` under another. May be left out with rows,
                and of an index that `build` returned, which knows its own.
            blocks: names or globs: score these blocks alone.
            cosine: divide by the norms of both rows over these blocks; a row of zeros has the cosine 0.
            transform: for a batch or texts, what their gradients go through: the query's side of `one_sided`, another
                dim. By default what the stored rows went through.
            tokenizer: for texts, the model's tokenizer, as `transformers` loads it; all of their tokens are labelled.
            fingerprint: what query rows are: `provenance(loss_fn, params, rows)`, where the model is not given. Rows
                that come straight from `per_example_grads` know their transform, but not the model's weights.
            unchecked: take the weights on trust, and rows that do not even know their transform as they are.
            force: warn where fingerprints do not fit, instead of refusing.

        Returns:
            The answer: `.top(k)`, `.bottom(k)`, `.all()`, `.by_block()`, `.by_document()`.

        Raises:
            FingerprintError: if the query is not of this index, naming the field and both values.
            ValueError: if a query is empty or not finite, blocks are unknown, the loss or the transform cannot be made
                from what is stored, or cosines are asked for that FAISS or a curvature on one side cannot give.
        """
        if isinstance(query, CollectedRows) or (model is None and self._holds_rows(query)):
            rows = query
            if model is not None and isinstance(query, CollectedRows):
                fingerprint = provenance(*self._function(model), query)
        else:
            loss_fn, params = self._function(model)
            if isinstance(query, str) or (isinstance(query, list | tuple) and all(isinstance(x, str) for x in query)):
                query = _as_batch([query] if isinstance(query, str) else query, tokenizer)
            rows = per_example_grads(loss_fn, params, query, transform=transform or self.made_by)
            shapes = {name: tuple(row.shape[1:]) for name, row in rows.items()}
            fingerprint = fingerprint_of(loss_fn, params, transform or self.made_by, shapes)
        chosen = choose(self.index.blocks, blocks)
        fitting = matched(rows, self.index.fingerprint, chosen, fingerprint, unchecked, force)
        matrix = query_matrix(fitting, chosen)
        weights = None
        if cosine:
            self._check_cosine(rows)
            norms = matrix.double().norm(dim=1, keepdim=True)
            matrix = (matrix / norms.where(norms > 0, 1)).to(matrix.dtype)
            weights = self._inverse_norms(chosen)
        matrix = matrix.to(self.device, torch.promote_types(matrix.dtype, self._dtype))
        search = self._approximate if self._uses_faiss else None
        return Answer(self.index, matrix, chosen, weights, search=search, examples=self.texts)

    def trace(self, model: nn.Module | tuple[LossFn, Params], batch: Batch, k: int | None = 10) -> Hits:
        """Return the rows that helped a batch's examples most, in one line: `ask(batch, model).top(k)`.

        Args:
            model: the model, or `(loss_fn, params)`; as for `ask`.
            batch: the queries.
            k: how many; `None` ranks all rows.
        """
        return self.ask(batch, model).top(k)

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
            >>> attr = Attributor(build(ell, w, [x], transform=as_blocks(), progress=False))
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

    @cached_property
    def made_by(self) -> Transform:
        """The transform of the stored rows, from their recipe.

        Raises:
            ValueError: if it needs factors or moments that are not at hand, or another transform was given.
        """
        stored = self.index.fingerprint
        if self.transform is not None:
            check(fingerprint_of(None, None, self.transform, self.index.blocks, weights=stored.weights or ""), stored)
            return self.transform
        # what only training can make, as the scale of each of its steps, is on the training side alone
        return rebuild(
            [s for s in stored.steps if s.sides != "train only" or s.name in STEPS], self.factors, self.moments
        )

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

    @property
    def _uses_faiss(self) -> bool:
        return self.faiss is not None and self.faiss.index_factory is not None

    @cached_property
    def _neighbours(self) -> Neighbours:
        assert self.faiss is not None
        return neighbours(self.index, self.faiss)

    @cached_property
    def _norms(self) -> dict[tuple[str, ...], Tensor]:
        """Inverse norms of the rows over the blocks that were asked for so far."""
        return {}

    def _inverse_norms(self, chosen: Chosen) -> Float[Tensor, " n"]:
        if chosen.names not in self._norms:
            self._norms[chosen.names] = inverse_norms(self.index, chosen)
        return self._norms[chosen.names]

    def _holds_rows(self, query: Any) -> bool:
        """Whether a query without a model is rows: a mapping that names a block, or any mapping for an opened index."""
        named = isinstance(query, Mapping) and any(name in self.index.blocks for name in query)
        return named or (isinstance(query, Mapping) and self.index.function is None)

    def _function(self, model: nn.Module | tuple[LossFn, Params] | None) -> tuple[LossFn, Params]:
        if isinstance(model, tuple):
            return model
        if model is not None:
            return self.loss_of(model)
        if self.index.function is None:
            raise ValueError(
                f"{self.index!r} was opened from its files, which hold no model: pass model=, or (loss_fn, params), "
                "with a batch or texts"
            )
        return self.index.function

    def _check_cosine(self, rows: Any) -> None:
        """Refuse cosines that would not be what they are called.

        Raises:
            ValueError: saying what to do.
        """
        if self._uses_faiss:
            raise ValueError(
                "FAISS searches inner products of the rows as they are stored, not cosines: build the index under "
                "unit_norm(), or ask without faiss="
            )
        if isinstance(rows, CollectedRows) and self._known is not None:
            mine, theirs = (_powers(transform) for transform in (rows.transform, self._known))
            if mine != theirs:
                raise ValueError(
                    f"the query's curvature has the powers {mine or 'none'}, and the stored rows' {theirs or 'none'}: "
                    "a cosine wants the same on both sides. Build and ask with power=-0.5, as two_sided does"
                )

    def _approximate(self, queries: Tensor, columns: Chosen, k: int, smallest: bool) -> Nearest:
        assert self.faiss is not None
        return approximate(self.index, self._neighbours, queries, columns, k, smallest, self.faiss.nprobe)

    def _pieces(self) -> Iterable[Piece]:
        return self.index.pieces(scan.rows_a_piece())


def _powers(transform: Transform) -> list[float]:
    return [step.settings["power"] for step in transform.steps if "power" in step.settings]


def _as_batch(texts: Sequence[str], tokenizer: Any) -> Batch:
    """Return texts as one batch, padded on the right, every token labelled.

    Raises:
        ValueError: if there is no tokenizer, no text, or one of fewer than two tokens.
    """
    if tokenizer is None:
        raise ValueError(
            "texts need tokenizer=: the model's, as transformers loads it; or pass the batch that they make"
        )
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


def rows_for(queries: Index, stored: Fingerprint, chosen: Chosen, force: bool = False) -> Rows:
    """Return the rows of a query index as stored rows want them: checked, and of the smaller dim if both nest.

    Raises:
        FingerprintError: if they do not belong together, naming the field and both values.
        ValueError: if there is no row, or blocks are missing.
    """
    if not len(queries):
        raise ValueError(f"the query {queries.path or 'index'} holds no row")
    mine = queries.fingerprint.dim
    if mine is not None and stored.dim is not None and mine > stored.dim:
        with suppress(ValueError):  # where it does not nest, what follows says so
            queries = narrowed(queries, stored.dim)
    common = [name for name in chosen.names if name in queries.blocks]
    rows = matched(queries.rows(common or None), stored, chosen, queries.fingerprint, force=force)
    chosen.matrix(rows)  # says what does not fit where a difference was forced
    return rows
