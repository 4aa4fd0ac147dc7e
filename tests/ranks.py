"""Two processes of a test that are ranks of one group.

They are forked from the test's process, which has imported everything, and leave as `multiprocessing` ends a forked
child: when their work returns, with their streams flushed and the status of what happened, and *without* taking the
interpreter down. A rank of gloo that takes it down may die of SIGABRT ("terminate called without an active
exception"): gloo's worker threads live as long as DTensor's caches hold the mesh, past `destroy_process_group`. One
that drops the tensors of the last collective while the interpreter ends asks for its lock, is ended for that, and a
thread of C++ which is ended inside a destructor ends the process.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_two_ranks(work: Callable[..., None], path: Path, *more: Any) -> None:
    """Run `work(*more)` in two ranks that have met; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(_meet, (path / "rendezvous", work, more), nprocs=2, start_method="fork")


def _meet(rank: int, file: Path, work: Callable[..., None], more: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not come along into a fork
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}  # where a Trainer looks,
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # and what it wants, though they have met
    store = torch.distributed.FileStore(str(file), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(*more)
    torch.distributed.barrier()  # a rank that leaves early closes what the other still reads from
    torch.distributed.destroy_process_group()
