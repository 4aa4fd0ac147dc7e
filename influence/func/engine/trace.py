"""The trace finds each use of each parameter in a loss function, and where the examples are at each.

A probe stands in for a parameter in a call of a pure function. It is a tensor subclass: every torch function that
touches it arrives at `Probe.__torch_function__`, which asks the run's `Watcher` what to do. What is computed from
parameters alone (a transpose, `1 + weight`, a position embedding) stays a probe, as an expression, until it meets
the examples.

The function runs on two and on three examples of the first batch. Whatever changes its size between the two runs is
the example axis; a merged axis `n · s` is told from `s · n` by its values. An operation which meets no examples keeps
its result a probe, and the trace is taken again until nothing new is learnt.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from influence.func.engine.batch import sample
from influence.types import Batch, LossFn, Params


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

    def place(self, leaf: Tensor) -> int:
        """Return where an argument is among the leaves."""
        return next(i for i, other in enumerate(self.leaves) if other is leaf)

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


def probes(params: Params, watcher: Watcher) -> Params:
    """Return probes that stand for parameters."""
    return {name: probe(p, name, (name,), watcher) for name, p in params.items()}


def base_name(leaf: Any) -> str | None:
    """Return a leaf's parameter if it is one, unchanged."""
    return leaf.source if isinstance(leaf, Probe) and isinstance(leaf.source, str) else None


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


class AnotherPath(ValueError):
    """A batch takes the model along another path than the one that was planned; the message says where."""


class Axis(NamedTuple):
    """The axis of a tensor along which examples lie.

    Attributes:
        dim: the dimension.
        flat: whether it holds `n · k` entries, examples merged with something else (positions, heads).
        inner: whether in such a merged axis the example is the fast index, `(k n)`; otherwise `(n k)`.
        position: the dimension of token positions, where they were looked for; `NO_POSITION` if it has none.
    """

    dim: int
    flat: bool = False
    inner: bool = False
    position: int | None = None

    def split(self, x: Shaped[Tensor, "..."], n: int) -> Shaped[Tensor, "n ..."]:
        """Return `x` with the example axis in front and its own place kept, of size 1 or `k`: `n` batches of one."""
        size = x.shape[self.dim]
        if size % n or (size != n and not self.flat):
            raise AnotherPath(
                f"an axis of {size} entries does not hold {n} examples as it did when the plan was made: the model "
                "takes another path on this batch"
            )
        if not self.flat:
            return x.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        k = x.shape[self.dim] // n
        if self.inner:
            return x.unflatten(self.dim, (k, n)).movedim(self.dim + 1, 0)
        return x.unflatten(self.dim, (n, k)).movedim(self.dim, 0)


NO_POSITION = -1


def positions(x: Shaped[Tensor, "..."], axis: Axis, n: int, keep: int | None) -> Shaped[Tensor, "..."]:
    """Arrange a tensor, features last, as `[n, s, d]`, or `[n, keep, r, d]` where positions stay apart."""
    parts = axis.split(x, n)
    if keep is None:
        return parts.flatten(1, -2)
    moved = parts.movedim(position_dim(parts[..., 0], keep, axis), 1)
    return moved.reshape(n, keep, -1, moved.shape[-1])


def position_dim(parts: Shaped[Tensor, "n ..."], keep: int, axis: Axis) -> int:
    """Return the axis of token positions of a split tensor.

    Raises:
        ValueError: if there is none, or more than one that it could be.
    """
    dims = [dim for dim in range(1, parts.ndim) if parts.shape[dim] == keep]
    if axis.position is not None:
        dims = [axis.position + 1] if axis.position + 1 in dims else []
    elif keep == 1:
        dims = dims[:1]
    if len(dims) != 1:
        found = "no axis" if not dims else f"{len(dims)} axes that could be the one"
        raise ValueError(f"{found} of {keep} token positions in a use of shape {list(parts.shape[1:])} per example")
    return dims[0]


def find_position(whole: tuple[int, ...], shorter: tuple[int, ...], s: int) -> int | None:
    """Return the dimension of token positions of a tensor seen with `s` positions and with one less.

    `NO_POSITION` if nothing changed; `None` if the shapes do not tell.
    """
    if whole == shorter:
        return NO_POSITION
    changed = [dim for dim, (a, b) in enumerate(zip(whole, shorter, strict=False)) if a != b]
    if len(whole) != len(shorter) or len(changed) != 1:
        return None
    a, b = whole[changed[0]], shorter[changed[0]]
    return changed[0] if a % s == 0 and b == a // s * (s - 1) else None


class Signature(NamedTuple):
    """What is remembered of a tensor: its shape, and along each long axis a weighted sum over the others.

    The weights are no constant: rows of a normalised tensor all have the same plain sum.
    """

    shape: tuple[int, ...]
    sums: dict[int, Tensor]


def signature(x: Tensor, n: int) -> Signature:
    """Return the signature of a tensor seen at batch size `n`."""
    shape = tuple(x.shape)
    merged = [dim for dim, size in enumerate(shape) if size > n and size % n == 0]
    if not merged or x.numel() == 0:
        return Signature(shape, {})
    wide = x.detach().to(torch.float64)
    sums = {}
    for dim in merged:
        rows = wide.movedim(dim, 0).reshape(shape[dim], -1)
        sums[dim] = rows @ torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=x.device).mul(1.7).cos()
    return Signature(shape, sums)


class MixedAxes(ValueError):
    """A tensor which has no single example axis."""


class AlikeExamples(MixedAxes):
    """A merged axis whose order cannot be told from these examples."""


def find_axis(two: Signature, three: Signature) -> Axis | None:
    """Return the example axis of a tensor seen at batch sizes 2 and 3; `None` if it knows no examples.

    Raises:
        MixedAxes: if the shapes do not tell a single axis.
    """
    if two.shape == three.shape:
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if len(two.shape) != len(three.shape) or len(changed) != 1:
        raise MixedAxes(f"shapes {list(two.shape)} at two examples and {list(three.shape)} at three")
    dim = changed[0]
    a, b = two.shape[dim], three.shape[dim]
    if a % 2 or b % 3 or a // 2 != b // 3:
        raise MixedAxes(f"shapes {list(two.shape)} at two examples and {list(three.shape)} at three")
    if a == 2:
        return Axis(dim)
    k, small, large = a // 2, two.sums[dim], three.sums[dim]
    outer = (large[:a] - small).abs().sum()
    inner = (large.view(k, 3)[:, :2] - small.view(k, 2)).abs().sum()
    scale = large.abs().sum()
    if max(inner, outer) <= 1e-6 * scale or not scale > 0:
        raise AlikeExamples("the examples of the first batch are alike, so their order in a merged axis does not show")
    if min(inner, outer) > 1e-2 * scale:
        raise MixedAxes(f"the {b} entries of a merged axis are in no order of examples")
    return Axis(dim, flat=True, inner=bool(inner < outer))


def known_axis(axis: Axis | None) -> Axis:
    """Return an axis that the plan has established."""
    assert axis is not None
    return axis


class CannotTrace(ValueError):
    """The loss function cannot be run by the batched engine; the message says why."""


class NeedsOtherExamples(CannotTrace):
    """The examples at hand do not tell where examples are; others will."""


class TracedUse(NamedTuple):
    """One planned use of parameters.

    Attributes:
        call: the operation as it was seen at three examples.
        inputs: example axis of each tensor argument that is not a probe, by its place among the leaves.
        outputs: example axis of each tensor result.
    """

    call: Call
    inputs: dict[int, Axis | None]
    outputs: tuple[Axis | None, ...]

    def axis(self, leaf: Any) -> Axis | None:
        """Return the example axis of an argument; `None` if it has none."""
        return next((axis for place, axis in self.inputs.items() if self.call.leaves[place] is leaf), None)

    @property
    def knows_examples(self) -> bool:
        """Whether any argument or result has an example axis."""
        return any(self.outputs) or any(self.inputs.values())


class Trace(NamedTuple):
    """What the trace found: the uses where examples meet parameters, and the operations on parameters alone."""

    uses: dict[UseKey, TracedUse]
    alone: frozenset[UseKey]


class Event(NamedTuple):
    """One operation seen in one run."""

    key: UseKey
    call: Call
    alone: bool
    inputs: dict[int, Signature]
    outputs: list[Signature]


class Keys:
    """Counts uses within one run, so that each has a name which is the same in the next run."""

    def __init__(self) -> None:
        """Start counting."""
        self.seen: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def __call__(self, call: Call) -> UseKey:
        """Return the next key of a call."""
        pair = (op_name(call.func), call.params)
        self.seen[pair] += 1
        return UseKey(*pair, self.seen[pair] - 1)


def writes(op: str) -> bool:
    """Whether an operation writes to its argument."""
    inplace = op.endswith("_") and not op.endswith("__")
    return inplace or op.startswith(("__set__", "__setitem__")) or (op.startswith("__i") and op != "__invert__")


def _run(loss_fn: LossFn, params: Params, batch: Batch, n: int, known: dict[UseKey, bool]) -> list[Event]:
    events: list[Event] = []
    keys = Keys()

    def watch(call: Call) -> Any:
        out = call.run()
        if not tensors_of(out):
            return out
        key = keys(call)
        if writes(key.op):
            raise CannotTrace(f"{key} writes to its argument")
        alone = known.get(key, not call.data)
        inputs = {i: signature(call.leaves[i], n) for i in call.data}
        events.append(Event(key, call, alone, inputs, [signature(t, n) for t in tensors_of(out)]))
        return derive(call, out, watch) if alone else out

    with torch.no_grad():
        loss_fn(probes(params, watch), batch)
    return events


def trace(loss_fn: LossFn, params: Params, batch: Batch) -> Trace:
    """Find every use of every parameter, and the example axis at each.

    Raises:
        CannotTrace: if the batched engine cannot serve this function.
    """
    known: dict[UseKey, bool] = {}
    small, large = sample(batch, 2), sample(batch, 3)
    for _ in range(50):
        two = _run(loss_fn, params, small, 2, known)
        three = _run(loss_fn, params, large, 3, known)
        if [e.key for e in two] != [e.key for e in three]:
            raise CannotTrace("the operations on parameters depend on the batch")
        learnt = {}
        uses = {}
        for a, b in zip(two, three, strict=True):
            use = TracedUse(b.call, _axes(a, b), _output_axes(a, b))
            if not a.alone:
                uses[a.key] = use
            if use.knows_examples == a.alone and a.key not in known:
                learnt[a.key] = not use.knows_examples
        if not learnt:
            return Trace(uses, frozenset(e.key for e in three if e.alone))
        known |= learnt
    raise CannotTrace("the loss function derives more than 50 tensors from its parameters alone")


def position_axes(
    loss_fn: LossFn, params: Params, batch: Batch, known: dict[UseKey, bool], s: int
) -> dict[UseKey, tuple[dict[int, int | None], tuple[int | None, ...]]]:
    """Find where token positions are at each use, by a run on examples that are one position shorter.

    `known` says of each traced operation whether it meets no example. Returns the dimension of positions of each
    argument and each result, or nothing where the function takes no other length.
    """
    whole = sample(batch, 2)
    shorter = tree_map(lambda x: x[:, :-1] if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == s else x, whole)
    try:
        runs = [_run(loss_fn, params, examples, 2, known) for examples in (whole, shorter)] if s > 1 else []
    except (RuntimeError, ValueError, IndexError):
        return {}
    if not runs or [e.key for e in runs[0]] != [e.key for e in runs[1]]:
        return {}
    return {
        a.key: (
            {i: find_position(a.inputs[i].shape, b.inputs[i].shape, s) for i in a.inputs},
            tuple(find_position(x.shape, y.shape, s) for x, y in zip(a.outputs, b.outputs, strict=True)),
        )
        for a, b in zip(*runs, strict=True)
        if not a.alone
    }


def _axes(a: Event, b: Event) -> dict[int, Axis | None]:
    try:
        return {i: find_axis(a.inputs[i], b.inputs[i]) for i in a.inputs}
    except AlikeExamples as error:
        raise NeedsOtherExamples(str(error)) from None
    except MixedAxes as error:
        raise CannotTrace(f"an argument of {a.key} has no single example axis: {error}") from None


def _output_axes(a: Event, b: Event) -> tuple[Axis | None, ...]:
    try:
        return tuple(find_axis(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))
    except AlikeExamples as error:
        raise NeedsOtherExamples(str(error)) from None
    except MixedAxes as error:
        raise CannotTrace(f"the result of {a.key} has no single example axis: {error}") from None
