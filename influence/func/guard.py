"""The guard of the batched engine: rows of a batch against a plain backward over a few of its examples."""

import torch

from influence.func.batched import BatchedPlan, batched_rows
from influence.func.batches import batch_size, take
from influence.types import Batch, LossFn, Params, Rows

GUARD_TOLERANCE = {torch.float64: (1e-5, 1e-6), torch.float32: (1e-2, 1e-3)}
"""Largest relative error that the guard lets pass, and the share of the whole gradient below which a block's error is
measured against that share instead; half precision: (0.1, 0.01). Honest float32 models read 1e-7, or 2e-3 under
bfloat16 autocast; wrong plans 0.1."""

CHECKED = 4
"""Examples of a batch whose rows are compared. A wrong plan moves an axis or misses a use, so it is wrong for most
examples; a plain backward over all of them takes longer than the rows did."""


def guard_limit(params: Params) -> float:
    """Return the largest relative error that the guard lets pass."""
    return GUARD_TOLERANCE.get(next(iter(params.values())).dtype, (0.1, 0.01))[0]


def guard(
    plan: BatchedPlan, loss_fn: LossFn, params: Params, batch: Batch, rows: Rows | None = None, seed: int = 0
) -> tuple[float | None, str]:
    r"""Check `Σ_n c_n row_n = ∇ Σ_n c_n ℓ_n` over a few examples `n`, with random weights `c`, by a plain backward.

    The rows are those of the whole batch, the backward is of the few alone. So it catches a misplaced example axis,
    which an unweighted sum over all of them cannot see, and rows which hold anything of another example.

    Args:
        plan: what was executed.
        loss_fn: the loss function.
        params: plain parameters.
        batch: the batch.
        rows: the linear part of its rows `{name: [n, …]}`, if they are at hand.
        seed: which examples are taken, and their weights.

    Returns:
        The largest relative error and the block where it is; `None` and the reason where the examples show nothing.
    """
    n = batch_size(batch)
    if rows is None:
        rows, _ = batched_rows(plan, loss_fn, params, batch)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=generator)[:CHECKED].sort().values
    weights = torch.rand(len(chosen), generator=generator, dtype=torch.float64) + 0.5
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = loss_fn(leaves, batch if len(chosen) == n else take(batch, chosen))
        total = (losses * weights.to(losses)).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    plain = {
        name: (torch.zeros_like(p) if g is None else g)[None]
        for (name, p), g in zip(params.items(), found, strict=True)
    }
    got = {name: torch.tensordot(weights.to(row), row[chosen], 1)[None] for name, row in rows.items()}
    return compare_rows(got, plan.folded.linear_rows(plain), next(iter(params.values())).dtype)


def compare_rows(got: Rows, expected: Rows, dtype: torch.dtype) -> tuple[float | None, str]:
    """Return the largest relative error between two sets of rows, and where it is; or why there is none."""
    floor = GUARD_TOLERANCE.get(dtype, (0.1, 0.01))[1]
    finite = all(bool(torch.isfinite(row).all()) for row in expected.values())
    if not finite:
        return None, "the gradient of the batch is not finite"
    whole = sum(float(row.double().square().sum()) for row in expected.values()) ** 0.5
    if whole == 0 and not any(bool(row.any()) for row in got.values()):
        return None, "the gradient of the batch is zero"
    worst, where = 0.0, ""
    for name, row in expected.items():
        scale = max(float(row.double().norm()), floor * whole)
        error = float((got[name].double() - row.double()).norm())
        relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
        if not relative <= worst:
            worst, where = relative, name
    return worst, where
