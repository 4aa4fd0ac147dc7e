"""The probe: a parameter that reports how it is used, so that a rule can tap its per-example gradient there.

A probe stands in for a parameter in a call of a pure function. It is a tensor subclass: every torch function that
touches it arrives at `Probe.__torch_function__`, which asks the run's `Watcher` what to do. What is computed from
parameters alone (a transpose, `1 + weight`, a position embedding) stays a probe, as an expression, until it meets
the examples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class UseKey(NamedTuple):
    """Which use of which parameters: the operation, their names, and how often that pair came before."""

    op: str
    params: tuple[str, ...]
    call: int

    def __str__(self) -> str:
        """Return the key as an error or a plan shows it."""
        return f"{self.op}({', '.join(self.params)})" + (f" use {self.call + 1}" if self.call else "")


class Expr(NamedTuple):
    """An operation on parameters alone, kept so that a gradient can be pulled back through it."""

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    item: int | None

    def evaluate(self, base: dict[str, Tensor]) -> Tensor:
        """Compute the expression anew from base parameters."""
        leaves = [evaluate(leaf.source, base) if isinstance(leaf, Probe) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = self.func(*args, **kwargs)
        return out if self.item is None else out[self.item]


def evaluate(source: "str | Expr", base: dict[str, Tensor]) -> Tensor:
    """Return what a probe stands for, as a function of base parameters."""
    return base[source] if isinstance(source, str) else source.evaluate(base)


class Call(NamedTuple):
    """One intercepted operation: its arguments as leaves, some of them probes."""

    func: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec

    @property
    def probes(self) -> list[int]:
        """Positions of the probes among the leaves."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Probe)]

    @property
    def data(self) -> list[int]:
        """Positions of the other tensors among the leaves."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Probe)]

    @property
    def params(self) -> tuple[str, ...]:
        """Names of all base parameters involved, in order of appearance."""
        return tuple(dict.fromkeys(name for i in self.probes for name in self.leaves[i].names))

    def arguments(self, names: Sequence[str], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments by name, probes included."""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return {**dict.fromkeys(names), **(defaults or {}), **dict(zip(names, args, strict=False)), **kwargs}

    def run(self, replaced: dict[int, Tensor] | None = None) -> Any:
        """Execute the operation on plain values, some of them replaced."""
        leaves = [leaf.value if isinstance(leaf, Probe) else leaf for leaf in self.leaves]
        for i, value in (replaced or {}).items():
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)


Watcher: TypeAlias = Callable[[Call], Any]
"""What a run does with each operation on a probe: returns its result."""


class Probe(Tensor):
    """A parameter, or an expression of parameters, which reports its uses to a watcher."""

    value: Tensor
    source: "str | Expr"
    names: tuple[str, ...]
    watcher: Watcher

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the operation to the watcher of the first probe among its arguments."""
        call = Call(func, *tree_flatten((args, kwargs or {})))
        for leaf in call.leaves:
            if isinstance(leaf, Probe):
                return leaf.watcher(call)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def probe(value: Tensor, source: "str | Expr", names: tuple[str, ...], watcher: Watcher) -> Probe:
    """Return a probe that stands for a value."""
    made = value.detach().as_subclass(Probe)
    made.value, made.source, made.names, made.watcher = value, source, names, watcher
    return made


def op_name(func: Any) -> str:
    """Return a stable name of a torch function, also of attribute accesses and operators."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):
        return f"{name}.{func.__self__.__name__}"
    return name


def tensors_of(out: Any) -> list[Tensor]:
    """Return the tensors of a result, which may be a tensor or a sequence."""
    if isinstance(out, Tensor):
        return [out]
    return [item for item in out if isinstance(item, Tensor)] if isinstance(out, list | tuple) else []


def derive(call: Call, out: Any, watcher: Watcher) -> Any:
    """Wrap a result computed from parameters alone: it stays a probe."""
    leaves = tuple(call.leaves)

    def wrap(value: Any, item: int | None) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return probe(value, Expr(call.func, leaves, call.spec, item), call.params, watcher)

    if isinstance(out, Tensor):
        return wrap(out, None)
    return type(out)(wrap(value, item) for item, value in enumerate(out)) if type(out) in (list, tuple) else out
