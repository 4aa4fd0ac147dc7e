"""The `Index` value: stored rows read as one, from memory-mapped shards or from memory; also at a smaller dim.

Nothing is loaded until it is asked for, and a dataset's checksum is verified when it is first read.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence import store
from influence.index.columns import Columns, Encoded, Piece, decode
from influence.index.provenance import Fingerprint
from influence.index.root import HEADER, About, Shard, header_of, read_root
from influence.index.run import made_by, way_on, what_is_there
from influence.index.shards import ROOT
from influence.store import BadFileError
from influence.store.folder import RUN, run_id
from influence.terminal import human, table
from influence.types import LossFn, Params, Rows
from influence.visible import visible


@runtime_checkable
class ShardRows(Protocol):
    """A shard, on disk or in memory."""

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        ...

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it."""
        ...


class ShardInMemory(NamedTuple):
    """A shard in memory."""

    tensors: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self.tensors["rows"].shape[0]

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it."""
        return self.tensors.get(name)


class ShardOnDisk:
    """A shard on disk: mapped when it is first read; each dataset verified when it is."""

    def __init__(self, path: Path, shard: Shard, verify: bool) -> None:
        """Hold what the root knows of it."""
        self.path, self.shard, self.verify = path, shard, verify
        self.rows, self._read = shard.rows, dict[str, Tensor]()

    @cached_property
    def _buffer(self) -> Any:
        return store.map_file(self.path)

    def get(self, name: str) -> Tensor | None:
        """Return a dataset, if it has it.

        Raises:
            BadFileError: if its bytes are not those that were written.
        """
        if name not in self.shard.places:
            return None
        if name not in self._read:
            if self.verify:
                self.check(name)
            self._read[name] = store.mapped(self._buffer, self.shard.places[name])
        return self._read[name]

    def check(self, name: str) -> None:
        """Verify one dataset's checksum.

        Raises:
            BadFileError: naming the file and the dataset.
        """
        place = self.shard.places[name]
        if place.bytes and store.checksum(self._buffer, place) != place.sha256:
            raise BadFileError(
                f"{self.path} is damaged: the checksum of its dataset {name!r} differs from what was written. Delete "
                f"the file and {ROOT}, and run the same command again, which makes this shard anew"
            )


def check_size(path: Path, shard: Shard) -> None:
    """Refuse a shard that is gone or of another size.

    Raises:
        FileNotFoundError: if it is gone.
        BadFileError: if it has another size.
    """
    again = f"Restore it, or delete {ROOT} and run the same command again, which makes what is missing"
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing ({shard.rows:,} rows). {again}")
    if path.resolve().parent != path.parent.resolve():
        raise BadFileError(f"shard {path} is a link out of its directory, which is not followed: put the file there")
    size = path.stat().st_size
    if size != shard.bytes:
        how = "cut off" if size < shard.bytes else "too long"
        raise BadFileError(f"shard {path} is {how}: it has {size:,} bytes, and {shard.bytes:,} were written. {again}")


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
    known = index.fingerprint
    lines += [f"weights: {_short(known.weights)}", f"function: {_short(known.function)}"]
    lines += ["steps:", *(f"  {visible(s.name, lines=False)}: {_short(s.settings)}" for s in known.steps)]
    recorded = {visible(name, lines=False): value for name, value in known.recorded.items()}
    lines += ["recorded:", *(f"  {name}: {_short(value)}" for name, value in recorded.items())]
    lines.append(f"configuration: {_short(about.config, 400)}")
    lines += ["", _table(["block", "shape", "columns"], [_block(index, name) for name in index.blocks])]
    if about.shards:
        rows = [[s.file, f"{s.begin}:{s.end}", f"{s.rows:,}", human(s.bytes), "whole"] for s in about.shards]
        lines += ["", _table(["shard", "examples", "rows", "bytes", "size"], rows)]
        lines.append(f"{len(about.shards)} shards, {human(sum(s.bytes for s in about.shards))} bytes")
    return "\n".join(lines)


def _block(index: "Index", name: str) -> list[str]:
    begin, end = index.columns.spans[name]
    return [visible(name, lines=False), "×".join(map(str, index.blocks[name])) or "1", f"{begin}:{end}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    if len(rows) > SHOWN:
        rows = [*rows[: SHOWN // 2], ["…", *[""] * (len(head) - 1)], *rows[-SHOWN // 2 :]]
    return table(head, rows)


def _short(value: object, most: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"


def to_dataset(index: "Index") -> Any:
    """Return a dataset of `index`, `loss`, `length`, `gradients` (and `position` of tokens)."""
    import datasets
    import pyarrow

    if index.dim >= 2**31:
        raise ValueError(f"a dataset's list holds less than 2^31 entries, and a row has {index.dim:,}: choose blocks")
    counts = index.offsets.diff()
    columns: dict[str, Any] = {
        "index": index.index.repeat_interleave(counts),
        "loss": index.loss.repeat_interleave(counts),
        "length": index.length.repeat_interleave(counts),
    }
    if index.per_token:
        columns["position"] = index.position
    pieces = []
    for piece in index.pieces():
        matrix = index.matrix(piece.begin, piece.begin + len(piece.values))
        pieces.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(matrix.flatten().numpy()), index.dim))
    kind = pyarrow.list_(pyarrow.float64() if index.dtype == "float64" else pyarrow.float32(), index.dim)
    arrays = {name: pyarrow.array(torch.as_tensor(column).numpy()) for name, column in columns.items()}
    return datasets.Dataset(pyarrow.table({**arrays, "gradients": pyarrow.chunked_array(pieces, kind)}))


AT_ONCE = 1 << 26
"""Entries that are decoded at once where a caller does not say."""


class TokenPlace(NamedTuple):
    """Where token rows are from.

    Attributes:
        document: the row of the dataset.
        position: the position in its `input_ids`.
    """

    document: Int[Tensor, " *q"]
    position: Int[Tensor, " *q"]


class Index:
    """Rows with everything needed to use them; `print` it.

    Attributes:
        about: kind, configuration, command, plan and shards.
        path: the run directory; `None` in memory.
        function: the loss function and the parameters that the rows were collected with, where `build` returned the
            index; `None` where it was opened.
    """

    def __init__(
        self,
        about: About,
        parts: Sequence[ShardRows],
        path: Path | None = None,
        function: tuple[LossFn, Params] | None = None,
    ) -> None:
        """Present shards as one index."""
        self.about, self.parts, self.path, self.function = about, tuple(parts), path, function
        self._begins = [0]
        for part in self.parts:
            self._begins.append(self._begins[-1] + part.rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._begins[-1]

    @property
    def columns(self) -> Columns:
        """Where each block lies in a row."""
        return self.about.columns

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """The blocks' shapes, in order."""
        return dict(self.columns.shapes)

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.columns.dim

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.about.dtype

    @property
    def per_token(self) -> bool:
        """Whether there is a row for every token."""
        return self.about.per_token

    @property
    def fingerprint(self) -> Fingerprint:
        """What the rows are."""
        return self.about.fingerprint

    @property
    def examples(self) -> int:
        """How many examples the rows are of."""
        return len(self.index)

    @cached_property
    def loss(self) -> Float[Tensor, " n"]:
        """Each example's loss."""
        return self._whole("loss")

    @cached_property
    def length(self) -> Int[Tensor, " n"]:
        """Each example's tokens."""
        return self._whole("length")

    @cached_property
    def index(self) -> Int[Tensor, " n"]:
        """Each example's row in the dataset, or its chunk's number."""
        return self._whole("index")

    @cached_property
    def offsets(self) -> Int[Tensor, " n_and_1"]:
        """Where each example's rows begin, and where the last one's end."""
        if not self.per_token:
            return torch.arange(len(self) + 1)
        found = [torch.zeros(1, dtype=torch.int64)]
        for begin, part in zip(self._begins, self.parts, strict=False):
            offsets = part.get("offsets")
            assert offsets is not None
            found.append(offsets[1:] + begin)
        return torch.cat(found)

    @cached_property
    def position(self) -> Int[Tensor, " r"]:
        """Each token row's position in its example."""
        if not self.per_token:
            raise ValueError("this index has a row for every example, not for every token: rows have no positions")
        return self._whole("position")

    @cached_property
    def document(self) -> Int[Tensor, " r"]:
        """The row of the dataset that each row is from: of a chunk, its first document, or the token's own."""
        if len(self) and all(part.get("document") is not None for part in self.parts if part.rows):
            return self._whole("document")
        return self.index.repeat_interleave(self.offsets.diff())

    @cached_property
    def documents(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " r"]]:
        """The documents that rows are from, and the place of each row's among them."""
        documents, groups = torch.unique(self.document, return_inverse=True)
        return documents, groups

    def place(self, row: Int[Tensor, " *q"]) -> TokenPlace:
        """Return where token rows are from.

        Args:
            row: numbers of rows.

        Returns:
            The row of the dataset (or the chunk's number) and the position in its `input_ids`.
        """
        example = torch.searchsorted(self.offsets, row, right=True) - 1
        return TokenPlace(self.index[example], self.position[row])

    def pieces(self, rows_at_once: int | None = None) -> Iterator[Piece]:
        """Yield the rows as they are stored, some at a time and in order: views, no copies.

        Args:
            rows_at_once: most rows of a piece; shards' ends end pieces too.
        """
        size = rows_at_once or max(1, AT_ONCE // max(self.dim, 1))
        for begin, part in zip(self._begins, self.parts, strict=False):
            if not part.rows:
                continue
            values, scale = part.get("rows"), part.get("scale")
            assert values is not None
            for at in range(0, part.rows, size):
                chosen = slice(at, min(at + size, part.rows))
                yield Piece(begin + at, values[chosen], None if scale is None else scale[chosen])

    def matrix(
        self, begin: int = 0, end: int | None = None, blocks: Iterable[str] | None = None
    ) -> Float[Tensor, "r d"]:
        """Return some rows as numbers, blocks side by side.

        Args:
            begin: the first row.
            end: the one behind the last; `None` takes all.
            blocks: which blocks; `None` takes all. They come in their stored order.

        Returns:
            The rows, in float32, or float64 if they are stored so.
        """
        begin, end, _ = slice(begin, end).indices(len(self))
        chosen = self.columns.chosen(blocks)
        found = []
        for first, part in zip(self._begins, self.parts, strict=False):
            here = slice(max(begin - first, 0), max(min(end - first, part.rows), 0))
            if here.start < here.stop:
                values, scale = part.get("rows"), part.get("scale")
                assert values is not None
                stored = Encoded(values[here], None if scale is None else scale[here])
                found.append(decode(stored, self.columns, chosen))
        if not found:
            return torch.zeros(0, chosen.dim, dtype=torch.float64 if self.dtype == "float64" else torch.float32)
        return found[0] if len(found) == 1 else torch.cat(found)

    def take(self, rows: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Return rows by their numbers, in any order, as `matrix` does.

        Args:
            rows: their numbers.

        Returns:
            The rows, in float32, or float64 if they are stored so.
        """
        out = torch.empty(len(rows), self.dim, dtype=torch.float64 if self.dtype == "float64" else torch.float32)
        for first, part in zip(self._begins, self.parts, strict=False):
            here = ((rows >= first) & (rows < first + part.rows)).nonzero()[:, 0]
            if len(here):
                values, scale = part.get("rows"), part.get("scale")
                assert values is not None
                values = values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
                at = rows[here] - first
                out[here] = decode(Encoded(values[at], None if scale is None else scale[at]), self.columns)
        return out

    def rows(self, blocks: Iterable[str] | None = None, begin: int = 0, end: int | None = None) -> Rows:
        """Return some rows block by block, as they were collected.

        Args:
            blocks: which blocks; `None` takes all.
            begin: the first row.
            end: the one behind the last; `None` takes all.

        Returns:
            `{block: [r, *shape]}`.
        """
        chosen = self.columns.chosen(blocks)
        return chosen.split(self.matrix(begin, end, list(chosen.shapes)))

    def tokens(self, i: int) -> Rows:
        """Return the rows of one example of a token index, one row per token.

        Args:
            i: the example's number in the index; -1 is the last.

        Returns:
            `{block: [tokens, *shape]}`.
        """
        if not self.per_token:
            raise ValueError("this index has a row for every example; tokens(i) is for one built with per_token")
        number = range(self.examples)[i]
        return self.rows(None, int(self.offsets[number]), int(self.offsets[number + 1]))

    def dataset(self) -> Any:
        """Return a Hugging Face dataset: columns `index`, `loss`, `length` and `gradients`, all decoded in memory.

        Of a token index each row is a token, with its `position`.
        """
        return to_dataset(self)

    def verify(self) -> None:
        """Read every byte again.

        Raises:
            ValueError: naming the shard and the dataset that is not as it was written.
        """
        for part in self.parts:
            if isinstance(part, ShardOnDisk):
                check_size(part.path, part.shard)
                for name in part.shard.places:
                    part.check(name)
                if header_of(part.path, part.shard.places) != part.shard.header:
                    raise BadFileError(
                        f"{part.path} is damaged in its {HEADER}: h5py may misread it; the rows themselves are whole. "
                        f"Delete the file and {ROOT}, and run the same command again, which makes this shard anew"
                    )

    def _whole(self, name: str) -> Tensor:
        found = [part.get(name) for part in self.parts]
        return torch.cat([x for x in found if x is not None])

    def __str__(self) -> str:
        """Return what `influence inspect` prints."""
        return describe(self)

    def __repr__(self) -> str:
        """Return the index in a line."""
        where = "in memory" if self.path is None else f"at {self.path}"
        text = f"<{self.about.kind} of {len(self):,} rows × {self.dim:,} in {self.dtype}, {where}>"
        return visible(text, lines=False)


def open_index(path: str | Path, verify: bool = True) -> Index:
    """Open a finished index; nothing but its root is read.

    Args:
        path: the run directory, or its root.
        verify: whether each dataset's checksum is verified when it is first read.

    Returns:
        The index.

    Raises:
        FileNotFoundError: if there is none, or a shard is gone.
        ValueError: if it was not finished, or a shard is cut off; naming it.
    """
    path = Path(path)
    directory = path.parent if path.name == ROOT else path
    if not (directory / ROOT).exists():
        if (directory / RUN).exists():
            raise ValueError(f"{what_is_there(directory)}. It is not finished: {way_on(directory)}")
        raise FileNotFoundError(f"there is no index at {directory}: it has no {ROOT}")
    about = read_root(directory, run_id(directory))
    for shard in about.shards:
        check_size(directory / shard.file, shard)
    return Index(about, [ShardOnDisk(directory / shard.file, shard, verify) for shard in about.shards], directory)
