"""Anchored runs: what is wanted of a backward is summed as it passes, so something must ask for the whole of it."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from influence.func.batched import BatchedPlan, Runner
from influence.func.batches import batch_size
from influence.func.contributions import Scene
from influence.func.probe import probe
from influence.types import Batch, Params

Head: TypeAlias = Callable[[Params, Batch], tuple[Tensor, Any]]
"""`(params, batch) -> (output, what it says of it)`: what cotangents are pulled back from."""


class Anchored(Runner):
    """The watcher of a run whose taps sum what they see; some blocks have rows all the same.

    Attributes:
        anchor: a zero that every tap depends on: its gradient is asked for so that every backward runs.
    """

    def __init__(self, plan: BatchedPlan, scene: Scene, with_rows: Collection[str]) -> None:
        """Start a run; the named blocks have rows."""
        like = next(iter(scene.values.values()))
        self.anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        zeros = {
            block.into: scene.values[block.parts[0].source].new_zeros(()).expand(scene.n, *block.shape).requires_grad_()
            for block in plan.folded.blocks
            if block.name in with_rows
        }
        super().__init__(plan, scene, zeros)

    def pull(self, out: Tensor, cotangent: Tensor, retain: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Pull one cotangent back through every tap; yield the rows of blocks that have them."""
        if not out.requires_grad:
            raise ValueError("no use of a parameter reaches the outputs of this batch")
        zeros = [self.anchor, *self.zeros.values()]
        found = torch.autograd.grad(out, zeros, cotangent, retain_graph=retain, allow_unused=True)
        yield from zip(self.zeros, found[1:], strict=True)


Run = TypeVar("Run", bound=Anchored)


def watched(
    plan: BatchedPlan, make: Callable[[Scene], Run], head: Head, params: Params, batch: Batch
) -> tuple[Tensor, Any, Run]:
    """Run a function of parameters with every use watched.

    Args:
        plan: what the batched engine executes.
        make: makes the watcher.
        head: the function.
        params: the parameters.
        batch: the batch.

    Returns:
        The output, what the head says of it, and the watcher, whose backward takes cotangents.
    """
    plain = {name: p.detach() for name, p in params.items()}
    run = make(Scene(batch_size(batch), None, dict(plan.folded.layout.params), plan.feeds, plain))
    probes = {name: probe(p, name, (name,), run) for name, p in plain.items()}
    out, said = head(probes, batch)  # type: ignore[arg-type]
    return out, said, run
