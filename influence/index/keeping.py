"""FAISS indexes kept next to the shards, or in the user's cache, keyed by everything they depend on."""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.index.neighbours import FaissConfig, Neighbours, Stored, begins_of, shards_of
from influence.index.run import NEIGHBOURS
from influence.store import BadFileError, Lock, sync
from influence.store.folder import (
    RUN,
    Manifest,
    discard,
    manifest_of,
    read_manifest,
    write_manifest,
)
from influence.store.replacing import TEMPORARY

KIND = "faiss"


def neighbours(stored: Stored, config: FaissConfig, beside: Path | None) -> Neighbours:
    """Return the FAISS index of some rows: the one that is kept, or a new one, which is then kept.

    It is kept beside the rows; where that disk cannot be written, in the user's cache.

    Args:
        stored: the rows.
        config: how.
        beside: the directory of the run; `None` keeps it in memory alone.

    Returns:
        The FAISS index.

    Raises:
        ValueError: if FAISS does not understand the factory, or cannot learn it from so few rows.
        BadFileError: if something else stands where it would be kept.
        MemoryError: if it would not fit.
    """
    import faiss

    begins = begins_of(stored.number, config.num_shards)
    if beside is None:
        return Neighbours(tuple(shard for _, shard in shards_of(stored, config)), begins)
    names = [f"{number}.faiss" for number in range(config.num_shards)]
    key = {
        "faiss": faiss.__version__,
        "index_factory": config.index_factory,
        "max_train_examples": config.max_train_examples,
        "num_shards": config.num_shards,
        "rows": dict(stored.identity),
    }
    wanted = manifest_of(KIND, {}, [], key, {}, names)
    name = f"{config.index_factory.replace(',', '_')}-{wanted.id[:16]}"
    places = [folder / name for folder in (beside / NEIGHBOURS, cache())]
    directory = next((place for place in places if _is_kept(place, wanted)), None)
    if directory is None:
        directory = places[0 if os.access(beside, os.W_OK) else 1]
        _keep(directory, wanted, stored, config)
    ends = [*begins[1:], stored.number]
    sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
    read = (_read(directory / each, config, stored.chosen.dim, n) for each, n in zip(names, sizes, strict=True))
    return Neighbours(tuple(read), begins)


def cache() -> Path:
    """Return where FAISS indexes of rows on a disk that cannot be written are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "influence" / NEIGHBOURS


def _keep(directory: Path, wanted: Manifest, stored: Stored, config: FaissConfig) -> None:
    """Write all shards and their checksums to a temporary directory, then rename it."""
    import faiss

    folder = directory.parent
    if folder.is_symlink():
        raise BadFileError(f"{folder} is a link out of its directory, which is not followed: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, wait=True):
        if _is_kept(directory, wanted):  # by another process, meanwhile
            return
        _forget(folder, wanted)
        if directory.exists():  # and a file of it is damaged
            discard(directory)
        temporary = folder / f".{directory.name}.{wanted.id[:16]}.{secrets.token_hex(8)}.partial"
        temporary.mkdir()
        sums = {}
        for number, shard in shards_of(stored, config):
            path = temporary / wanted.files[number]
            faiss.write_index(shard, str(path))
            sync(path)
            sums[path.name] = _sha256(path)
            del shard  # before the next is made
        write_manifest(temporary, wanted._replace(config={"sha256": sums}))
        os.replace(temporary, directory)
        sync(folder)


def _forget(folder: Path, wanted: Manifest) -> None:
    """Remove what killed writers left, and what was kept of the same rows before others were appended."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if TEMPORARY.fullmatch(path.name):
            for left in path.iterdir():
                left.unlink()
            path.rmdir()
        elif (path / RUN).is_file():
            kept = read_manifest(path)
            rows = {**kept.plan.get("rows", {}), "shards": wanted.plan["rows"]["shards"]}
            if kept.kind == KIND and {**kept.plan, "rows": rows} == wanted.plan:
                discard(path)


def _is_kept(directory: Path, wanted: Manifest) -> bool:
    """Whether a directory holds the FAISS index that is wanted, whole.

    Raises:
        BadFileError: if it is something else.
    """
    if not directory.is_dir():
        return False
    there = read_manifest(directory)
    if (there.kind, there.plan, there.files) != (wanted.kind, wanted.plan, wanted.files):
        raise BadFileError(f"{directory} does not hold the FAISS index that its name says: delete it")
    sums = there.config.get("sha256")
    if not isinstance(sums, Mapping):
        return False
    paths = [directory / name for name in wanted.files]
    return all(path.is_file() and sums.get(path.name) == _sha256(path) for path in paths)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, config: FaissConfig, dim: int, number: int) -> Any:
    """Return the FAISS index of a file.

    Raises:
        BadFileError: if it is no FAISS index of so many rows of so many columns.
    """
    import faiss

    cells = faiss.IO_FLAG_MMAP  # maps the lists of an IVF index, and reads any other whole
    mapped = cells if "IVF" in config.index_factory else getattr(faiss, "IO_FLAG_MMAP_IFC", cells)
    try:
        found = faiss.read_index(str(path), mapped if config.mmap_index else 0)
    except RuntimeError as error:
        raise BadFileError(f"{path} is no FAISS index: delete {path.parent}, and it is made again") from error
    if (found.d, found.ntotal) != (dim, number):
        raise BadFileError(
            f"{path} has {found.ntotal} rows of {found.d}, and the shards have {number} of {dim}: delete {path.parent}"
        )
    return found
