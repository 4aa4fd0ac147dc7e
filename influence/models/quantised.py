"""Linear layers with quantised weights as pure functions, differentiable by the weight."""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor, nn


class QuantisedLinear(nn.Linear):
    r"""A linear layer `y = x (W_q + W)ᵀ + b`: `W_q` is dequantised when it is used, and `W` is zero.

    The gradient by `W` at zero is the gradient by the weight: a quantised weight has rows like any other, under the
    same name, and no dense weight is held. `W` takes no storage, and no product either unless it is differentiated.
    bitsandbytes' own layers don't serve: they refuse `torch.func`, change their state in the forward, and on CPUs with
    AVX-512 lose their gradient for good once they were called without one. Its 8-bit layers also round the inputs;
    here the weights alone are rounded. Such a model is there to be differentiated, not to be saved.

    Cost: one dequantisation in the forward and one in the backward.

    Attributes:
        packed: the weight as stored, integers.
        state: what bitsandbytes needs to unpack 4 bits, or the 8-bit weight's largest entry of each row, `[o]`.
    """

    def __init__(
        self,
        packed: Int8[Tensor, "o i"] | UInt8[Tensor, "bytes 1"],
        state: Any,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
        self.weight = _zero(shape, torch.zeros((1, 1), dtype=dtype, device=packed.device))
        self.bias = bias  # type: ignore[assignment] # nn.Linear registers it as it is
        self.packed, self.state = nn.Parameter(packed, requires_grad=False), state

    @property
    def quantisation(self) -> Any:
        """The values that unpack the weight, in a form that a fingerprint can read."""
        return self.state if isinstance(self.state, Tensor) else self.state.as_dict()

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return the layer's output."""
        packed, state, dtype = self.packed.detach(), self.state, input.dtype
        output = _Product.apply(input, lambda: unpack(packed, state, dtype))
        if not _is_still_zero(self.weight):
            output = output + nn.functional.linear(input, self.weight)
        return output if self.bias is None else output + self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantisedLinear":
        if _is_still_zero(self.weight):
            memo.setdefault(id(self.weight), _zero(tuple(self.weight.shape), self.weight.detach()[:1, :1]))
        other = memo[id(self)] = type(self).__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        weight, at = self.weight, self._parameters
        if not _is_still_zero(weight):
            return super()._apply(fn, recurse)
        at["weight"] = None
        super()._apply(fn, recurse)
        at["weight"] = _zero(tuple(weight.shape), fn(weight.detach()[:1, :1]))
        moved = self.state.to(self.packed.device)  # bitsandbytes moves its state in place
        self.state = self.state if moved is None else moved
        return self


class _Product(torch.autograd.Function):
    """`x Wᵀ` with a weight that is unpacked again in the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the product."""
        return nn.functional.linear(x, weight())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the function that unpacks the weight, not the weight."""
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by `x`."""
        return grads[0] @ ctx.weight(), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Return the product for a batch, and the batch axis; all axes but the last are alike."""
        assert in_dims[0] is not None
        return _Product.apply(x.movedim(in_dims[0], 0), weight), 0


def unpack(packed: Shaped[Tensor, "..."], state: Any, dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Return the dense weight: `packed · state / 127` row by row for 8 bits, by bitsandbytes for 4."""
    if isinstance(state, Tensor):
        return packed.to(dtype) * (state / 127).to(dtype)[:, None]
    return import_module("bitsandbytes.functional").dequantize_4bit(packed, state).to(dtype)


def make_pure(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace a model's bitsandbytes layers (not called yet) in place, and return it; weights are shared."""
    layers = import_module("bitsandbytes.nn")
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, layers.Linear4bit | layers.Linear8bitLt):
                weight = layer.weight
                state = weight.quant_state if isinstance(layer, layers.Linear4bit) else weight.SCB
                shape = (layer.out_features, layer.in_features)
                setattr(owner, name, QuantisedLinear(weight.data, state, shape, dtype, layer.bias))
    return model


def _zero(shape: tuple[int, ...], entry: Float[Tensor, "1 1"]) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(entry).expand(shape), requires_grad=False)


def _is_still_zero(weight: Tensor) -> bool:
    """Whether a weight is the zero without storage, and is not differentiated."""
    plain = type(weight) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    return plain and not weight.requires_grad and not any(weight.stride())
