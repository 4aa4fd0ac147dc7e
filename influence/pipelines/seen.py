"""What a pass sees of a batch: rows, losses, lengths; and the steps that see it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from influence.data import Tokenized
from influence.func.fold import Sink
from influence.func.per_example import PlannedRows, per_example_grads_fn
from influence.index import Collected
from influence.pipelines.configs import RunConfig
from influence.pipelines.prepare import Measured, predicted


class Seen(NamedTuple):
    """What is seen of a batch.

    Attributes:
        collected: rows, losses and lengths, as an index stores them.
        counts: which examples have a label to predict, which is what a mean averages.
    """

    collected: Collected
    counts: Bool[Tensor, " n"]


class Step(NamedTuple):
    """A planned step.

    Attributes:
        rows_of: the planned rows.
        see: `batch -> Seen`.
    """

    rows_of: PlannedRows
    see: Callable[[Mapping[str, Tensor]], Seen]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each block's row."""
        return {name: tuple(shape) for name, shape in self.rows_of.plan.folded.row_shapes.items()}


def plan_step(
    measured: Measured, first: Mapping[str, Tensor], execution: RunConfig, tokens: Tokenized, task: str
) -> Step:
    """Plan the rows of a dataset on its first batch.

    Args:
        measured: what is measured.
        first: the first batch.
        execution: by which engine.
        tokens: the dataset, which knows from which documents a chunk is.
        task: of the model.

    Returns:
        The step.
    """
    rows_of = per_example_grads_fn(
        measured.loss_fn,
        measured.params,
        dict(first),
        transform=measured.transform,
        engine=execution.engine,
        compile=execution.compile,
        nonfinite=execution.nonfinite,
    )
    documents = first_documents(tokens)

    def see(batch: Mapping[str, Tensor]) -> Seen:
        rows, losses = rows_of.with_losses(measured.params, batch)
        document = None if documents is None else documents[batch["index"].cpu()]
        return Seen(Collected(rows, losses, batch["attention_mask"].sum(1), document), predicted(batch, task))

    return Step(rows_of, see)


def first_documents(tokens: Tokenized) -> Int[Tensor, " n"] | None:
    """Return the document that each chunk begins with; `None` where examples are documents themselves."""
    if tokens.document is None:
        return None
    return tokens.document[tokens.offsets[:-1]].long()


def collected(sink: Sink) -> Sink:
    """Return a sink of what an index stores as one of what a pass sees."""
    return through(sink, lambda seen: seen.collected)


def of_rows(sink: Sink) -> Sink:
    """Return a sink of rows (`sinks.mean()`, `sinks.gram()`) as one of what a pass sees."""
    return through(sink, lambda seen: dict(seen.collected.rows))


def through(sink: Sink, view: Callable[[Any], Any]) -> Sink:
    """Return a sink that sees a view of each value."""
    return sink._replace(update=lambda state, index, value: sink.update(state, index, view(value)))


def total_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers a row has."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
