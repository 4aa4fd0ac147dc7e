"""Chains as an axis: states stacked, stepped by one `vmap`, in chunks or one by one, with the same result for each."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from influence.func.engine.attention import under_vmap
from influence.sgmcmc.samplers.langevin import Info, Sampler
from influence.sgmcmc.samplers.target import PerChain, Target, position_losses
from influence.types import Batch, Params

WORK = 1 << 25
"""Weights times positions of a batch up to which a CPU steps chains together: above, batched matrix products are slower
than plain ones, by more than is saved on small operations."""
MEMORY = 1 << 28
"""Weights that are stacked at most."""


class Replica(NamedTuple):
    """One chain of one group (of hyper-parameters, or of a restriction)."""

    group: int
    chain: int


class Chunk(NamedTuple):
    """Chains that are stepped together.

    Attributes:
        replicas: which they are.
        at: where they lie among all.
        stacked: whether their states have a chain axis.
    """

    replicas: tuple[Replica, ...]
    at: slice
    stacked: bool


def cut(replicas: Sequence[Replica], size: int) -> list[Chunk]:
    """Return replicas in chunks; one alone has no chain axis.

    Example:
        >>> [chunk.at for chunk in cut([Replica(0, c) for c in range(5)], 2)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    parts = [tuple(replicas[i : i + size]) for i in range(0, len(replicas), size)]
    return [Chunk(part, slice(i * size, i * size + len(part)), size > 1) for i, part in enumerate(parts)]


def size_of(moving: int, batch: Batch, chains: int, on_cpu: bool) -> int:
    """Return how many chains of `moving` weights are stepped together by default: a function of shapes alone."""
    leaves = [x for x in tree_flatten(batch)[0] if isinstance(x, Tensor) and x.ndim]
    positions = max((x.numel() if not x.is_floating_point() else x.shape[0] for x in leaves), default=1)
    if on_cpu and moving * positions > WORK:
        return 1
    return max(1, min(chains, MEMORY // max(moving, 1)))


def stack(trees: Sequence[Any]) -> Any:
    """Return trees of tensors as one with a leading axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def first_state(sampler: Sampler, params: Params, chunk: Chunk, seed: int) -> Any:
    """Return a chunk's first state."""
    states = [sampler.init(params, sampler.noise(seed, r.chain, 0), r.group) for r in chunk.replicas]
    return stack(states) if chunk.stacked else states[0]


def noise_of(sampler: Sampler, chunk: Chunk, seed: int, step: int) -> Any:
    """Return a chunk's noise at a step, counted from 1: a function of (seed, chain, step) alone."""
    drawn = {chain: sampler.noise(seed, chain, step) for chain in {r.chain for r in chunk.replicas}}
    each = [drawn[r.chain] for r in chunk.replicas]
    return stack(each) if chunk.stacked else each[0]


def step(sampler: Sampler, chunk: Chunk, state: Any, batches: Sequence[Batch], noise: Any) -> tuple[Any, Info]:
    """Step a chunk on one batch that all chains share, or one each; what it says has a chain axis."""
    batch = batches[0] if len(batches) == 1 else PerChain(together(batches))
    state, info = sampler.step(state, batch, noise)
    return state, info if chunk.stacked else tree_map(lambda x: x[None], info)


def together(batches: Sequence[Batch]) -> Batch:
    """Return batches of several chains as one, with a chain axis; refuse batches of different shapes."""
    flat = [tree_flatten(batch) for batch in batches]
    stacked = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        shapes = {tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves}
        if len(shapes) > 1:
            raise ValueError(
                f"the chains' batches have different shapes {sorted(shapes)} and cannot be stacked: pad the dataset to "
                "one length, or pass shared_batches=True or chain_chunk=1"
            )
        stacked.append(torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0])
    return tree_unflatten(stacked, flat[0][1])


def losses_along(target: Target, chunk: Chunk, params: Params, batch: Batch) -> Float[Tensor, "c n t"]:
    """Return the losses of every position of a batch, for each chain of a chunk."""
    if not chunk.stacked:
        with torch.no_grad():
            return _losses(target, params, batch)[None]
    with torch.no_grad(), under_vmap():
        return torch.vmap(partial(_losses, target), in_dims=(0, None))(params, batch)


def _losses(target: Target, params: Params, batch: Batch) -> Float[Tensor, "n t"]:
    cast = {name: p.to(target.anchor[name].dtype) for name, p in params.items()}
    return position_losses(target.loss_fn, {**target.frozen, **cast}, batch)[0]


def refuses_vmap(sampler: Sampler, chunk: Chunk, state: Any, batches: Sequence[Batch], seed: int) -> str | None:
    """Try a step of stacked chains; return why it cannot be, or `None`."""
    try:
        step(sampler, chunk, state, batches, noise_of(sampler, chunk, seed, 1))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # the plan prints it and steps one by one, where what is no matter of vmap is raised again
        return str(error).strip().splitlines()[0][:200]
    return None
