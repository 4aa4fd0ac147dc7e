"""A model as a tree of layers, blocks, heads and parameter counts, and the default targets in it."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, TypeAlias

from torch import nn

from influence.families import Place, places
from influence.func.loss.functionalize import functionalize, module_layout
from influence.func.transform.layout import Heads, Layout, block_name


def layer_matrices(model: nn.Module) -> tuple[str, ...]:
    """Return the default targets of every pipeline: the matrices of a model's repeated layers.

    Embeddings, unembeddings, norms and biases are not among them, nor are tables inside layers (T5's relative
    positions); fused experts are. Of a model with adapters they are the matrices of the active adapters. A model
    without repeated layers gives all its matrices but embeddings.

    Args:
        model: any module.

    Returns:
        Names of parameters, for `functionalize(model, targets=...)`.

    Raises:
        ValueError: if the model has no matrix.

    Example:
        >>> from torch import nn
        >>> layer = lambda: nn.ModuleDict({"attn": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        >>> layer_matrices(nn.Sequential(nn.Embedding(9, 4), layer(), layer(), nn.Linear(4, 9)))
        ('1.attn.weight', '2.attn.weight')
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    layout = module_layout(model)
    matrices = [
        name
        for name, p in model.named_parameters()
        if layout[name].is_matrix and p.is_floating_point() and id(p) not in tables
    ]
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no matrix to take as a target: name some by targets=")
    where = places(name for name, _ in model.named_parameters())
    inside = [name for name in matrices if where[name].stack is not None] or matrices
    adapters = active_adapters(model)
    return tuple([name for name in inside if name.startswith(adapters)] or inside)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of a PEFT model's active adapter parameters; none for any other model."""
    return tuple(
        f"{name}.{kind}.{adapter}".removeprefix(".")
        for name, module in model.named_modules()
        for kind in getattr(module, "adapter_layer_names", ())
        for adapter in module.active_adapters
    )


PARTS = ("embedding", "attention", "mlp", "other", "unembedding")

Tree: TypeAlias = dict[str, Any]
"""Lines, each with the tree of the lines below it."""


def describe(model: nn.Module) -> str:
    """Describe a model as a tree of its layers, blocks and heads, with the number of parameters of each.

    Layers that are alike are described once. Blocks are `[o, i]`, output first whatever the module stores, and
    `4 × [o, i]` where one parameter holds four experts. Default targets of pipelines have a star.
    Integers that store a quantised weight are not counted.

    Args:
        model: any module.

    Returns:
        The tree, to print.

    Example:
        >>> from torch import nn
        >>> print(describe(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))))
        Sequential: 81 parameters, float32 on cpu
        ├─ 0 [9, 4] 36
        └─ 1* [9, 4] + bias 45
        * default targets: 1 matrices, 36 parameters
    """
    layout = functionalize(model, loss=lambda output, batch: output)[0].layout
    layout = Layout({name: param for name, param in layout.params.items() if param.dtype.is_floating_point})
    where, starred = places(layout.params), {*layer_matrices(model)}
    stacks: dict[str | None, list[str]] = {}
    for name, place in where.items():
        stacks.setdefault(place.stack, []).append(name)
    outside = _parts(stacks.pop(None, []), where, layout, starred)
    root: Tree = {line: below for line, below in outside.items() if line.startswith("embedding")}
    for stack, names in stacks.items():
        branch, count = _layers(names, where, layout, starred)
        root[f"{stack or 'items'} × {count}: {_count(names, layout)}"] = branch
    root.update(outside)
    for tie, owner in _ties(model):
        root[f"{tie}: tied to {owner}"] = {}
    title = f"{_title(model, layout)}: {_count(layout.params, layout)} parameters, {_kinds(layout)}"
    footer = f"* default targets: {len(starred)} matrices, {_count(starred, layout)} parameters"
    return "\n".join((title, *_lines(root), footer))


def _layers(names: list[str], where: Mapping[str, Place], layout: Layout, starred: set[str]) -> tuple[Tree, int]:
    """Return a branch for each kind of layer in a stack, and the number of layers."""
    layers: dict[int, list[str]] = {}
    for name in names:
        layers.setdefault(where[name].layer or 0, []).append(name)
    alike: dict[tuple, list[int]] = {}
    for layer, held in layers.items():
        alike.setdefault(tuple((where[name].within, layout[name].shape) for name in held), []).append(layer)
    tree: Tree = {}
    for same in alike.values():
        held = layers[same[0]]
        line = f"{_ranges(same)}: {_count(held, layout)}{' each' if len(same) > 1 else ''}"
        tree[line] = _parts(held, where, layout, starred)
    return tree, len(layers)


def _parts(names: list[str], where: Mapping[str, Place], layout: Layout, starred: set[str]) -> Tree:
    """Return a branch for each part with its blocks below; if nothing has a part, the blocks. Biases join matrices."""
    partners = {layout[name].bias for name in names}
    tree: Tree = {}
    for part in PARTS:
        held = [name for name in names if where[name].part == part]
        if not held:
            continue
        below: Tree = {}
        tree[f"{part}: {_count(held, layout)}"] = below
        for name in held:
            if name in partners:
                continue
            param = layout[name]
            bias = [param.bias] if param.bias is not None else []
            experts = f"{param.experts} × " if param.experts else ""
            shape = f"{experts}{list(param.one)}{' + bias' if bias else ''}"
            star = "*" if name in starred else ""
            heads = f", {_heads(param.heads)}" if param.heads else ""
            below[f"{block_name(where[name].within)}{star} {shape} {_count([name, *bias], layout)}{heads}"] = {}
    return below if {where[name].part for name in names} == {"other"} else tree


def _ties(model: nn.Module) -> list[tuple[str, str]]:
    """Return the second names of tied parameters, each with the first."""
    first = {id(p): name for name, p in model.named_parameters()}
    again = model.named_parameters(remove_duplicate=False)
    return [(block_name(name), block_name(first[id(p)])) for name, p in again if first[id(p)] != name]


def _lines(tree: Tree, indent: str = "") -> Iterator[str]:
    """Yield the lines of a tree with its branches drawn."""
    for at, (line, below) in enumerate(tree.items(), 1):
        last = at == len(tree)
        yield f"{indent}{'└─' if last else '├─'} {line}"
        yield from _lines(below, indent + ("   " if last else "│  "))


def _title(model: nn.Module, layout: Layout) -> str:
    family = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" ({family})" if family else "")


def _kinds(layout: Layout) -> str:
    dtypes = dict.fromkeys(str(param.dtype).removeprefix("torch.") for param in layout.params.values())
    devices = dict.fromkeys(str(param.device) for param in layout.params.values())
    return f"{' and '.join(dtypes)} on {' and '.join(devices)}"


def _count(names: Iterable[str], layout: Layout) -> str:
    return f"{sum(prod(layout[name].shape) for name in names):,}"


def _heads(heads: Heads) -> str:
    if heads.fused is None:
        return f"{heads.count} heads × {heads.size}{' (inputs)' if heads.axis == 'in' else ''}"
    kv = heads.kv or heads.count
    return f"{heads.count} query and {kv} key heads × {heads.size}, {heads.fused}"


def _ranges(numbers: list[int]) -> str:
    """Return numbers as ranges, `0, 2–4`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
