"""Searching a stored index, and the bytes per second of the store, against the least that either could cost.

The rows are synthetic: unit vectors around 4096 centres, written by the store's own writer as float16 shards. Every
variant of a comparison runs in every round, in an order shuffled anew. Searches on one thread are judged by processor
time, all else by wall time.

| variant | what is timed |
|---|---|
| bare product | the shards' rows as raw memory maps: `buffer.copy_(block); queries @ buffer.T`, nothing kept |
| scan | `Attributor.search`, `k = 10`: the same rows through the index, top k and all |
| FAISS Flat, IVF1024 | `Attributor.ask` with a `FaissConfig`; float32 rows in memory; the IVF looks into 10 cells |
| store write | `store.write` of each shard's tensors: checksums, fsync, rename |
| raw write | the same bytes into a `numpy.memmap`, flushed and synced |
| store read | the sum of every stored word, by `Index.pieces` |
| raw read | the same from `numpy.memmap` |
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure, report
from benchmarks.report import Check

K = 10
QUERIES = (1, 32)
CENTRES = 4096
SHARD = 1 << 16


class Line(NamedTuple):
    """One variant.

    Attributes:
        name: which.
        p50: median seconds.
        p99: seconds that 99 % of the rounds take at the most.
        over: its time over the bare one's, median over rounds; None where there is no bare one.
    """

    name: str
    p50: float
    p99: float
    over: float | None


def rows_of(begin: int, end: int, dim: int) -> Tensor:
    """Rows `begin` to `end`, unit vectors around centres, the same for every cut into shards of `SHARD`."""
    centres = torch.randn(CENTRES, dim, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1 + begin)
    kind = torch.randint(CENTRES, (end - begin,), generator=draw)
    rows = centres[kind] + torch.randn(end - begin, dim, generator=draw)
    return rows / rows.norm(dim=1, keepdim=True)


def write_index(path: Path, rows: int, dim: int) -> None:
    """Write the index as a run of shards."""
    from influence import as_blocks
    from influence.index import Collected, Columns, fingerprint_of, finish, shard_sink, start

    columns = Columns({"w": (dim,)})
    plan = [[begin, min(begin + SHARD, rows)] for begin in range(0, rows, SHARD)]
    fingerprint = fingerprint_of(None, None, as_blocks(), columns.shapes, weights="synthetic")
    with start(path, "index", {}, [], {"shards": plan}, fingerprint) as run:
        for number, (begin, end) in enumerate(plan):
            sink = shard_sink(path, number, (begin, end), columns, "float16")
            made = Collected({"w": rows_of(begin, end, dim)}, torch.zeros(end - begin))
            sink.finalize(sink.update(sink.init(), torch.arange(begin, end), made))
        finish(run.directory)


def raw_maps(index: Any) -> list[np.ndarray]:
    """The rows of every shard as `numpy.memmap` has them."""
    maps = []
    for shard in index.about.shards:
        place = shard.places["rows"]
        maps.append(np.memmap(index.path / shard.file, np.float16, "c", place.offset, tuple(place.shape)))
    return maps


def cut(maps: Sequence[np.ndarray], at_once: int) -> Iterator[Tensor]:
    """Blocks of rows."""
    return (torch.from_numpy(m[b : b + at_once]) for m in maps for b in range(0, len(m), at_once))


def blocked_product(maps: Sequence[np.ndarray], queries: Tensor, at_once: int) -> Callable[[], None]:
    """The bare product: every block is converted and multiplied, the faster way round, and the result forgotten."""
    from influence.index.scan import MANY

    buffer, q = torch.empty(at_once, queries.shape[1]), len(queries)
    blocks = list(cut(maps, at_once))
    out = torch.empty(q, at_once) if q < MANY else torch.empty(at_once, q).mT

    def step() -> None:
        for block in blocks:
            rows = buffer[: len(block)]
            rows.copy_(block)
            torch.mm(queries, rows.mT, out=out[:, : len(block)])

    return step


def summed(blocks: Callable[[], Iterator[Tensor]]) -> Callable[[], int]:
    """Read every byte once."""

    def step() -> int:
        return sum(int(block.view(torch.int64).sum()) for block in blocks())

    return step


def lines_of(times: dict[str, measure.Times], bare: str | None, clock: str = "wall") -> list[Line]:
    """Medians and 99th percentiles of a clock."""
    seconds = {name: getattr(each, clock) for name, each in times.items()}
    found = []
    for name, mine in seconds.items():
        p99 = statistics.quantiles(mine, n=100, method="inclusive")[98] if len(mine) > 1 else mine[0]
        over = None if bare is None or name == bare else measure.ratio(mine, seconds[bare]).median
        found.append(Line(name, statistics.median(mine), p99, over))
    return found


def search(path: Path, dim: int, rows: int, rounds: int, threads: int, faiss: bool) -> list[Line]:
    """Time the bare product and the scan, then FAISS."""
    from influence import Attributor, FaissConfig, open_index
    from influence.index.scan import rows_at_once

    torch.set_num_threads(threads)
    clock = "cpu" if threads == 1 else "wall"
    index, found = open_index(path), []
    scan = Attributor(index)
    for q in QUERIES:
        near = rows_of(0, min(SHARD, rows), dim)[: 7 * q : 7]
        queries = near + 0.5 * torch.randn(near.shape, generator=torch.Generator().manual_seed(9)) / dim**0.5
        steps: dict[str, measure.Step] = {
            f"bare product, {q}": blocked_product(raw_maps(index), queries, rows_at_once(dim, q)),
            f"scan, {q}": lambda q=queries: scan.ask({"w": q}, unchecked=True).top(K),
        }
        for step in steps.values():
            step()
        found += lines_of(measure.interleave(steps, rounds), f"bare product, {q}", clock)
        exact = scan.ask({"w": queries}, unchecked=True).top(K)
        for factory in ("Flat", "IVF1024,Flat" if rows >= 100_000 else "IVF16,Flat") if faiss else ():
            made = time.perf_counter()
            approximate = Attributor(index, faiss=FaissConfig(factory, max_train_examples=65_536, batch_size=8192))
            hits = approximate.ask({"w": queries}, unchecked=True).top(K)
            made = time.perf_counter() - made
            pairs = zip(hits.indices.tolist(), exact.indices.tolist(), strict=True)
            recall = sum(len({*a} & {*b}) for a, b in pairs) / (K * q)
            print(f"  FAISS {factory}: ready in {made:.1f} s, recall@{K} {recall:.3f}")
            name = f"FAISS {factory}, {q}"
            step = lambda queries=queries, attr=approximate: attr.ask({"w": queries}, unchecked=True).top(K)  # noqa: E731
            found += lines_of(measure.interleave({name: step}, rounds), None, clock)
            del approximate, step, hits
    return found


def bandwidth(path: Path, dim: int, rounds: int, scratch: Path) -> list[Line]:
    """Time writing some shards and reading all, by the store and by raw memory maps."""
    from influence import open_index, store
    from influence.index.scan import rows_at_once

    index = open_index(path)
    parts = index.parts[:4]
    tensors = [{name: part.get(name).clone() for name in ("rows", "scale", "index", "loss")} for part in parts]

    def write_store() -> None:
        for number, held in enumerate(tensors):
            store.write(scratch / f"store-{number}.h5", held, {}, kind="shard", schema=1)

    def write_raw() -> None:
        for number, held in enumerate(tensors):
            rows = held["rows"].numpy()
            name = scratch / f"raw-{number}.bin"
            mapped = np.memmap(name, rows.dtype, "w+", shape=rows.shape)
            mapped[:] = rows
            mapped.flush()
            del mapped
            handle = os.open(name, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    at_once, maps = rows_at_once(dim), raw_maps(index)
    found = []
    for steps in (
        {"raw write": write_raw, "store write": write_store},
        {
            "raw read": summed(lambda: cut(maps, at_once)),
            "store read": summed(lambda: (piece.values for piece in index.pieces(at_once))),
        },
    ):
        for step in steps.values():
            step()
        found += lines_of(measure.interleave(steps, rounds), next(iter(steps)))
    size = sum(held["rows"].numel() * 2 for held in tensors)
    whole = len(index) * dim * 2
    for line, bytes_ in zip(found, (size, size, whole, whole), strict=True):
        print(f"  {line.name:12} {bytes_ / line.p50 / 1e9:6.2f} GB/s")
    return found


def run(
    rows: int = 1_000_000,
    dim: int = 512,
    rounds: int = 50,
    threads: int = 2,
    quick: bool = False,
    path: Path | None = None,
    faiss: bool = True,
) -> dict:
    """Write, read and search; prints the tables and returns them with the machine and the settings."""
    import influence

    rows, rounds = (40_000, 5) if quick else (rows, rounds)
    torch.set_num_threads(threads)
    directory = Path(tempfile.mkdtemp(prefix="influence-search-", dir=path))
    try:
        began = time.perf_counter()
        write_index(directory / "run", rows, dim)
        print(f"{rows:,} × {dim} float16, made and written in {time.perf_counter() - began:.1f} s; {threads} threads")
        began = time.perf_counter()
        influence.open_index(directory / "run").verify()
        print(f"every checksum verified in {time.perf_counter() - began:.1f} s")
        (directory / "scratch").mkdir()
        lines = bandwidth(directory / "run", dim, rounds, directory / "scratch")
        lines += search(directory / "run", dim, rows, rounds, threads, faiss)
    finally:
        shutil.rmtree(directory)
    cells = [
        [line.name, f"{line.p50 * 1e3:.1f}", f"{line.p99 * 1e3:.1f}", "" if line.over is None else f"{line.over:.3f}"]
        for line in lines
    ]
    print(f"\n{report.table(['variant, queries', 'p50 ms', 'p99 ms', 'over bare'], cells)}")
    return {
        "benchmark": "index",
        "machine": measure.machine(),
        "versions": measure.versions("torch", "faiss-cpu", "h5py", "influence"),
        "settings": {"rows": rows, "dim": dim, "rounds": rounds, "threads": threads, "quick": quick, "k": K},
        "lines": [line._asdict() for line in lines],
    }


def targets(found: dict) -> list[Check]:
    """Judge: a scan costs at most 1.2 bare products, and the store at least 0.9 of a memory map's bandwidth."""
    over = {line["name"]: line["over"] for line in found["lines"]}
    scans = [report.at_most(f"scan over bare product, {q} queries", over[f"scan, {q}"], 1.2) for q in QUERIES]
    inverse = {name: 1 / over[name] for name in ("store write", "store read")}
    return scans + [report.at_least(f"bandwidth of {name} over raw", inverse[name], 0.9) for name in inverse]
