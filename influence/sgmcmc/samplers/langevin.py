r"""What samplers share, one leaf formula each: noise, drift, integrator, restriction, box.

With `ε` the step size, `G` a diagonal metric and `η` standard normals, Langevin's discretised step is

$$w' = w - \tfrac{ε}{2}\,G\,\bigl(nβ\,g + γ(w - w^*) + λ w\bigr) + \sqrt{ε G}\;η$$
"""

import hashlib
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from influence.func.loss.losses import widen
from influence.sgmcmc.samplers.target import Hyper, Setting, Target, check_range
from influence.types import Batch, Params

Leaf: TypeAlias = Float[Tensor, "*shape"]


class Info(NamedTuple):
    """What a step says beside its state.

    Attributes:
        loss: mean loss of the batch before the step.
        terms: what was asked for or comes for free: metrics, acceptance, temperature.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Tensor]


class Init(Protocol):
    """Makes a chain's first state."""

    def __call__(self, params: Params, noise: Any, group: int = 0) -> Any:
        """Return the state at the given parameters, with a group's hyper-parameters."""
        ...


class Sampler(NamedTuple):
    """A sampler: three pure functions.

    Attributes:
        target: what it draws from.
        init: `(params, noise, group=0) -> state`; a state is a NamedTuple with a field `params`.
        step: `(state, batch, noise) -> (state, info)`; of one chain, under `vmap`, or of states stacked by hand, which
            is faster: then only the gradient is vmapped.
        noise: `(key, chain, step) -> noise`: what `init` (at step 0) and `step` take.
    """

    target: Target
    init: Init
    step: Callable[[Any, Batch, Any], tuple[Any, Info]]
    noise: Callable[[int, int, int], Any]


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


def gaussian_noise(target: Target) -> Callable[[int, int, int], Params]:
    """Return the noise of a sampler that needs a standard normal per parameter."""

    def noise(key: int, chain: int, step: int) -> Params:
        return normals(target.anchor, generator(key, chain, step))

    return noise


def start(target: Target, params: Params, noise: Params, setting: Setting) -> Params:
    """Return where a chain starts: the given parameters that move, in at least float32, and the target's noise.

    Raises:
        ValueError: if a parameter is missing.
    """
    missing = [name for name in target.anchor if name not in params]
    if missing:
        raise ValueError(f"params lack {missing[:3]}, which the target moves; pass what local_posterior was given")
    there = masters({name: params[name] for name in target.anchor})
    if not target.init_noise:
        return there
    return {name: restrict(w + target.init_noise * noise[name], w, setting.mask.get(name)) for name, w in there.items()}


def fit(x: Tensor, w: Tensor) -> Tensor:
    """Return a scalar, or one per chain, in a leaf's dtype and with axes of length one where the leaf has its own.

    Without this, a parameter of one number would be promoted to float64 by its step size.
    """
    return x.to(w.dtype).reshape(x.shape + (1,) * (w.ndim - x.ndim)) if x.ndim else x.to(w.dtype)


def fitted(setting: Setting, params: Params) -> dict[tuple[torch.dtype, int], Setting]:
    """Return a setting's scalars as they fit leaves, by dtype and rank."""
    like = {(p.dtype, p.ndim): p for p in params.values()}
    return {
        key: setting._replace(
            lr=fit(setting.lr, w),
            n_beta=fit(setting.n_beta, w),
            localization=fit(setting.localization, w),
            weight_decay=fit(setting.weight_decay, w),
            own={name: fit(x, w) for name, x in setting.own.items()},
        )
        for key, w in like.items()
    }


def per_chain(x: Tensor, setting: Setting) -> Shaped[Tensor, "*c"]:
    """Return the sum of a leaf's entries, for each chain by itself where chains are stacked."""
    return x.reshape(*setting.lr.shape, -1).sum(-1)


def drift(w: Leaf, g: Leaf, anchor: Tensor, s: Setting, prior: tuple[bool, bool] = (True, True)) -> Leaf:
    r"""Return the gradient of the target's potential, `nβ g + γ (w - w^*) + λ w`.

    Args:
        w: parameter.
        g: gradient of the mean loss.
        anchor: `w^*`.
        s: scalars that fit the parameter.
        prior: whether localization and weight decay are there at all.
    """
    d = s.n_beta * g
    if prior[0]:
        d = d + s.localization * (w - anchor)
    return d + s.weight_decay * w if prior[1] else d


def has_prior(target: Target) -> tuple[bool, bool]:
    """Return whether any chain has localization, and whether any has weight decay."""
    return bool(torch.as_tensor(target.localization).any()), bool(torch.as_tensor(target.weight_decay).any())


def langevin(w: Leaf, d: Leaf, noise: Leaf, lr: Tensor, metric: Leaf | None = None) -> Leaf:
    r"""Return `w - (ε/2) G d + √(ε G) η`, the Euler-Maruyama step."""
    if metric is None:
        return w - lr / 2 * d + lr.sqrt() * noise
    return w - lr / 2 * (metric * d) + lr.sqrt() * (metric.sqrt() * noise)


def restrict(new: Leaf, old: Leaf, mask: Bool[Tensor, "..."] | None) -> Leaf:
    """Return the new entries where the mask lets them move, and the old bits elsewhere."""
    return new if mask is None else torch.where(mask, new, old)


def box(w: Leaf, anchor: Tensor, size: float | None) -> Leaf:
    """Return a parameter clamped to the anchor ± size; last, after the noise."""
    if size is None:
        return w
    middle = widen(anchor)  # in bfloat16 most boxes would be rounded to nothing
    return torch.clamp(w, middle - size, middle + size)


def check_step(lr: Hyper, bounding_box: float | None) -> None:
    """Refuse a step size or a box that is out of range.

    Raises:
        ValueError: naming it.
    """
    check_range("lr", lr, 0, above=True)
    if bounding_box is not None:
        check_range("bounding_box", bounding_box, 0, above=True)


def moving(params: Params, setting: Setting) -> Tensor | int:
    """Return how many entries of a chain move."""
    chains = setting.lr.numel()
    return sum(
        per_chain(setting.mask[name], setting) if name in setting.mask else p.numel() // chains
        for name, p in params.items()
    )
