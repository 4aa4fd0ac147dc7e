"""Every kind of bad input to sampling and what it answers: `python -m tests.messages_sampling` prints the table."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from influence import sgmcmc
from tests.cases import LLAMA, hf
from tests.messages import Bad, message_of
from tests.test_sgmcmc_runs import bowl_until, classifier

STEEP: dict[str, Any] = {"lr": 1e-2, "n_beta": 1e-6, "batch_size": 2, "num_draws": 40, "progress": False}
QUIET: dict[str, Any] = {"lr": 1e-4, "n_beta": 5.0, "batch_size": 5, "num_chains": 2, "progress": False}


def diverging(**settings: Any) -> sgmcmc.Run:
    data = torch.arange(4.0)
    start = {"w": torch.zeros(2)}
    return sgmcmc.sample(bowl_until(0.6), start, data, {"all": data}, **{**STEEP, **settings})


def sampled(**settings: Any) -> sgmcmc.Run:
    loss_fn, params, data = classifier()
    return sgmcmc.sample(loss_fn, params, data, **{**QUIET, "num_draws": 4, **settings})


def stale(**changed: Any) -> sgmcmc.Run:
    """Run, then ask the same folder for another run; its name is left out of what is printed."""
    loss_fn, params, data = classifier()
    first = {**QUIET, "num_draws": 2}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sgmcmc.sample(loss_fn, params, data, **first, output_path=run)
        weights = changed.pop("params", params)
        try:
            return sgmcmc.sample(loss_fn, weights, data, **{**first, **changed}, output_path=run)
        except ValueError as error:
            raise ValueError(str(error).replace(str(run), "runs/a")) from error


def moved() -> dict[str, Any]:
    return {name: p + 1e-3 for name, p in classifier()[1].items()}


def llama(restriction: Any) -> Any:
    from influence import functionalize

    model = hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1})()
    return sgmcmc.masks(*functionalize(model), restriction)


def verdict(policy: str) -> Any:
    raise ValueError(sgmcmc.llc.estimate(diverging(on_divergence=policy)).verdict)


NARROW = {"2.weight": torch.ones(6, dtype=torch.bool)}
NUMBERS = {"2.weight": torch.ones(3, 6)}

CASES = [
    Bad("a chain that diverges", diverging, ("chain", "diverged: at step", "Lower lr", "on_divergence='drop'")),
    Bad("the same, dropped", lambda: verdict("drop"), ("chain", "diverged and", "dropped")),
    Bad("the same, its prefix kept", lambda: verdict("prefix"), ("diverged at step", "only what came before is here")),
    Bad(
        "the same, within the burn-in",
        lambda: diverging(on_divergence="prefix", num_burnin_steps=100),
        ("within the burn-in of 100", "nothing is left to keep"),
    ),
    Bad(
        "every chain, dropped",
        lambda: diverging(on_divergence="drop", num_chains=1, num_draws=400),
        ("diverged", "Lower lr", "no chain is left"),
    ),
    Bad("a dataset smaller than a batch", lambda: sampled(batch_size=21), ("20 examples", "one batch of 21")),
    Bad(
        "an observable smaller than its batches",
        lambda: sampled(observables={"few": (classifier()[2], 5)}),
        ("observable 'few' has 20 examples", "5 batches of 5", "ask for fewer"),
    ),
    Bad("a mask of a wrong shape", lambda: sampled(restriction=NARROW), ("torch.bool [6]", "[3, 6]", "no broadcast")),
    Bad("a mask of numbers", lambda: sampled(restriction=NUMBERS), ("torch.float32 [3, 6]", "expected torch.bool")),
    Bad("a mask of no parameter", lambda: sampled(restriction={"x": True}), ("['x']", "no parameters", "0.weight")),
    Bad("an unknown restriction", lambda: llama("l0 atn"), ("'l0 atn'", "Near: l0 attn")),
    Bad("a parameter misspelt", lambda: sampled(restriction="2.weigth"), ("'2.weigth'", "Near: 2.weight")),
    Bad("a layer that is not there", lambda: llama("l7"), ("'l7' names no layer", "layers 0 to 0")),
    Bad("a head that is not there", lambda: llama("l0h9"), ("'l0h9' is out of range", "counted from 0")),
    Bad("one draw only, LLC", lambda: sgmcmc.llc.estimate(sampled(num_draws=1)), ("at least two steps", "num_draws")),
    Bad(
        "one draw only, influences",
        lambda: sgmcmc.bif.estimate(sampled(num_draws=1, observables={"all": classifier()[2]})),
        ("at least two draws", "raise num_draws"),
    ),
    Bad(
        "one draw only, susceptibilities",
        lambda: sgmcmc.susceptibility.estimate(
            {"full": sampled(num_draws=1, num_chains=1, observables={"all": classifier()[2]})}, "all"
        ),
        ("at least 2 draws; there are 1", "raise num_draws"),
    ),
    Bad("a stale folder: other weights", lambda: stale(params=moved()), ("runs/a holds a run of another weights",)),
    Bad("a stale folder: another step size", lambda: stale(lr=2e-4), ("another lr: it has 0.0001, this one 0.0002",)),
    Bad(
        "a stale folder: another restriction",
        lambda: stale(restriction="0.*"),
        ("another restriction: it has 'full', this one '0.*'",),
    ),
    Bad(
        "an estimator's needs not kept",
        lambda: sgmcmc.bif.estimate(sampled(keep="moments", observables={"all": classifier()[2]}), level="token"),
        ("kept no losses of positions of 'all'", "keep='tokens'"),
    ),
]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in CASES:
        print(f"* {case.name}:\n    {message_of(case)}")
