"""A search by FAISS: its index of a run's rows, and the exact scan where it finds too few."""

from jaxtyping import Float
from torch import Tensor

from influence.func.similarity import Nearest
from influence.index import scan
from influence.index.chosen import Chosen, choose
from influence.index.keeping import neighbours
from influence.index.neighbours import FaissConfig, Neighbours, Stored
from influence.index.reading import Index


def neighbours_of(index: Index, config: FaissConfig) -> Neighbours:
    """Return the FAISS index of all rows, kept under everything that they are: fingerprint, shards and checksums.

    Args:
        index: the rows.
        config: how.

    Returns:
        The FAISS index.
    """
    checksums = [
        [shard.places[name].sha256 for name in ("rows", "scale") if name in shard.places]
        for shard in index.about.shards
    ]
    identity = {"fingerprint": index.fingerprint.json(), "shards": checksums}
    return neighbours(Stored(index.pieces, len(index), choose(index.blocks), identity), config, index.path)


def approximate(
    index: Index,
    made: Neighbours,
    matrix: Float[Tensor, "q d"],
    chosen: Chosen,
    k: int,
    reverse: bool,
    nprobe: int,
) -> Nearest:
    """Return what FAISS finds; queries for which it finds fewer than `k` are answered by the scan.

    Args:
        index: the rows.
        made: their FAISS index.
        matrix: the queries, over the chosen columns.
        chosen: the columns that are looked at.
        k: how many.
        reverse: the smallest scores, smallest first.
        nprobe: cells that are looked into.

    Returns:
        Scores and rows.
    """
    whole = matrix.new_zeros(len(matrix), index.dim)
    at = 0
    for span in chosen.spans:
        whole[:, span] = matrix[:, at : at + span.stop - span.start]
        at += span.stop - span.start
    found = made.search(-whole if reverse else whole, k, nprobe)
    values, indices = (-found.values if reverse else found.values).to(matrix.dtype), found.indices
    lacking = (indices < 0).any(1)
    if lacking.any():
        pieces = index.pieces(scan.rows_at_once(index.dim, len(matrix)))
        exact = scan.scan(pieces, matrix[lacking.to(matrix.device)], chosen, k, reverse)
        values[lacking], indices[lacking] = exact.values.cpu(), exact.indices.cpu()
    return Nearest(values, indices)
