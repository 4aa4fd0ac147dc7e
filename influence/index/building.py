"""Builds an index from any loss function and any batches, in memory or on disk."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from influence.func.engine.batch import batch_size
from influence.func.engine.per_example import per_example_grads_fn
from influence.func.engine.per_token import per_token_grads_fn, real_positions
from influence.func.engine.plan import Plan
from influence.func.numbers import check_number
from influence.func.transform.chain import Transform
from influence.index.columns import Columns, check_dtype
from influence.index.provenance import fingerprint_of
from influence.index.root import About, finish
from influence.index.rows import Index, ShardInMemory, open_index
from influence.index.run import start
from influence.index.shards import Collected, memory_sink, shard_sink
from influence.store.folder import refuse_foreign
from influence.types import Batch, LossFn, Params

Step = Callable[[Params, Batch], Collected]


def build(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    path: str | Path | None = None,
    *,
    transform: Transform | None = None,
    dtype: str = "float32",
    engine: str = "auto",
    per_token: str | None = None,
    chunk_size: int | None = None,
    nonfinite: str = "error",
    shard_size: int = 4096,
    config: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
    recorded: Mapping[str, Any] | None = None,
    weights: str | None = None,
    overwrite: bool = False,
    append: bool = False,
    progress: bool = True,
) -> Index:
    """Collect the rows of a dataset into an index.

    Args:
        loss_fn: any pure function `(params, batch) -> losses[n]`.
        params: the parameters to differentiate.
        batches: the data, as the function takes them. `batch["index"]`, where there is one, says which rows of the
            dataset a batch holds; otherwise they are counted.
        path: the run directory to write; `None` keeps the index in memory.
        transform: what is wanted of the gradients.
        dtype: how rows are stored: float32, float64, float16, bfloat16 or int8.
        engine: as in `per_example_grads`.
        per_token: `"use"` or `"loss"` for a row of every token, as in `per_token_grads`; `None` for one of every
            example.
        chunk_size: examples computed at a time.
        nonfinite: `"error"` or `"zero"`.
        shard_size: examples of a shard, at the least: batches stay whole.
        config: anything JSON can write, to be found in the index.
        command: what to type to make it again.
        recorded: more to record in the fingerprint, as `{"data": "wikitext"}`.
        weights: the hash of the weights, if it is known.
        overwrite: delete the run that is there: the files that its manifest names, no others.
        append: add to a finished index; examples without `index` are counted on.
        progress: show a bar, of batches and tokens, in a terminal and in a notebook.

    Returns:
        The index, open; it keeps the function and the parameters, so that it can be asked with a batch alone.

    Raises:
        ValueError: if there is no batch, or an option does not fit.
        FileExistsError: if a run is there; saying what.

    Example:
        >>> import torch
        >>> from influence.index import build
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> w = {"w": torch.tensor([1.0, 0.0])}
        >>> index = build(lambda params, x: (x @ params["w"]).square() / 2, w, [x], progress=False)
        >>> index
        <index of 2 rows × 2 in float32, in memory>
        >>> index.rows()["w"], index.loss
        (tensor([[ 1.,  2.],
                [ 9., 12.]]), tensor([0.5000, 4.5000]))
    """
    check_dtype(dtype)
    check_number("shard_size", shard_size, 1)
    if path is None and (append or overwrite):
        raise ValueError("append and overwrite are for an index on disk: pass path=")
    if path is not None:
        refuse_foreign(path)
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise ValueError("there is no batch: an index needs at least one example to know its columns")
    step, plan = step_of(
        loss_fn, params, first, transform, engine, per_token, chunk_size=chunk_size, nonfinite=nonfinite
    )
    columns = Columns(plan.folded.row_shapes)
    shapes = columns.shapes
    fingerprint = fingerprint_of(loss_fn, params, plan.transform, shapes, weights, recorded, plan.layout, first)
    size = len(batches) if isinstance(batches, Sized) else None
    whole = tqdm(chain([first], source), desc="build", total=size, unit="batch", disable=not progress)
    settings = {"dtype": dtype, "engine": engine, "per_token": per_token, **(config or {})}
    if path is None:
        sink = memory_sink(columns, dtype, per_token is not None)
        state = sink.init()
        for index, value in _collected(_numbered(whole, 0), step, params, whole):
            state = sink.update(state, index, value)
        what = replace(fingerprint, live=None)  # which holds on to the model
        about = About("index", dtype, per_token is not None, columns, what, settings, list(command), {}, ())
        return Index(about, [ShardInMemory(sink.finalize(state))], None, (loss_fn, params))
    planned = {"shard_size": shard_size, "dtype": dtype, "per_token": per_token is not None}
    with start(path, "index", settings, command, planned, fingerprint, overwrite, False, append) as run:
        collected = _collected(_numbered(whole, _next_row(path) if append else 0), step, params, whole)
        for number, some in enumerate(_shards(collected, shard_size), run.first):
            sink = shard_sink(run.directory, number, None, columns, dtype, per_token is not None)
            state = sink.init()
            for index, value in some:
                state = sink.update(state, index, value)
            sink.finalize(state)
        finish(run.directory)
    there = open_index(path)
    return Index(there.about, there.parts, there.path, (loss_fn, params))


def step_of(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    transform: Transform | None = None,
    engine: str = "auto",
    per_token: str | None = None,
    **options: Any,
) -> tuple[Step, Plan]:
    """Plan the step that a shard's sink takes: rows, losses and lengths of a batch, from one forward.

    Args:
        loss_fn: the loss function.
        params: the parameters.
        batch: a first batch.
        transform: what is wanted of the gradients.
        engine: as in `per_example_grads`.
        per_token: `"use"`, `"loss"` or `None`.
        options: for `per_example_grads_fn`.

    Returns:
        `(params, batch) -> Collected`, and the plan; a row's columns are `Columns(plan.folded.row_shapes)`.
    """
    if per_token is None:
        rows_of = per_example_grads_fn(loss_fn, params, batch, transform=transform, engine=engine, **options)

        def of_examples(params: Params, batch: Batch) -> Collected:
            rows, losses = rows_of.with_losses(params, batch)
            return Collected(rows, losses, lengths_of(batch))

        return of_examples, rows_of.plan
    if engine not in ("auto", "batched"):
        raise ValueError(f"per-token rows need the batched engine; got engine={engine!r}")
    tokens_of = per_token_grads_fn(loss_fn, params, batch, position=per_token, transform=transform)

    def of_tokens(params: Params, batch: Batch) -> Collected:
        found, losses = tokens_of.with_losses(params, batch)
        return Collected(found.rows, losses, lengths_of(batch), None, found.offsets, found.positions)

    return of_tokens, tokens_of.plan


def lengths_of(batch: Batch) -> Int[Tensor, " n"]:
    """Return the tokens of each example: its attention mask's, or its positions; 1 where there are none."""
    if isinstance(batch, Mapping) and ("attention_mask" in batch or "input_ids" in batch):
        return real_positions(batch).sum(1)
    return torch.ones(batch_size(batch), dtype=torch.int64)


def _numbered(batches: Iterable[Batch], first: int) -> Iterator[tuple[Tensor, Batch]]:
    """Yield each batch with the rows of the dataset that it holds."""
    begin = first
    for batch in batches:
        n = batch_size(batch)
        index = batch.get("index") if isinstance(batch, Mapping) else None
        if index is not None and int(index.min()) < first:
            raise ValueError(
                f"a batch holds row {int(index.min())} of the dataset, and the index that is appended to has rows up "
                f"to {first - 1}: count on from there, or leave `index` out of the batches"
            )
        yield torch.arange(begin, begin + n) if index is None else index, batch
        begin += n


def _collected(
    numbered: Iterator[tuple[Tensor, Batch]], step: Step, params: Params, bar: tqdm
) -> Iterator[tuple[Tensor, Collected]]:
    tokens = 0
    for index, batch in numbered:
        value = step(params, batch)
        yield index, value
        if not bar.disable and value.length is not None:
            tokens += int(value.length.sum())
            bar.set_postfix(tokens=f"{tokens:,}", refresh=False)


def _shards(collected: Iterator[tuple[Tensor, Collected]], size: int) -> Iterator[Iterator[tuple[Tensor, Collected]]]:
    """Yield batches shard by shard: whole ones, until there are enough examples."""
    for index, value in collected:

        def shard(index: Tensor = index, value: Collected = value) -> Iterator[tuple[Tensor, Collected]]:
            count = len(index)
            yield index, value
            while count < size:
                following = next(collected, None)
                if following is None:
                    return
                count += len(following[0])
                yield following

        yield shard()


def _next_row(path: str | Path | None) -> int:
    assert path is not None
    there = open_index(path).index
    return int(there.max()) + 1 if len(there) else 0
