"""Runs: resumed after anything, never overwritten unless told, one writer at a time, and a full disk loses nothing."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import store
from influence.index import Collected, Columns, Fingerprint, Run, done, finish, open_index, shard_sink, start
from influence.index.recipe import StepFacts
from influence.store import hdf5
from influence.store.folder import read_manifest
from influence.store.lock import HELD

COLUMNS = Columns({"w": (50,)})
SKETCH = StepFacts("project", "sketch", "equal", {"dim": 8})
PRINT = Fingerprint("abc", steps=(SKETCH,), recorded={"data": "one", "loss": "sum"})
PLAN: dict[str, Any] = {"shards": [[0, 4], [4, 8], [8, 10]], "tokens": 100}
COMMAND = ["influence", "build", "--model", "tiny"]


def begin(directory: Path, plan: Any = None, fingerprint: Fingerprint = PRINT, kind: str = "index", **how: Any) -> Run:
    return start(directory, kind, {"lr": 1}, COMMAND, PLAN if plan is None else plan, fingerprint, **how)


def row(index: torch.Tensor) -> torch.Tensor:
    return index[:, None].double() + torch.arange(50) / 100


def write(run: Run, numbers: list[int]) -> None:
    for number in numbers:
        first, last = run.shards[number]
        index = torch.arange(first, last)
        sink = shard_sink(run.directory, number, (first, last), COLUMNS)
        sink.finalize(sink.update(sink.init(), index, Collected({"w": row(index)}, index.double())))


def whole(directory: Path, **how: Any) -> None:
    with begin(directory, **how) as run:
        write(run, run.todo)
        finish(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    with begin(tmp_path) as run:
        assert run.todo == [0, 1, 2]
        write(run, [0, 2])
    with begin(tmp_path) as run:
        assert run.todo == [1]
        assert done(tmp_path) == {0, 2}
        write(run, run.todo)
        finish(tmp_path)
    assert torch.equal(open_index(tmp_path).matrix(), row(torch.arange(10)).float())
    assert not HELD


def test_a_shard_that_was_cut_off_or_is_another_runs_is_made_again(tmp_path: Path) -> None:
    """A shard by its name alone."""
    with begin(tmp_path / "other", {**PLAN, "tokens": 50}) as run:
        write(run, [0, 1, 2])
    with begin(tmp_path / "run") as run:
        write(run, [0, 1])
    path = tmp_path / "run" / "shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-100])
    foreign = tmp_path / "run" / "shard-00002.h5"
    foreign.write_bytes((tmp_path / "other" / "shard-00002.h5").read_bytes())
    with pytest.raises(store.BadFileError, match=r"shard-00002.h5 belongs to another run"):
        done(tmp_path / "run")
    with pytest.raises(store.BadFileError, match=r"shard-00001.h5 is damaged"):
        finish(tmp_path / "run")
    with begin(tmp_path / "run") as run:
        write(run, [1])
        with pytest.raises(store.BadFileError, match=r"shard-00002.h5 belongs to another run"):
            finish(tmp_path / "run")
        foreign.unlink()
        write(run, run.todo)
        finish(tmp_path / "run")
    open_index(tmp_path / "run").verify()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    whole(tmp_path)
    before = contents(tmp_path)
    said = (
        r"holds a run of kind 'index' \(finished; 3 of 3 shards, [\d,]+ bytes\), made by: influence build --model tiny"
    )
    with pytest.raises(FileExistsError, match=said + r"\. It is finished: pass overwrite=True"):
        begin(tmp_path)
    with pytest.raises(FileExistsError, match=said + r"\. This run is of kind 'scores'"):
        begin(tmp_path, kind="scores")
    assert contents(tmp_path) == before
    assert not HELD
    run = read_manifest(tmp_path).id
    (tmp_path / f".shard-00000.h5.{run[:16]}.{'0' * 16}.partial").write_text("left by a killed process")
    (tmp_path / ".shard-00000.h5.abc.partial").write_text("mine")
    with pytest.warns(UserWarning, match=r"since the run did not write it: .shard-00000.h5.abc.partial"):
        whole(tmp_path, overwrite=True, plan={"shards": [[0, 3]]})
    kept = [".lock", ".shard-00000.h5.abc.partial", "index.h5", "run.json", "shard-00000.h5"]
    assert sorted(contents(tmp_path)) == kept
    assert len(open_index(tmp_path)) == 3


def test_an_unfinished_run_is_resumed_only_when_told(tmp_path: Path) -> None:
    with begin(tmp_path) as run:
        write(run, [0])
    with pytest.raises(FileExistsError, match=r"unfinished; 1 of 3 shards.*Pass resume=True"):
        begin(tmp_path, resume=False)


@pytest.mark.parametrize(
    ("field", "theirs", "mine", "other"),
    [
        ("weights", '"abc"', '"abd"', {"weights": "abd"}),
        ("project.dim", "8", "4", {"steps": (SKETCH._replace(settings={"dim": 4}),)}),
        ("clip", "null", '{"norm": 1.0}', {"steps": (SKETCH, StepFacts("clip", None, "equal", {"norm": 1.0}))}),
        ("data", '"one"', '"two"', {"recorded": {"data": "two", "loss": "sum"}}),
    ],
    ids=str,
)
def test_another_fingerprint_is_refused_with_both_values(
    tmp_path: Path, field: str, theirs: str, mine: str, other: dict[str, Any]
) -> None:
    """Two halves of one index from two models."""
    with begin(tmp_path) as run:
        write(run, [0])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"Its {field} is {theirs}, and this run's is {mine}")):
        begin(tmp_path, fingerprint=replace(PRINT, **other))
    assert contents(tmp_path) == before


def test_another_plan_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path).close()
    with pytest.raises(ValueError, match=r"Its plan has tokens = 100, and this run's has 50"):
        begin(tmp_path, plan={**PLAN, "tokens": 50})
    with pytest.raises(ValueError, match=r"Its plan has shards = \[\[0, 4\], .*this run's has \[\[0, 10\]\]"):
        begin(tmp_path, plan={**PLAN, "shards": [[0, 10]]})


def test_appending(tmp_path: Path) -> None:
    """Rows of other data at the end; an old root that names new shards; a plan that starts over."""
    with pytest.raises(FileNotFoundError, match=r"there is no index in .* to append to"):
        begin(tmp_path / "index", append=True)
    directory = tmp_path / "run"
    with begin(directory) as run:
        write(run, [0])
    with pytest.raises(FileExistsError, match="not finished, so there is nothing to append to yet"):
        begin(directory, append=True)
    with begin(directory) as run:
        write(run, run.todo)
        finish(directory)
    more = {"shards": [[10, 13], [13, 14]]}
    new_data = replace(PRINT, recorded={**PRINT.recorded, "data": "two"})
    old = {name: data for name, data in contents(directory).items() if name.startswith("shard")}
    with pytest.raises(ValueError, match=r"Its loss is \"sum\", and this run's is \"mean\": appended rows must be"):
        begin(directory, more, replace(PRINT, recorded={"data": "two", "loss": "mean"}), append=True)
    with pytest.raises(
        ValueError, match=r"rows of the dataset up to 9: appended shards begin at 10 or later, got \[\[8"
    ):
        begin(directory, {"shards": [[8, 11]]}, new_data, append=True)
    with begin(directory, more, new_data, append=True) as run:
        assert (run.first, run.todo) == (3, [3, 4])
        write(run, [3])
    assert len(open_index(directory)) == 10  # the index is what it was until the append is finished
    with pytest.raises(ValueError, match=r"an append of shards \[\[10, 13\], \[13, 14\]\] was cut off"):
        begin(directory, {"shards": [[10, 14]]}, new_data, append=True)
    with begin(directory, more, new_data, append=True) as run:
        assert run.todo == [4]
        write(run, run.todo)
        finish(directory)
    index = open_index(directory)
    assert torch.equal(index.matrix(), row(torch.arange(14)).float())
    assert torch.equal(index.index, torch.arange(14))
    assert [change["recorded"]["data"] for change in index.about.appended] == ["two"]
    assert all(contents(directory)[name] == data for name, data in old.items())
    with begin(directory, {"shards": [[14, 16]]}, append=True) as run:
        write(run, run.todo)
        finish(directory)
    assert len(open_index(directory)) == 16
    assert "appended from shard 5: influence build" in str(open_index(directory))


def test_a_damaged_shard_of_an_appended_index_is_made_again(tmp_path: Path) -> None:
    """What an error says to do: delete the shard and the root, and run the same command."""
    more = {"shards": [[10, 13], [13, 14]]}
    whole(tmp_path)
    whole(tmp_path, plan=more, append=True)
    before = open_index(tmp_path).matrix()
    for name in ("index.h5", "shard-00001.h5", "shard-00003.h5"):
        (tmp_path / name).unlink()
    with begin(tmp_path) as run:
        assert (run.first, run.last, run.todo) == (0, 3, [1])
        write(run, run.todo)
        with pytest.raises(ValueError, match=r"1 of 5 shards are missing, the first of them shard-00003.h5"):
            finish(tmp_path)
    with begin(tmp_path, more, append=True) as run:
        assert (run.first, run.last, run.todo) == (3, 5, [3])
        write(run, run.todo)
        finish(tmp_path)
    assert torch.equal(open_index(tmp_path).matrix(), before)
    with pytest.raises(ValueError, match="appended shards begin at 14 or later"):
        begin(tmp_path, more, append=True)


def test_a_start_that_was_killed_leaves_no_trace(tmp_path: Path) -> None:
    whole(tmp_path / "other")
    run = read_manifest(tmp_path / "other").id
    shutil.rmtree(tmp_path / "other")
    (tmp_path / ".lock").write_text("influence lock: process 1 on nowhere")
    (tmp_path / f".run.json.{run[:16]}.{'0' * 16}.partial").write_text("{")
    whole(tmp_path)
    assert sorted(contents(tmp_path)) == [".lock", "index.h5", "run.json", *(f"shard-0000{i}.h5" for i in range(3))]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"holds thesis.tex and no run"):
            begin(tmp_path, **how)
    assert contents(tmp_path) == {"thesis.tex": b"years"}
    whole(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"since the run did not write it: notes.txt"):
        whole(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    begin(tmp_path).close()
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text[:50])
    for how in ({}, {"overwrite": True}):
        with pytest.raises(store.BadFileError, match=r"run.json is damaged"):
            begin(tmp_path, **how)
    (tmp_path / "run.json").write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(store.BadFileError, match=r"schema 99, this version reads 1"):
        begin(tmp_path)
    (tmp_path / "run.json").write_text(text.replace('"kind": "index"', '"kind": ["index"]'))
    with pytest.raises(
        store.BadFileError, match=r"run.json is not what it says: kind must be a text, and is \['index'\]"
    ):
        begin(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "a run of mine"}')
    for how in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"holds run.json, which is no manifest of a run of influence"):
            begin(tmp_path, **how)
    assert (tmp_path / "run.json").read_text() == '{"name": "a run of mine"}'


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from tests.test_index_run import begin
from pathlib import Path
import os
run = begin(Path(sys.argv[1]))
child = os.fork()  # as a data loader's worker: it has the parent's files, and outlives it
if not child:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), root], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        for how in ({}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match=rf"is being written by process {other.pid} on "):
                begin(tmp_path, **how)
        other.kill()
        other.wait()
        with begin(tmp_path) as run:
            assert run.todo == [0, 1, 2]
            with pytest.raises(BlockingIOError, match=rf"by this very process \({os.getpid()}\)"):
                begin(tmp_path)
        begin(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        other.kill()
        other.wait()
        other.stdout.close()


WRITE = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from influence.index import finish
from tests.test_index_run import begin, write, MANY
run = begin(Path(sys.argv[1]), MANY)
print("ready", flush=True)
write(run, run.todo)
finish(run.directory)
"""
MANY = {"shards": [[i, i + 1] for i in range(25)]}


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """A shard that is half there under its own name."""
    whole(tmp_path / "undisturbed", plan=MANY)
    root, directory = str(Path(__file__).parents[1]), tmp_path / "killed"
    kills = 0
    for moment in (0.002, 0.006, 0.01, 0.02):
        run = subprocess.Popen([sys.executable, "-c", WRITE, str(directory), root], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(moment)
        run.kill()
        run.wait()
        run.stdout.close()
        kills += not (directory / "index.h5").exists()
        if (directory / "index.h5").exists():
            break
    assert kills
    if not (directory / "index.h5").exists():
        with begin(directory, MANY) as again:
            write(again, again.todo)
            finish(directory)
    index, expected = open_index(directory), open_index(tmp_path / "undisturbed")
    index.verify()
    assert torch.equal(index.matrix(), expected.matrix())
    sums = [{k: p.sha256 for s in i.about.shards for k, p in s.places.items()} for i in (index, expected)]
    assert sums[0] == sums[1]
    assert [s.places for s in index.about.shards] == [s.places for s in expected.about.shards]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin(tmp_path) as run:
        write(run, [0])
        written = hdf5._write_all
        for code in (errno.ENOSPC, errno.EDQUOT):

            def full(raw: Any, array: Any, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(hdf5, "_write_all", full)
            with pytest.raises(
                OSError, match=r"no space left for .*shard-00001.h5: about [\d,]+ bytes .* and [\d,]+ are"
            ) as e:
                write(run, [1])
            assert e.value.errno == errno.ENOSPC
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json", "shard-00000.h5"]
        monkeypatch.setattr(hdf5, "_write_all", written)
        write(run, run.todo)
        finish(tmp_path)
    open_index(tmp_path).verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        # a full disk is a real one of tmpfs, which only root may mount
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_for_real(small_disk: Path) -> None:
    """At every size that is left: in HDF5's tables, in the data, in the attributes, in run.json, in the root."""
    ballast = small_disk / "ballast"
    directory = small_disk / "run"
    failures: list[tuple[int | None, bool]] = []
    for kilobytes in range(240, 0, -8):
        ballast.write_bytes(bytes(kilobytes * 1024))
        try:
            with begin(directory) as run:
                write(run, run.todo)
                finish(directory)
            break
        except OSError as error:
            failures.append((error.errno, "no space left for" in str(error)))
        assert not list(directory.glob(".*.partial")), kilobytes
    assert len(failures) > 3
    assert set(failures) == {(errno.ENOSPC, True)}
    assert not HELD
    index = open_index(directory)
    index.verify()
    assert torch.equal(index.matrix(), row(torch.arange(10)).float())


def test_replacing_keeps_the_old_file_when_anything_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with store.replacing(path) as name:
            name.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {"file": b"old"}
