"""The one atomic, checksummed HDF5 writer and reader of the library."""

from influence.store.hdf5 import read, write

__all__ = ["read", "write"]
