"""Training-data attribution and developmental interpretability by pure functions on PyTorch."""

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import Any

from influence.func import similarity, sinks
from influence.func.engine.per_example import explain, per_example_grads, per_example_grads_fn
from influence.func.engine.per_token import per_token_grads
from influence.func.fold import Sink, fold
from influence.func.loss.functionalize import functionalize
from influence.func.transform.blocks import as_blocks, split_heads
from influence.func.transform.chain import Transform, chain
from influence.func.transform.layout import Heads
from influence.func.transform.nested import down_project
from influence.func.transform.precondition import precondition
from influence.func.transform.project import project
from influence.func.transform.scale import Factored, Moments, scale_by_adafactor, scale_by_adam, unit_norm
from influence.func.transform.sides import Sides, one_sided, two_sided
from influence.func.transform.whiten import eigen_whiten, kept_energy, kfac_whiten

__all__ = [
    "Attributor",
    "Factored",
    "FaissConfig",
    "Heads",
    "Moments",
    "Sides",
    "Sink",
    "Transform",
    "as_blocks",
    "attribute",
    "build",
    "chain",
    "data",
    "down_project",
    "eigen_whiten",
    "explain",
    "explorer",
    "fold",
    "functionalize",
    "hessians",
    "index",
    "kept_energy",
    "kfac_whiten",
    "models",
    "one_sided",
    "open_index",
    "per_example_grads",
    "per_example_grads_fn",
    "per_token_grads",
    "precondition",
    "project",
    "scale_by_adafactor",
    "scale_by_adam",
    "sgmcmc",
    "similarity",
    "sinks",
    "split_heads",
    "store",
    "train",
    "two_sided",
    "unit_norm",
    "viz",
]

ROOMS = ("attribute", "data", "explorer", "hessians", "index", "models", "sgmcmc", "store", "train", "viz")
"""Rooms that are imported when they are first asked for."""

LENT = dict.fromkeys(("Attributor", "FaissConfig", "build", "open_index"), "index")
"""Names of such rooms that are to be had from here."""


def __getattr__(name: str) -> Any:
    """Import a room on its first use, and look up the version."""
    if name == "__version__":
        return version("influence")
    if name in ROOMS:
        return import_module(f"influence.{name}")
    if name in LENT:
        return getattr(import_module(f"influence.{LENT[name]}"), name)
    near = get_close_matches(name, __all__, 1)
    raise AttributeError(
        f"module 'influence' has no attribute {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    )
