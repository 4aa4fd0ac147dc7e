"""States of sinks as files: any nesting of named tuples, tuples, dictionaries, tensors and plain values.

A tensor that appears twice is written once and is one tensor again when read: curvature decomposes what blocks share
once.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from influence.store import BadFileError

SCHEMA = 1


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Return a state's tensors by name, and the rest of it as JSON can write it.

    Args:
        state: the state.

    Returns:
        Tensors, and the structure that refers to them.

    Example:
        >>> import torch
        >>> from influence.func.sinks import Total
        >>> flatten(Total({"w": torch.ones(2)}, 3))[1]
        {'tuple': [{'dict': {'w': {'tensor': '0'}}}, {'value': 3}]}
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = str(len(names))
                tensors[names[id(value)]] = value
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            return {"dict": {key: walk(item) for key, item in value.items()}}
        if isinstance(value, tuple | list):
            return {"tuple": [walk(item) for item in value]}
        return {"value": value}

    return tensors, walk(state)


def restore(tensors: Mapping[str, Tensor], structure: Any, like: Any, where: str = "a state") -> Any:
    """Return the state that `flatten` took apart.

    Args:
        tensors: its tensors.
        structure: the rest of it.
        like: an empty state, which says what kind of named tuple it is.
        where: the file, for the message.

    Returns:
        The state.

    Raises:
        BadFileError: if the structure is none of `flatten`'s.
    """
    wrong = BadFileError(f"{where} is not what it says: its state is none of this pass. Remove it, or pass --overwrite")

    def walk(node: Any) -> Any:
        if not isinstance(node, dict) or len(node) != 1:
            raise wrong
        ((kind, value),) = node.items()
        if kind == "tensor" and isinstance(value, str) and value in tensors:
            return tensors[value]
        if kind == "dict" and isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if kind == "tuple" and isinstance(value, list):
            return tuple(walk(item) for item in value)
        if kind == "value" and (value is None or isinstance(value, str | int | float)):
            return value
        raise wrong

    found = walk(structure)
    if hasattr(like, "_make"):
        if not isinstance(found, tuple) or len(found) != len(like):
            raise wrong
        return type(like)._make(found)
    return found
