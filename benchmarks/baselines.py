"""What `influence` is compared with, written by hand and as well as we can.

Every function takes a `Workload` (and the projection matrices `{block: (L[p, o], R[q, i])}`) and returns a step: a
function of nothing that does one batch. Steps that project return `{block: [n, p, q]}` and must all agree.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.models import Workload, twin

# `{block: (L[p, o], R[q, i])}` and `{block: [n, p, q]}`.
Matrices = Mapping[str, tuple[Tensor, Tensor]]
Rows = dict[str, Tensor]


def floor(work: Workload) -> Callable[[], Tensor]:
    """One forward and one backward that stops at the inputs; no weight gradient is ever formed.

    Whatever collects gradients of every layer by one backward pass must at least do this (all of it, but for the
    gradient of the inputs themselves).
    """

    def step() -> Tensor:
        inputs = work.inputs().requires_grad_()
        loss = work.losses(work.model, inputs, work.labels).sum()
        return torch.autograd.grad(loss, inputs)[0]

    return step


def hooks(work: Workload, matrices: Matrices, pruned: bool = False) -> Callable[[], Rows]:
    """Forward and backward hooks used as well as they can be.

    The forward hook keeps `x Rᵀ` instead of `x`; the backward hook turns the output gradient into `L (∂ℓ/∂y)ᵀ x Rᵀ`.
    Only the inputs require a gradient, so no weight gradient is formed; the hooks are registered once. The backward
    hook sits on the output *tensor*: `register_full_backward_hook` wraps inputs and outputs in an autograd function of
    its own and measured 1 % slower. The thin products run on two-dimensional, contiguous operands with the matrix
    transposed beforehand: 1.02 × floor against 1.05 with `F.linear(x, R)`.

    Args:
        work: The workload.
        matrices: `L` and `R` per block.
        pruned: Let the graph begin at the first hooked outputs: not even the inputs get a gradient, so this may run
            below the floor.
    """
    model, rows, tips = twin(work.model), {}, []
    for name in work.blocks:
        left, right = matrices[name]
        model.get_submodule(name).register_forward_hook(_collector(name, left, right, rows, tips))

    def step() -> Rows:
        rows.clear()
        tips.clear()
        inputs = work.inputs()
        if not pruned:
            tips.append(inputs.requires_grad_())
        loss = work.losses(model, inputs, work.labels).sum()
        torch.autograd.grad(loss, tips)
        return dict(rows)

    return step


def covariance_hooks(work: Workload, panels: int = 4) -> Callable[[], Matrices]:
    """K-FAC's sums by hooks used as well as they can be: what a covariance fit costs at the least.

    A Gram matrix is symmetric, so only its lower triangle is computed, in column panels (0.67 to 0.73 of the time of
    the whole product here; half would be the limit, and torch offers no `syrk`). An input that several layers share is
    summed once. The column of ones is never made: its products are the input's column sums and a count.

    Returns:
        A step that adds a batch and returns the lower triangles `{block: (Σ g gᵀ, Σ ã ãᵀ)}` so far.
    """
    model, seen, sums = twin(work.model), {}, {}

    def add(key: tuple[str, str], x: Tensor, ones: bool) -> None:
        rows, width = len(x), x.shape[1]
        if key not in sums:
            sums[key] = x.new_zeros(width + ones, width + ones)
        wide = -(-width // panels)
        for start in range(0, width, wide):
            panel = slice(start, min(start + wide, width))
            sums[key][start:width, panel].addmm_(x[:, start:].mT, x[:, panel])
        if ones:
            sums[key][width, :width] += x.sum(0)
            sums[key][width, width] += rows

    def hook(name: str) -> Hook:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            if id(x) not in seen:
                seen.clear()  # layers that share an input follow one another
                seen[id(x)] = name, x  # kept alive, so that its id is nobody else's
                add((name, "right"), x.detach().flatten(0, -2), True)
            shared[name] = seen[id(x)][0]
            output.register_hook(lambda g: add((name, "left"), g.flatten(0, -2), False))

        return keep

    shared: dict[str, str] = {}
    for name in work.blocks:
        model.get_submodule(name).register_forward_hook(hook(name))

    def step() -> Matrices:
        inputs = work.inputs().requires_grad_()
        loss = work.losses(model, inputs, work.labels).sum()
        seen.clear()
        torch.autograd.grad(loss, inputs)
        return {name: (sums[name, "left"], sums[shared[name], "right"]) for name in work.blocks}

    return step


def vmap_then_project(work: Workload, matrices: Matrices) -> Callable[[], Rows]:
    """`vmap(grad)` of the full weights, as the torch.func tutorial has it, then the projection."""
    params = {name: work.model.get_parameter(name) for name in work.targets}

    def loss(chosen: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        def call(*args: Tensor, **kwargs: object) -> object:
            return functional_call(work.model, chosen, args, kwargs)

        return work.losses(call, inputs[None], label[None])[0]

    rows_of = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> Rows:
        with torch.no_grad(), warnings.catch_warnings():
            # Fused attention has no batching rule on the CPU: vmap loops over it and warns. It is still the fastest.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return project(rows_of(params, work.inputs(), work.labels), matrices)

    return step


def training_step(work: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward with the gradients of all parameters: what a training step costs, for scale."""
    model = twin(work.model, {name for name, _ in work.model.named_parameters()})
    params = list(model.parameters())
    images = isinstance(work.batch, tuple)

    def step() -> tuple[Tensor, ...]:
        inputs = work.inputs() if images else model.get_input_embeddings()(work.batch["input_ids"])
        return torch.autograd.grad(work.losses(model, inputs, work.labels).sum(), params)

    return step


def dense_rows(
    work: Workload,
    matrices: Matrices,
    moments: Mapping[str, Tensor] | None = None,
    eps: float = 0.0,
    bias: bool = False,
) -> Rows:
    """The oracle: each example's full weight gradients by autograd, one at a time; scale, then project.

    Args:
        work: Its weights and batch.
        matrices: `L` and `R` per block.
        moments: Second moments per weight; gradients are divided by `sqrt(v) + eps`.
        eps: As said.
        bias: Whether a block's bias is its last column.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in work.blocks}
    for grads in dense_gradients(work, bias):
        for name, gradient in grads.items():
            if moments is not None:
                gradient = gradient / (moments[f"{name}.weight"].flatten(1).sqrt() + eps)
            left, right = matrices[name]
            rows[name].append(left @ gradient @ right.mT)
    return {name: torch.stack(per_example) for name, per_example in rows.items()}


def dense_gradients(work: Workload, bias: bool = False) -> Iterator[Rows]:
    """The full gradients `{block: [o, i]}` of one example after another, by autograd; with `bias`, `[o, i + 1]`.

    Args:
        work: Its weights and batch.
        bias: Whether a block's bias is its last column.
    """
    names = [name for block in work.blocks for name in (f"{block}.weight", f"{block}.bias")[: 1 + bias]]
    model = twin(work.model, names)
    params = [model.get_parameter(name) for name in names]
    for inputs, label in zip(work.inputs(), work.labels, strict=True):
        loss = work.losses(model, inputs[None], label[None]).sum()
        grads = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
        yield {
            block: torch.cat([grads[f"{block}.weight"], grads[f"{block}.bias"][:, None]], 1)
            if bias
            else grads[f"{block}.weight"].flatten(1)
            for block in work.blocks
        }


def dense_factors(work: Workload) -> tuple[Matrices, Matrices]:
    """Sums over a batch of both factors of every linear block's gradient, for labels from the data.

    Returns:
        K-FAC's `{block: (Σ g gᵀ, Σ ã ãᵀ)}`, and TKFAC's, in which an example's `g gᵀ` is weighted by its `Σ ‖ã‖²` and
        its `ã ãᵀ` by its `Σ ‖g‖²`.
    """
    model, seen, outputs = twin(work.model), {}, {}

    def keep(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name], outputs[name] = args[0].detach(), output

        return hook

    for name in work.blocks:
        model.get_submodule(name).register_forward_hook(keep(name))
    loss = work.losses(model, work.inputs().requires_grad_(), work.labels).sum()
    grads = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    plain, traced = {}, {}
    for name, g in grads.items():
        x = F.pad(seen[name], (0, 1), value=1.0)
        each = [(a.mT @ a, b.mT @ b) for a, b in zip(g, x, strict=True)]
        plain[name] = (sum(left for left, _ in each), sum(right for _, right in each))
        traced[name] = (
            sum(right.trace() * left for left, right in each),
            sum(left.trace() * right for left, right in each),
        )
    return plain, traced


def project(full: Mapping[str, Tensor], matrices: Matrices) -> Rows:
    """`L G Rᵀ` of full gradients `{weight: [n, o, ...]}`; convolution kernels are unfolded to `[n, o, i]`."""
    rows = {}
    for name, gradient in full.items():
        block = name.removesuffix(".weight")
        left, right = matrices[block]
        rows[block] = left @ gradient.flatten(2) @ right.mT
    return rows


def worst_error(rows: Mapping, expected: Mapping) -> float:
    """The largest `‖Δ‖ / ‖expected‖` over blocks, and over the sides of each where they are pairs."""
    if rows.keys() != expected.keys():
        raise ValueError(f"blocks differ: {sorted(rows.keys() ^ expected.keys())}")
    if any(isinstance(row, tuple) for row in expected.values()):
        sides = range(2)
        return max(
            worst_error(*({name: row[k] for name, row in both.items()} for both in (rows, expected))) for k in sides
        )
    return max(float((rows[name] - row).norm() / row.norm()) for name, row in expected.items())


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


def _collector(name: str, left: Tensor, right: Tensor, rows: Rows, tips: list[Tensor]) -> Hook:
    """The forward hook of one block, which puts the backward hook on the module's output.

    An output without a graph is made the beginning of one and added to `tips`.
    """
    left_t, right_t = left.mT.contiguous(), right.mT.contiguous()

    def linear(module: nn.Linear, x: Tensor) -> Callable[[Tensor], None]:
        small = (x.reshape(-1, x.shape[-1]) @ right_t).view(len(x), -1, right_t.shape[1])

        def collect(g: Tensor) -> None:
            thin = (g.reshape(-1, g.shape[-1]) @ left_t).view(len(g), -1, left_t.shape[1])
            rows[name] = thin.mT @ small

        return collect

    def conv2d(module: nn.Conv2d, x: Tensor) -> Callable[[Tensor], None]:
        # Row q of R, shaped as a kernel, makes one channel of `unfold(x) Rᵀ`: the image is never unfolded.
        kernels = right.view(len(right), module.in_channels, *module.kernel_size)
        small = F.conv2d(x, kernels, None, module.stride, module.padding, module.dilation).flatten(2)

        def collect(g: Tensor) -> None:
            rows[name] = (left @ g.flatten(2)) @ small.mT

        return collect

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            tips.append(output.requires_grad_())
        rule = conv2d if isinstance(module, nn.Conv2d) else linear
        output.register_hook(rule(module, args[0].detach()))

    return hook
