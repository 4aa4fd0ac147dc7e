"""Cuts batches (pytrees of tensors) into examples, and refuses functions that have no per-example gradients."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from influence.types import Batch, LossFn, Params


def batch_size(batch: Batch) -> int:
    """Return how many examples a batch holds: the common length of its tensors' first axis.

    Raises:
        ValueError: if there is no tensor, no example, or the tensors disagree.
    """
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(batch)[0] if isinstance(leaf, Tensor)]
    if not leaves and isinstance(batch, Mapping) and not isinstance(batch, dict):
        raise ValueError(f"a {type(batch).__name__} cannot be cut into examples; pass dict(batch)")
    if not leaves:
        raise ValueError("the batch holds no tensor; expected a pytree of tensors with the example axis first")
    sizes = {name: leaf.shape[0] if leaf.ndim else None for name, leaf in leaves}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        listed = ", ".join(f"batch{name}: {list(leaf.shape)}" for name, leaf in leaves)
        raise ValueError(
            f"every tensor of a batch has the example axis first, of one length; got {listed}. "
            "Close over what is the same for all examples instead of putting it in the batch"
        )
    if not leaves[0][1].shape[0]:
        raise ValueError("the batch holds no example: its tensors have length 0")
    return int(leaves[0][1].shape[0])


def take(batch: Batch, index: Tensor | slice) -> Batch:
    """Return the chosen examples of a batch."""
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, batch)


def chunks(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Yield a batch in pieces of at most `size` examples."""
    n = batch_size(batch)
    if size is None or size >= n:
        yield batch
        return
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {size}")
    for begin in range(0, n, size):
        yield take(batch, slice(begin, begin + size))


def sample(batch: Batch, count: int) -> Batch:
    """Return `count` examples of a batch; where it has fewer, others made by rolling along the second axis."""
    n = batch_size(batch)

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = [leaf[i % n] if i < n or leaf.ndim < 2 else leaf[i % n].roll(i // n, 0) for i in range(count)]
        return torch.stack(rows)

    return tree_map(pick, batch)


def split_leaves(batch: Batch) -> tuple[list[Tensor], Any]:
    """Return the tensors of a batch and a function that puts tensors in their place."""
    leaves, spec = tree_flatten(batch)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: list[Tensor]) -> Batch:
        filled = list(leaves)
        for i, tensor in zip(at, tensors, strict=True):
            filled[i] = tensor
        return tree_unflatten(filled, spec)

    return [leaves[i] for i in at], rebuild


LOSS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far a loss may move, relative to the largest, when other examples join the batch; half precision: 0.1."""


def check_losses(losses: Any, n: int) -> None:
    """Refuse what is not one loss per example.

    Raises:
        ValueError: naming what came.
    """
    if not isinstance(losses, Tensor):
        raise ValueError(f"loss_fn must return a tensor of one loss per example, [{n}]; got {type(losses).__name__}")
    if tuple(losses.shape) != (n,):
        hint = "return the losses before their mean or sum" if losses.ndim == 0 else "sum each example's own losses"
        raise ValueError(f"loss_fn must return one loss per example, shape [{n}]; got {list(losses.shape)}: {hint}")
    if not losses.is_floating_point():
        raise ValueError(f"loss_fn must return floating-point losses; got {losses.dtype}")


def check_unmixed(few: Tensor, more: Tensor) -> None:
    """Refuse a function whose losses move when other examples join the batch.

    Raises:
        ValueError: naming the loss that moved.
    """
    a, b = few.detach().double(), more.detach().double()[: few.shape[0]]
    scale = b.abs().max().clamp_min(1e-6)
    moved = ((a - b).abs() / scale).nan_to_num(0.0)
    if moved.max() > LOSS_TOLERANCE.get(few.dtype, 0.1):
        i = int(moved.argmax())
        raise ValueError(
            f"example {i}'s loss changes from {a[i].item():.6g} to {b[i].item():.6g} when another example joins the "
            "batch: a per-example gradient does not exist. Something mixes examples (BatchNorm in train mode, a mean "
            "over the batch, in-batch negatives) or is random; use mode='eval', or sum each example's own loss"
        )


REORDERINGS = {"sort", "argsort", "topk", "msort", "bincount", "histc", "index_copy", "index_add"}
"""Operations whose result may lie in another order, or be of another size, on another batch: routed tokens."""


class Inspection(TorchDispatchMode):
    """Refuses every operation that draws from a global generator, before it draws, and notes what routes by value.

    Attributes:
        routing: names of the operations by which values decide where elements go.
    """

    def __init__(self) -> None:
        """Start with nothing noted."""
        super().__init__()
        self.routing: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let pure operations pass."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs):
            raise ValueError(
                f"the loss function draws random numbers ({func}): dropout was left on, or it samples. "
                "Use functionalize(model, mode='eval'), or pass the noise in the batch"
            )
        name = func._schema.name.removeprefix("aten::")
        dynamic = torch.Tag.dynamic_output_shape in func.tags
        if name == "index":
            dynamic = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if dynamic or name.removesuffix("_") in REORDERINGS:
            self.routing.add(name)
        return func(*args, **kwargs)


def draws(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a seeded operation really draws: attention kernels do only where their dropout is not zero."""
    schema = func._schema.arguments  # type: ignore[attr-defined]
    for i, argument in enumerate(schema):
        if argument.name in ("dropout_p", "p", "dropout"):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(value)
    return True


def check_params(params: Params) -> None:
    """Refuse parameters which are no dictionary of floating-point tensors.

    Raises:
        ValueError: naming the first that is not.
    """
    if not isinstance(params, dict) or not params:
        raise ValueError("params must be a dictionary {name: tensor} with at least one entry, as functionalize returns")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"parameter {name!r} must be a floating-point tensor to have a gradient; got {kind}")


def check_function(loss_fn: LossFn, params: Params, batch: Batch) -> set[str]:
    """Refuse what is not a differentiable, pure function of one loss per example, by running it on few examples.

    Returns:
        Names of operations by which it routes elements by their values.

    Raises:
        ValueError: saying what it does instead.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("no gradient exists under torch.inference_mode(); leave it, or use torch.no_grad()")
    inspection = Inspection()
    with inspection, torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        few = loss_fn(leaves, sample(batch, 2))
    with inspection, torch.no_grad():
        more = loss_fn(params, sample(batch, 3))
    check_losses(few, 2)
    check_losses(more, 3)
    check_unmixed(few, more)
    if not _reaches(few, leaves):
        raise ValueError(
            f"the losses have no gradient with respect to any of {', '.join(list(params)[:5])}: the function does not "
            "use these parameters, or computes under torch.no_grad() or detach()"
        )
    return inspection.routing


def _reaches(out: Tensor, leaves: Params) -> bool:
    """Whether a backward from a tensor would come to one of some leaves."""
    wanted, seen, nodes = {id(leaf) for leaf in leaves.values()}, set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
    return False


def check_independence(loss_fn: LossFn, params: Params, batch: Batch) -> None:
    """Verify that each example's loss depends on that example alone: exchange one, the others must not move.

    Raises:
        ValueError: naming the pair.
    """
    n = batch_size(batch)
    with torch.no_grad():
        before = loss_fn(params, batch)
        for j in range(n if n > 1 else 0):
            index = torch.arange(n)
            index[j] = (j + 1) % n
            after = loss_fn(params, take(batch, index))
            moved = (after - before).abs() / before.abs().max().clamp_min(1e-6)
            moved[j] = 0
            limit = {torch.float64: 1e-6, torch.float32: 1e-3}.get(before.dtype, 0.1)
            if moved.max() > limit:
                i = int(moved.argmax())
                raise ValueError(
                    f"example {i}'s loss moves from {before[i].item():.6g} to {after[i].item():.6g} when example {j} "
                    "is exchanged: a per-example gradient does not exist. Remove what mixes examples "
                    "(BatchNorm in train mode, a mean over the batch)"
                )
