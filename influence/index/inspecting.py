"""What is in an index, as text."""

import json
from typing import TYPE_CHECKING

from influence.func.plan import human
from influence.index.run import made_by
from influence.visible import visible

if TYPE_CHECKING:
    from influence.index.reading import Index

SHOWN = 12
"""Blocks and shards that are listed; of more, the first and the last."""


def describe(index: "Index") -> str:
    """Return all that an index knows of itself: contents, provenance, blocks, shards and their sizes."""
    about = index.about
    where = "in memory" if index.path is None else str(index.path)
    unit = "tokens" if index.per_token else "examples"
    lines = [
        visible(f"{about.kind} at {where}" if index.path else f"{about.kind} {where}", lines=False),
        f"{len(index):,} rows ({unit}) of {index.examples:,} examples × {index.dim:,} columns in {index.dtype}",
    ]
    if index.examples:
        lines.append(
            f"loss: mean {index.loss.double().mean():.4g}, from {index.loss.min():.4g} to {index.loss.max():.4g}; "
            f"{int(index.length.sum()):,} tokens, {int((index.length == 0).sum()):,} empty examples"
        )
    lines.append(f"made by: {made_by(about.command)}")
    for change in about.appended:
        lines.append(f"appended from shard {change['first']}: {made_by(change['command'])}")
    for title, fields in index.fingerprint.json().items():
        lines.append(f"{title.replace('_', ' ')}:")
        shown = {visible(name, lines=False): value for name, value in fields.items() if name != "blocks"}
        lines += [f"  {name}: {_short(value)}" for name, value in shown.items()]
    lines.append(f"configuration: {_short(about.config, 400)}")
    lines += ["", *_table(["block", "shape", "columns"], [_block(index, name) for name in index.blocks])]
    if about.shards:
        rows = [[s.file, f"{s.begin}:{s.end}", f"{s.rows:,}", human(s.bytes), "whole"] for s in about.shards]
        lines += ["", *_table(["shard", "examples", "rows", "bytes", "size"], rows)]
        lines.append(f"{len(about.shards)} shards, {human(sum(s.bytes for s in about.shards))} bytes")
    return "\n".join(lines)


def _block(index: "Index", name: str) -> list[str]:
    begin, end = index.columns.spans[name]
    return [visible(name, lines=False), "×".join(map(str, index.blocks[name])) or "1", f"{begin}:{end}"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if len(rows) > SHOWN:
        rows = [*rows[: SHOWN // 2], ["…", *[""] * (len(head) - 1)], *rows[-SHOWN // 2 :]]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def _short(value: object, most: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"
