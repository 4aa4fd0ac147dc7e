"""Checkpoints: an optimizer's state read from files, without executing any pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.store import BadFileError
from influence.train.contents import CONTENTS, plain, read_shards

FILES = ("optimizer.pt", "optimizer.bin", "optimizer.safetensors", "optimizer.pth")
SHARDS = ("optimizer_0", "optimizer", ".")
"""Folders of a checkpoint in which an optimizer's shards may be."""


def find_state(path: str | Path) -> Path:
    """Return the file of an optimizer's state, or the folder of its shards.

    Raises:
        FileNotFoundError: if there is none; saying what was looked for.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: give a checkpoint's folder, or an optimizer's file")
        return path
    files = [path / name for name in FILES if (path / name).is_file()]
    folders = [path / name for name in SHARDS if (path / name / CONTENTS).is_file()]
    if not files and not folders:
        raise FileNotFoundError(
            f"{path} holds no optimizer: looked for {', '.join(FILES)}, and for DCP shards in {', '.join(SHARDS[:-1])} "
            "and itself. Save the optimizer too (Trainer: save_only_model=False), or pass its file"
        )
    return files[0] if files else folders[0]


def read_state(path: str | Path) -> dict[str, Any]:
    """Return an optimizer's state dict, as it was saved.

    Args:
        path: a file of `torch.save` or safetensors, a checkpoint's folder with one, or a folder of DCP shards.

    Returns:
        `{"state": {parameter: {...}}, "param_groups": [...]}`.

    Raises:
        FileNotFoundError: if there is no optimizer in the folder; saying what was looked for.
        BadFileError: if the file holds something else, or is damaged.
    """
    path = find_state(path)
    if path.is_dir():
        found = read_shards(path)
    elif path.suffix == ".safetensors":
        found = _read_safetensors(path)
    else:
        found = plain(path, str(path))
    for name in ("optimizer", "optimizer_state_dict", "optim", "opt"):
        if isinstance(found, Mapping) and "state" not in found and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not isinstance(found.get("state"), Mapping):
        held = ", ".join(sorted(map(str, found))[:5]) if isinstance(found, Mapping) else type(found).__name__
        raise BadFileError(f"{path} holds {held}, and no optimizer: expected 'state' and 'param_groups'")
    state, groups = dict(found["state"]), found.get("param_groups", ())
    if not isinstance(groups, list | tuple) or not all(
        isinstance(each, Mapping) for each in (*groups, *state.values())
    ):
        raise BadFileError(f"{path} holds no optimizer: its groups and the entries of its state must be dictionaries")
    if any("params" in group and not isinstance(group["params"], list | tuple) for group in groups):
        raise BadFileError(f"{path} holds no optimizer: 'params' of its groups must be lists")
    return {"state": state, "param_groups": list(groups)}


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the state of keys `state.<parameter>.<entry>`; the groups are JSON in the file's metadata."""
    from safetensors import SafetensorError, safe_open

    state: dict[Any, dict[str, Any]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, _, entry = key.rpartition(".")
                name = name.removeprefix("optimizer.").removeprefix("state.")
                number: Any = int(name) if name.isdecimal() else name
                state.setdefault(number, {})[entry] = file.get_tensor(key)
            groups = json.loads((file.metadata() or {}).get("param_groups", "[]"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is damaged, or no safetensors: {' '.join(str(error).split())[:200]}") from error
    return {"state": state, "param_groups": groups}
