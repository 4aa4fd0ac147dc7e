"""Files of the library: the one atomic, checksummed HDF5 writer and reader, locks, and run directories."""

from influence.store.hdf5 import (
    Place,
    any_head,
    check_places,
    check_whole,
    checksum,
    digest_of,
    locate,
    map_file,
    mapped,
    read,
    read_facts,
    read_head,
    write,
)
from influence.store.lock import Lock
from influence.store.replacing import output_file, replacing, sync, write_text
from influence.store.schema import BadFileError

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
