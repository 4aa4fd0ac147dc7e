r"""Preconditioning: inverse powers of a curvature as transforms of rows.

`precondition` applies `H^r` block by block. Where the power separates, as K-FAC's `factored` inversion does at every
`r`, it folds into the probe, `L G R^T` with `L = S_c^r`, `R = A_c^r`. Elsewhere it maps the block's own gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from influence.func.transform.chain import BLOCKS_AT_HAND, Step, Transform
from influence.func.transform.curvature import Curvature, Weights, check_inversion, inverse_weights
from influence.func.transform.folding import Block, Folded, block_with_sides, with_rows


@runtime_checkable
class BlockCurvature(Protocol):
    """What a fit of `hessians` returns, as far as a transform needs it."""

    @property
    def method(self) -> str:
        """How it was fitted."""
        ...

    @property
    def blocks(self) -> Mapping[str, Curvature]:
        """The curvature of each block."""
        ...

    @property
    def under(self) -> str:
        """Fingerprint of the transform whose rows these are the curvature of."""
        ...

    @property
    def description(self) -> str:
        """That transform, as it was written."""
        ...

    @property
    def transform(self) -> Transform | None:
        """That transform, if it is at hand."""
        ...

    @property
    def digest(self) -> str:
        """A hash of every number."""
        ...


def precondition(
    factors: BlockCurvature,
    power: float = -1.0,
    damping: float = 0.1,
    inversion: str = "damped",
    missing: str = "error",
) -> Transform:
    r"""Apply an inverse power of the curvature to every block, `vec(G) ← H^r vec(G)`.

    With `λ` the eigenvalues and `c` the damping the multiplier is `1/(λ + c λ̄)` for `"damped"`, `1/(λ + c)` for
    `"absolute"`, `λ/(λ² + (cλ̄)²)` for `"tikhonov"`, `1/λ` where `λ > cλ̄` for `"pseudoinverse"`, and the separable
    `1/((λ_S + √δ/π)(λ_A + π√δ))`, `δ = cλ̄`, for `"factored"`, all to the power `-r`. The separable one folds into the
    probe; the others cost two rotations of a whole gradient, `4 o i (o + i)` FLOPs per example and block.

    Curvature is bound to rows, not to weights: factors of one checkpoint may precondition the rows of another, as a sum
    over checkpoints wants.

    Args:
        factors: what a fit returned.
        power: `r` in [-1, 0].
        damping: `c ≥ 0`, relative to the block's mean eigenvalue (`"absolute"`: as it is).
        inversion: how small eigenvalues are met.
        missing: what to do with blocks without curvature, those that the factors do not have and those that no gradient
            reached: `"error"`, or `"identity"`, which lets them through as they are. A block whose curvature is
            rounding beside the others' always goes through: its gradients cancel, as those of a key's bias do under
            softmax, and an inverse would make their rounding as large as everything else.

    Returns:
        The transform; rows must have come through the transform which the factors were fitted under.

    Raises:
        ValueError: if an option is out of range, or (when bound) blocks have no curvature or other rows.

    Example:
        >>> import torch
        >>> from influence import as_blocks, hessians, per_example_grads, precondition, chain
        >>> ell, w, x = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}, torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> factors = hessians.autocorrelation.fit(ell, w, [x], transform=as_blocks())
        >>> inverse = chain(as_blocks(), precondition(factors, damping=0.0))
        >>> per_example_grads(ell, w, x, transform=inverse)["w"]
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    check_inversion(power, damping, inversion)
    if missing not in ("error", "identity"):
        raise ValueError(f"missing must be 'error' or 'identity'; got {missing!r}")
    made: dict[str, Weights] = {}

    def weights(name: str) -> Weights:
        if name not in made:
            made[name] = inverse_weights(factors.blocks[name], power, damping, inversion, f"block {name!r}")
        return made[name]

    def extend(folded: Folded) -> Folded:
        covered = coherent(factors, folded, missing, inversion)
        for name in covered:
            weights(name)
        if folded.finish:
            maps = {name: Powered(factors.blocks[name], weights(name).grid) for name in covered}
            return with_rows(folded, lambda rows: {n: maps[n](row) if n in maps else row for n, row in rows.items()})
        return replace(folded, blocks=tuple(_power(block, covered) for block in folded.blocks))

    def _power(block: Block, covered: frozenset[str]) -> Block:
        if block.into not in covered:
            return block
        curvature, mine = factors.blocks[block.into], weights(block.into)
        if mine.sides is None or len(curvature.bases) != len(curvature.shape):
            return replace(block, linear=(*block.linear, Powered(curvature, mine.grid)))
        sides = tuple(_matrix(b.vectors, w) for b, w in zip(curvature.bases, mine.sides, strict=True))
        return block_with_sides(block, sides[0], sides[1] if len(sides) == 2 else None)

    settings = {
        "factors": f"{factors.method}:{factors.digest[:16]}",
        "power": float(power),
        "damping": float(damping),
        "inversion": inversion,
        "missing": missing,
    }
    return Transform((Step("precondition", settings, extend, kind="curvature", sides="power", needs_blocks=True),))


def coherent(factors: BlockCurvature, folded: Folded, missing: str, inversion: str) -> frozenset[str]:
    """Return the rows that have curvature, having checked that it is theirs.

    Raises:
        ValueError: if the rows came through another transform, are of other shapes, or have no curvature.
    """
    if folded.made != (BLOCKS_AT_HAND,) and Transform(folded.made).fingerprint != factors.under:
        steps = ", ".join(map(repr, folded.made))
        raise ValueError(
            f"the factors were fitted under {factors.description}; these rows come from chain({steps}). Curvature "
            "belongs to the rows it was fitted on: fit it under this chain, or precondition where it was fitted"
        )
    shapes = folded.row_shapes
    absent = [name for name in shapes if name not in factors.blocks]
    if absent and (missing == "error" or len(absent) == len(shapes)):
        raise ValueError(
            f"{len(absent)} of {len(shapes)} blocks have no curvature in these factors ({', '.join(absent[:5])}); they "
            f"have {', '.join(list(factors.blocks)[:5])}…. Are they another model's? Otherwise fit these blocks too, "
            "leave them out (exclude=…), or pass missing='identity'"
        )
    for name, shape in shapes.items():
        if name in factors.blocks and factors.blocks[name].shape != shape:
            raise ValueError(
                f"block {name!r} has rows of shape {list(shape)}, and the factors' are of "
                f"{list(factors.blocks[name].shape)}: they are another model's, or the bias was in one alone"
            )
    dead = frozenset() if inversion == "absolute" else without_curvature(factors)
    unreached = [name for name in shapes if name in dead and factors.blocks[name].mean == 0]
    if unreached and missing == "error":
        raise ValueError(
            f"the curvature of {len(unreached)} blocks is zero ({', '.join(unreached[:5])}): no gradient reached them, "
            "and there is nothing to invert. Leave them out of the targets (exclude=…), use inversion='absolute', or "
            "pass missing='identity'"
        )
    return frozenset(shapes) - frozenset(absent) - dead


def fitted_under(factors: BlockCurvature, transform: Transform | None) -> Transform:
    """Return the transform which factors were fitted under.

    Raises:
        ValueError: if it is neither at hand nor given, or another is given.
    """
    chosen = transform if transform is not None else factors.transform
    if chosen is None:
        raise ValueError(
            f"these factors were loaded from a file, and their transform {factors.description} cannot be restored from "
            "it: pass transform="
        )
    if chosen.fingerprint != factors.under:
        raise ValueError(f"these factors were fitted under {factors.description}; got transform={chosen}")
    return chosen


def without_curvature(factors: BlockCurvature) -> frozenset[str]:
    """Return the blocks whose curvature is zero, or the square of rounding beside the largest: a key's bias, say."""
    means = {name: c.mean for name, c in factors.blocks.items()}
    largest = max(means.values(), default=0.0)
    rounding = {name: torch.finfo(c.bases[0].values.dtype).eps for name, c in factors.blocks.items()}
    return frozenset(name for name, mean in means.items() if mean <= rounding[name] ** 2 * largest)


def _matrix(vectors: Tensor | None, weights: Float[Tensor, " d"]) -> Shaped[Tensor, "d *d"]:
    """Return `Q diag(w) Q^T`, or the diagonal, in float64."""
    if vectors is None:
        return weights.double()
    q = vectors.double()
    return (q * weights.double()) @ q.mT


@dataclass(frozen=True)
class Powered:
    """A power of a block's curvature, as a map of its rows."""

    curvature: Curvature
    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Powered":
        """Return the map where rows are, in at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return Powered(self.curvature.to(device, wide), self.weights.to(device, wide))

    def __call__(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Apply it."""
        return self.curvature.apply(rows, self.weights)
