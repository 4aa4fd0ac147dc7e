"""Query rows of finished runs, and their scores with the rows of a pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.fingerprint import fingerprint as hash_of
from influence.func.loss.losses import widen
from influence.func.transform.folding import vectors
from influence.index import Fingerprint, open_index
from influence.index.attributor import rows_for
from influence.index.columns import choose
from influence.pipelines.frame.prepare import check_gradients
from influence.pipelines.passes.pass_steps import Seen
from influence.types import Rows


class Queries(NamedTuple):
    """The query rows of one run.

    Attributes:
        name: the run.
        rows: its rows, decoded.
    """

    name: str
    rows: Rows

    @property
    def number(self) -> int:
        """How many there are."""
        return len(next(iter(self.rows.values())))


def load_queries(
    paths: Sequence[str],
    fingerprint: Fingerprint,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Sequence[str] = (),
    force: bool = False,
) -> list[Queries]:
    """Return the rows of query runs, checked against the rows that they will meet.

    Args:
        paths: the runs.
        fingerprint: of the corpus's rows.
        shapes: of the corpus's rows.
        blocks: the blocks to take, names or globs; all by default.
        force: warn where fingerprints refuse.

    Returns:
        The queries.

    Raises:
        ValueError: if there is none, or one does not belong to these rows, naming the field and both values.
    """
    if not paths:
        raise ValueError("no query: pass --query RUN, a run of influence build or reduce")
    found, chosen = [], choose(shapes, list(blocks) or None)
    for path in paths:
        index = open_index(path)
        check_gradients(index)
        rows = rows_for(index, fingerprint, chosen, force)
        found.append(Queries(path, rows))
    return found


def contents(path: str) -> dict[str, Any]:
    """Return what a query run's rows are, and a hash of them: a run that is resumed must meet the same."""
    index = open_index(path)
    sums = [
        shard.places[name].sha256 for shard in index.about.shards for name in ("rows", "scale") if name in shard.places
    ]
    fields = index.fingerprint.json()
    fields["recorded"].pop("trial", None)  # examples, which the hash of the rows stands for
    return {"rows": hash_of(sums), **fields}


def scores_of(rows: Rows, queries: Queries) -> Float[Tensor, "b n q"]:
    """Return every block's inner products of rows with a run's queries, in at least float32."""
    parts = []
    for name, theirs in queries.rows.items():
        mine, wanted = widen(vectors(rows[name])), widen(vectors(theirs))
        dtype = torch.promote_types(mine.dtype, wanted.dtype)
        parts.append(mine.to(dtype) @ wanted.to(mine.device, dtype).mT)
    return torch.stack(parts)


class Scored(NamedTuple):
    """The scores of a batch.

    Attributes:
        columns: `{name: [n, q]}`: a run's scores under its number, and where asked for each block's part of them.
        seen: what else was seen.
    """

    columns: Rows
    seen: Seen


def scored(seen: Seen, queries: Sequence[Queries], mode: str, per_block: bool) -> Scored:
    """Return the scores of a batch's rows."""
    columns: Rows = {}
    for number, run in enumerate(queries):
        parts = scores_of(seen.collected.rows, run)
        whole = parts.sum(0)
        chosen = whole.argmax(1, keepdim=True) if mode == "nearest" else None
        columns[column(number)] = whole if chosen is None else whole.gather(1, chosen)
        if per_block:
            for name, part in zip(run.rows, parts, strict=True):
                columns[column(number, name)] = part if chosen is None else part.gather(1, chosen)
    return Scored(columns, seen)


def column(number: int, block: str | None = None) -> str:
    """Return the name under which the scores of a query run are stored."""
    return f"query{number}" if block is None else f"query{number}/{block}"
