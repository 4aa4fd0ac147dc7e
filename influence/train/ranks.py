"""Processes that train together: what one does for all, and an error of one that all hear of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ranks(NamedTuple):
    """The processes of a training.

    Attributes:
        rank: this one.
        world: how many.
        device: where their collectives are.
    """

    rank: int
    world: int
    device: Any

    def first(self, work: Callable[[], object]) -> None:
        """Have the first process do something while the others wait.

        Raises:
            RuntimeError: on the others, if it failed; it raises its own error.
        """
        self.each(work if self.rank == 0 else lambda: None)

    def each(self, work: Callable[[], object]) -> None:
        """Have every process do something, and go on when all have.

        Raises:
            RuntimeError: on those that did, if another failed; that raises its own error.
        """
        failed: BaseException | None = None
        try:
            work()
        except BaseException as error:
            if self.world == 1:
                raise
            failed = error  # raised below, once the others know
        if self.world > 1:
            flag = torch.tensor([int(failed is not None)], device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            if failed is not None:
                raise failed
            if int(flag):
                raise RuntimeError("another process of this training could not go on: see its message")
