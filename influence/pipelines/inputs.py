"""What a configuration reads from this machine, by the hash of its bytes: a run that is resumed reads the same."""

import dataclasses
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = ("model", "tokenizer", "adapter", "reference", "dataset", "template", "checkpoints", "optimizer")
"""Fields that may name a file or a folder."""


def contents(config: Any) -> dict[str, str]:
    """Return the hash of every file and folder that a configuration names; what is on the Hub has none.

    A folder's is that of all its files, with their names; a pattern's that of all files it matches. It costs one
    reading of everything.

    Args:
        config: a dataclass of this package, with a `run`, whose own files do not count.

    Returns:
        Hashes, by what the configuration says.
    """
    own = Path(config.run).absolute()  # which may lie in a folder that it reads

    def read(name: str) -> list[Path]:
        return [path for path in _paths(name) if own not in path.absolute().parents]

    return {name: _hash(paths) for name in dict.fromkeys(_named(config)) if (paths := read(name))}


def _named(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _named(value)
        elif field.name in SOURCES:
            yield from (one for one in (value if isinstance(value, tuple) else (value,)) if one is not None)


def _paths(name: str) -> list[Path]:
    """Return the files that a name stands for, in order."""
    place = Path(name).expanduser()
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file())
    return [place] if place.is_file() else sorted(map(Path, glob.glob(str(place))))


def _hash(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
