"""What a pass sees of a batch: rows, losses, lengths; and the steps that see it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from influence.data import Tokenized
from influence.func.fold import Sink
from influence.func.sinks import taking
from influence.func.transform.layout import Layout
from influence.index import Collected, step_of
from influence.pipelines.frame.configs import RunConfig
from influence.pipelines.frame.prepare import Measured, predicted


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
        see: `batch -> Seen`.
        shapes: the shape of each block's row.
        layout: the parameters' layout.
    """

    see: Callable[[Mapping[str, Tensor]], Seen]
    shapes: dict[str, tuple[int, ...]]
    layout: Layout


def plan_step(
    measured: Measured,
    first: Mapping[str, Tensor],
    execution: RunConfig,
    tokens: Tokenized,
    task: str,
    per_token: str | None = None,
) -> Step:
    """Plan the rows of a dataset on its first batch.

    Args:
        measured: what is measured.
        first: the first batch.
        execution: by which engine.
        tokens: the dataset, which knows from which documents a chunk is.
        task: of the model.
        per_token: a row for every token, `"use"` or `"loss"`, instead of one for every example.

    Returns:
        The step.
    """
    options: dict[str, Any] = {}
    if per_token is None:
        options = {"compile": execution.compile, "nonfinite": execution.nonfinite}
    step, plan = step_of(
        measured.loss_fn, measured.params, dict(first), measured.transform, execution.engine, per_token, **options
    )

    def see(batch: Mapping[str, Tensor]) -> Seen:
        collected = step(measured.params, dict(batch))
        return Seen(collected._replace(document=documents_of(tokens, batch, collected)), predicted(batch, task))

    return Step(see, {name: tuple(shape) for name, shape in plan.folded.row_shapes.items()}, plan.layout)


def documents_of(tokens: Tokenized, batch: Mapping[str, Tensor], collected: Collected) -> Tensor | None:
    """Return the document that each row is from: a chunk's first, a token's own; `None` where examples are documents.

    Args:
        tokens: the dataset.
        batch: a batch of it.
        collected: its rows.

    Returns:
        Rows of the dataset.
    """
    if tokens.document is None:
        return None
    begins = tokens.offsets[batch["index"].cpu() - tokens.index[0]]
    if collected.offsets is None or collected.positions is None:
        return tokens.document[begins].long()
    begins = begins.repeat_interleave(collected.offsets.diff().cpu())
    return tokens.document[begins + collected.positions.cpu()].long()


def collected(sink: Sink) -> Sink:
    """Return a sink of what an index stores as one of what a pass sees."""
    return taking(sink, lambda seen: seen.collected)


def of_rows(sink: Sink) -> Sink:
    """Return a sink of rows (`sinks.mean()`, `sinks.gram()`) as one of what a pass sees."""
    return taking(sink, lambda seen: dict(seen.collected.rows))


def total_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers a row has."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
