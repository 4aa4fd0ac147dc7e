r"""Mixing: one curvature out of two, the queries' and the index's (TrackStar, Chang et al. 2024, appendix A.1.3).

$$H_\text{mix} = w\, H_\text{query} + (1 - w)\, H_\text{index}$$

What all queries have in common says nothing about any of them. Its directions are large in the queries' curvature, so
whitening by a mix that holds some of it plays them down. Both are means per document: the sizes of the data sets do
not enter.
"""

from collections.abc import Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.transform.curvature import Basis, Curvature, decompose
from influence.hessians.factors import Factors


def mix(query: Factors, index: Factors, weight: float | None = None, *, components: int = 1000) -> Factors:
    r"""Mix two dense or diagonal curvatures, block by block.

    Exact: the matrices are rebuilt in float64, added and decomposed again, `O(d³)` per block. Diagonals mix as
    diagonals, a diagonal and a dense one as dense.

    The labels of both must have one source: an empirical Fisher and a Fisher are different quantities in the same
    units, and their sum is neither. Seeds and draws may differ, both estimate the same; the result has the query's.

    Args:
        query: curvature of the queries, as from `autocorrelation.fit`.
        index: curvature of the training documents, under the same transform and at the same parameters.
        weight: `w` in [0, 1]; by default that of `mixing_weight`.
        components: how many components to play down, for the automatic weight.

    Returns:
        The factors. `documents` and `positions` are the sums; a note holds the weight.

    Raises:
        ValueError: if the two are not curvatures of the same rows, are Kronecker products, or the weight is no weight.

    Example:
        >>> import torch
        >>> from influence import as_blocks, hessians
        >>> ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}
        >>> query, index = (
        ...     hessians.autocorrelation.fit(ell, w, [torch.tensor(rows)], transform=as_blocks())
        ...     for rows in ([[2.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 2.0]])
        ... )
        >>> mix(query, index, 0.75).blocks["w"].dense()
        tensor([[3.5000, 0.0000],
                [0.0000, 6.5000]], dtype=torch.float64)
    """
    _check(query, index)
    how = "as given"
    if weight is None:
        spectra = {"query": pooled(query.blocks), "index": pooled(index.blocks)}
        weight = mixing_weight(spectra["query"], spectra["index"], components)
        how = f"automatic, components={components}"
        if weight in (0, 1) and components > 0:
            side = "query" if weight else "index"
            how += f", of which the {side}'s curvature has {int((spectra[side] > 0).sum()):,}"
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], the query's share of the mix; got {weight}")
    names = sorted({factors.method.removeprefix("mixed ") for factors in (query, index)})
    note = (
        f"{weight:.6g} of {query.method} of {query.documents:,} documents (query) and {1 - weight:.6g} of "
        f"{index.method} of {index.documents:,} documents (index); the weight is {how}"
    )
    if weight in (0, 1):
        note += f", and leaves the {'index' if weight else 'query'} out"
    return Factors(
        f"mixed {' and '.join(names)}",
        {name: _mixed(block, index.blocks[name], weight, name) for name, block in query.blocks.items()},
        query.documents + index.documents,
        {name: seen + index.positions[name] for name, seen in query.positions.items() if name in index.positions},
        query.reduction,
        query.labels,
        query.under,
        query.description,
        query.transform if query.transform is not None else index.transform,
        query.weights,
        {**query.notes, **index.notes, "mix": note},
        query.function,
    )


def mixing_weight(
    query_eigenvalues: Float[Tensor, " d"], index_eigenvalues: Float[Tensor, " d"], components: int = 1000
) -> float:
    r"""Return the weight at which the two curvatures meet at the k-th component, `w σ_query[k] = (1 - w) σ_index[k]`.

    $$w = \frac{\sigma_\text{index}[k]}{\sigma_\text{query}[k] + \sigma_\text{index}[k]}, \qquad
    k = \min(\text{components}, d) - 1$$

    with each side's eigenvalues clamped to zero and sorted, largest first. Above the k-th component the queries'
    curvature, which falls faster, then outweighs the index's: about `components` directions are played down as common
    to the queries. With `components ≤ 0` the weight is 1. A query whose rank is below `k` leaves `σ_query[k] = 0`, so
    its weight is 1 as well.

    Where both are zero, any weight would do, and each gives other scores: this is refused.

    Args:
        query_eigenvalues: the eigenvalues of all blocks together.
        index_eigenvalues: the same of the index.
        components: how many components to play down.

    Returns:
        `w`, in [0, 1].

    Raises:
        ValueError: if the numbers of eigenvalues differ, or both sides' k-th is zero.

    Example:
        >>> import torch
        >>> mixing_weight(torch.tensor([5.0, 2.0, 1.0, 0.5]), torch.tensor([9.0, 4.0, 1.0, 0.1]), components=2)
        0.6666666666666666
    """
    if query_eigenvalues.shape != index_eigenvalues.shape or not query_eigenvalues.numel():
        raise ValueError(
            f"both sides need the eigenvalues of the same blocks, at least one; got {query_eigenvalues.numel()} of the "
            f"query and {index_eigenvalues.numel()} of the index"
        )
    if components <= 0:
        return 1.0
    mine, theirs = (
        values.double().clamp_min(0).sort(descending=True).values for values in (query_eigenvalues, index_eigenvalues)
    )
    k = min(components, mine.numel()) - 1
    sigma_query, sigma_index = float(mine[k]), float(theirs[k])
    if sigma_query + sigma_index == 0:
        ranks = [int((values > 0).sum()) for values in (mine, theirs)]
        raise ValueError(
            f"components={components}: the query's curvature has rank {ranks[0]} and the index's {ranks[1]}, so both "
            f"are zero at component {k + 1} of {mine.numel()} and no weight makes them meet there. Lower components to "
            f"at most {min(ranks)}, fit on more documents, or pass weight="
        )
    return sigma_index / (sigma_query + sigma_index)


def pooled(blocks: Mapping[str, Curvature]) -> Float[Tensor, " d"]:
    """Return the eigenvalues of all blocks together, in float64; what is rounding in its block counts as zero.

    A block fitted on fewer documents than it has directions is singular, and its zeros come out as any number below
    rounding: the ratio of two of those would be a weight.
    """
    return torch.cat([_cleaned(curvature) for curvature in blocks.values()])


def _cleaned(curvature: Curvature) -> Float[Tensor, " d"]:
    values = curvature.eigenvalues.flatten()
    rounding = prod(curvature.shape) * torch.finfo(values.dtype).eps * values.max() if values.numel() else 0.0
    return torch.where(values > rounding, values, 0.0).double()


def _mixed(query: Curvature, index: Curvature, weight: float, name: str) -> Curvature:
    """Return the mix of one block, in the wider dtype of the two."""
    mine, theirs = query.bases[0], index.bases[0]
    what = f"block {name!r} (mixed)"
    if mine.vectors is None and theirs.vectors is None:
        basis = decompose(weight * mine.values.double() + (1 - weight) * theirs.values.double(), what)
    else:
        basis = decompose(weight * query.dense() + (1 - weight) * index.dense(), what)
    dtype = torch.promote_types(mine.values.dtype, theirs.values.dtype)
    vectors = None if basis.vectors is None else basis.vectors.to(dtype)
    return Curvature(query.shape, (Basis(vectors, basis.values.to(dtype)),))


def _check(query: Factors, index: Factors) -> None:
    """Refuse what are no curvatures of the same rows.

    Raises:
        ValueError: naming the field and both values.
    """
    for side, factors in (("query", query), ("index", index)):
        apart = [name for name, c in factors.blocks.items() if c.kind in ("kronecker", "corrected")]
        if apart:
            raise ValueError(
                f"the {side}'s {factors.method} has Kronecker factors ({apart[0]!r} is "
                f"{factors.blocks[apart[0]].kind}), and a sum of two Kronecker products is no Kronecker product. Fit "
                "one set of factors on both data sets together, or mix hessians.autocorrelation factors of projected "
                "rows"
            )
    if query.under != index.under:
        raise ValueError(
            f"under: the query's curvature is that of rows under {query.description} (fingerprint "
            f"{query.under[:12]}…), the index's under {index.description} ({index.under[:12]}…). Fit both under one "
            "transform"
        )
    if query.weights != index.weights:
        raise ValueError(
            f"weights: the query's curvature was fitted at other parameters (hash {query.weights[:12]}…) than the "
            f"index's ({index.weights[:12]}…). Fit both on one model"
        )
    query.check_function(index.function)
    if query.reduction != index.reduction:
        raise ValueError(
            f"reduction: the query's loss is {query.reduction!r}, the index's {index.reduction!r}, so they have "
            "different units. Fit both with one reduction"
        )
    if query.labels.source != index.labels.source:
        raise ValueError(
            f"labels: the query's curvature has {query.labels.source!r} labels, the index's {index.labels.source!r}: "
            "a Fisher and an empirical Fisher are different quantities. Fit both with the same labels="
        )
    if query.blocks.keys() != index.blocks.keys():
        only = [
            ", ".join(list(a.blocks.keys() - b.blocks.keys())[:4]) or "none"
            for a, b in ((query, index), (index, query))
        ]
        raise ValueError(
            f"blocks: the query has {len(query.blocks)}, the index {len(index.blocks)}; in the query alone: {only[0]}; "
            f"in the index alone: {only[1]}. Fit both on the same targets"
        )
    for name, curvature in query.blocks.items():
        other = index.blocks[name].shape
        if curvature.shape != other:
            raise ValueError(
                f"shape of block {name!r}: {list(curvature.shape)} in the query, {list(other)} in the index. They are "
                "of different models"
            )
