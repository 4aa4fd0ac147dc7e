"""Datasets as memory maps: tensors whose bytes stay in the file until they are read."""

import mmap
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from influence.store.checksums import sha256
from influence.store.hdf5 import DTYPES, Place


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
