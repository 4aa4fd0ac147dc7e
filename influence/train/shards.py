"""DCP shards: an optimizer that several ranks saved, read whole by one process, executing no pickle."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.store import BadFileError
from influence.train.contents import Contents, Piece, read_contents


def read_shards(path: Path) -> dict[str, Any]:
    """Return the state that shards hold together; every rank's are read here.

    Raises:
        BadFileError: if they hold no optimizer, or a part is missing or no tensor; naming the file.
    """
    contents = read_contents(path)
    keys = [*contents.tensors, *contents.others]
    wanted = [key for key in keys if {"state", "param_groups"} & {*_path_of(contents, key)}]
    if not wanted:
        held = ", ".join(keys[:5])
        raise BadFileError(f"the shards in {path} hold {held} …, and no optimizer: expected 'state' and 'param_groups'")
    pieces: dict[str, list[Piece]] = {key: [] for key in wanted}
    for piece in contents.pieces:
        pieces.get(piece.key, []).append(piece)
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[Any, Any] = {}
    for key in wanted:
        value = _tensor(path, contents, key, pieces[key]) if key in contents.tensors else _other(path, key, pieces[key])
        steps = _path_of(contents, key)
        if "state" in steps:
            *_, name, entry = steps
            state.setdefault(name, {})[entry] = value
        else:
            _put(groups, steps[steps.index("param_groups") + 1 :], value)
    return {"state": state, "param_groups": _groups(groups, state)}


def _tensor(path: Path, contents: Contents, key: str, pieces: list[Piece]) -> Tensor:
    """Return a tensor, put together from its parts."""
    dtype, size = contents.tensors[key]
    whole, missing = torch.empty(size, dtype=dtype), torch.ones(size, dtype=torch.bool)
    for piece in pieces:
        part, offsets = _loaded(path, piece), piece.offsets or (0,) * len(size)
        fits = isinstance(part, Tensor) and (part.dtype, part.layout) == (dtype, torch.strided)
        if not fits or not len(offsets) == len(part.shape) == len(size):
            raise BadFileError(f"{path / piece.file} has no part of {key!r}, which is {list(size)} of {dtype}")
        place = tuple(slice(begin, begin + length) for begin, length in zip(offsets, part.shape, strict=True))
        if any(one.stop > most for one, most in zip(place, size, strict=True)):
            raise BadFileError(f"{path / piece.file} has a part of {key!r} that ends behind its {list(size)}")
        whole[place], missing[place] = part.detach(), False
    if missing.any():
        raise BadFileError(
            f"the shards in {path} lack {int(missing.sum()):,} of {missing.numel():,} entries of {key!r}"
        )
    return whole


def _other(path: Path, key: str, pieces: list[Piece]) -> Any:
    """Return an entry that is no tensor."""
    if len(pieces) != 1:
        raise BadFileError(
            f"the shards in {path} have {len(pieces)} parts of {key!r}, which is no tensor: expected one"
        )
    return _loaded(path, pieces[0])


def _loaded(path: Path, piece: Piece) -> Any:
    """Return what a part holds: torch reads it, which makes tensors and plain data alone."""
    with open(path / piece.file, "rb") as file:
        file.seek(piece.begin)
        return plain(io.BytesIO(file.read(piece.length)), f"{path / piece.file} at {piece.key!r}")


def plain(source: Any, name: str) -> Any:
    """Return what `torch.save` wrote, of tensors and plain data alone.

    Args:
        source: a file, or its path.
        name: what messages call it.

    Raises:
        BadFileError: if it holds more, or is damaged.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadFileError(
            f"{name} holds more than tensors and numbers, and is not unpickled: save optimizer.state_dict() alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises whatever a broken file leads it to
        raise BadFileError(
            f"{name} is damaged, or torch did not save it: {' '.join(str(error).split())[:200]}"
        ) from error


def _path_of(contents: Contents, key: str) -> tuple[Any, ...]:
    """Return where a flattened key was."""
    if key in contents.paths:
        return contents.paths[key]
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
