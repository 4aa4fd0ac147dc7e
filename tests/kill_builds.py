"""Kill builds at random moments with SIGKILL, resume them, and compare every byte with an undisturbed build's.

python -m tests.kill_builds --kills 50        # prints the histogram of shards that were done at the kill
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from influence.index import open_index
from influence.pipelines import build
from influence.pipelines.build import BuildConfig
from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig, TransformConfig
from notebooks.make_corpus import make


def configuration(folder: Path, documents: int, shards: int) -> BuildConfig:
    """Make a model and a corpus, and return how an index of so many shards is built of it."""
    make(folder / "made", documents, steps=0, hidden=32, layers=1)
    execution = RunConfig(shard_size=-(-documents // shards), token_budget=256, progress=False, dtype="float16")
    model, corpus = ModelConfig(str(folder / "made" / "model")), DataConfig(str(folder / "made" / "corpus.jsonl"))
    return BuildConfig("", model, corpus, transform=TransformConfig(projection_dim=8), execution=execution)


def contents(run: Path) -> Any:
    """Return everything an index is, but for where it lies and which run wrote it."""
    index = open_index(run)
    index.verify()
    shards = [(s.begin, s.end, {name: place.sha256 for name, place in s.places.items()}) for s in index.about.shards]
    return shards, index.blocks, index.fingerprint.json()


def started(config: BuildConfig, run: Path) -> Any:
    """Start a build in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_build, args=(replace(config, run=str(run)),))
    process.start()
    return process


def _build(config: BuildConfig) -> None:
    torch.set_num_threads(1)
    build.run(config)
    os._exit(0)  # not through pytest's own exit


def written(run: Path) -> int:
    return len(list(run.glob("shard-*.h5")))


def until(condition: Any, process: Any) -> float:
    while not condition() and process.is_alive():
        time.sleep(0.0005)
    return time.monotonic()


def kill_and_resume(folder: Path, config: BuildConfig, shards: int, kills: int, seed: int) -> list[int]:
    """Kill builds between their first and last shard, resume them, and compare.

    Returns:
        How many shards were done at each kill.
    """
    process = started(config, folder / "whole")
    first = until(lambda: written(folder / "whole") > 0, process)
    last = until(lambda: written(folder / "whole") == shards, process)
    process.join()
    assert process.exitcode == 0
    expected = contents(folder / "whole")
    draw, done = torch.Generator().manual_seed(seed), []
    for attempt in itertools.count():
        if len(done) == kills:
            return done
        run = folder / f"killed-{attempt}"
        moment = 1 + float(torch.rand(1, generator=draw)) * (shards - 1)  # in shards: other load stretches all alike
        process = started(config, run)
        begun = until(lambda run=run, moment=moment: written(run) >= int(moment), process)
        while time.monotonic() < begun + moment % 1 * (last - first) / (shards - 1) and process.is_alive():
            time.sleep(0.0005)
        if not process.is_alive():
            continue  # it was quicker than the one that was timed
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (run / "index.h5").exists():
            continue
        done.append(written(run))
        process = started(config, run)
        process.join()
        assert process.exitcode == 0, f"kill {len(done)}: the resumed build failed"
        assert contents(run) == expected, f"kill {len(done)}: the index is another"
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--documents", type=int, default=960)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="influence-kills-") as folder:
        config = configuration(Path(folder), options.documents, options.shards)
        began = time.monotonic()
        done = kill_and_resume(Path(folder), config, options.shards, options.kills, options.seed)
    print(f"{len(done)} builds of {options.shards} shards killed and resumed in {time.monotonic() - began:.0f} s: all")
    print("bit-identical to the undisturbed one. Shards done at the kill:")
    counts = Counter(done)
    for shards in range(min(counts), max(counts) + 1):
        print(f"  {shards:3d}  {'#' * counts[shards]}")


if __name__ == "__main__":
    sys.exit(main())
