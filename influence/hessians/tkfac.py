r"""TKFAC: Kronecker factors with the right trace (Gao et al. 2021), in their per-example form.

$$H \approx \delta\, S^* \otimes A^*, \quad A^* = \mathbb{E}[\operatorname{tr}(S_n)\, A_n] / \delta, \quad
S^* = \mathbb{E}[\operatorname{tr}(A_n)\, S_n] / \delta,$$
$$\delta = \mathbb{E}[\operatorname{tr} A_n \operatorname{tr} S_n]$$

with `A_n = Σ_s ã ã^T` and `S_n = Σ_s g g^T` of one example, so that nothing depends on how examples are batched. With
one position per example the trace is exactly that of the Fisher. With more (a convolution's groups count too) it counts
every pair of positions, so it is about as many times too large as there are: relative damping does not see that,
absolute damping does.
"""

from collections.abc import Iterable, Sequence
from functools import partial, reduce

import torch

from influence.func.engine.sums import BlockSums, Pair, add_grams
from influence.func.transform.chain import Transform
from influence.hessians.factors import Factors
from influence.hessians.fitting import fit as fit_method
from influence.hessians.kfac import gather
from influence.hessians.kronecker import MAX_SIDE, kronecker_factors, kronecker_method
from influence.hessians.method import About, Method, Sums
from influence.types import Batch, LossFn, Params


def build(max_side: int = MAX_SIDE) -> Method:
    """Return TKFAC as a value, for `hessians.fit`.

    Args:
        max_side: a side of a block with more entries is kept as a diagonal.

    Returns:
        The method.
    """
    return kronecker_method("tkfac", max_side, partial(gather, "tkfac", _together, max_side), _assemble)


def fit(
    loss_fn: LossFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    transform: Transform | None = None,
    labels: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    max_side: int = MAX_SIDE,
    progress: bool = True,
) -> Factors:
    """Fit trace-corrected Kronecker factors in one pass. Arguments, cost and coverage as in `kfac.fit`.

    Args:
        loss_fn: a loss function.
        params: the parameters.
        batches: batches, seen once.
        transform: a separable transform.
        labels: `"sampled"`, `"data"` or `"exact"`.
        seed: of the sampled labels.
        draws: labels per position.
        max_side: a side of more entries is kept as a diagonal.
        progress: show a progress bar where there is a terminal.

    Returns:
        The factors.

    Example:
        >>> import torch
        >>> from influence import functionalize, hessians
        >>> loss_fn, params = functionalize(torch.nn.Linear(2, 1, bias=False), loss="squared_error")
        >>> batch = {"input": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "labels": torch.zeros(2, 1)}
        >>> round(hessians.tkfac.fit(loss_fn, params, [batch], labels="exact").trace, 5)
        10.0
    """
    return fit_method(
        loss_fn,
        params,
        batches,
        build(max_side),
        transform=transform,
        labels=labels,
        seed=seed,
        draws=draws,
        progress=progress,
    )


def _together(pairs: Sequence[Pair]) -> BlockSums:
    """Sum `tr(S_n) A_n`, `tr(A_n) S_n` and `tr A_n tr S_n` over all uses of one block."""
    lefts, rights = (torch.stack([side.energy() for side in sides]).sum(0) for sides in zip(*pairs, strict=True))
    return {
        "left": reduce(add_grams, [pair.left.gram(rights) for pair in pairs]),
        "right": reduce(add_grams, [pair.right.gram(lefts) for pair in pairs]),
        "traces": (lefts * rights).sum(),
    }


def _assemble(about: About, sums: Sums) -> Factors:
    """Turn sums into factors; the scale `δ` goes to the left side."""
    return kronecker_factors(about, sums, lambda name: sums.blocks[name]["traces"])
