"""States of sinks as files: any nesting of named tuples, tuples, dictionaries, tensors and plain values.

A tensor that appears twice is written once and is one tensor again when read: curvature decomposes what blocks share
once.
"""

from typing import Any

from torch import Tensor

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


def restore(tensors: dict[str, Tensor], structure: Any, like: Any) -> Any:
    """Return the state that `flatten` took apart.

    Args:
        tensors: its tensors.
        structure: the rest of it.
        like: an empty state, which says what kind of named tuple it is.

    Returns:
        The state.
    """

    def walk(node: Any) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: walk(item) for key, item in value.items()}
        return tuple(walk(item) for item in value) if kind == "tuple" else value

    found = walk(structure)
    return type(like)._make(found) if hasattr(like, "_make") else found
