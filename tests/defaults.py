"""Try every pair of a curvature fit and what reads it, of a transform and a sink, at their defaults, on four models.

`python -m tests.defaults` prints a table, and ends with 1 if two defaults refuse one another.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from influence import (
    Attributor,
    Transform,
    as_blocks,
    build,
    chain,
    eigen_whiten,
    fold,
    functionalize,
    hessians,
    kfac_whiten,
    one_sided,
    per_example_grads,
    precondition,
    project,
    sinks,
    two_sided,
    unit_norm,
)

NOT_SEPARABLE = {("autocorrelation", "kfac_whiten"), ("ekfac", "kfac_whiten")}
"""`kfac_whiten` sketches each side of `L G Rᵀ`: a dense curvature, or a corrected spectrum, has no sides."""


def gpt2() -> nn.Module:
    """Return a small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def models() -> dict[str, tuple[Any, Any, list[Any]]]:
    """Return four models as functions, each with two batches that do not say which examples they hold."""
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    images, ids = torch.randn(8, 1, 6, 6), torch.randint(0, 11, (8, 6))

    def mlp(bias: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))

    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    made = {"mlp": (mlp(True), x), "no bias": (mlp(False), x), "conv": (conv, images)}
    found = {name: (*functionalize(net), [(data[:4], y[:4]), (data[4:], y[4:])]) for name, (net, data) in made.items()}
    texts = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    return {**found, "gpt2": (*functionalize(gpt2()), texts)}


READERS: Mapping[str, Callable[[hessians.Factors], tuple[Transform, Transform]]] = {
    "precondition": lambda f: (chain(as_blocks(), precondition(f)), as_blocks()),
    "eigen_whiten": lambda f: (chain(as_blocks(), eigen_whiten(f)),) * 2,
    "kfac_whiten": lambda f: (chain(as_blocks(), kfac_whiten(f)),) * 2,
    "one_sided": lambda f: tuple(one_sided(f)),
    "two_sided": lambda f: tuple(two_sided(f)),
}
TRANSFORMS: Mapping[str, Transform] = {
    "blocks": as_blocks(),
    "project": chain(as_blocks(), project(4)),
    "unit norm": chain(as_blocks(), unit_norm()),
    "all": chain(as_blocks(), project(4), unit_norm()),
}
SINKS = ("mean", "total", "gram", "score", "build, ask")


def read(loss_fn: Any, params: Any, batches: list[Any], reader: str, method: str) -> None:
    """Fit a curvature, and collect the rows of both sides of a reader."""
    factors = hessians.fit(loss_fn, params, batches, hessians.build(method), progress=False)
    query, train = READERS[reader](factors)
    asked = per_example_grads(loss_fn, params, batches[0], transform=query)
    for batch in batches:
        rows = per_example_grads(loss_fn, params, batch, transform=train)
        assert {name: row.shape for name, row in rows.items()} == {name: row.shape for name, row in asked.items()}


def sunk(loss_fn: Any, params: Any, batches: list[Any], transform: Transform, sink: str) -> None:
    """Fold rows into a sink, or build an index of them and ask it."""
    if sink == "build, ask":
        index = build(loss_fn, params, batches, transform=transform, progress=False)
        assert len(Attributor(index).ask(batches[0]).top(2).ids) == 4
        return
    rows = per_example_grads(loss_fn, params, batches[0], transform=transform)
    made = sinks.score(rows) if sink == "score" else getattr(sinks, sink)()
    fold(lambda batch: per_example_grads(loss_fn, params, batch, transform=transform), batches, {"x": made})


def tried(call: Callable[[], None]) -> str:
    """Return what a call says: nothing if all went well."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[tuple[str, str, str], str]:
    """Return what every pair says, by model and both names."""
    found: dict[tuple[str, str, str], str] = {}
    for model, (loss_fn, params, batches) in models().items():
        world = (loss_fn, params, batches)
        for method, reader in itertools.product(hessians.METHODS, READERS):
            if (method, reader) not in NOT_SEPARABLE:
                found[model, method, reader] = tried(partial(read, *world, reader, method))
        for name, sink in itertools.product(TRANSFORMS, SINKS):
            found[model, name, sink] = tried(partial(sunk, *world, TRANSFORMS[name], sink))
    return found


def main() -> int:
    """Print the table."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = refusals()
    for (model, one, other), said in found.items():
        print(f"{model:8} {one:16} {other:14} {said or 'ok'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
