"""Names that mean something: the types which cross the rooms of the library."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Parameters by name, as `named_parameters()` gives them: tied weights appear once."""

Rows: TypeAlias = dict[str, Tensor]
"""Per-example (or per-token) gradients of a batch, `[n, ...]` under each block's name."""

Batch: TypeAlias = Any
"""Any pytree of tensors which all have the example axis first."""

ExampleLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""A user's `loss(output, batch) -> [n]` for `functionalize`."""


@runtime_checkable
class LossFn(Protocol):
    """A pure function of parameters and a batch which returns one loss per example.

    Example i's loss depends on example i alone.
    """

    def __call__(self, params: Params, batch: Batch, /) -> Float[Tensor, " n"]:
        """Return the losses `[n]` of the batch's examples."""
        ...
