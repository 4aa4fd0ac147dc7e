"""Call everything that is public, and say which call left a global generator of random numbers other than it was.

`python -m tests.generators` prints JSON. It is a process of its own, without the hook that checks types in tests: what
checks an item of a list takes one at random, and so moves Python's generator itself.
"""

import contextlib
import doctest
import functools
import importlib
import inspect
import io
import json
import pkgutil
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

MOVED: dict[str, list[str]] = {}
CALLED: set[str] = set()


def states() -> dict[str, Any]:
    """Return where the three generators stand."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002 -- the global one is what is looked at
        "random": random.getstate(),
    }


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Note down whether what happens here moves a generator."""
    before = states()
    try:
        yield
    finally:
        after = states()
        moved = [which for which in before if before[which] != after[which]]
        if moved:
            MOVED.setdefault(name, moved)


def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a function that is watched while it runs, and while what it yields is asked for."""

    def each(items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with watched(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(name)
        with watched(name):
            result = function(*args, **kwargs)
        return each(result) if inspect.isgenerator(result) else result

    return call


def packages() -> list[ModuleType]:
    """Return the package and its rooms."""
    import influence

    rooms = [f"influence.{room.name}" for room in pkgutil.iter_modules(influence.__path__) if room.ispkg]
    return [influence, *map(importlib.import_module, rooms)]


def public() -> dict[str, tuple[Any, str, Any]]:
    """Return who holds each public function or class, under which name, and what it is."""
    found: dict[str, tuple[Any, str, Any]] = {}
    for package in packages():
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if isinstance(value, ModuleType):
                inside = vars(value).items()
                own = {key: one for key, one in inside if getattr(one, "__module__", None) == value.__name__}
                for key, one in own.items():
                    if not key.startswith("_") and (inspect.isclass(one) or isinstance(one, FunctionType)):
                        found[f"{value.__name__}.{key}"] = (value, key, one)
            elif inspect.isclass(value) or isinstance(value, FunctionType):
                found[f"{package.__name__}.{name}"] = (package, name, value)
    return found


def guard() -> dict[str, list[Any]]:
    """Watch every public function, and every method of a public class; return the objects with examples by name."""
    examples: dict[str, list[Any]] = {}
    replaced: dict[int, Any] = {}
    for name, (holder, key, value) in public().items():
        examples.setdefault(name, [value])
        if inspect.isclass(value):
            if id(value) in replaced:
                continue
            replaced[id(value)] = value
            for method, function in list(vars(value).items()):
                if isinstance(function, FunctionType) and not method.startswith("_"):
                    setattr(value, method, guarded(function, f"{name}.{method}"))
        else:
            made = replaced.setdefault(id(value), guarded(value, name))
            setattr(holder, key, made)
            home = sys.modules[value.__module__]
            if getattr(home, value.__name__, None) is value:
                setattr(home, value.__name__, made)
    return examples


def run_examples(examples: dict[str, list[Any]]) -> list[str]:
    """Run the examples of docstrings; return those that failed."""
    failed = []
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for name, objects in examples.items():
        for value in objects:
            for test in finder.find(value, name, globs=dict(vars(sys.modules[value.__module__]))):
                said = io.StringIO()
                if runner.run(test, out=said.write).failed:
                    failed.append(f"{name}: {said.getvalue()[-600:]}")
    return failed


def run_commands(folder: Path) -> dict[str, int]:
    """Type every command on a tiny world; return each one's exit status."""
    from influence.cli import COMMANDS, main
    from tests.pipeline_world import world

    made = world()
    model, small = ["--model", made / "model"], ["--shard-size", 8, "--projection-dim", 4]
    corpus, asked = ["--dataset", made / "corpus.jsonl"], ["--query.dataset", made / "questions.jsonl"]
    questions = ["--dataset", made / "questions.jsonl"]
    chains = ["--num-draws", 4, "--num-chains", 2, "--num-burnin-steps", 0, "--batch-size", 4, "--lr", 1e-6]
    checkpoint = folder / "checkpoint"
    shutil.copytree(made / "model", checkpoint)
    save_optimizer(checkpoint)
    sums = ["--checkpoints", checkpoint, "--learning-rates", 0.1]

    grams = ["--method", "autocorrelation"]
    typed: list[list[Any]] = [
        ["build", folder / "index", *model, *corpus, *small],
        ["reduce", folder / "mean", *model, *questions, *small],
        ["score", folder / "scores", *model, *corpus, *small, "--query", folder / "mean"],
        ["query", folder / "index", "--text", "babo lives in", "--record", folder / "out.csv"],
        ["query", folder / "index", "--text", "babo lives in", "--faiss.index-factory", "IVF2,Flat"],
        ["hessian", folder / "h", *model, *corpus, *small, *grams],
        ["hessian", folder / "hq", *model, *questions, *small, *grams],
        ["mix", folder / "mix", "--query", folder / "hq", "--index", folder / "h"],
        ["trackstar", folder / "trackstar", *model, *corpus, *asked, "--components", 5, *small],
        ["ekfac", folder / "ekfac", *model, *corpus, *asked, *small],
        ["trak", folder / "trak", *model, *corpus, *asked, "--shard-size", 8, "--projection-dim", 16],
        ["tracin", folder / "tracin", *model, *corpus, *asked, *sums, *small],
        ["less", folder / "less", *model, *corpus, *asked, *sums, "--shard-size", 8, "--projection-dim", 16],
        ["sample", folder / "chains", *model, *corpus, *chains, "--observables", "data"],
        ["llc", folder / "llc", *model, *corpus, *chains, "--plot", folder / "llc.png"],
        ["bif", folder / "bif", *model, *corpus, *chains, "--observed", 4, "--plot", folder / "bif.png"],
        ["susceptibilities", folder / "chi", *model, *corpus, *chains, "--observed", 4, "--restrictions", "l0h0"],
        ["recall", folder / "index", "--gold", made / "questions.jsonl", *questions],
        ["inspect", folder / "index", "--verify"],
        ["explore", folder / "index", "--to", folder / "page.html"],
        ["export", folder / "index", "--to", folder / "rows.parquet"],
    ]
    assert {flags[0] for flags in typed} == {*COMMANDS}
    status = {}
    for flags in typed:
        with watched(f"influence {flags[0]}"):
            status[f"influence {flags[0]}"] = main([str(flag) for flag in flags])
    return status


def save_optimizer(checkpoint: Path) -> None:
    """Save the optimizer of a checkpoint, after an update."""
    from influence.models import load

    model = load(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.arange(6)[None]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")


def run_rest(folder: Path) -> None:
    """Call what has no example of its own, and no command that calls it by its public name."""
    import influence
    from influence import (
        as_blocks,
        chain,
        functionalize,
        hessians,
        index,
        per_example_grads,
        project,
        sgmcmc,
        sinks,
        train,
    )
    from influence.sgmcmc import theory
    from tests.test_train_callback import TARGETS, TRANSFORM, trainer_of

    model = torch.nn.Linear(3, 2, bias=False)
    net = functionalize(model)
    batch = {"input": torch.eye(3), "labels": torch.tensor([0, 1, 1]), "index": torch.arange(3)}
    factors = hessians.ekfac.fit(*net, [batch], progress=False)
    kfac = hessians.kfac.fit(*net, [batch], labels="exact", progress=False)
    for method in (hessians.shampoo, hessians.tkfac):
        hessians.step(*net, batch, method.build(), labels="data")
    rows = per_example_grads(*net, batch, transform=chain(as_blocks(), project(2)))
    whitened = [
        chain(as_blocks(), made) for made in (influence.eigen_whiten(factors, 2), influence.kfac_whiten(kfac, dim=2))
    ]
    for made in (*whitened, *influence.one_sided(factors), *influence.two_sided(factors)):
        per_example_grads(*net, batch, transform=made)
    influence.kept_energy(factors, 2)
    influence.fold(lambda one: rows, [batch], {"gram": sinks.gram(), "scores": sinks.score(rows)})
    built = influence.build(*net, [batch], folder / "built", transform=chain(as_blocks(), project(2)))
    index.narrowed(influence.open_index(folder / "built"), 1)
    index.memory_sink(index.columns_of(rows))
    index.provenance(*net, rows)
    built.rows()
    draws = sgmcmc.bif.draws
    run = sgmcmc.sample(
        *net, batch, {"q": batch}, lr=1e-3, n_beta=sgmcmc.default_n_beta(3), batch_size=2, num_draws=4, progress=False
    )
    sgmcmc.bif.top_k(draws(run, "q"), draws(run, "q"), 1)
    sgmcmc.llc.wbic(run, 3)
    sgmcmc.rmsprop_sgld.build(sgmcmc.local_posterior(*net, n_beta=1.0), lr=0.1)
    grid = {
        "lrs": [1e-3, 1e-4],
        "localizations": [1.0],
        "n_beta": 1.0,
        "num_draws": 4,
        "batch_size": 2,
        "progress": False,
    }
    influence.viz.plateau(sgmcmc.llc.calibrate(*net, batch, **grid))
    one = torch.ones(1, 1)
    theory.gaussian_susceptibility(one, one[None], one, one, torch.ones(1, dtype=torch.bool))
    influence.attribute.trackstar(*net, train=batch, queries=batch, dim=2, components=1, progress=False)
    scores = influence.attribute.trak(*net, train=batch, queries=batch, dim=4, progress=False)
    scores.save(folder / "scores.h5")
    influence.attribute.load(folder / "scores.h5")
    index.check(built.fingerprint, built.fingerprint)
    direction = train.direction_of(per_example_grads(*net, batch), net[0].layout)
    train.step_for(net[1], direction)
    optimizer = torch.optim.AdamW(model.parameters())
    net[0](dict(model.named_parameters()), batch).sum().backward()
    optimizer.step()
    state = train.read_optimizer(model, optimizer)
    train.scale_by_optimizer(state)
    asked = {"train": batch, "queries": batch, "rates": [1.0], "optimizers": [state]}
    influence.attribute.less(*net, **asked, dim=4, progress=False)
    callback = train.GradientCollectorCallback(folder / "rows", TRANSFORM, targets=TARGETS, engine="loop")
    trainer_of(folder, callback, num_train_epochs=1)[0].train()
    train.epoch_rates(train.read_order(folder / "rows"))
    train.sum_epochs(folder / "rows")


def main() -> None:
    """Print what moved a generator, what failed and what was not called."""
    import matplotlib

    matplotlib.use("agg")
    with watched("import of every room"):
        names = public()
    examples = guard()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        failed = run_examples(examples)
        assert "pytest" not in sys.modules, "tyro draws from Python's generator where it sees pytest, to test itself"
        status = run_commands(Path(folder))
        run_rest(Path(folder))
    first: dict[int, str] = {}  # one of the names of each
    for name, (_, _, value) in names.items():
        if isinstance(value, FunctionType):
            first.setdefault(id(value), name)
    functions = {*first.values()}
    print(
        json.dumps(
            {
                "moved": MOVED,
                "failed": failed,
                "status": status,
                "functions": len(functions),
                "not called": sorted(functions - CALLED),
            }
        )
    )


if __name__ == "__main__":
    main()
