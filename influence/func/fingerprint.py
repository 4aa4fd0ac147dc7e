"""Fingerprints: a hash of settings that is the same in every process and on every machine."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a setting in its canonical form."""
    return hashlib.sha256(json.dumps(canonical(value), sort_keys=True).encode()).hexdigest()


def weights_hash(loss_fn: Any, params: Mapping[str, Tensor]) -> str:
    """Return the hash of every number that a loss function's model computes with.

    These are the parameters, those it closes over, its buffers, and what its quantised layers unpack their weights by.
    It does not depend on the device, nor on which of the parameters are differentiated. A reference model is part of
    the loss, not of the weights.
    """
    return fingerprint({**getattr(loss_fn, "constants", {}), **getattr(loss_fn, "frozen", {}), **params})


def canonical(value: Any) -> Any:
    """Return a setting in a form which JSON writes the same way everywhere; tensors become hashes of their bytes."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous()
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
        return {"tensor": digest, "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in sorted(value.items(), key=lambda item: str(item[0]))}
    if is_dataclass(value):
        return {type(value).__name__: canonical(vars(value))}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {type(value).__name__: canonical(value._asdict())}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, float):
        return value.hex()
    return value


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two nestings differ, by the dotted path to it, and both values; `None` where one has nothing.

    Example:
        >>> list(differences({"project": {"dim": 8, "seed": 0}}, {"project": {"dim": 8, "seed": 1}}))
        [('project.seed', 0, 1)]
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path, one, other


def describe(value: Any) -> str:
    """Return a setting as `repr` should show it: tensors by shape, long mappings by length."""
    if isinstance(value, Tensor):
        return f"<{'×'.join(map(str, value.shape))}>"
    if isinstance(value, Mapping) and len(value) > 3:
        return f"<{len(value)} entries>"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return f"<{type(value).__name__}>"
    return repr(value)
