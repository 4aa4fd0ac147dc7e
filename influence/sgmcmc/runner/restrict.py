"""Restrictions turn a few words into masks of the weights that move in a chain.

| restriction | what moves |
|---|---|
| `full` | everything |
| `embed`, `unembed` | the embeddings; the output head (the embedding itself, where the two are tied) |
| `l0`, `l0 attn`, `l0 mlp` | a layer, its attention, its MLP |
| `l0h1` | a head: its query rows and output columns, and its key and value rows if no other head shares them |
| `l0g0` | a group: a key and a value head, and all query heads that share them |
| a name or a glob | parameters by name |
| a list | the union |

`stack:l0` says which list of layers, in a model with several. Biases of queries and values go with their rows; those
of keys only where they have a gradient; a bias of the output projection belongs to no head.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor

from influence.families import KEY_BIAS_CANCELS, Place, kind_of, places
from influence.func.transform.blocks import head_slices
from influence.func.transform.layout import Heads
from influence.sgmcmc.samplers.target import Mask
from influence.types import LossFn, Params

Restriction: TypeAlias = str | Sequence[str] | Mask | None
"""Words of the grammar, a union of them, or masks; `None` is `full`."""

PATTERN = re.compile(r"(?:(?P<stack>[^:]+):)?l(?P<layer>\d+)\s*(?:(?P<part>attn|mlp)|(?P<kind>[hg])(?P<number>\d+))?")


def masks(loss_fn: LossFn, params: Params, restriction: Restriction) -> dict[str, Tensor | bool]:
    """Return which entries of which parameters a restriction lets move.

    Args:
        loss_fn: what `functionalize` returned; its layout knows the heads.
        params: the parameters.
        restriction: as in the table above.

    Returns:
        `True` or a boolean tensor per parameter that moves.

    Raises:
        ValueError: if a word is unknown or out of range; near ones are listed.

    Example:
        >>> import torch
        >>> from influence import functionalize
        >>> loss_fn, params = functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)))
        >>> list(masks(loss_fn, params, "1.*"))
        ['1.weight', '1.bias']
    """
    if restriction is None or restriction == "full":
        return dict.fromkeys(params, True)
    if isinstance(restriction, Mapping):
        return {name: True if entries is None else entries for name, entries in restriction.items()}
    words = [restriction] if isinstance(restriction, str) else list(restriction)
    if not words or any(not isinstance(word, str) for word in words):
        raise ValueError(f"a restriction is a word, a list of words or masks by name; got {restriction!r}")
    if len(words) > 1 and "full" in words:
        raise ValueError("'full' in a union moves everything: pass 'full' alone, or leave it out")
    found: dict[str, Tensor | bool] = {}
    for word in words:
        for name, entries in _word(loss_fn, params, word.strip()).items():
            before = found.get(name, False)
            both = isinstance(before, Tensor) and isinstance(entries, Tensor)
            found[name] = before | entries if both else (before if before is True or entries is False else entries)
    return {name: found[name] for name in params if name in found}


def preview(loss_fn: LossFn, params: Params, restriction: Restriction) -> str:
    """Return a tree of the parameters that a restriction lets move, with their shares.

    Example:
        >>> import torch
        >>> from influence import functionalize
        >>> loss_fn, params = functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)))
        >>> print(preview(loss_fn, params, "1.weight"))
        3 of 13 weights move
        0  ░░░░░░░░░░    0.0 %  0 of 9
        1  ████████░░   75.0 %  3 of 4
          weight  3 of 3
    """
    chosen = masks(loss_fn, params, restriction)

    def count(name: str) -> int:
        entries = chosen.get(name)
        return int(entries.sum()) if isinstance(entries, Tensor) else params[name].numel() if entries else 0

    modules: dict[str, list[str]] = {}
    for name in params:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    total = sum(p.numel() for p in params.values())
    lines, width = [f"{sum(map(count, params)):,} of {total:,} weights move"], max(map(len, modules))
    for module, names in modules.items():
        some, all_ = sum(map(count, names)), sum(params[name].numel() for name in names)
        filled = round(10 * some / all_)
        bar = "█" * filled + "░" * (10 - filled)
        lines.append(f"{module.ljust(width)}  {bar}  {100 * some / all_:5.1f} %  {some:,} of {all_:,}")
        moving = [name for name in names if count(name)]
        lines += [f"  {name.rpartition('.')[2]}  {count(name):,} of {params[name].numel():,}" for name in moving]
    return "\n".join(lines)


def _word(loss_fn: LossFn, params: Params, word: str) -> dict[str, Tensor | bool]:
    found = places(params)
    if word == "full":
        return dict.fromkeys(params, True)
    if word.lower() in ("embed", "unembed"):
        return dict.fromkeys(_outside(loss_fn, found, word.lower()), True)
    match = PATTERN.fullmatch(word) or PATTERN.fullmatch(word.lower())
    if match is None:
        hits = [name for name in params if fnmatchcase(name, word)]
        if not hits:
            raise ValueError(
                f"the restriction {word!r} is no word of the grammar and matches none of {len(params)} parameters. "
                f"Near: {', '.join(_near(word, params, found))}"
            )
        return dict.fromkeys(hits, True)
    layer = _layer(found, match["stack"], int(match["layer"]), word)
    if match["kind"]:
        own = [name for name in layer if found[name].part == "attention"]
        return _heads(loss_fn, params, own, match["kind"], int(match["number"]), word)
    part = {"attn": "attention", "mlp": "mlp", None: None}[match["part"]]
    chosen = [name for name in layer if part is None or found[name].part == part]
    if not chosen:
        have = sorted({found[name].part for name in layer})
        raise ValueError(f"the restriction {word!r} matches nothing: that layer has {have}; use a glob over names")
    return dict.fromkeys(chosen, True)


def _near(word: str, params: Params, found: Mapping[str, Place]) -> list[str]:
    layers = sorted({p.layer for p in found.values() if p.layer is not None})
    usual = ["full", "embed", "unembed", *(f"l{i}{part}" for i in layers for part in ("", " attn", " mlp", "h0", "g0"))]
    near = get_close_matches(word, [*usual, *params], n=4, cutoff=0.4)
    return near or ["full", *list(params)[:3]]


def _outside(loss_fn: LossFn, found: Mapping[str, Place], word: str) -> list[str]:
    part = "embedding" if word == "embed" else "unembedding"
    names = [name for name, place in found.items() if place.part == part]
    tied = getattr(loss_fn, "unembedding", None)
    if word == "unembed" and not names and isinstance(tied, str) and tied in found:
        return [tied]  # the head is the embedding
    if not names:
        outside = [name for name, place in found.items() if place.layer is None][:5]
        raise ValueError(
            f"the restriction {word!r} finds no {part} by name (if it is tied, it is 'embed'); outside the layers "
            f"there are {outside}: name one"
        )
    return names


def _layer(found: Mapping[str, Place], stack: str | None, layer: int, word: str) -> list[str]:
    stacks = sorted({place.stack for place in found.values() if place.stack is not None})
    if stack is None and len(stacks) > 1:
        raise ValueError(
            f"the restriction {word!r} may mean any of the lists of layers {stacks}: write '{stacks[0]}:{word}'"
        )
    at = stacks[0] if stack is None and stacks else stack
    names = [name for name, place in found.items() if place.stack == at and place.layer == layer]
    if not names:
        have = sorted({p.layer for p in found.values() if p.stack == at and p.layer is not None})
        listed = f"{at} has layers {have[0]} to {have[-1]}" if have else f"lists of layers are {stacks or 'not there'}"
        raise ValueError(f"the restriction {word!r} names no layer: {listed}")
    return names


def _heads(
    loss_fn: LossFn, params: Params, names: Sequence[str], kind: str, number: int, word: str
) -> dict[str, Tensor | bool]:
    """Return the entries of one head, or of one group, among the weights of an attention."""
    layout: Any = getattr(loss_fn, "layout", None)
    known: dict[str, Heads] = {}
    if layout is not None:
        known = {name: layout[name].heads for name in names if layout[name].heads is not None}
    if not known:
        raise ValueError(
            f"the restriction {word!r} needs to know the heads, and the layout of this loss has none there: its family "
            "is not in influence.families, or it is no functionalize()d model; pass masks by name"
        )
    queries = max(heads.count for heads in known.values())
    kv = min(heads.kv or heads.count for heads in known.values())
    most = queries if kind == "h" else kv
    if number >= most:
        what = "heads" if kind == "h" else "groups of heads"
        raise ValueError(f"the restriction {word!r} is out of range: that layer has {most} {what}, counted from 0")
    group = queries // kv
    of_query = {number} if kind == "h" else set(range(number * group, (number + 1) * group))
    of_key = {number} if kind == "g" or group == 1 else set()
    family = getattr(loss_fn, "family", None)
    found: dict[str, Tensor | bool] = {}
    for name, heads in known.items():
        param = layout[name]
        axis = int(param.transposed) if heads.axis == "out" else int(not param.transposed)
        alone = _kind(family, name, heads, queries)
        slices = list(_slices(heads, alone, of_query, of_key))
        if not slices:
            continue
        found[name] = _sliced(params[name], axis, [(start, stop) for _, start, stop in slices])
        if heads.axis == "out" and param.bias in params:
            kept = [(start, stop) for which, start, stop in slices if which != "k" or family not in KEY_BIAS_CANCELS]
            if kept:
                found[param.bias] = _sliced(params[param.bias], 0, kept)
    return found


def _slices(heads: Heads, alone: str, of_query: set[int], of_key: set[int]) -> Iterator[tuple[str, int, int]]:
    """Yield `(q, k, v or o, start, stop)` of the slices of a weight that belong to chosen heads.

    A fused weight says the kind of each slice; a weight of one kind has `alone`.
    """
    for suffix, start, stop in head_slices(heads):
        which, _, head = suffix.rpartition("head_")
        which = which.rstrip(".") or alone
        if int(head) in (of_key if which in ("k", "v") else of_query):
            yield which, start, stop


def _kind(family: str | None, name: str, heads: Heads, queries: int) -> str:
    """Return whether a weight of one kind makes queries, keys, values or outputs (`q`, `k`, `v`, `o`).

    By its family's record, and where there is none by its heads: a weight with fewer heads than there are queries is
    shared by a group of them. Without groups, keys and values are cut as queries are.
    """
    known = kind_of(family, name.replace(".base_layer.", ".").removesuffix(".weight"))
    return known or ("o" if heads.axis == "in" else "v" if heads.count < queries else "q")


def _sliced(param: Tensor, axis: int, slices: Sequence[tuple[int, int]]) -> Tensor:
    mask = torch.zeros(param.shape, dtype=torch.bool)
    for start, stop in slices:
        mask.narrow(axis, start, stop - start).fill_(True)
    return mask
