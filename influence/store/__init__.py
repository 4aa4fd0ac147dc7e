"""Files of the library: the one atomic, checksummed HDF5 writer and reader, locks, and run directories."""

from influence.store.errors import BadFileError
from influence.store.hdf5 import (
    Place,
    any_head,
    check_places,
    check_whole,
    digest_of,
    locate,
    read,
    read_facts,
    read_head,
    write,
)
from influence.store.lock import Lock
from influence.store.mapping import checksum, map_file, mapped
from influence.store.replacing import output_file, replacing, sync, write_text

__all__ = [
    "BadFileError",
    "Lock",
    "Place",
    "any_head",
    "check_places",
    "check_whole",
    "checksum",
    "digest_of",
    "locate",
    "map_file",
    "mapped",
    "output_file",
    "read",
    "read_facts",
    "read_head",
    "replacing",
    "sync",
    "write",
    "write_text",
]
