"""DCP shards: an optimizer that several ranks saved, read whole by one process, executing no pickle."""

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence.store import BadFileError

CONTENTS = ".metadata"
"""The file's name."""
LARGEST = 1 << 28
"""Bytes of the largest table that is read."""
DEEPEST = 32
"""Steps of the longest path to an entry."""

TABLES, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": dtype
    for name, dtype in {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "int64": torch.int64,
        "int32": torch.int32,
        "int16": torch.int16,
        "int8": torch.int8,
        "uint64": torch.uint64,
        "uint32": torch.uint32,
        "uint16": torch.uint16,
        "uint8": torch.uint8,
        "bool": torch.bool,
        "complex64": torch.complex64,
        "complex128": torch.complex128,
    }.items()
}
WORDS = {
    *DTYPES,
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    *(f"{room}.{kind}" for room in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
    f"{FILES}._StorageInfo",
    *(
        f"{TABLES}.{name}"
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""All that a table may name."""


class Named(str):
    """A word that stands for a thing of torch's, and is not the thing."""


class Made:
    """A note that a table makes something.

    Attributes:
        kind: what.
        given: of what.
        state: what it is set up with.
    """

    def __init__(self, kind: str, given: tuple[Any, ...]) -> None:
        """Note what is made."""
        self.kind, self.given, self.state = kind, given, None


class Piece(NamedTuple):
    """Where a part of an entry lies.

    Attributes:
        key: the entry.
        offsets: where the part begins in its tensor; `None` of what is no tensor.
        file: the file in the folder.
        begin: its first byte.
        length: its bytes.
    """

    key: str
    offsets: tuple[int, ...] | None
    file: str
    begin: int
    length: int


class Contents(NamedTuple):
    """What shards hold.

    Attributes:
        tensors: type and size of every tensor.
        others: entries that are no tensors.
        paths: where an entry was before the state was flattened.
        pieces: the parts.
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    others: frozenset[str]
    paths: Mapping[str, tuple[str | int, ...]]
    pieces: tuple[Piece, ...]


def read_contents(folder: Path) -> Contents:
    """Read a table of contents.

    Raises:
        BadFileError: if it is none, or asks for anything but plain values; naming the file.
    """
    path = folder / CONTENTS
    if path.stat().st_size > LARGEST:
        raise BadFileError(f"{path} has {path.stat().st_size:,} bytes; a table of contents has at most {LARGEST:,}")
    try:
        return _contents(unpacked(path.read_bytes()), folder)
    except (ValueError, TypeError, KeyError, IndexError) as error:  # whatever a broken table leads to
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BadFileError(f"the table of contents {path}: {said}: not read") from error


def unpacked(raw: bytes) -> Any:
    """Return the value of a pickle, with notes in the place of what it would make.

    Args:
        raw: the pickle.

    Raises:
        ValueError: if it names what is not in `WORDS`, or does what no table of contents does.

    Example:
        >>> import pickle
        >>> unpacked(pickle.dumps({"a": [1, (2.5, None)]}))
        {'a': [1, (2.5, None)]}
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        """Take what lies above the last mark."""
        begin = marks.pop()
        taken = stack[begin:]
        del stack[begin:]
        return taken

    code: Any
    given: Any
    for code, given, _ in pickletools.genops(raw):
        match code.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(given)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(given)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                _put([item], stack[-1])
            case "APPENDS":
                items = marked()
                _put(items, stack[-1])
            case "SETITEM":
                pair = [stack.pop(), stack.pop()][::-1]
                _set(pair, stack[-1])
            case "SETITEMS":
                pairs = marked()
                _set(pairs, stack[-1])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[given] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "GLOBAL":
                stack.append(_word(given.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, room = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(room, str):
                    raise ValueError(f"it asks for {_said(name)} of {_said(room)}")
                stack.append(_word(f"{room}.{name}"))
            case "REDUCE" | "NEWOBJ":
                given, kind = stack.pop(), stack.pop()
                if not isinstance(kind, Named) or not isinstance(given, tuple):
                    raise ValueError(f"it calls {_said(kind)}, which is no name")
                stack.append(Made(kind, given))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Made):
                    raise ValueError(f"it sets up {_said(stack[-1])}, which it did not make")
                stack[-1].state = state
            case _:
                raise ValueError(f"it has a step {code.name}")
    [value] = stack
    return value


def _word(name: str) -> Named:
    if name not in WORDS:
        said = name if re.fullmatch(r"[\w.]{1,100}", name) else repr(name)[:100]
        raise ValueError(f"it asks for {said}, which is no table of contents")
    return Named(name)


def _put(items: list[Any], into: Any) -> None:
    if not isinstance(into, list):
        raise ValueError(f"it puts items into {_said(into)}, which is no list")
    into += items


def _set(pairs: list[Any], into: Any) -> None:
    keys = pairs[::2]
    if not isinstance(into, dict) or not all(isinstance(key, str | int | Made) for key in keys):
        raise ValueError("it sets items of what is no dictionary, or by other keys than names, numbers and entries")
    into.update(zip(keys, pairs[1::2], strict=True))


def _contents(table: Any, folder: Path) -> Contents:
    fields = _fields(table, f"{TABLES}.Metadata")
    tensors, others = {}, set()
    for key, entry in _dictionary(fields["state_dict_metadata"]).items():
        if not isinstance(key, str):
            raise ValueError(f"the key {_said(key)} is no text")
        if isinstance(entry, Made) and entry.kind == f"{TABLES}.BytesStorageMetadata":
            others.add(key)
        else:
            said = _fields(entry, f"{TABLES}.TensorStorageMetadata")
            tensors[key] = _dtype(said["properties"]), _size(said["size"])
    pieces = tuple(_piece(index, info) for index, info in _dictionary(fields["storage_data"]).items())
    sizes = {name: _bytes(folder, name) for name in {piece.file for piece in pieces}}
    for piece in pieces:
        if piece.begin + piece.length > sizes[piece.file]:
            raise ValueError(f"a part of {_said(piece.key)} ends behind the end of {piece.file}")
    needed = sum(dtype.itemsize * prod(size) for dtype, size in tensors.values())
    if needed > sum(sizes.values()):
        raise ValueError(f"its tensors have {needed:,} bytes, and its files {sum(sizes.values()):,}")
    paths = {key: _path(steps) for key, steps in _dictionary(fields.get("planner_data") or {}).items()}
    return Contents(tensors, frozenset(others), paths, pieces)


def _piece(index: Any, info: Any) -> Piece:
    at, where = _fields(index, f"{TABLES}.MetadataIndex"), _fields(info, f"{FILES}._StorageInfo")
    key, name, begin, length = at["fqn"], where["relative_path"], where["offset"], where["length"]
    if not isinstance(key, str) or not _whole(begin, length):
        raise ValueError(f"the part of {_said(key)} at {_said(begin)}, {_said(length)} is none")
    if not isinstance(name, str) or Path(name).name != name or "\\" in name:
        raise ValueError(f"the file {_said(name)} does not lie in the folder itself")
    if where.get("transform_descriptors"):
        raise ValueError(
            f"the part of {_said(key)} is compressed: save it again without, or give optimizer.state_dict()"
        )
    return Piece(key, None if at.get("offset") is None else _size(at["offset"]), name, begin, length)


def _bytes(folder: Path, name: str) -> int:
    place = folder / name
    if not place.is_file():
        raise ValueError(f"there is no file {name} beside it")
    return place.stat().st_size


def _fields(made: Any, kind: str) -> dict[str, Any]:
    if not isinstance(made, Made) or made.kind != kind or not isinstance(made.state, dict):
        raise ValueError(f"expected a {kind.rpartition('.')[2]}; got {_said(made)}")
    if not all(isinstance(name, str) for name in made.state):
        raise ValueError(f"a {kind.rpartition('.')[2]} has fields without a name")
    return made.state


def _dictionary(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a dictionary; got {_said(value)}")
    return value


def _dtype(properties: Any) -> torch.dtype:
    """Return the type of a dense tensor."""
    if not isinstance(properties, Made) or properties.kind != f"{TABLES}.TensorProperties":
        raise ValueError("a tensor has no properties")
    if not isinstance(properties.state, tuple) or len(properties.state) != 5:
        raise ValueError("a tensor's properties are not five")
    dtype, layout = properties.state[:2]
    if not isinstance(layout, Made) or layout.given != ("torch.strided",):
        raise ValueError("a tensor is not dense (torch.strided)")
    if not isinstance(dtype, Named) or dtype not in DTYPES:
        raise ValueError(f"a tensor has the type {_said(dtype)}; there are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _size(made: Any) -> tuple[int, ...]:
    given = made.given if isinstance(made, Made) and made.kind == "torch.Size" else made
    numbers = given[0] if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], tuple | list) else given
    if not isinstance(numbers, tuple | list) or len(numbers) > DEEPEST or not _whole(*numbers):
        raise ValueError(f"the size {_said(numbers)} is none")
    return tuple(numbers)


def _path(steps: Any) -> tuple[str | int, ...]:
    known = isinstance(steps, tuple | list) and all(isinstance(step, str | int) for step in steps)
    if not known or len(steps) > DEEPEST:
        raise ValueError(f"the path {_said(steps)} is none")
    return tuple(steps)


def _whole(*numbers: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in numbers)


def _said(value: Any) -> str:
    """Return a value for a message: never all of one that may hold itself a million times."""
    if isinstance(value, Made):
        return f"a {value.kind}"
    return repr(value)[:60] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


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
            _place(groups, steps[steps.index("param_groups") + 1 :], value)
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


def _place(into: dict[Any, Any], steps: tuple[Any, ...], value: Any) -> None:
    if not steps:
        into[None] = value
        return
    into.setdefault(steps[0], {})
    if len(steps) == 1:
        into[steps[0]] = value
    else:
        _place(into[steps[0]], steps[1:], value)


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
