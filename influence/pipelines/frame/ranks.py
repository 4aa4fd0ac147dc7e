"""Ranks: processes that `torchrun` started, which share a directory and wait for one another; or one plain process.

Everything large goes through files; what ranks tell one another fits into torch's rendezvous store. A rank that fails
says so there, and whoever waits or works sees it within a second, whatever started the processes.
"""

import contextlib
import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

EVERY = 0.5
"""Seconds between two looks at whether another rank failed."""

POLL = 0.02
"""Seconds between two looks at what a rank waits for."""


class RankFailed(RuntimeError):
    """Another rank failed, so this one stops."""


class Ranks:
    """This process among its peers.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        """Hold the place, and the store that all ranks see."""
        self.rank, self.world, self._store = rank, world, store
        self._waits, self._looked = 0, 0.0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def check(self) -> None:
        """Stop if another rank failed.

        Raises:
            RankFailed: with the other rank's traceback.
        """
        if self._store is None or time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        if self._store.check(["failed"]):
            failed = json.loads(self._store.get("failed"))
            raise RankFailed(f"rank {failed['rank']} failed, so rank {self.rank} stops; its error:\n{failed['error']}")

    def barrier(self) -> None:
        """Wait for every rank."""
        if self._store is None:
            return
        self._waits += 1
        key = f"barrier/{self._waits}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world:
            self.check()
            time.sleep(POLL)
        self._left(key)

    def _left(self, key: str) -> None:
        """Let the first rank, in whose process the store may live, go on only when all others saw that they may."""
        if not self.first:
            self._store.add(f"{key}/left", 1)
            return
        while self._store.add(f"{key}/left", 0) < self.world - 1:
            self.check()
            time.sleep(POLL)

    def once(self, work: Callable[[], Any]) -> Any:
        """Return what the first rank's call returns, on every rank; others do not call.

        Args:
            work: returns something JSON can write.
        """
        if self._store is None:
            return work()
        self._waits += 1
        key = f"once/{self._waits}"
        if self.first:
            result = work()
            self._store.set(key, json.dumps(result))
            return result
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL)
        return json.loads(self._store.get(key))

    def fail(self, error: BaseException) -> None:
        """Tell the others."""
        if self._store is not None and not isinstance(error, RankFailed):
            said = "".join(traceback.format_exception(error))
            with contextlib.suppress(RuntimeError):  # the store may be what failed
                self._store.set("failed", json.dumps({"rank": self.rank, "error": said}))


class Launch(NamedTuple):
    """What a launcher's environment says."""

    rank: int
    world: int
    local: int


def launched() -> Launch:
    """Return this process's place by the environment that `torchrun` sets; a plain process is alone."""
    number = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    return Launch(number["RANK"], number["WORLD_SIZE"], int(os.environ.get("LOCAL_RANK", number["RANK"])))


@functools.cache
def joined() -> Ranks:
    """Join the other ranks, once in a process."""
    if launched().world == 1:
        return Ranks()
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    return Ranks(rank, world, store)


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Work among the other ranks, if there are any: on an error tell them, on success wait for them.

    Yields:
        This process's place; the same inside another `ranks()`.
    """
    mine = joined()
    try:
        yield mine
        mine.barrier()
    except BaseException as error:
        mine.fail(error)
        raise


def among_ranks(run: Callable[P, R]) -> Callable[P, R]:
    """Return a pipeline that tells the other ranks of an error wherever in it that comes.

    Args:
        run: the pipeline.
    """

    @functools.wraps(run)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        with ranks():
            return run(*args, **kwargs)

    return told


def own_device(device: str) -> str:
    """Return where a rank computes: `cuda` is the GPU of its local number."""
    return f"cuda:{launched().local}" if device == "cuda" and launched().world > 1 else device
