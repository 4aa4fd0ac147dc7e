"""Files that a user names: whole or not at all, and what a killed writer left is removed by the next."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from influence import store
from influence.store import output_file
from influence.store.folder import manifest_of, take


def die(path: Path) -> None:
    with output_file(path) as name:
        name.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def killed(path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.csv"
    killed(path)
    killed(path.parent / "b.csv")
    (path.parent / ".a.csv.mine.partial").write_text("mine")
    assert not path.exists()
    assert len(list(path.parent.iterdir())) == 3
    with output_file(path) as name:
        name.write_text("whole")
    assert path.read_text() == "whole"
    left = sorted(each.name for each in path.parent.iterdir())
    assert left[0] == ".a.csv.mine.partial"
    assert left[1].startswith(".b.csv.")
    assert left[2:] == ["a.csv"]


def test_another_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with output_file(path) as first:
        first.write_text("first")
        with output_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.exists()
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail() -> None:
        with output_file(path) as name:
            name.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_files_of_runs_and_what_is_no_file_are_not_replaced(tmp_path: Path) -> None:
    store.write(tmp_path / "index.h5", {}, {}, kind="some", schema=1)
    take(tmp_path / "run", manifest_of("some", {}, [], {}, {}, []))[0].release()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "index.h5", tmp_path / "run" / "run.json", tmp_path / "run" / ".lock", tmp_path / "pipe"):
        before = path.stat()
        with pytest.raises(FileExistsError, match="write to another place"), output_file(path):
            pass
        assert path.stat() == before
    assert [each.name for each in tmp_path.glob(".*")] == []
