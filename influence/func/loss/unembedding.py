r"""Losses of positions, a few positions at a time: what is wide, the logits of a large vocabulary, never exists whole.

The loss of a position depends on that position's input `h_t` alone, so its gradient `s_t = ∇_{h_t} ℓ_t` can be had in
the same pass as the loss, while the position's logits are there. The backward is then `g_t s_t`: no logits are kept,
and none are computed twice. The backward of the backward needs the Hessian of `ℓ_t`, for which they are.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.func.loss.losses import widen
from influence.types import Params

ENTRIES = 1 << 25
"""Logits that exist at a time: 128 MiB in float32. A batch of no more than this is not cut."""
LARGE = 1 << 14
"""A smaller vocabulary is never cut: a batch would have to hold thousands of positions."""


class Unembedding(NamedTuple):
    """A model cut before its last linear map.

    Attributes:
        before: the skeleton of the model, which returns what the map sees as its logits.
        needed: names of the parameters it has.
        weight: name of the map's weight, `[v, d]`.
        bias: name of its bias.
        cap: `c` of logits `c tanh(z / c)`, where the model caps them.
        vocabulary: `v`.
    """

    before: nn.Module
    needed: frozenset[str]
    weight: str
    bias: str | None
    cap: float | None
    vocabulary: int


def positions_at_once(vocabulary: int) -> int:
    """Return how many positions' logits exist at a time."""
    return max(1, ENTRIES // vocabulary)


def unembedding(model: nn.Module, values: Params) -> Unembedding | None:
    """Cut a language model before its last linear map.

    That the model does nothing more to the map's result than cap it is tried, on two tokens.

    Args:
        model: the skeleton of a model.
        values: all its parameters.

    Returns:
        The model in two parts; `None` where its vocabulary is small, the last map is no plain linear one (an adapter's,
        a quantised one), or more follows (a scale).
    """
    skeleton: Any = model
    if not hasattr(skeleton, "get_output_embeddings") or getattr(skeleton, "main_input_name", "") != "input_ids":
        return None
    head: Any = skeleton.get_output_embeddings()
    if type(head) is not nn.Linear or head.out_features < LARGE or skeleton.config.is_encoder_decoder:
        return None
    names = {id(p): name for name, p in skeleton.named_parameters()}
    weight, bias = names[id(head.weight)], None if head.bias is None else names[id(head.bias)]
    path = next(name for name, module in skeleton.named_modules() if module is head)
    before: Any = copy.deepcopy(skeleton)
    cap = getattr(before.config, "final_logit_softcapping", None)
    if cap is not None:
        before.config.final_logit_softcapping = None
    seen = Seen()
    before.set_submodule(path, seen)
    needed = {name for name, _ in before.named_parameters()}
    if not needed <= set(values):
        return None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=values[weight].device)
    with torch.no_grad():
        found = torch.func.functional_call(before, {name: values[name] for name in needed}, (), {"input_ids": tokens})
    if getattr(found, "logits", None) is not seen.input:
        return None
    before.set_submodule(path, nn.Identity())
    return Unembedding(before, frozenset(needed), weight, bias, cap, head.out_features)


class Seen(nn.Module):
    """Returns its input, and remembers it."""

    input: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input itself."""
        self.input = x
        return x


def by_chunks(
    loss_of: Callable[..., Tensor],
    hidden: Float[Tensor, "*n d"],
    each: Sequence[Tensor],
    fixed: Sequence[Tensor],
    size: int,
) -> Float[Tensor, "*n"]:
    r"""Return the loss of every position, computed `size` positions at a time.

    $$\ell_t = f(h_t, e_t; W), \qquad \nabla_{h_t} Σ_t g_t \ell_t = g_t\, ∇_h f(h_t, e_t; W)$$

    Cost: that of the loss and its gradient with respect to `h`; beside the result only `h` and its gradient are kept.

    Args:
        loss_of: `(hidden [1, c, d], *each [1, c, …], *fixed) -> losses [1, c]`, each of its own position alone;
            differentiable by `torch.func`.
        hidden: what the gradient is taken with respect to.
        each: more inputs of every position, as labels, `[*n, …]`.
        fixed: inputs that all positions share, as the unembedding; they get no gradient.
        size: positions at a time.

    Returns:
        The losses.

    Example:
        >>> import torch
        >>> h = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> losses = by_chunks(lambda x, w: (x @ w) ** 2, h, [], [torch.tensor([1.0, 0.0])], size=1)
        >>> losses.tolist(), torch.autograd.grad(losses.sum(), h)[0].tolist()
        ([1.0, 9.0], [[2.0, 0.0], [6.0, 0.0]])
    """
    lead = hidden.shape[:-1]
    flat = [tensor.flatten(0, len(lead) - 1)[None] for tensor in (hidden, *each)]
    if torch.is_grad_enabled() and hidden.requires_grad:
        return Losses.apply(loss_of, size, len(flat), *flat, *fixed)[0].reshape(lead)
    pieces = _pieces(size, len(flat), [*flat, *fixed])
    return torch.cat([loss_of(h, *rest) for h, rest in pieces], 1).reshape(lead)


class Losses(torch.autograd.Function):
    """`(hidden, …) -> (losses, slopes)`: one pass, which keeps the slopes for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss_of: Callable[..., Tensor], size: int, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of all positions, and each one's gradient with respect to its input."""
        losses, slopes = [], []
        for h, rest in _pieces(size, count, tensors):
            value_and_pull: Any = torch.func.vjp(lambda x, rest=rest: loss_of(x, *rest), h)
            value, pull = value_and_pull
            losses.append(value)
            slopes.append(pull(torch.ones_like(value))[0])
        return torch.cat(losses, 1), torch.cat(slopes, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and the slopes."""
        ctx.loss_of, ctx.size, ctx.count = inputs[:3]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return each slope times the gradient of its loss."""
        slopes, hidden, *rest = ctx.saved_tensors
        slopes = Slopes.apply(ctx.loss_of, ctx.size, ctx.count, slopes, hidden, *rest)
        found = (gradient[..., None] * widen(slopes)).to(hidden.dtype)
        return (None, None, None, found, *(None for _ in rest))


class Slopes(torch.autograd.Function):
    """The slopes again, whose own backward multiplies by the Hessian of each position's loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        loss_of: Callable[..., Tensor], size: int, count: int, slopes: Tensor, hidden: Tensor, *rest: Tensor
    ) -> Tensor:
        """Return the slopes, which are known."""
        return slopes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.loss_of, ctx.size, ctx.count = inputs[:3]
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the Hessian of each position's loss times the gradient of its slope."""
        tensors = ctx.saved_tensors
        found = []
        for v, (h, rest) in zip(gradient.split(ctx.size, 1), _pieces(ctx.size, ctx.count, tensors), strict=True):
            slope = torch.func.grad(lambda x, rest=rest: ctx.loss_of(x, *rest).sum())
            found.append(torch.func.vjp(slope, h)[1](v)[0])
        return (None, None, None, None, torch.cat(found, 1), *(None for _ in tensors[1:]))


def _pieces(size: int, count: int, tensors: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Return the inputs of `loss_of`, some positions at a time; the first `count` tensors have positions."""
    cut: Any = zip(*(tensor.split(size, 1) for tensor in tensors[:count]), strict=True)
    return [(h, [*each, *tensors[count:]]) for h, *each in cut]
