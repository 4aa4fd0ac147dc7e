"""The gradient index: rows on disk with everything needed to use them, and to refuse a wrong use."""

from influence.index.attributor import Attributor, Hits
from influence.index.building import build, step_of
from influence.index.columns import Columns, columns_of
from influence.index.faiss_search import FaissConfig
from influence.index.narrowing import narrowed
from influence.index.provenance import Fingerprint, FingerprintError, check, fingerprint_of, provenance
from influence.index.recipe import rebuild, recipe
from influence.index.root import About, finish
from influence.index.rows import Index, Piece, Place, open_index
from influence.index.run import Run, done
from influence.index.shards import Collected, memory_sink, shard_sink
from influence.index.starting import start

__all__ = [
    "About",
    "Attributor",
    "Collected",
    "Columns",
    "FaissConfig",
    "Fingerprint",
    "FingerprintError",
    "Hits",
    "Index",
    "Piece",
    "Place",
    "Run",
    "build",
    "check",
    "columns_of",
    "done",
    "fingerprint_of",
    "finish",
    "memory_sink",
    "narrowed",
    "open_index",
    "provenance",
    "rebuild",
    "recipe",
    "shard_sink",
    "start",
    "step_of",
]
