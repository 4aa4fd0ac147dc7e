"""The library promises no hooks and no global state; here every way to break that promise raises when it is called.

A call is the library's when the nearest frame outside torch belongs to `influence`: tests, transformers and torch
itself may do as they like. The guards stand before `influence` is imported, so a name it binds is guarded too.
"""

import functools
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from torch.optim import optimizer

from tests.typed import checked

jaxtyping.jaxtyped = checked  # type: ignore[assignment] # what jaxtyping's hook writes above every function

hypothesis.settings.register_profile("shared", deadline=None)  # a busy machine is slow, and not wrong
hypothesis.settings.load_profile("shared")

HOOK_OWNERS = (
    torch.Tensor,
    torch.nn.Module,
    torch.nn.modules.module,
    torch.optim.Optimizer,
    optimizer,
    torch.autograd.graph,
)

GLOBAL_STATE: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (random, ("seed", "setstate")),
    (np.random, ("seed", "set_state")),
    (
        torch,
        ("manual_seed", "seed", "set_rng_state", "set_default_dtype", "set_default_device", "set_default_tensor_type"),
    ),
    (torch.random, ("manual_seed", "seed", "set_rng_state", "fork_rng")),
    *(
        (owner, ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all"))
        for owner in (torch.cuda, torch.cuda.random)
    ),
)

# The compiler saves and restores the generators around itself, checkpointing around a recomputation.
TORCH_OWN_BUSINESS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.utils.checkpoint")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def called_by_influence(frame: FrameType | None) -> bool:
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if any(within(module, package) for package in TORCH_OWN_BUSINESS):
            return False
        if not any(within(module, package) for package in ("torch", "contextlib", "functools", __name__)):
            return within(module, "influence")
        frame = frame.f_back
    return False


def guard(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if called_by_influence(sys._getframe(1)):
            raise AssertionError(f"`influence` called {name}, which changes state that is not its own")
        return function(*args, **kwargs)

    return guarded


def guarded_names() -> Iterator[tuple[Any, str]]:
    for owner in HOOK_OWNERS:
        yield from ((owner, name) for name in vars(owner) if name.startswith("register_") and "hook" in name)
    for owner, names in GLOBAL_STATE:
        yield from ((owner, name) for name in names if hasattr(owner, name))


GUARDS = [(owner, name, getattr(owner, name)) for owner, name in guarded_names()]


def pytest_configure(config: pytest.Config) -> None:
    for owner, name, function in GUARDS:
        setattr(owner, name, guard(function, f"{owner.__name__}.{name}"))


def pytest_unconfigure(config: pytest.Config) -> None:
    for owner, name, function in GUARDS:
        setattr(owner, name, function)
