"""Run directories: nothing foreign is touched, only what a manifest names is removed, runs are not mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import store
from influence.store.folder import (
    Manifest,
    clear,
    manifest_of,
    read_manifest,
    refuse_foreign,
    take,
    tidy,
    write_manifest,
)
from influence.store.hdf5 import MAGIC
from influence.store.lock import LOCK

FILES = ["root.h5", "config.yaml", "steps/", "part-#.h5", "share-#-#/"]


def manifest(seed: int = 0, kind: str = "thing") -> Manifest:
    return manifest_of(kind, {}, ["influence", kind], {"seed": seed}, {}, FILES, ["left-#.h5"])


def file(path: Path, run: str) -> Path:
    store.write(path, {"x": torch.arange(3)}, {}, kind="part", schema=1, run=run)
    return path


def begun(directory: Path, wanted: Manifest | None = None, **how: Any) -> Manifest:
    wanted = manifest() if wanted is None else wanted
    lock, there = take(directory, wanted, **how)
    lock.release()
    return there or wanted


def listing(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))
    }


NAMES = ["root.h5", "config.yaml", "part-00000.h5", "run.json", ".lock", ".root.h5.partial", "share-0-2", "notes.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_holds_no_run_of_ours_is_refused_whatever_it_holds(
    tmp_path: Path, name: str, overwrite: bool
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"write to another directory"):
        take(tmp_path, manifest(), overwrite)
    assert listing(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("name", ["run.json", ".lock"])
def test_links_are_not_followed_out_of_the_directory(tmp_path: Path, name: str) -> None:
    """The lock cut its target off."""
    target = tmp_path / "target"
    begun(tmp_path / "run")
    target.write_bytes((tmp_path / "run" / "run.json").read_bytes() if name == "run.json" else b"mine")
    before = target.read_bytes()
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(FileExistsError, match=rf"{name}"):
        take(tmp_path / "run", manifest(), True)
    assert target.read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "link.h5").symlink_to(target)
    file(tmp_path / "link.h5", "")  # a file replaces a link, and leaves what it pointed to
    assert target.read_bytes() == before
    assert not (tmp_path / "link.h5").is_symlink()


def test_overwriting_removes_what_the_manifest_names_and_names_what_is_left(tmp_path: Path) -> None:
    mine = begun(tmp_path)
    for name in ("root.h5", "part-00000.h5", "left-3.h5"):
        file(tmp_path / name, mine.id)
    begun(tmp_path / "steps" / "one")
    (tmp_path / "share-0-2").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f".root.h5.{mine.id[:16]}.{'0' * 16}.partial").write_text("half")
    with pytest.warns(UserWarning, match=r"since the run did not write it: notes.txt"):
        begun(tmp_path, manifest(1), overwrite=True)
    assert set(listing(tmp_path)) == {"run.json", ".lock", "notes.txt"}
    assert read_manifest(tmp_path).plan == {"seed": 1}


@pytest.mark.parametrize(
    "name", ["part-00001.h5", "part-7.h5", "root.h5/mine", "steps/mine.txt", "steps/one/mine.txt", "share-0-2/mine"]
)
def test_what_stands_in_the_way_of_overwriting_is_named_and_nothing_is_removed(tmp_path: Path, name: str) -> None:
    """Chains of the user's, in a folder that is called as ours are."""
    mine = begun(tmp_path)
    file(tmp_path / "part-00000.h5", mine.id)
    begun(tmp_path / "steps" / "one")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name.partition('/')[0]}.*is not of the run in .*nothing was removed"):
        begun(tmp_path, manifest(1), overwrite=True)
    assert listing(tmp_path) == before


def test_a_file_of_another_run_is_neither_removed_nor_read(tmp_path: Path) -> None:
    mine, other = begun(tmp_path / "a"), begun(tmp_path / "b", manifest(1))
    path = file(tmp_path / "a" / "part-00000.h5", other.id)
    with pytest.raises(store.BadFileError, match=r"part-00000.h5 belongs to another run"):
        store.read(path, kind="part", schema=1, run=mine.id)
    clear(tmp_path / "a", mine)
    assert path.exists()


def test_overwriting_goes_on_wherever_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed around the writing of run.json it could neither be resumed nor overwritten."""
    for kill in range(6):
        directory = tmp_path / str(kill)
        mine = begun(directory)
        for name in ("root.h5", "part-00000.h5"):
            file(directory / name, mine.id)
        events = iter(range(kill))
        real = {name: getattr(Path, name) for name in ("unlink",)}

        def counted(self: Path, *args: Any, events: Any = events, real: Any = real, **how: Any) -> Any:
            if next(events, None) is None and not self.name.endswith(".partial"):
                raise KeyboardInterrupt
            return real["unlink"](self, *args, **how)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", counted)
            if kill < 2:
                with pytest.raises(KeyboardInterrupt):
                    begun(directory, manifest(1), overwrite=True)
        begun(directory, manifest(1), overwrite=True)
        assert set(listing(directory)) == {"run.json", ".lock"}
        assert read_manifest(directory).id == manifest(1).id


def test_tidying_removes_scratch_and_what_killed_writers_left(tmp_path: Path) -> None:
    mine = begun(tmp_path)
    for name in ("root.h5", "left-0.h5"):
        file(tmp_path / name, mine.id)
    (tmp_path / f".root.h5.{mine.id[:16]}.{'0' * 16}.partial").write_text("half")
    (tmp_path / f".root.h5.{'f' * 16}.{'0' * 16}.partial").write_text("another run's")
    tidy(tmp_path, mine)
    assert set(listing(tmp_path)) == {"run.json", ".lock", "root.h5", f".root.h5.{'f' * 16}.{'0' * 16}.partial"}


def test_the_id_is_what_the_run_is(tmp_path: Path) -> None:
    assert manifest().id == manifest()._replace(config={"device": "cuda"}).id
    assert len({manifest().id, manifest(1).id, manifest(0, "other").id}) == 3
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()


def test_every_field_of_a_manifest_of_a_wrong_type_is_named(tmp_path: Path) -> None:
    """108 of 360 damaged attributes gave a bare KeyError or TypeError."""
    held = json.loads(json.dumps(manifest()._asdict()))
    wrong: list[Any] = [None, 3, -1.5, True, "x", [], ["x", 1], {}, {"a": 1}, [[1]]]
    for name in held:
        for value in wrong:
            if isinstance(value, type(held[name])) and not (isinstance(value, list) and value):
                continue
            (tmp_path / "run.json").write_text(json.dumps({**held, name: value}))
            with pytest.raises((store.BadFileError, FileExistsError), match=r"run.json"):
                take(tmp_path, manifest())
        (tmp_path / "run.json").write_text(json.dumps({key: value for key, value in held.items() if key != name}))
        with pytest.raises((store.BadFileError, FileExistsError), match=r"run.json"):
            take(tmp_path, manifest())


def test_a_zeroed_block_hangs_nothing(tmp_path: Path) -> None:
    """In HDF5's tables it made the library loop for ever; our reader sees the plain block alone."""
    path = tmp_path / "x.h5"
    tensors = {f"block/{i}": torch.arange(50.0) + i for i in range(8)}
    store.write(path, tensors, {"text": "x" * 4000}, kind="thing", schema=1)
    whole = path.read_bytes()
    outcomes = set()
    for at in range(0, len(whole), 512):
        path.write_bytes(whole[:at] + bytes(min(512, len(whole) - at)) + whole[at + 512 :])
        try:
            found, _ = store.read(path, kind="thing", schema=1)
        except store.BadFileError as error:
            outcomes.add("refused" if str(path) in str(error) else str(error))
        else:
            outcomes.add("same" if all(torch.equal(found[name], tensors[name]) for name in tensors) else "another")
    assert outcomes == {"same", "refused"}


def test_a_head_that_lies_is_refused(tmp_path: Path) -> None:
    """A stranger may write a checksum that holds: what the facts say must still be possible."""
    import hashlib

    path = tmp_path / "x.h5"
    store.write(path, {"x": torch.arange(4.0)}, {}, kind="thing", schema=1)
    whole = path.read_bytes()
    facts = json.loads(whole[len(MAGIC) :].split(b"\n")[1])
    lies = [
        {"tensors": {"x": [0, [1 << 40], "float32", "0"]}},
        {"tensors": {"x": [-8, [4], "float32", "0"]}},
        {"tensors": {"x": [0, [4, -1], "float32", "0"]}},
        {"tensors": {"x": [0, [4], "_utils", "0"]}},
        {"tensors": {"x": [0, [4], "float32"]}},
        {"tensors": []},
        {"bytes": 7},
        {"schema": "1"},
        {"run": None},
    ]
    for lie in lies:
        text = json.dumps({**facts, **lie}).encode()
        line = f"{hashlib.sha256(text).hexdigest()} {len(text):020}\n".encode()
        path.write_bytes((MAGIC + line + text + b"\n").ljust(512, b"\0") + whole[512:])
        with pytest.raises(store.BadFileError, match=r"x.h5 is (not what it says|damaged)"):
            store.read(path, kind="thing", schema=1)


def test_the_lock_is_given_back_only_by_its_owner(tmp_path: Path) -> None:
    """A record lock is lost when its process closes any handle of the file: to look at it must not open it."""
    lock, _ = take(tmp_path, manifest())
    refuse_foreign(tmp_path)
    with pytest.raises(BlockingIOError, match="this very process"):
        take(tmp_path, manifest())
    assert (tmp_path / LOCK).read_text().startswith("influence lock: process ")
    lock.release()
    assert (tmp_path / LOCK).read_text() == "influence lock\n"


def test_a_manifest_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    take(tmp_path / "run", manifest_of("some", {}, [], {}, {}, []))[0].release()
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"config": {}', '"config": {"a": ' + "[" * 600 + "]" * 600 + "}"))
    with pytest.raises(store.BadFileError, match=rf"^{path} is damaged"):
        read_manifest(tmp_path / "run")
