"""Which function a module computes, as far as its settings say: numbers that no weight and no buffer holds.

Two models of the same weights are two functions if a norm has another epsilon, an MLP another activation, attention
another scale. All of that stands in the classes of a module's parts, in their attributes and in its config. What code
alone decides (a forward that was replaced, a constant in a closure) does not: a trial shows it (`func.trial`).
"""

import enum
import functools
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from influence.func.fingerprint import fingerprint

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "where it was saved, by which version, and what it is called": (
        *("name", "name_or_path", "path", "model_name", "model_name_or_path", "tokenizer_name", "tokenizer_class"),
        *("transformers_version", "architectures", "auto_map", "model_tags", "id2label", "label2id"),
    ),
    "the weights and the machine say it, and they are hashed or free": (
        *("dtype", "torch_dtype", "device", "device_map", "hf_device_map", "quantization_config", "kernel_config"),
    ),
    "the same function up to rounding, by another way": (
        *("attn_implementation", "experts_implementation", "fused_attn", "chunk_size_feed_forward", "pretraining_tp"),
        *("gradient_checkpointing", "torchscript", "inplace"),
    ),
    "it acts in training alone, or acted before it": (
        *("training", "initializer_range", "initializer_factor", "warnings_issued", "inference_mode"),
    ),
    "it decides what is returned beside the logits, how text is generated, or a loss which is not ours": (
        *("return_dict", "output_attentions", "output_hidden_states", "generation_config", "loss_type"),
        *("problem_type", "all_tied_weights_keys"),
    ),
    "PEFT's settings of the adapters, whose layers hold what they came to": ("peft_config", "targeted_module_names"),
}
"""Names of attributes and of entries of a config which change no output, by the reason."""
OF_GENERATION = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
"""Entries of a config that a causal model reads in `generate` alone; scripts set them. A classifier pools by them."""
CONFIGS = ("config", "cfg")
"""Attributes that hold a config."""
_LEFT_OUT = frozenset(name for names in LEFT_OUT.values() for name in names)
_INACTIVE = re.compile(r"dropout|pdrop|drop_path|drop_prob|layerdrop|cache")
"""What is inactive where there is no training, and what only remembers."""
_PATH = re.compile(r"(/|~|\.{1,2}/|[A-Za-z]:[\\/])")
_LONG = 400
"""Characters of a value's JSON beyond which its hash is kept."""
_DEEP = 6
"""How far values are nested."""


class _Unknown(Exception):
    """A value that cannot be told by numbers and words; a trial shows what it does."""


def described(module: nn.Module, task: str = "plain") -> dict[str, Any]:
    """Return what a module's function depends on beside its parameters and buffers, as JSON has it.

    The repeated layers are told together: `layers.*.norm.eps` is one value where all have it, or else the list of all.
    What is `None`, false or empty is left out, so that a version of a library which names more says the same.

    Args:
        module: the module, whose parameters may have no storage.
        task: where its labels sit, as `Model.task`.

    Returns:
        The class of every part under its path, attributes under `path.name`, the config under `config.name`.

    Example:
        >>> described(nn.Sequential(nn.Linear(2, 3), nn.GELU(approximate="tanh")))["*"]
        ['Linear', 'GELU']
        >>> described(nn.LayerNorm(3, eps=1e-3))["eps"]
        0.001
    """
    found: dict[str, list[Any]] = {}
    kinds: dict[str, list[str]] = {}
    seen: set[int] = set()
    without = _LEFT_OUT | (frozenset(OF_GENERATION) if task == "causal" else frozenset())
    for path, part in module.named_modules():
        at = ".".join("*" if piece.isdecimal() else piece for piece in path.split("."))
        kinds.setdefault(at or "class", []).append(type(part).__name__)
        for name, value in _told(part, seen, without):
            found.setdefault(f"{at}.{name}" if at else name, []).append(value)
    told = {name: _together(values) for name, values in found.items() if any(map(_says, values))}
    for at, names in kinds.items():
        one = _together(names)
        told[at] = f"{len(names)} × {one}" if len(names) > 1 and isinstance(one, str) else one
    return dict(sorted(told.items()))


def differing(mine: Any, theirs: Any) -> tuple[Any, Any]:
    """Return of two descriptions the entries that differ, `None` where one has none."""
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return mine, theirs
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return {name: mine.get(name) for name in names}, {name: theirs.get(name) for name in names}


def _told(part: nn.Module, seen: set[int], without: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield a part's own attributes, and its config's entries if no other part had the config."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return
    for name, value in vars(part).items():
        replaced = callable(value) and hasattr(type(part), name)
        if replaced or _leaves_out(name, without):
            continue
        if name in CONFIGS and (entries := _entries(value)) is not None:
            if id(value) not in seen:
                seen.add(id(value))
                yield from _flat(name, entries, without)
            continue
        try:
            yield name, _plain(value, without)
        except _Unknown:  # a trial shows what it does
            continue


def _leaves_out(name: str, without: frozenset[str]) -> bool:
    return name.startswith("_") or name in without or _INACTIVE.search(name) is not None


def _entries(config: Any) -> Mapping[str, Any] | None:
    """Return the entries of a config: transformers', a dataclass, a namespace, a dictionary; `None` of others."""
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        return dict(config.to_dict())
    return getattr(config, "__dict__", None)


def _flat(path: str, entries: Mapping[str, Any], without: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config, those within others by their paths."""
    for name, value in entries.items():
        if _leaves_out(str(name), without):
            continue
        if isinstance(value, Mapping) and path.count(".") < _DEEP:
            yield from _flat(f"{path}.{name}", value, without)
            continue
        try:
            yield f"{path}.{name}", _plain(value, without)
        except _Unknown:  # as above
            continue


def _plain(value: Any, without: frozenset[str], deep: int = 0) -> Any:
    """Return a value as JSON has it: numbers, words, functions by name, and what holds such.

    Raises:
        _Unknown: if it is anything else.
    """
    if deep > _DEEP:
        raise _Unknown
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON has no infinity
    if isinstance(value, str):
        return None if _PATH.match(value) else str(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), without, deep + 1)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return [_plain(part, without, deep + 1) for part in parts]
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type):
        return value.__qualname__.rpartition("<locals>.")[2]
    if isinstance(value, Mapping):
        return _known(value, without, deep)
    if is_dataclass(value):
        return {type(value).__name__: _known(vars(value), without, deep)}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, without, deep + 1) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(item, without, deep + 1) for item in value]
    raise _Unknown


def _known(entries: Mapping[Any, Any], without: frozenset[str], deep: int) -> dict[str, Any]:
    """Return the entries of a mapping that can be told."""
    found = {}
    for name, value in entries.items():
        if not _leaves_out(str(name), without):
            try:
                found[str(name)] = _plain(value, without, deep + 1)
            except _Unknown:  # as above
                continue
    return {name: value for name, value in sorted(found.items()) if _says(value)}


def _says(value: Any) -> bool:
    """Whether a value says more than that there is none."""
    return value is not None and value is not False and value not in ("", [], {})


def _together(values: list[Any]) -> Any:
    """Return what parts of one path have: one value if all have it; the hash of long ones."""
    told = values[0] if all(value == values[0] for value in values) else values
    text = json.dumps(told, sort_keys=True)
    return told if len(text) <= _LONG else f"{len(text):,} characters of hash {fingerprint(told)[:16]}"
