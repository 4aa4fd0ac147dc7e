"""Chains shared out among processes: the same as one process runs, and resumed by any number of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from influence import sgmcmc
from influence.cli import main
from influence.sgmcmc.runner import traces
from tests.pipeline_world import world
from tests.test_ranks import ROOT, torchrun
from tests.test_sgmcmc_runs import same


def flags(run: Path, *more: str) -> list[str]:
    """55 steps in float64 of 3 chains, under two restrictions, with observables."""
    data = str(world() / "corpus.jsonl")
    chains = ["--num-chains", "3", "--num-draws", "50", "--num-burnin-steps", "5", "--batch-size", "4"]
    watched = ["--observables", "data", "--observed", "4", "--restrictions", "full", "l0 mlp"]
    settings = ["--localization", "1000", "--checkpoint-every", "10", *more]
    return [
        "sample",
        str(run),
        "--model",
        str(world() / "model"),
        "--dataset",
        data,
        *chains,
        *watched,
        *settings,
    ]


def loaded(run: Path) -> dict[str, sgmcmc.Run]:
    found = sgmcmc.load(run)
    assert isinstance(found, dict)
    return found


def test_two_processes_run_the_chains_of_one(tmp_path: Path) -> None:
    ran = torchrun("-m", "influence", *flags(tmp_path / "two"))
    assert ran.returncode == 0, ran.stderr
    assert "on 2 ranks" in ran.stdout
    assert main(flags(tmp_path / "one")) == 0
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    for name, run in one.items():
        assert run.loss.dtype == torch.float64
        assert run.loss.shape == (3, 55)
        same(run, two[name], 1e-10)
        assert run.facts == two[name].facts
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [".lock", "config.yaml", "run.h5", "run.json"]
    assert main(flags(tmp_path / "two")) == 0  # one process reads what two have written


def test_a_run_killed_on_two_processes_goes_on_in_one_bit_by_bit(tmp_path: Path) -> None:
    """Both are killed after some checkpoints; the shares stay as they were dealt, so no chain has another neighbour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "influence", *flags(tmp_path / "a")]
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, cwd=ROOT, stderr=subprocess.DEVNULL) for rank in (0, 1)
    ]
    shares = [tmp_path / "a" / name for name in ("chains-0-1", "chains-1-3")]
    began = time.time()
    while not all((share / "state.h5").is_file() for share in shares) and time.time() - began < 150:
        time.sleep(0.005)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "a" / "run.h5").exists()
    assert main(flags(tmp_path / "a")) == 0
    ran = torchrun("-m", "influence", *flags(tmp_path / "b"))
    assert ran.returncode == 0, ran.stderr
    resumed, whole = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    for name, run in whole.items():
        same(run, resumed[name])


def test_unfinished_shares_of_other_settings_are_refused(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    class Killed(BaseException):
        pass

    write = traces.store.write

    def killing(path: Path, *args: Any, **kwargs: Any) -> None:
        write(path, *args, **kwargs)
        if path.name == "state.h5":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(traces.store, "write", killing)
        with contextlib.suppress(Killed):
            main(flags(tmp_path / "a"))
    assert (tmp_path / "a" / "chains-0-3" / "state.h5").is_file()
    capsys.readouterr()
    assert main(flags(tmp_path / "a", "--lr", "2e-4")) == 1
    assert "another lr of full: it has 0.0001, this one 0.0002. Pass --overwrite" in capsys.readouterr().err
    assert main(flags(tmp_path / "a", "--num-chains", "2")) == 1
    assert "holds a run of another --num-chains: it has 3, this one 2. Pass --overwrite" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "not finished (chains-0-3)" in capsys.readouterr().out
    assert main(flags(tmp_path / "a")) == 0
    assert main(flags(tmp_path / "a", "--num-chains", "2", "--overwrite")) == 0
