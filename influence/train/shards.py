"""DCP shards: an optimizer that several ranks saved, read whole by one process, executing no pickle."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as tables
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

CONTENTS = ".metadata"
"""The table of contents: a pickle, torch's own choice, read as plain data."""


def read_shards(path: Path) -> dict[str, Any]:
    """Return the state that shards hold together; every rank's are read here."""
    reader = Reader(path)
    contents = reader.read_metadata()
    wanted: dict[str, Any] = {
        key: torch.empty(kept.size, dtype=kept.properties.dtype)
        if isinstance(kept, tables.TensorStorageMetadata)
        else io.BytesIO()
        for key, kept in contents.state_dict_metadata.items()
        if "state" in _path_of(contents, key) or "param_groups" in _path_of(contents, key)
    }
    if not wanted:
        held = ", ".join(list(contents.state_dict_metadata)[:5])
        raise ValueError(f"the shards in {path} hold {held} …, and no optimizer: expected 'state' and 'param_groups'")
    planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader.set_up_storage_reader(contents, True)
    planner.set_up_planner(wanted, contents, True)
    plans = reader.prepare_global_plan(
        planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    )
    reader.read_data(planner.finish_plan(plans[0]), planner).wait()
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[Any, Any] = {}
    for key, value in wanted.items():
        steps = _path_of(contents, key)
        if "state" in steps:
            *_, name, entry = steps
            state.setdefault(name, {})[entry] = value
        else:
            _put(groups, steps[steps.index("param_groups") + 1 :], value)
    return {"state": state, "param_groups": _groups(groups, state)}


class Reader(filesystem.FileSystemReader):
    """torch's reader of shards, whose table of contents may name torch's own classes of it and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> tables.Metadata:
        """Return the table of contents."""
        found: tables.Metadata = Contents(io.BytesIO((Path(self.path) / CONTENTS).read_bytes())).load()
        if found.storage_meta is None:
            found.storage_meta = tables.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Contents(pickle.Unpickler):
    """Reads the table of contents of DCP shards, which torch writes as a pickle: plain data, no code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of torch's own plain classes.

        Raises:
            ValueError: if the file asks for anything else.
        """
        plain = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): _layout,
            ("collections", "OrderedDict"): OrderedDict,
            ("pathlib", "PosixPath"): Path,
            (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        }
        if (module, name) in plain:
            return plain[module, name]
        source = {tables.__name__: tables, "torch": torch}.get(module)
        found = getattr(source, name, None)
        if isinstance(found, torch.dtype) or (isinstance(found, type) and found.__module__ == tables.__name__):
            return found
        raise ValueError(f"the shards' {CONTENTS} asks for {module}.{name}, which is no table of contents: not read")


def _layout(name: str) -> torch.layout:
    return getattr(torch, name.removeprefix("torch."))


class Planner(DefaultLoadPlanner):
    """torch's plan of what to load, which takes numbers but executes nothing."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Put what is no tensor where it belongs."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _path_of(contents: tables.Metadata, key: str) -> tuple[Any, ...]:
    """Return where a flattened key was."""
    planned = contents.planner_data or {}
    if key in planned:
        return tuple(planned[key])
    head, dot, rest = key.partition("state.")
    if not dot or "param_groups" in head:
        return tuple(key.split("."))
    name, _, entry = rest.rpartition(".")
    return (*head.split("."), "state", name, entry)


def _put(into: dict[Any, Any], steps: tuple[Any, ...], value: Any) -> None:
    if not steps:
        into[None] = value
        return
    into.setdefault(steps[0], {})
    if len(steps) == 1:
        into[steps[0]] = value
    else:
        _put(into[steps[0]], steps[1:], value)


def _groups(found: dict[Any, Any], state: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return parameter groups: a list that was saved whole, or one group of what is there."""
    if isinstance(found.get(None), list):
        return found[None]
    numbered = [found[key] for key in sorted(key for key in found if isinstance(key, int))]
    if numbered and all(isinstance(group, Mapping) and "params" in group for group in numbered):
        listed = [
            list(group["params"].values()) if isinstance(group["params"], dict) else group["params"]
            for group in numbered
        ]
        return [{**group, "params": params} for group, params in zip(numbered, listed, strict=True)]
    by_name = {name: settings for name, settings in found.items() if isinstance(settings, Mapping)}
    return [{"params": [name], **by_name.get(name, {})} for name in state] if by_name else []
