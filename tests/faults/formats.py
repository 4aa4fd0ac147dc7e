"""The one place that knows how facts stand in files: read as JSON, and written back so that every checksum holds."""

import hashlib
import json
from pathlib import Path
from typing import Any

MAGIC = b"influence store 1\n"
FREE = ("config", "command", "recorded")
"""Attributes under which anything may stand: it is shown, and decides nothing."""


def facts(path: Path) -> Any:
    """Return what a file says of itself."""
    if path.suffix == ".yaml":
        import yaml

        return yaml.safe_load(path.read_text())
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return _block(path)


def rewrite(path: Path, said: Any) -> None:
    """Let a file say something else of itself, as consistently as its writer would."""
    if path.suffix == ".yaml":
        import yaml

        path.write_text(yaml.safe_dump(said))
    elif path.suffix == ".json":
        path.write_text(json.dumps(said, indent=1) + "\n")
    else:
        _write_block(path, said)


def _block(path: Path) -> Any:
    """Return the facts of one of our HDF5 files."""
    held = path.read_bytes()
    if held.startswith(MAGIC):
        return json.loads(held.split(b"\n", 3)[2])
    import h5py

    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["about"])


def _write_block(path: Path, said: Any) -> None:
    held = path.read_bytes()
    if held.startswith(MAGIC):
        text = json.dumps(said).encode()
        old = held.split(b"\n", 3)[2]
        head = MAGIC + f"{hashlib.sha256(text).hexdigest()} {len(text):020}\n".encode() + text + b"\n"
        whole = len(MAGIC) + 64 + 1 + 20 + 1 + len(old) + 1
        room = held.index(b"\x89HDF\r\n\x1a\n")  # the block is padded up to where HDF5 begins
        if len(head) > room:
            raise ValueError("these facts do not fit")
        path.write_bytes(head + bytes(max(whole - len(head), 0)) + held[max(whole, len(head)) :])
        return
    import h5py

    text = json.dumps(said)
    with h5py.File(path, "r+") as file:
        file.attrs["about"] = text
        file.attrs["sha256"] = hashlib.sha256(text.encode()).hexdigest()
