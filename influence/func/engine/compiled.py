"""Compiles a whole step, and uses it once it has agreed with the eager step on a real batch.

The step, its backward included, is first recorded as one graph of tensor operations (`make_fx`); the graph is what is
compiled. So no Python of ours, no subclass and no custom `autograd.Function` is left for the compiler to misread
(compiled directly, that pair returned zeros without a word), and no graph break is possible.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from influence.types import Batch, Params, Rows

COMPILE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest distance between compiled and eager rows, relative to the eager rows' norm; half precision: 0.1."""


class Compiled:
    """A step compiled once per batch shape."""

    def __init__(self, step: Callable[[Params, Batch], Rows], backend: str | Callable[..., Any] = "inductor") -> None:
        """Hold the eager step; nothing is compiled before the first batch of a shape."""
        self.step, self.backend = step, backend
        self.graphs: dict[Any, Callable[[list[Tensor]], list[Tensor]] | None] = {}
        self.names: dict[Any, list[str]] = {}

    def __call__(self, params: Params, batch: Batch) -> Rows:
        """Return the rows of a batch, from the compiled step where it is trusted."""
        leaves, spec = tree_flatten((params, batch))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (spec, repr(constants), tuple((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self.graphs:
            eager = self.step(params, batch)
            self.graphs[key] = self.trusted(params, batch, leaves, spec, tensors, eager)
            self.names[key] = list(eager)
            return eager
        graph = self.graphs[key]
        if graph is None:
            return self.step(params, batch)
        with torch.no_grad():
            return dict(zip(self.names[key], graph(tensors), strict=True))

    def trusted(
        self, params: Params, batch: Batch, leaves: list[Any], spec: Any, tensors: list[Tensor], eager: Rows
    ) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Compile for these shapes; return `None`, with a warning that says why, where the result cannot be trusted."""

        def flat(tensors: list[Tensor]) -> list[Tensor]:
            fresh = iter(tensors)
            filled = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return list(self.step(*tree_unflatten(filled, spec)).values())

        try:
            graph = torch.compile(record(flat, tensors), backend=self.backend, fullgraph=True, dynamic=False)
            with torch.no_grad():
                got = graph(tensors)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"not compiled, running eagerly: {reason[0][:300]}", stacklevel=4)
            return None
        for (name, row), compiled in zip(eager.items(), got, strict=True):
            scale = float(row.double().norm())
            distance = float((compiled.double() - row.double()).norm())
            limit = COMPILE_TOLERANCE.get(row.dtype, 0.1)
            if not distance <= limit * scale + 1e-30:
                warnings.warn(
                    f"the compiled step differs from the eager one at {name!r} (relative error "
                    f"{distance / max(scale, 1e-30):.2g}, limit {limit:g}): running eagerly",
                    stacklevel=4,
                )
                return None
        return graph


def record(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]) -> torch.fx.GraphModule:
    """Record a function of tensors, backward passes included, as one graph of tensor operations for their shapes."""

    def settled(tensors: list[Tensor]) -> list[Tensor]:
        with SettleConstants():
            return function(tensors)

    return make_fx(settled)(tensors)


class SettleConstants(TorchDispatchMode):
    """Lets a recorded function branch on a value which no input moves (positions made by `arange`), and on no other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a question about a constant; refuse one about an input."""
        proxies = get_proxy_mode()
        if func is not torch.ops.aten._local_scalar_dense.default or proxies is None:
            return func(*args, **(kwargs or {}))
        slot = get_proxy_slot(args[0], proxies.tracer, None)
        if slot is not None and depends_on_input(slot.proxy.node):
            raise RuntimeError("the model branches on the values of its inputs, which a compiled graph cannot")
        with disable_proxy_modes_tracing():
            return func(*args, **(kwargs or {}))


def depends_on_input(node: torch.fx.Node) -> bool:
    """Whether a recorded value depends on any input of the graph."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return True
        fresh = [parent for parent in current.all_input_nodes if parent not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False
