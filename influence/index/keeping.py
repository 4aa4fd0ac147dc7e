"""FAISS indexes kept beside the rows that they are of, under everything that they depend on."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.func.fingerprint import fingerprint
from influence.index.neighbours import FaissConfig, Neighbours, Stored, begins_of, shards_of
from influence.index.run import NEIGHBOURS

SCHEMA = 1


def neighbours(stored: Stored, config: FaissConfig, beside: Path | None) -> Neighbours:
    """Return the FAISS index of some rows: the one that is kept, or a new one, which is then kept.

    Args:
        stored: the rows.
        config: how.
        beside: the directory of the run; `None` keeps it in memory alone.

    Returns:
        The FAISS index.

    Raises:
        ValueError: if FAISS does not understand the factory, or cannot learn it from so few rows.
        MemoryError: if it would not fit.
    """
    import faiss

    if beside is None:
        made = tuple(shard for _, shard in shards_of(stored, config))
        return Neighbours(made, begins_of(stored.number, config.num_shards))
    key = {
        "schema": SCHEMA,
        "faiss": faiss.__version__,
        "index_factory": config.index_factory,
        "max_train_examples": config.max_train_examples,
        "num_shards": config.num_shards,
        "rows": stored.identity,
    }
    directory = beside / NEIGHBOURS / f"{config.index_factory.replace(',', '_')}-{fingerprint(key)[:16]}"
    if not _is_whole(directory, key):
        _write(directory, key, stored, config)
        _forget(directory, key)
    paths = [directory / f"{number}.faiss" for number in range(config.num_shards)]
    return Neighbours(tuple(_read(path, config) for path in paths), begins_of(stored.number, config.num_shards))


def _write(directory: Path, key: Mapping[str, Any], stored: Stored, config: FaissConfig) -> None:
    """Write all shards to a temporary directory, then rename it."""
    import faiss

    temporary = directory.parent / f".{directory.name}.{secrets.token_hex(8)}.partial"
    temporary.mkdir(parents=True)
    try:
        for number, shard in shards_of(stored, config):
            faiss.write_index(shard, str(temporary / f"{number}.faiss"))
            del shard  # before the next is made
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / "about.json").write_text(json.dumps({"key": key, "sizes": sizes}, indent=1))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _forget(directory: Path, key: Mapping[str, Any]) -> None:
    """Remove what was kept of the same index before rows were appended: nothing will ask for it again."""
    for about in directory.parent.glob("*/about.json"):
        kept = json.loads(about.read_text())["key"]
        same = {**kept, "rows": {**kept["rows"], "shards": key["rows"]["shards"]}}
        if about.parent != directory and same == json.loads(json.dumps(key)):
            shutil.rmtree(about.parent)


def _is_whole(directory: Path, key: Mapping[str, Any]) -> bool:
    """Whether a directory holds the FAISS index of a key, and all of it."""
    try:
        about = json.loads((directory / "about.json").read_text())
        sizes = {name: (directory / name).stat().st_size for name in about["sizes"]}
    except (OSError, ValueError, KeyError):
        return False
    return about["key"] == json.loads(json.dumps(key)) and about["sizes"] == sizes


def _read(path: Path, config: FaissConfig) -> Any:
    import faiss

    if not config.mmap_index:
        return faiss.read_index(str(path))
    cells = faiss.IO_FLAG_MMAP  # maps the lists of an IVF index, and reads any other whole
    return faiss.read_index(
        str(path), cells if "IVF" in config.index_factory else getattr(faiss, "IO_FLAG_MMAP_IFC", cells)
    )
