"""The gradient index: rows on disk with everything needed to use them, and to refuse a wrong use."""

from influence.index.answer import Answer, Hits
from influence.index.attributor import Attributor
from influence.index.building import build, step_of
from influence.index.columns import Columns, Piece, columns_of
from influence.index.faiss_search import FaissConfig
from influence.index.narrowing import narrowed
from influence.index.provenance import Fingerprint, FingerprintError, check, fingerprint_of, provenance
from influence.index.recipe import rebuild, recipe
from influence.index.root import About, finish
from influence.index.rows import Index, TokenPlace, open_index
from influence.index.run import Run, start
from influence.index.shards import Collected, done, memory_sink, shard_sink

__all__ = [
    "About",
    "Answer",
    "Attributor",
    "Collected",
    "Columns",
    "FaissConfig",
    "Fingerprint",
    "FingerprintError",
    "Hits",
    "Index",
    "Piece",
    "Run",
    "TokenPlace",
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
