"""One HDF5 file of tensors and facts: written whole or not at all, and read only if every checksum holds.

The layout, for whoever reads it with h5py alone: each tensor is a contiguous dataset under its name, with the attribute
`sha256` of its little-endian bytes; the file has the attributes `kind`, `schema` (an integer), `about` (JSON) and
`sha256` of that JSON. Where dimensions are named, each name is a dimension scale, so netCDF-4 readers know the axes.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    about: Any,
    *,
    kind: str,
    schema: int,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write tensors and facts to a file, atomically: a temporary file, flushed, synced, then renamed.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        tensors: contiguous datasets by name.
        about: anything JSON can write.
        kind: what the file holds.
        schema: version of its layout.
        dims: names of the dimensions of some tensors.
    """
    import h5py

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        with h5py.File(name, "x") as file:
            for key, tensor in tensors.items():
                data = tensor.detach().cpu().contiguous().numpy()
                dataset = file.create_dataset(key, data=data.astype(data.dtype.newbyteorder("<")))
                dataset.attrs["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
            _name_dimensions(file, dims or {})
            text = json.dumps(about)
            file.attrs.update(kind=kind, schema=schema, about=text, sha256=hashlib.sha256(text.encode()).hexdigest())
            file.flush()
        _sync(name)
        os.replace(name, path)
        _sync(path.parent)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


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

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no HDF5 file")
    with h5py.File(path, "r") as file:
        facts = dict(file.attrs)
        if facts.get("kind") != kind:
            raise ValueError(f"{path} holds {facts.get('kind', 'something else')!r}; expected {kind!r}")
        if int(facts["schema"]) != schema:
            raise ValueError(
                f"{path} has schema {int(facts['schema'])}, this version reads {schema}: use the version that wrote it"
            )
        if hashlib.sha256(str(facts["about"]).encode()).hexdigest() != facts["sha256"]:
            raise ValueError(f"{path} is damaged: the checksum of its facts differs")
        tensors: dict[str, Tensor] = {}

        def take(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and not item.is_scale:
                data = item[()]
                if hashlib.sha256(data.tobytes()).hexdigest() != item.attrs["sha256"]:
                    raise ValueError(f"{path} is damaged: the checksum of {key!r} differs")
                tensors[key] = torch.from_numpy(data)

        file.visititems(take)
    return tensors, json.loads(str(facts["about"]))


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
