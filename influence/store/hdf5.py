"""One HDF5 file of tensors and facts: written whole or not at all, and read only if every checksum holds.

The layout, for whoever reads it with h5py alone: each tensor is a contiguous dataset under its name, 64-byte aligned in
the file, with the attribute `sha256` of its little-endian bytes, or rather of the digests of every 4 MiB of them
(`checksums`); bfloat16, which HDF5 does not have, is uint16 with the attribute `dtype="bfloat16"`. The file has the
attributes `kind`, `schema` (an integer), `about` (JSON) and `sha256` of that JSON. Where dimensions are named, each
name is a dimension scale, so netCDF-4 readers know the axes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from influence.store.checksums import sha256
from influence.store.replacing import replacing

ALIGNMENT = 64
"""Bytes that every dataset's offset is a multiple of."""


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
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    about: Any,
    *,
    kind: str,
    schema: int,
    dims: Mapping[str, Sequence[str]] | None = None,
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
        dims: names of the dimensions of some tensors.

    Raises:
        OSError: if the disk is full, naming the file, the bytes it needs and those that are free.
    """
    import h5py

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = {key: [data] if isinstance(data, Tensor) else list(data) for key, data in tensors.items()}
    arrays = {key: [little_endian(piece) for piece in each] for key, each in pieces.items()}
    text = json.dumps(about)
    with replacing(path, sum(array.nbytes for each in arrays.values() for array in each)) as name:
        with h5py.File(name, "x", alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
            file.attrs.update(kind=kind, schema=schema, about=text, sha256=hashlib.sha256(text.encode()).hexdigest())
            offsets = {}
            for key, (first, *rest) in arrays.items():
                if first.ndim:
                    shape = (len(first) + sum(map(len, rest)), *first.shape[1:])
                    dataset = file.create_dataset(key, shape, first.dtype, dcpl=_early())
                else:
                    dataset = file.create_dataset(key, data=first)
                if pieces[key][0].dtype == torch.bfloat16:
                    dataset.attrs["dtype"] = "bfloat16"
                offsets[key] = dataset.id.get_offset()
        with ThreadPoolExecutor(1) as pool, open(name, "r+b", buffering=0) as raw:
            digests = {key: pool.submit(sha256, map(octets, each)) for key, each in arrays.items()}
            for key, each in arrays.items():
                if offsets[key] is not None and each[0].ndim:
                    raw.seek(offsets[key])
                    for array in each:
                        _write_all(raw, array)
            os.fsync(raw.fileno())  # while the checksums are taken
        with h5py.File(name, "r+") as file:
            for key, digest in digests.items():
                file[key].attrs["sha256"] = digest.result()
            _name_dimensions(file, dims or {})


def read(path: str | Path, *, kind: str, schema: int) -> tuple[dict[str, Tensor], Any]:
    """Read a file that `write` wrote.

    Args:
        path: the file.
        kind: what it should hold.
        schema: the version of the layout that the caller knows.

    Returns:
        The tensors and the facts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, another version, or damaged data.
    """
    import h5py

    facts = read_facts(path, kind=kind, schema=schema)
    tensors: dict[str, Tensor] = {}

    def take(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not item.is_scale:
            data = numpy.asarray(item[()])
            if sha256([octets(data)]) != item.attrs["sha256"]:
                raise ValueError(f"{path} is damaged: the checksum of {key!r} differs")
            tensor = torch.from_numpy(data)
            tensors[key] = tensor.view(torch.bfloat16) if item.attrs.get("dtype") == "bfloat16" else tensor

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return tensors, facts


def read_facts(path: str | Path, *, kind: str, schema: int) -> Any:
    """Read what a file that `write` wrote says about itself, without its tensors.

    Args:
        path: the file.
        kind: what it should hold.
        schema: the version of the layout that the caller knows.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, another version, is cut off, or its facts are damaged.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            facts = dict(file.attrs)
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if facts.get("kind") != kind:
        raise ValueError(f"{path} holds {facts.get('kind', 'something else')!r}; expected {kind!r}")
    if int(facts["schema"]) != schema:
        raise ValueError(
            f"{path} has schema {int(facts['schema'])}, this version reads {schema}: use the version that wrote it"
        )
    if hashlib.sha256(str(facts["about"]).encode()).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path} is damaged: the checksum of its facts differs")
    return json.loads(str(facts["about"]))


def locate(path: str | Path) -> dict[str, Place]:
    """Return where every dataset of a file lies, for who maps it into memory."""
    import h5py

    places = {}
    with h5py.File(path, "r") as file:
        for key, dataset in file.items():
            if dataset.is_scale:
                continue
            dtype = str(dataset.attrs.get("dtype", dataset.dtype.name))
            offset = dataset.id.get_offset() or 0
            places[key] = Place(int(offset), tuple(dataset.shape), dtype, str(dataset.attrs["sha256"]))
    return places


def little_endian(tensor: Tensor) -> Any:
    """Return a tensor as a contiguous little-endian array; bfloat16 as uint16."""
    data = tensor.detach().cpu().contiguous()
    array = (data.view(torch.uint16) if data.dtype == torch.bfloat16 else data).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def octets(array: Any) -> Any:
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view("u1")


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


def _write_all(raw: Any, array: Any) -> None:
    left = memoryview(octets(array))
    while left:
        left = left[raw.write(left) :]
