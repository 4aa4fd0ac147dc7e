"""Datasets become token batches: loading, text, chat, templates, chunks, rewards, packing."""

from influence.data.batches import batches, collate, pack
from influence.data.budget import auto_token_budget
from influence.data.documents import TextFormat
from influence.data.rewards import advantages
from influence.data.slices import context_length
from influence.data.sources import load
from influence.data.stream import stream
from influence.data.templates import Template
from influence.data.tokenize import tokenize
from influence.data.tokenized import Counts, Tokenized, chunk, shards

__all__ = [
    "Counts",
    "Template",
    "TextFormat",
    "Tokenized",
    "advantages",
    "auto_token_budget",
    "batches",
    "chunk",
    "collate",
    "context_length",
    "load",
    "pack",
    "shards",
    "stream",
    "tokenize",
]
