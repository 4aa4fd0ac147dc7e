"""Datasets as memory maps: tensors whose bytes stay in the file until they are read."""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from influence.store.replacing import replacing
from influence.store.schema import BadFileError, conform, refuse_version

CHUNK = 1 << 22
"""Bytes that are hashed apart."""
THREADS = min(os.cpu_count() or 1, 8)


def sha256(buffers: Iterable[Any]) -> str:
    """Return the checksum of the bytes of buffers, one after the other; it does not depend on where they are cut.

    Args:
        buffers: what has bytes: contiguous arrays, views of memory maps.

    Returns:
        In hexadecimal.

    Example:
        >>> from influence.store.hdf5 import sha256
        >>> sha256([b"some", b"where"]) == sha256([b"somewhere"])
        True
    """
    chunks = list(chunked(buffers))
    if len(chunks) < 2:  # no thread is worth it
        return hashlib.sha256(b"".join(map(digest, chunks))).hexdigest()
    with ThreadPoolExecutor(min(THREADS, len(chunks))) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, chunks))).hexdigest()


def chunked(buffers: Iterable[Any]) -> Iterator[list[memoryview]]:
    """Yield the pieces of every `CHUNK` bytes; the last chunk has what is left."""
    chunk: list[memoryview] = []
    room = CHUNK
    for buffer in buffers:
        view = memoryview(buffer)
        left = view.cast("B") if view.nbytes else view  # an empty one cannot be cast
        while left:
            chunk.append(left[:room])
            left, room = left[room:], room - len(chunk[-1])
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def digest(pieces: Iterable[memoryview]) -> bytes:
    """Return the sha256 of pieces, one after the other."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.digest()


ALIGNMENT = 64
"""Bytes that every dataset's offset is a multiple of."""
MAGIC = b"influence store 1\n"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""How HDF5's own part begins."""
FIRST = len(MAGIC) + 64 + 1 + 20 + 1
"""Bytes of the first two lines: the number of bytes is padded."""
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Types of tensors that a file may hold, by the name that it gives them."""


class Place(NamedTuple):
    """Where a dataset lies in its file.

    Attributes:
        offset: first byte; 0 for an empty dataset.
        shape: its shape.
        dtype: its type, as torch names it.
        sha256: the checksum of its bytes.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Head(NamedTuple):
    """What a file says in its plain block.

    Attributes:
        kind: what it holds.
        schema: version of its layout.
        run: the id of the run that it belongs to; empty for a file of its own.
        bytes: its size.
        tables: the checksum of what is neither this block nor a tensor: HDF5's own tables.
        tensors: where its tensors are.
        about: its facts.
    """

    kind: str
    schema: int
    run: str
    bytes: int
    tables: str
    tensors: dict[str, Place]
    about: Any


class Tensors(dict[str, Tensor]):
    """The tensors of a file, by name: to ask for one that it does not have is an error that names the file."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        """Refuse.

        Raises:
            BadFileError: naming the file and the tensor.
        """
        raise BadFileError(f"{self.path} is not what it says: it has no tensor {name!r}")


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    about: Any,
    *,
    kind: str,
    schema: int,
    run: str = "",
    dims: Mapping[str, Sequence[str]] | None = None,
    extend: Callable[[Any], None] = lambda file: None,
) -> None:
    """Write tensors and facts to a file, atomically: a temporary file, flushed, synced, then renamed.

    HDF5 lays the file out; the bytes are written past it, while another thread takes the checksums. The same tensors
    and facts give the same bytes.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        tensors: contiguous datasets by name; one may come in pieces, which follow one another along its first axis.
        about: anything JSON can write.
        kind: what the file holds.
        schema: version of its layout.
        run: the id of the run that the file belongs to.
        dims: names of the dimensions of some tensors.
        extend: adds to the open `h5py.File` what only readers with h5py see.

    Raises:
        OSError: if the disk is full, naming the file, the bytes it needs and those that are free.
    """
    import h5py

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = {key: [data] if isinstance(data, Tensor) else list(data) for key, data in tensors.items()}
    arrays = {key: [little_endian(piece) for piece in each] for key, each in pieces.items()}
    shapes = {key: _shape(each) for key, each in arrays.items()}
    types = {key: str(each[0].dtype).removeprefix("torch.") for key, each in pieces.items()}
    text = json.dumps(about)

    def head(offsets: Mapping[str, int], digests: Mapping[str, str], size: int, tables: str) -> bytes:
        places = {key: (offsets[key], shapes[key], types[key], digests[key]) for key in arrays}
        known = {"kind": kind, "schema": schema, "run": run, "bytes": size, "tables": tables, "tensors": places}
        return json.dumps(known)[:-1].encode() + b', "about": ' + text.encode() + b"}"

    large = 1 << 62  # numbers of this size leave room for any
    room = FIRST + len(head(dict.fromkeys(arrays, large), dict.fromkeys(arrays, "0" * 64), large, "0" * 64)) + 1
    block = max(512, 1 << (room - 1).bit_length())
    with replacing(path, sum(array.nbytes for each in arrays.values() for array in each) + block, run) as name:
        offsets = {}
        with h5py.File(name, "w", userblock_size=block, alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
            file.attrs.update(kind=kind, schema=schema, about=text)
            for key, each in arrays.items():
                if shapes[key]:
                    dataset = file.create_dataset(key, shapes[key], each[0].dtype, dcpl=_early())
                else:
                    dataset = file.create_dataset(key, data=each[0])
                if types[key] == "bfloat16":
                    dataset.attrs["dtype"] = "bfloat16"
                offsets[key] = dataset.id.get_offset() if 0 not in shapes[key] else 0
            extend(file)
        with ThreadPoolExecutor(1) as pool, open(name, "r+b", buffering=0) as raw:
            digests = {key: pool.submit(sha256, map(octets, each)) for key, each in arrays.items()}
            for key, each in arrays.items():
                raw.seek(offsets[key])
                for array in each:
                    _write_all(raw, octets(array))
            os.fsync(raw.fileno())  # while the checksums are taken
        taken = {key: digest.result() for key, digest in digests.items()}
        with h5py.File(name, "r+") as file:
            for key, digest in taken.items():
                file[key].attrs["sha256"] = digest
            _name_dimensions(file, dims or {})
        places = [Place(offsets[key], shapes[key], types[key], "") for key in arrays]
        facts = head(offsets, taken, name.stat().st_size, _tables(name, block, places))
        with open(name, "r+b", buffering=0) as raw:
            line = f"{hashlib.sha256(facts).hexdigest()} {len(facts):020}\n".encode()
            _write_all(raw, MAGIC + line + facts + b"\n")


def read(path: str | Path, *, kind: str, schema: int, run: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Read a file that `write` wrote.

    Args:
        path: the file.
        kind: what it should hold.
        schema: the version of the layout that the caller knows.
        run: the id of the run that it should belong to; `None` takes any.

    Returns:
        The tensors and the facts.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: if it holds something else, another version, another run's, or damaged data.
    """
    head = read_head(path, kind=kind, schema=schema, run=run)
    tensors = Tensors(path)
    with open(path, "rb") as file:
        for key, place in head.tensors.items():
            data = torch.empty(place.bytes, dtype=torch.uint8)
            view: Any = data.numpy()
            file.seek(place.offset)
            if file.readinto(view) != place.bytes or sha256([view]) != place.sha256:
                raise BadFileError(f"{path} is damaged: the checksum of {key!r} differs")
            tensors[key] = data.view(DTYPES[place.dtype]).reshape(place.shape)
    return tensors, head.about


def read_facts(path: str | Path, *, kind: str, schema: int, run: str | None = None) -> Any:
    """Read what a file that `write` wrote says about itself, without its tensors.

    Args:
        path: the file.
        kind: what it should hold.
        schema: the version of the layout that the caller knows.
        run: the id of the run that it should belong to; `None` takes any.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: if it holds something else, another version, another run's, is cut off, or its facts are damaged.
    """
    return read_head(path, kind=kind, schema=schema, run=run).about


def read_head(path: str | Path, *, kind: str, schema: int, run: str | None = None) -> Head:
    """Read all that a file says in its plain block, checked; see `read_facts`."""
    head = any_head(path)
    if head.kind != kind:
        raise BadFileError(f"{path} holds {head.kind!r}; expected {kind!r}")
    refuse_version(path, head.schema, schema)
    if run is not None and head.run != run:
        raise BadFileError(
            f"{path} belongs to another run (its id is {head.run[:16] or 'none'}, this run's is {run[:16]}): it was "
            "put here from elsewhere. Move it away and run the same command again, or write to another directory"
        )
    return head


def check_whole(path: str | Path, *, kind: str, schema: int, run: str | None = None) -> Head:
    """Read every byte of a file, and return what it says of itself.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: as `read_facts`; or if a tensor, or HDF5's own tables, are damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from influence import store
        >>> path = f"{tempfile.mkdtemp()}/numbers.h5"
        >>> store.write(path, {"x": torch.ones(2)}, {"lr": 1}, kind="numbers", schema=1)
        >>> store.check_whole(path, kind="numbers", schema=1).about
        {'lr': 1}
    """
    head = read_head(path, kind=kind, schema=schema, run=run)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held:
        for key, place in head.tensors.items():
            with memoryview(held) as view, view[place.offset : place.offset + place.bytes] as part:
                if sha256([part]) != place.sha256:
                    raise BadFileError(f"{path} is damaged: the checksum of {key!r} differs")
        block = held.find(SIGNATURE)
    if _tables(path, block, head.tensors.values()) != head.tables:
        raise BadFileError(f"{path} is damaged: the checksum of its HDF5 tables differs")
    return head


def _tables(path: str | Path, block: int, places: Iterable[Place]) -> str:
    """Return the checksum of a file's bytes behind its plain block and outside its tensors."""
    digest, end = hashlib.sha256(), block
    with open(path, "rb") as file:
        for place in sorted(place for place in places if place.bytes):
            file.seek(end)
            digest.update(file.read(max(0, place.offset - end)))
            end = place.offset + place.bytes
        file.seek(end)
        digest.update(file.read())
    return digest.hexdigest()


def digest_of(path: str | Path) -> str:
    """Return the checksum of all that a file says of itself, the checksums of its tensors among it."""
    any_head(path)
    with open(path, "rb") as file:
        return file.read(FIRST)[len(MAGIC) :][:64].decode()


def any_head(path: str | Path) -> Head:
    """Read the plain block of a file of any kind.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: if it is no file of ours, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(FIRST)
        name, _, version = MAGIC.strip().rpartition(b" ")
        there = first.partition(b"\n")[0].removeprefix(name + b" ")
        if there.isdigit() and there != version:
            raise BadFileError(
                f"{path} is a file of influence of format {int(there)}, and this version reads {int(version)} (or its "
                "beginning is damaged): use the version that wrote it, or make it again by the command that made it"
            )
        if not first.startswith(MAGIC):
            raise BadFileError(f"{path} is no file of influence, or its beginning is damaged")
        digest, _, length = first[len(MAGIC) :].decode(errors="replace").partition(" ")
        if len(first) < FIRST or not length.strip().isdecimal() or int(length) > size:
            raise BadFileError(f"{path} is damaged: its first lines are cut off or changed")
        text = file.read(int(length))
    if hashlib.sha256(text).hexdigest() != digest:
        raise BadFileError(f"{path} is damaged: the checksum of its facts differs")
    head = conform(parsed(text, path), Head, str(path))
    if head.bytes != size:
        how = "cut off" if size < head.bytes else "too long"
        raise BadFileError(f"{path} is damaged: it is {how}, {size:,} bytes of {head.bytes:,}")
    check_places(head.tensors, size, str(path))
    return head


def locate(path: str | Path) -> dict[str, Place]:
    """Return where every tensor of a file lies, for who maps it into memory."""
    return any_head(path).tensors


def check_places(places: Mapping[str, Place], size: int, where: str) -> None:
    """Refuse places that no file of a size can have.

    Raises:
        BadFileError: naming the file and the tensor.
    """
    for key, place in places.items():
        if place.dtype not in DTYPES or min(place.offset, *place.shape, 0) < 0 or place.offset + place.bytes > size:
            raise BadFileError(f"{where} is not what it says: its tensor {key!r} cannot be {tuple(place)}")


def parsed(text: str | bytes, path: str | Path) -> Any:
    """Parse JSON.

    Raises:
        BadFileError: naming the file.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is damaged: it is no JSON ({error})") from error


def little_endian(tensor: Tensor) -> Any:
    """Return a tensor as a contiguous little-endian array; bfloat16 as uint16."""
    data = tensor.detach().cpu().contiguous()
    array = (data.view(torch.uint16) if data.dtype == torch.bfloat16 else data).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def octets(array: Any) -> Any:
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view("u1")


def _shape(pieces: Sequence[Any]) -> tuple[int, ...]:
    first = pieces[0]
    return (sum(map(len, pieces)), *first.shape[1:]) if first.ndim else ()


def _name_dimensions(file: Any, dims: Mapping[str, Sequence[str]]) -> None:
    """Attach a dimension scale to each named axis: the numbers from 0.

    Raises:
        ValueError: if one name has two lengths.
    """
    for key, names in dims.items():
        dataset = file[key]
        for axis, (name, length) in enumerate(zip(names, dataset.shape, strict=True)):
            if name not in file:
                file.create_dataset(name, data=range(length), dtype="<i8").make_scale(name.rpartition("/")[2])
            if len(file[name]) != length:
                raise ValueError(f"the dimension {name!r} has length {len(file[name])}, and {key!r} {length} there")
            dataset.dims[axis].attach_scale(file[name])


def _early() -> Any:
    """Return the setting by which a dataset has its place in the file from the start."""
    import h5py

    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return settings


def _write_all(raw: Any, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[raw.write(left) :]


def map_file(path: str | Path) -> mmap.mmap:
    """Map a file into memory, privately: nothing that is done to the map reaches the file."""
    with open(path, "rb") as file:
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def mapped(buffer: Any, place: Place) -> Shaped[Tensor, "..."]:
    """Return a dataset of a mapped file as a tensor, without a copy."""
    dtype = DTYPES[place.dtype]
    count = torch.Size(place.shape).numel()
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=place.offset).reshape(place.shape)


def checksum(buffer: Any, place: Place) -> str:
    """Return the checksum of a dataset's bytes as they are in the file now."""
    return sha256([memoryview(buffer)[place.offset : place.offset + place.bytes]])
