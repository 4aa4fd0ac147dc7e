"""Time and memory, measured so that two runs agree: interleaved rounds, ratios within a round, a fresh process each.

**Time.** Every variant runs once per round, in an order shuffled anew; a ratio is taken between two times of the *same*
round, and the median over rounds is what is reported. A neighbour who slows the machine for a minute then slows both
sides of the ratio. Wall time and processor time are both kept. With one thread, processor time is the clock to trust
(it hardly sees other processes); with several it counts the threads' idle spinning, so wall time is. By default glibc
gives every large block back to the kernel and faults in a fresh one, 7 % of a step here and most of its scatter; the
timed process keeps its heap instead (`keep_heap`), for every variant alike.

**Memory.** One process per variant. After a warm-up step the kernel's own high-water mark of the resident set is reset
(writing 5 to `/proc/self/clear_refs`) and read back after one more step (`VmHWM`): every byte counts, whoever allocated
it, with no sampling to miss a spike. So that the resident set follows the live tensors instead of the allocator's free
lists, the process maps every block of 64 KiB and more by itself (`MALLOC_MMAP_THRESHOLD_`) and returns what it can
before the step (`malloc_trim`).
"""

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], object]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class Times(NamedTuple):
    """Seconds of one variant, one entry per round."""

    wall: list[float]
    cpu: list[float]


class Ratio(NamedTuple):
    """Median and quartiles over rounds of one time over another of the same round."""

    median: float
    low: float
    high: float


class Memory(NamedTuple):
    """Bytes of one variant, measured in a process of its own.

    Attributes:
        held: Resident before the step, above the process with only the model and its batch (plans, code, imports).
        step: The step's high-water mark above what was resident before it.
    """

    held: int
    step: int


def interleave(steps: Mapping[str, Step], rounds: int, seed: int = 0, on_round: Callable[[int], None] | None = None):
    """Time every step once per round, in an order shuffled per round.

    Args:
        steps: The variants by name; each was already warmed up.
        rounds: How often each runs.
        seed: Of the order.
        on_round: Called with the number of finished rounds.

    Returns:
        `{name: Times}`.
    """
    order, shuffle = list(steps), random.Random(seed).shuffle
    times = {name: Times([], []) for name in steps}
    for done in range(rounds):
        shuffle(order)
        for name in order:
            wall, cpu = timed(steps[name])
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
        if on_round is not None:
            on_round(done + 1)
    return times


def keep_heap() -> None:
    """Tell glibc's allocator to take everything from the heap and to never give it back (elsewhere: do nothing)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def timed(step: Step) -> tuple[float, float]:
    """Wall and processor seconds of one step, without the garbage collector's."""
    gc.collect()
    gc.disable()
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        result = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        gc.enable()
    del result
    return wall, cpu


def ratio(over: list[float], under: list[float], scale: float = 1.0) -> Ratio:
    """Median and quartiles of `scale * over / under`, round by round."""
    values = sorted(scale * a / b for a, b in zip(over, under, strict=True))
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def memory_of(module: str, arguments: list[str]) -> Memory:
    """Run `python -m module *arguments` in a fresh process that ends with `print_memory`, and read what it printed.

    Raises:
        RuntimeError: The process failed; the message ends with its last lines.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def print_memory(prepare: Callable[[], Step]) -> None:
    """Prepare a step, warm it up, and print the `Memory` of one more as a line of JSON.

    The two warm-up steps let every lazy import, kernel choice and workspace happen first.
    """
    start = _resident()
    step = prepare()
    for _ in range(2):
        step()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    result = step()
    peak = _status("VmHWM")
    del result
    print(json.dumps(Memory(before - start, peak - before)._asdict()))


class Alive(TorchDispatchMode):
    """While active, watch how many bytes of new tensors whose last two axes are one of `shapes` live at the same time.

    An activation that happens to have one of the shapes counts too: what is measured is an upper bound.

    Attributes:
        peak: The most bytes so far.
    """

    def __init__(self, shapes: Collection[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes, self.peak = set(shapes), 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then count."""
        out = func(*args, **(kwargs or {}))
        old = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id_of(t) not in old]
        for tensor in new:
            if tuple(tensor.shape[-2:]) in self.shapes:
                storage = tensor.untyped_storage()
                self._storages[id_of(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def id_of(tensor: torch.Tensor) -> int:
    """Where the storage itself lives: views share it."""
    return tensor.untyped_storage()._cdata


def machine() -> dict[str, object]:
    """What the figures were measured on, for the JSON beside them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load": os.getloadavg(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """The interpreter's and the packages' versions; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")
