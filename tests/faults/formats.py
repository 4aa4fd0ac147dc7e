"""The one place that knows how facts stand in files: read as JSON, and written back so that every checksum holds."""

import hashlib
import json
from pathlib import Path
from typing import Any

from influence.func.fingerprint import fingerprint

MAGIC = b"influence store 1\n"
FREE = ("config", "command", "recorded", "settings", "resolved", "function", "facts")
"""Attributes under which anything may stand: it is shown, and compared with what a query or a resume has there."""
SETTINGS = "config.yaml"
"""The file by which a user replays a run, and which he may edit."""


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
        if path.name == "run.json" and isinstance(said, dict) and "sha256" in said:
            said["sha256"] = fingerprint({name: value for name, value in said.items() if name != "sha256"})
        path.write_text(json.dumps(said, indent=1) + "\n")
    else:
        _write_block(path, said)


def _block(path: Path) -> Any:
    """Return the facts of one of our HDF5 files."""
    return json.loads(path.read_bytes().split(b"\n", 3)[2])


def _write_block(path: Path, said: Any) -> None:
    """Write facts into the plain block that is before what HDF5 knows of a file."""
    held, text = path.read_bytes(), json.dumps(said).encode()
    room = held.index(b"\x89HDF\r\n\x1a\n")
    block = MAGIC + f"{hashlib.sha256(text).hexdigest()} {len(text):020}\n".encode() + text + b"\n"
    if len(block) > room:
        raise ValueError(f"{len(block)} bytes of facts do not fit into {room}")
    path.write_bytes(block.ljust(room, b"\0") + held[room:])
