"""Blocks: parameters as oriented matrices `[o, i]`, with their biases, whole or head by head."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from influence.func.transform.chain import Stage, Step, Transform
from influence.func.transform.folding import Block, Folded, Part, into_blocks, sliced
from influence.func.transform.layout import Heads


def as_blocks(bias: bool = False) -> Transform:
    r"""View every parameter's gradient as its block.

    A matrix becomes `[o, i]`, output first whatever the module stores: Hugging Face's `Conv1D` is transposed, a
    convolution is unfolded (`i` = input channels of a group × kernel), embeddings and anything tied to them keep
    `[V, d]`. Other parameters stay vectors. A block is named by its parameter without `.weight`. Where one parameter
    holds the matrices of several experts, each is a block of its own, `name.expert_3`.

    Args:
        bias: put a matrix's bias behind its last column, `[o, i + 1]`; otherwise it stays a block of its own.

    Returns:
        The transform; it comes first in a chain.

    Example:
        >>> import torch
        >>> from influence import as_blocks, functionalize, per_example_grads
        >>> loss_fn, params = functionalize(torch.nn.Linear(3, 2), loss=lambda y, batch: y.sum(-1))
        >>> rows = per_example_grads(loss_fn, params, (torch.eye(3), torch.zeros(3)), transform=as_blocks(bias=True))
        >>> rows["weight"].shape
        torch.Size([3, 2, 4])
    """
    return Transform((Step("as_blocks", {"bias": bias}, lambda folded: into_blocks(folded, bias), Stage.BLOCKS),))


def split_heads(heads: Mapping[str, Heads | Mapping[str, Any]] | None = None) -> Transform:
    """Split attention blocks into one block per head.

    Args:
        heads: which blocks (globs over block names) have which heads, as `Heads` or a mapping of its fields; `None`
            takes what `functionalize` knows of the model's family from its config.

    Returns:
        The transform. Blocks are named `name.head_3`, those of a fused weight `name.q.head_3`, `name.k.head_0`,
        `name.v.head_0`. An output projection is sliced on its input side; its bias, which belongs to no head, becomes
        a block `name.bias`.

    Example:
        >>> from influence import Heads, split_heads
        >>> split_heads({"*.q_proj": Heads(12, 64)})
        split_heads(heads={'*.q_proj': {'count': 12, 'size': 64, 'axis': 'out', 'fused': None, 'kv': None}})
    """
    given = None if heads is None else {name: h if isinstance(h, Heads) else Heads(**h) for name, h in heads.items()}

    def extend(folded: Folded) -> Folded:
        if not folded.untouched:
            raise ValueError("heads are slices of untouched blocks: put split_heads() right after as_blocks()")
        found = _assign(folded, given)
        blocks: list[Block] = []
        for block in folded.blocks:
            blocks.extend(_split(block, found[block.name]) if block.name in found else [block])
        return replace(folded, blocks=tuple(blocks))

    def resolve(folded: Folded) -> dict[str, Any]:
        return {"heads": {name: asdict(h) for name, h in _assign(folded, given).items()}}

    settings = {"heads": None if given is None else {name: asdict(h) for name, h in given.items()}}
    return Transform((Step("split_heads", settings, extend, Stage.HEADS, needs_blocks=True, resolve=resolve),))


def _assign(folded: Folded, heads: Mapping[str, Heads] | None) -> dict[str, Heads]:
    names = [block.name for block in folded.blocks]
    if heads is None:
        known = {
            block.name: spec
            for block in folded.blocks
            if (spec := folded.layout[block.parts[0].source].heads) is not None
        }
        if not known:
            raise ValueError(
                "split_heads() knows no attention heads in this model: its family is not in influence.families, "
                "or its attention weights are not among the targets; say which: "
                "split_heads({'*.q_proj': Heads(count, size)})"
            )
        return known
    found: dict[str, Heads] = {}
    for pattern, spec in heads.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = get_close_matches(pattern.removesuffix(".weight"), names, n=3, cutoff=0.3) or names[:5]
            raise ValueError(
                f"split_heads: no block matches {pattern!r}; near misses: {near} (a block is named without .weight)"
            )
        found.update(dict.fromkeys(matched, spec))
    return found


def head_slices(heads: Heads) -> Iterator[tuple[str, int, int]]:
    """Yield `(suffix, start, stop)` of every head along its axis."""
    count, size, kv = heads.count, heads.size, heads.kv or heads.count
    if count % kv:
        raise ValueError(f"{heads}: {count} query heads do not divide into groups of kv={kv} key heads")
    if heads.fused is None:
        yield from ((f"head_{h}", h * size, (h + 1) * size) for h in range(count))
    elif heads.fused == "concatenated":
        for offset, kind, number in ((0, "q", count), (count, "k", kv), (count + kv, "v", kv)):
            yield from ((f"{kind}.head_{h}", (offset + h) * size, (offset + h + 1) * size) for h in range(number))
    elif heads.fused in ("interleaved", "grouped"):
        group = count // kv
        for h in range(count):
            at = h // group * (group + 2) + h % group
            yield f"q.head_{h}", at * size, (at + 1) * size
        for kind, offset in (("k", group), ("v", group + 1)):
            for h in range(kv):
                at = h * (group + 2) + offset
                yield f"{kind}.head_{h}", at * size, (at + 1) * size
    else:
        raise ValueError(f"Heads(fused={heads.fused!r}): expected None, 'concatenated', 'interleaved' or 'grouped'")


def _split(block: Block, heads: Heads) -> list[Block]:
    if len(block.shape) != 2:
        raise ValueError(f"split_heads: block {block.name!r} is a vector {list(block.shape)}; heads split matrices")
    if heads.axis not in ("out", "in"):
        raise ValueError(f"Heads(axis={heads.axis!r}): expected 'out' or 'in'")
    parts, blocks = block.parts, []
    if heads.axis == "in" and len(parts) == 2:
        (weight, bias), shape = parts, block.shape
        assert weight.right is not None
        parts = (Part(weight.source, weight.left, replace(weight.right, after=0)),)
        name = f"{block.name}.bias"
        blocks.append(Block(name, (Part(bias.source, bias.left, None),), shape[:1], name, shape[:1]))
    axis = parts[0].left if heads.axis == "out" else parts[0].right
    assert axis is not None
    length, slices = axis.size, list(head_slices(heads))
    total = sum(stop - start for _, start, stop in slices)
    if total != length:
        raise ValueError(
            f"split_heads: {heads} covers {total} of the {length} entries of {block.name!r} along its {heads.axis!r} "
            f"axis; count × size must tile it (a fused weight counts its keys and values, kv={heads.kv})"
        )
    blocks.extend(sliced(replace(block, parts=parts), heads.axis, slices))
    return sorted(blocks, key=lambda piece: len(piece.shape) == 1)
