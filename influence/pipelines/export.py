"""Write an index's rows, decoded, for other tools: safetensors, npy, parquet."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from influence.index import Index, open_index
from influence.index.columns import choose
from influence.pipelines.frame.configs import Run
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.store import output_file
from influence.terminal import size

SAFETENSORS = {torch.int64: "I64", torch.int32: "I32", torch.float64: "F64", torch.float32: "F32"}
"""Types by safetensors' names."""
AT_ONCE = 1 << 24
"""Numbers that are decoded at once."""


@dataclass(frozen=True)
class ExportConfig:
    """Write the rows of an index (or scores) as safetensors, npy or parquet, decoded to float32 or float64.

    influence export runs/corpus --to corpus.parquet

    Attributes:
        run: the run directory of build, reduce or score.
        to: the file to write. Its suffix gives the format: .safetensors (a tensor per block), .npy (one matrix, blocks
            side by side) or .parquet (a list per row, with index, loss and length).
        format: the format, if the suffix does not give it.
        blocks: export only these blocks (names or globs).
        overwrite: replace the file.
    """

    run: Run
    to: str
    format: Literal["safetensors", "npy", "parquet"] | None = None
    blocks: tuple[str, ...] = ()
    overwrite: bool = False


def run(config: ExportConfig, say: Say = quiet) -> Outcome:
    """Export an index.

    Args:
        config: which, and where to.
        say: where its lines go.

    Returns:
        What was written.

    Raises:
        ValueError: if the format is unknown, or the run keeps no rows.
        FileExistsError: if the file is there.
    """
    path = Path(config.to)
    kind = config.format or path.suffix.removeprefix(".")
    if kind not in WRITERS:
        raise ValueError(f"export writes {', '.join(WRITERS)}; got {config.to!r}: end the file so, or pass --format")
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} exists already: pass --overwrite to replace it, or another --to")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the file to write by --to")
    if (Path(config.run) / "best.h5").exists():
        raise ValueError(f"{config.run} keeps the best and worst of its scores alone: score again without --top-k")
    index = open_index(config.run)
    blocks = list(choose(index.blocks, config.blocks or None).names)
    with output_file(path) as name:
        WRITERS[kind](index, blocks, name)
    facts = {"run": config.run, "file": str(path), "rows": len(index), "bytes": path.stat().st_size}
    return Outcome(str(path), facts, f"{len(index):,} rows in {path}, {size(path.stat().st_size)}")


def _slices(index: Index) -> Iterator[tuple[int, int]]:
    step = max(1, AT_ONCE // max(index.dim, 1))
    for begin in range(0, len(index), step):
        yield begin, min(begin + step, len(index))


def _about_rows(index: Index) -> dict[str, Tensor]:
    """Return what is known of each row beside its numbers."""
    counts = index.offsets.diff()
    known = {name: getattr(index, name).repeat_interleave(counts) for name in ("index", "loss", "length")}
    return known | ({"position": index.position} if index.per_token else {})


def _safetensors(index: Index, blocks: list[str], path: Path) -> None:
    number = "F64" if index.dtype == "float64" else "F32"
    known = _about_rows(index)
    shapes = {f"rows/{name}": (number, (len(index), *index.blocks[name])) for name in blocks}
    shapes |= {name: (SAFETENSORS[column.dtype], tuple(column.shape)) for name, column in known.items()}
    head, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + prod(shape) * int(dtype[1:]) // 8
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as file:  # safetensors' own writer makes a temporary file, which a kill leaves
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            for first, last in _slices(index):
                file.write(index.rows([block], first, last)[block].contiguous().numpy().tobytes())
        for column in known.values():
            file.write(column.contiguous().numpy().tobytes())


def _npy(index: Index, blocks: list[str], path: Path) -> None:
    import numpy

    width = index.columns.chosen(blocks).dim
    dtype = "<f8" if index.dtype == "float64" else "<f4"
    with open(path, "wb") as file:
        shape = {"descr": dtype, "fortran_order": False, "shape": (len(index), width)}
        numpy.lib.format.write_array_header_1_0(file, shape)
        for begin, end in _slices(index):
            file.write(index.matrix(begin, end, blocks).numpy().astype(dtype, copy=False).tobytes())


def _parquet(index: Index, blocks: list[str], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    known = _about_rows(index)
    number = pyarrow.float64() if index.dtype == "float64" else pyarrow.float32()
    widths = {name: torch.Size(index.blocks[name]).numel() for name in blocks}
    fields = [(name, pyarrow.from_numpy_dtype(column.numpy().dtype)) for name, column in known.items()]
    schema: Any = pyarrow.schema(fields + [(name, pyarrow.list_(number, width)) for name, width in widths.items()])
    with parquet.ParquetWriter(str(path), schema) as writer:
        for begin, end in _slices(index):
            columns = {name: pyarrow.array(column[begin:end].numpy()) for name, column in known.items()}
            for name, row in index.rows(blocks, begin, end).items():
                flat = pyarrow.array(row.reshape(-1).numpy())
                columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, widths[name])
            writer.write_table(pyarrow.table(columns, schema=schema))


WRITERS = {"safetensors": _safetensors, "npy": _npy, "parquet": _parquet}
"""How each format is written: `(index, blocks, path)`."""
