"""The one atomic, checksummed HDF5 writer and reader of the library."""

from influence.store.hdf5 import Place, locate, read, read_facts, write
from influence.store.mapping import checksum, map_file, mapped
from influence.store.replacing import replacing, sync

__all__ = ["Place", "checksum", "locate", "map_file", "mapped", "read", "read_facts", "replacing", "sync", "write"]
