r"""Losses per position, and their reduction to one loss per example. Arithmetic in at least float32.

Logits `z [n, t, v]`, labels `y [n, t]` with `-100` where there is none. Every loss returns `[n, t]`, zero where there
is no label.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a position without a label."""

PositionLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def widen(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Return a tensor in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(
    logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"], label_smoothing: float = 0.0
) -> Float[Tensor, "n t"]:
    r"""Cross-entropy of every position.

    $$\ell = (1 - ε)\,(\log Σ_v e^{z_v} - z_y) + ε\,(\log Σ_v e^{z_v} - \bar z)$$

    Args:
        logits: the logits.
        labels: the labels.
        label_smoothing: `ε`.

    Returns:
        The losses.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    flat = F.cross_entropy(
        widen(logits).flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return flat.reshape(labels.shape)


def log_odds(logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> Float[Tensor, "n t"]:
    r"""TRAK's output function with the sign of a loss (Park et al. 2023): minus the log-odds of the label.

    $$\ell = -\Bigl(z_y - \log Σ_{v ≠ y} e^{z_v}\Bigr)$$

    Args:
        logits: the logits.
        labels: the labels.

    Returns:
        The losses.

    Example:
        >>> import torch
        >>> log_odds(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0]]))
        tensor([[-2.]])
    """
    z, labelled = widen(logits), labels != IGNORED
    index = torch.where(labelled, labels, 0)[..., None]
    others = z.scatter(-1, index, float("-inf")).logsumexp(-1)
    return torch.where(labelled, others - z.gather(-1, index)[..., 0], 0.0)


def kl_divergence(
    logits: Float[Tensor, "n t v"], reference: Float[Tensor, "n t v"], labelled: Bool[Tensor, "n t"]
) -> Float[Tensor, "n t"]:
    r"""Divergence of a model from a reference, `KL(model ‖ reference)`.

    $$\ell = Σ_v p_v (\log p_v - \log r_v)$$

    Args:
        logits: the model's logits.
        reference: the reference's.
        labelled: which positions count.

    Returns:
        The losses.

    Example:
        >>> import torch
        >>> kl_divergence(torch.ones(1, 1, 3), torch.zeros(1, 1, 3), torch.tensor([[True]]))
        tensor([[0.]])
    """
    p, r = widen(logits).log_softmax(-1), widen(reference).log_softmax(-1)
    ratio = (p - r).masked_fill(p == float("-inf"), 0.0)
    return torch.where(labelled, (p.exp() * ratio).sum(-1), 0.0)


def reduce_positions(
    losses: Float[Tensor, "n t"], labelled: Bool[Tensor, "n t"], reduction: str
) -> Float[Tensor, " n"]:
    """Sum, or average over an example's own labelled positions; an example without one has loss 0.

    Args:
        losses: losses per position, zero where not labelled.
        labelled: which positions count.
        reduction: `"sum"` or `"mean"`.

    Returns:
        One loss per example.

    Example:
        >>> import torch
        >>> reduce_positions(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[True] * 2, [False] * 2]), "mean")
        tensor([2., 0.])
    """
    total = losses.sum(-1)
    return total / labelled.sum(-1).clamp_min(1) if reduction == "mean" else total
