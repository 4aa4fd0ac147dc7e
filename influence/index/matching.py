"""Queries and stored rows: whether they belong together, and at which dim they meet."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.transform.chain import CollectedRows
from influence.func.transform.nested import at_dim, down_project, projection, raise_project, unprojected
from influence.func.transform.project import project
from influence.index.columns import Chosen
from influence.index.provenance import Fingerprint, check, fingerprint_of
from influence.types import Rows


def matched(
    query: Rows,
    stored: Fingerprint,
    chosen: Chosen,
    fingerprint: Fingerprint | None = None,
    unchecked: bool = False,
    force: bool = False,
) -> Rows:
    """Return a query's rows as the stored ones want them, having checked that they belong together.

    Where both are projected by sketches that nest, they meet at the smaller dim: rows of a larger one are read at the
    stored dim, and rows of a smaller one are raised to it, which is the same product.

    Args:
        query: the query's rows.
        stored: what the stored rows are.
        chosen: the blocks that are looked at.
        fingerprint: what the query's rows are; rows from `per_example_grads` know all but the weights.
        unchecked: take the weights on trust, and rows that do not even know their transform as they are.
        force: warn where they do not belong together, instead of refusing.

    Returns:
        The rows.

    Raises:
        FingerprintError: if they do not belong together, naming the field and both values.
        ValueError: if the query's rows do not say of which weights they are.
    """
    if unchecked and not isinstance(query, CollectedRows):
        return query
    if isinstance(query, CollectedRows):
        step = projection(query.transform)
        if step is not None and stored.dim is not None and step.settings["dim"] > stored.dim:
            made = at_dim(query.transform, stored.dim)
            query = CollectedRows(down_project(query, stored.dim), made, query.layout)
            shapes = {name: tuple(row.shape[1:]) for name, row in query.items()}
            fingerprint = None if fingerprint is None else fingerprint.at_dim(stored.dim, shapes)
        if fingerprint is None and unchecked:
            shapes = {name: tuple(row.shape[1:]) for name, row in query.items()}  # and weights on trust
            weights = stored.weights or ""
            fingerprint = fingerprint_of(None, None, query.transform, shapes, weights, layout=query.layout)
    if fingerprint is None:
        missing = "of which weights they are" if isinstance(query, CollectedRows) else "how they were made"
        raise ValueError(
            f"the query rows do not say {missing}: pass fingerprint=provenance(loss_fn, params, rows), or ask by "
            "trace(), or pass unchecked=True if you are sure that they belong to this index"
        )
    lower = check(_restricted(fingerprint, chosen), _restricted(stored, chosen), force)
    if lower is None or stored.dim is None:
        return query
    known = stored.recorded.get("unprojected")
    if known is None and isinstance(query, CollectedRows):
        known = unprojected(query.transform, query.layout)
    if known is None:
        raise ValueError(
            f"rows of dim {lower} can be compared with the stored ones of dim {stored.dim} only if they know their "
            "layout: pass them as per_example_grads returns them"
        )
    assert fingerprint.sketch is not None
    step = project(**fingerprint.sketch.settings).steps[0]
    shapes = {name: tuple(known[name]) for name in chosen.names}
    return raise_project({name: query[name] for name in chosen.names}, stored.dim, step, shapes)


def query_matrix(rows: Rows, chosen: Chosen) -> Float[Tensor, "q d"]:
    """Return the chosen columns of a query's rows.

    Raises:
        ValueError: if there is no row, or one that is not finite.
    """
    matrix = chosen.matrix(rows).detach()
    if not len(matrix):
        raise ValueError("the query is empty: it has no row")
    bad = (~torch.isfinite(matrix)).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} of {len(matrix)} query rows are not finite, the first of them row {bad[0]}")
    return matrix


def _restricted(fingerprint: Fingerprint, chosen: Chosen) -> Fingerprint:
    """Return the fingerprint of some blocks of rows; a norm is over all blocks, so of rows that have one all count."""
    if fingerprint.cosine:
        return fingerprint
    return replace(fingerprint, shapes={n: shape for n, shape in fingerprint.shapes.items() if n in chosen.shapes})
