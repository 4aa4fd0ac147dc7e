"""Batches as pytrees: how many examples, cut into pieces, checked."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from influence.types import Batch


def batch_size(batch: Batch) -> int:
    """Return the number of examples of a batch.

    Args:
        batch: a pytree of tensors with the example axis first.

    Returns:
        The common length of that axis.

    Raises:
        ValueError: if there is no tensor, no example, or the tensors disagree.
    """
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(batch)[0] if isinstance(leaf, Tensor)]
    if not leaves and isinstance(batch, Mapping) and not isinstance(batch, dict):
        raise ValueError(f"a {type(batch).__name__} cannot be cut into examples; pass dict(batch)")
    if not leaves:
        raise ValueError("the batch holds no tensor; expected a pytree of tensors with the example axis first")
    sizes = {name: leaf.shape[0] if leaf.ndim else None for name, leaf in leaves}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        listed = ", ".join(f"batch{name}: {list(leaf.shape)}" for name, leaf in leaves)
        raise ValueError(
            f"every tensor of a batch has the example axis first, of one length; got {listed}. "
            "Close over what is the same for all examples instead of putting it in the batch"
        )
    if not leaves[0][1].shape[0]:
        raise ValueError("the batch holds no example: its tensors have length 0")
    return int(leaves[0][1].shape[0])


def take(batch: Batch, index: Tensor | slice) -> Batch:
    """Return the chosen examples of a batch."""
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, batch)


def chunks(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Yield a batch in pieces of at most `size` examples."""
    n = batch_size(batch)
    if size is None or size >= n:
        yield batch
        return
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {size}")
    for begin in range(0, n, size):
        yield take(batch, slice(begin, begin + size))


def sample(batch: Batch, count: int) -> Batch:
    """Return `count` examples of a batch; where it has fewer, others made by rolling along the second axis."""
    n = batch_size(batch)

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = [leaf[i % n] if i < n or leaf.ndim < 2 else leaf[i % n].roll(i // n, 0) for i in range(count)]
        return torch.stack(rows)

    return tree_map(pick, batch)


def split_leaves(batch: Batch) -> tuple[list[Tensor], Any]:
    """Return the tensors of a batch and a function that puts tensors in their place."""
    leaves, spec = tree_flatten(batch)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: list[Tensor]) -> Batch:
        filled = list(leaves)
        for i, tensor in zip(at, tensors, strict=True):
            filled[i] = tensor
        return tree_unflatten(filled, spec)

    return [leaves[i] for i in at], rebuild
