"""The regularisation that trained parameters imply: weight decay, or the ridge that early stopping amounts to."""

from collections.abc import Iterable

import torch

from influence.func.batches import batch_size
from influence.types import Batch, LossFn, Params


def implied_regularization(
    loss_fn: LossFn, params: Params, batches: Iterable[Batch], start: Params | None = None
) -> float:
    r"""Return the weight decay under which these parameters would be stationary.

    $$α = -\frac{\langle \bar g,\, θ - θ_0 \rangle}{\|θ - θ_0\|^2}, \qquad
    \bar g = \frac1N \sum_n \nabla \ell_n(θ)$$

    the least-squares solution of `ḡ + α (θ - θ_0) = 0`, which holds with the true `α` at a minimum of
    `(1/N) Σ ℓ_n + (α/2) ‖θ - θ_0‖²`. Without weight decay, a gradient flow stopped after time `t` has `ḡ_k = λ e^{-λt}
    (θ_0 - θ^*)_k` along an eigenvector, so `α` is a mean of `λ / (e^{λt} - 1) ≈ 1/t`: the ridge that early stopping
    amounts to (Ali et al. 2019).

    Args:
        loss_fn: a loss function.
        params: the trained parameters.
        batches: all documents they were trained on; those of a sample leave sampling noise in `ḡ`.
        start: what the parameters are pulled to: zero for weight decay (the default), the initial (pretrained)
            parameters for early stopping.

    Returns:
        `α`, in units of the mean over documents of the loss as reduced.

    Raises:
        ValueError: if the gradient does not pull against anything, so that no weight decay explains it.

    Example:
        >>> import torch
        >>> ell = lambda p, b: (p["w"] - b).square().sum(1) / 2
        >>> implied_regularization(ell, {"w": torch.tensor([2.0])}, [torch.tensor([[2.0], [4.0]])])  # 3 / (1 + α) = 2
        0.5
    """
    if start is not None and start.keys() != params.keys():
        raise ValueError(
            f"start and params have other names; they differ in {sorted(start.keys() ^ params.keys())[:4]}"
        )
    moved = {name: p.detach().double() - (start[name].double() if start else 0) for name, p in params.items()}
    length = sum(float(d.square().sum()) for d in moved.values())
    along, documents = 0.0, 0
    for batch in batches:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            total = loss_fn(leaves, batch).sum()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(found, moved.values(), strict=True)
        along += sum(float((g.double() * d).sum()) for g, d in pairs if g is not None)
        documents += batch_size(batch)
    if not documents:
        raise ValueError("batches is empty: pass at least one batch (an iterator that was used up holds none)")
    if not along < 0:
        raise ValueError(
            f"the mean gradient of these {documents:,} documents does not pull away from {'start' if start else 'zero'}"
            f" (⟨ḡ, θ - θ_0⟩ = {along / documents:.3g}, ‖θ - θ_0‖² = {length:.3g}), so no weight decay explains "
            "it. Pass all documents the model was trained on, start= its initial parameters, or "
            "regularization= yourself"
        )
    return -along / documents / length
