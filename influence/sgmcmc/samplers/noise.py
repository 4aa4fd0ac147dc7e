"""Noise as an argument: normals of (seed, chain, step), drawn on the CPU, the same whatever runs beside them."""

import hashlib
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from influence.func.loss.losses import widen
from influence.types import Params


def generator(seed: int, *counters: int | str) -> torch.Generator:
    """Return a CPU generator keyed by a seed and counters.

    Torch's engine reads 32 bits of its seed, so two of 10⁵ steps may share a key: by chance, and then only those two.

    Example:
        >>> import torch
        >>> draw = lambda *key: torch.randn(2, generator=generator(*key))
        >>> bool((draw(0, 1, 2) == draw(0, 1, 2)).all()), bool((draw(0, 1, 2) == draw(0, 2, 1)).any())
        (True, False)
    """
    digest = hashlib.blake2b(repr((seed, *counters)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normals(like: Mapping[str, Tensor], source: torch.Generator) -> Params:
    """Return standard normals shaped like some tensors, in at least float32: one draw, cut into views.

    Args:
        like: tensors whose shapes, dtypes and device count.
        source: where the numbers come from; it is advanced.

    Returns:
        The noise, by name.
    """
    drawn: Params = {}
    for dtype in (torch.float32, torch.float64):
        names = [name for name, x in like.items() if (x.dtype == torch.float64) == (dtype == torch.float64)]
        if not names:
            continue
        sizes = [prod(like[name].shape) for name in names]
        flat = torch.randn(sum(sizes), generator=source, dtype=dtype).to(like[names[0]].device)
        parts = zip(names, flat.split(sizes), strict=True)
        drawn.update({name: part.view(like[name].shape) for name, part in parts})
    return {name: drawn[name] for name in like}


def masters(params: Mapping[str, Tensor]) -> Params:
    """Return a copy of parameters in at least float32, in which small steps are not rounded away."""
    return {name: widen(p.detach()).clone() for name, p in params.items()}
