"""Ranks: the same bytes and sums as one process, a failing rank ends the others, a killed run resumes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence.hessians import load as load_factors
from influence.index import open_index
from influence.pipelines import build, hessian, reduce, score
from influence.pipelines.frame.configs import LossConfig, TransformConfig
from influence.pipelines.frame.ranks import launched
from influence.pipelines.passes import best, collect
from tests.pipeline_world import DOCUMENTS, FAST, build_config, corpus, model_config, questions, world

ROOT = Path(__file__).parent.parent


def everything(place: Path) -> None:
    """Run every distributed pipeline, one after the other, in this process's ranks."""
    build.run(build_config(place / "build"))
    view = TransformConfig(projection_dim=4)
    rows = reduce.ReduceConfig(str(place / "reduce"), model_config(), questions(), transform=view, execution=FAST)
    reduce.run(rows)
    reduce.run(replace(rows, run=str(place / "mean"), data=corpus()))
    scores = score.ScoreConfig(str(place / "score"), model_config(), corpus(), (str(place / "reduce"),))
    score.run(replace(scores, transform=view, execution=FAST))
    score.run(replace(scores, run=str(place / "heap"), top_k=3, transform=view, execution=FAST))
    factors = hessian.HessianConfig(str(place / "gram"), model_config(), corpus(), "autocorrelation", transform=view)
    hessian.run(replace(factors, execution=FAST))
    whole = TransformConfig(projection_dim=0)
    hessian.run(replace(factors, run=str(place / "ekfac"), method="ekfac", transform=whole, execution=FAST))


def failing(output: Any, batch: Any) -> Tensor:
    """A loss that fails on the last rank after a few batches, or kills its process."""
    calls.append(len(batch["index"]))
    mine = launched().rank == launched().world - 1 and 20 in batch["index"] and "FAIL" in os.environ
    if mine:
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
    if mine and os.environ["FAIL"] == "raise":
        raise ArithmeticError("this rank was told to fail")
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    if "SLOW" in os.environ:
        time.sleep(0.3)
    logits = torch.nn.functional.log_softmax(output.logits[:, :-1], -1)
    picked = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return -(picked * batch["attention_mask"][:, 1:]).sum(1)


calls: list[int] = []


def torchrun(*command: str, world_size: int = 2, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run([*launcher, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)


def plainly(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks by nothing but their environment; return the first, which does not fail itself."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"} | more
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, *command], env=env | {"RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[1] for process in started]
    assert all(process.returncode for process in started)
    return subprocess.CompletedProcess(command, started[0].returncode, "", said[0])


def bytes_of(run: Path) -> list[dict[str, str]]:
    """Return the checksum of every dataset of every shard."""
    return [{name: place.sha256 for name, place in s.places.items()} for s in open_index(run).about.shards]


def test_two_ranks_are_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from pathlib import Path\nfrom tests import pipeline_world\nfrom tests.test_ranks import everything\n"
        f"pipeline_world.world = lambda: Path({str(world())!r})\neverything(Path({str(tmp_path / 'two')!r}))\n"
    )
    ran = torchrun(str(script))
    assert ran.returncode == 0, ran.stderr
    everything(tmp_path / "one")
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("build", "score"):
        assert bytes_of(one / name) == bytes_of(two / name), name
    for name in ("reduce", "mean"):
        a, b = (open_index(place / name).matrix() for place in (one, two))
        assert float((a - b).norm() / a.norm()) <= 1e-12
    heaps = [best.read_best(place / "heap") for place in (one, two)]
    for name, heap in heaps[0].items():
        assert torch.equal(heap.indices, heaps[1][name].indices)
        assert torch.equal(heap.values, heaps[1][name].values)
    for name in ("gram", "ekfac"):
        a, b = (load_factors(place / name) for place in (one, two))
        assert a.documents == b.documents == DOCUMENTS
        for block, curvature in a.blocks.items():
            expected = curvature.dense()
            assert float((expected - b.blocks[block].dense()).norm() / expected.norm()) <= 1e-12
    assert not list(two.rglob("partial-*"))


def command(run: Path) -> list[str]:
    data = ["--model", str(world() / "model"), "--dataset", str(world() / "corpus.jsonl")]
    small = ["--shard-size", "4", "--token-budget", "128", "--projection-dim", "4", "--dtype", "float64"]
    return ["build", str(run), *data, *small, "--loss", "tests.test_ranks:failing"]


@pytest.mark.parametrize(("launch", "how"), [(torchrun, "raise"), (torchrun, "kill"), (plainly, "raise")])
def test_a_failing_rank_ends_the_others_and_the_run_resumes_alone(tmp_path: Path, launch: Any, how: str) -> None:
    """They waited for half an hour at the next barrier, and the error was on nobody's screen."""
    told = {"FAIL": how, "SLOW": "1", "FAILED_AT": str(tmp_path / "failed")}
    ran = launch("-m", "influence", *command(tmp_path / "a"), **told)
    assert time.time() - float((tmp_path / "failed").read_text()) < 10
    assert ran.returncode != 0
    if how == "raise":
        assert "ArithmeticError: this rank was told to fail" in ran.stderr
        assert "rank 1" in ran.stderr
    else:
        assert "SIGKILL" in ran.stderr or "-9" in ran.stderr
    assert not (tmp_path / "a" / "index.h5").exists()
    loss = LossConfig("tests.test_ranks:failing")
    small = replace(FAST, shard_size=4, token_budget=128)
    build.run(build_config(tmp_path / "a", loss=loss, execution=small))
    build.run(build_config(tmp_path / "b", loss=loss, execution=small))
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_an_error_before_the_pass_is_heard_too(tmp_path: Path) -> None:
    """Only what failed inside `with ranks()` reached the others; torchrun alone noticed the rest."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time, pathlib\nfrom influence.pipelines import build\n"
        "from influence.pipelines.frame.ranks import launched\n"
        "from tests import pipeline_world\nfrom tests.test_ranks import ROOT\n"
        f"pipeline_world.world = lambda: pathlib.Path({str(world())!r})\n"
        "def failing(*args):\n"
        f"    pathlib.Path({str(tmp_path / 'failed')!r}).write_text(str(time.time()))\n"
        "    raise ArithmeticError('this rank cannot read')\n"
        "if launched().rank: build.read_data = failing\n"
        f"build.run(pipeline_world.build_config(pathlib.Path({str(tmp_path / 'a')!r})))\n"
    )
    ran = plainly(str(script))
    assert time.time() - float((tmp_path / "failed").read_text()) < 10
    assert "RankFailed: rank 1 failed, so rank 0 stops" in ran.stderr
    assert "ArithmeticError: this rank cannot read" in ran.stderr


def test_a_sum_resumed_by_another_number_of_ranks_counts_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes die one after the other, each as another rank of another number; the rest is done alone."""
    from influence.func.engine.per_example import PlannedRows
    from influence.pipelines.frame import ranks as room

    class Died(Exception):
        pass

    loss = LossConfig("tests.test_ranks:failing")
    config = reduce.ReduceConfig(str(tmp_path / "r"), model_config(), corpus(), "sum", loss=loss)
    small = replace(FAST, shard_size=2, token_budget=128)
    config = replace(config, transform=TransformConfig(projection_dim=4), execution=small)
    with_losses, seen = PlannedRows.with_losses, [0]
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)

    def mortal(self: PlannedRows, params: Any, batch: Any) -> Any:
        seen[0] += 1
        if seen[0] > 3:
            raise Died
        return with_losses(self, params, batch)

    for rank, world_size in ((0, 1), (1, 3), (0, 2)):
        place = room.Ranks(rank, world_size)
        monkeypatch.setattr(room, "joined", lambda place=place: place)
        monkeypatch.setattr(room.Ranks, "first", property(lambda self: True))
        seen[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(PlannedRows, "with_losses", mortal)
            with pytest.raises(Died):
                reduce.run(config)
    monkeypatch.undo()
    assert len(list((tmp_path / "r").glob("partial-*"))) == 2
    reduce.run(config)
    reduce.run(replace(config, run=str(tmp_path / "whole")))
    a, b = (open_index(tmp_path / name) for name in ("r", "whole"))
    assert float((a.matrix() - b.matrix()).norm() / b.matrix().norm()) <= 1e-12
    assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-12)


def test_builds_killed_at_random_moments_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """A few of them; `python -m tests.kill_builds` kills fifty."""
    from tests.kill_builds import configuration, kill_and_resume

    done = kill_and_resume(tmp_path, configuration(tmp_path, 48, 12), 12, kills=2, seed=1)
    assert all(0 < shards <= 12 for shards in done)
