"""Runs `vmap` with plain operations where torch's own batching rule is missing or wrong."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class MathAttention(torch.overrides.TorchFunctionMode):
    """Computes attention by plain operations: the fused kernels have no batching rule for `vmap`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled dot-product attention, let all else pass."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and kwargs.get("need_weights", True) is False:
            # it uses the fused kernel, out of a mode's sight, unless it is asked for the weights
            return func(*args, **(kwargs | {"need_weights": True}))[0], None
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        return attention(**(dict(zip(names, args, strict=False)) | kwargs))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention, `softmax(q k^T · scale + mask) v`, as plain operations; 0 where nothing is seen."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores + torch.zeros(hidden.shape, dtype=scores.dtype, device=scores.device).masked_fill(
            hidden, float("-inf")
        )
    if attn_mask is None:  # everyone sees something
        weights = scores.softmax(-1)
    else:
        blocked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if blocked else scores + attn_mask
        unseeing = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


class PaddedEmbedding(torch.overrides.TorchFunctionMode):
    """Gives the padding row of an embedding no gradient, in any batch of tables.

    Torch's rule for `vmap` lays the tables below one another and keeps `padding_idx` for the first of them only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace an embedding with a padding row, let all else pass."""
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
        if given.get("padding_idx") is None or len(args) > 3:
            return func(*args, **kwargs)
        row, ids = given["padding_idx"] % given["weight"].shape[0], given["input"]
        found = func(**{**given, "padding_idx": None})
        return torch.where((ids == row).unsqueeze(-1), found.detach(), found)


@contextmanager
def under_vmap() -> Iterator[None]:
    """Run `vmap` with plain attention, and without torch's remark that an operation is run one example at a time."""
    with MathAttention(), PaddedEmbedding(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
