"""Susceptibilities: how each part of a network answers to each token."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from influence import viz
from influence.data.slices import pad_of
from influence.pipelines.chains.examples import Example, examples, words_of
from influence.pipelines.chains.finished import Samples, sampled, tokenizer_of
from influence.pipelines.chains.settings import SamplingConfig, sampling_of, with_keep
from influence.pipelines.frame.configs import at_least
from influence.pipelines.frame.outcome import Outcome, Say, as_row, quiet
from influence.pipelines.frame.texts import short
from influence.sgmcmc import susceptibility
from influence.sgmcmc.estimators.susceptibility import Susceptibility
from influence.store import output_file
from influence.terminal import table

WIDTH = 40
"""Characters of an example that are shown, where the loss is one per example."""


@dataclass(frozen=True)
class SusceptibilitiesConfig(SamplingConfig):
    r"""Susceptibilities: the covariance of a component's excess loss on a task with each token's loss.

    influence susceptibilities runs/chi --model gpt2 --dataset corpus.jsonl \
        --observables task=corpus.jsonl code=code.jsonl --restrictions l0h0 l0h1 l1h0 l1h1 --plot chi.png

    For every restriction chains are run in which only it moves, and chains in which all weights do. Negative: the
    component expresses the token; positive: it suppresses it.

    Attributes:
        run: the run directory; of a finished run with full among its restrictions, it is read, and needs no model.
        model: the model.
        data: the data that chains are trained on.
        observables: what is measured at every draw: name=dataset, or a word for the data themselves.
        observed: use the first so many examples of each observable.
        restrictions: the components: l0, 'l0 attn', 'l0 mlp', l0h1, l0g0, embed, unembed, names and globs of
            parameters; a plus joins them. full is always there.
        sampling_task: the observable whose loss is the task's; default the first.
        probes: observables whose tokens are probed; default all.
        sign: multiplies the result.
        scale: multiplies it too; with n_beta it is how fast the component's mean loss answers to more such data.
        top_k: tokens that are shown at either end, for each restriction.
        save: write every token's susceptibilities and their errors to this .csv file.
        plot: draw tokens in the plane of the first two principal components into this file (.png, .pdf, .svg).
        chains: the chains.
        loss: the loss.
        pace: how they are run.
    """

    observables: tuple[str, ...] = ("data",)
    observed: int = 64
    restrictions: tuple[str, ...] = ()
    sampling_task: str | None = None
    probes: tuple[str, ...] = ()
    sign: Literal[1, -1] = 1
    scale: float = 1.0
    top_k: int = 4
    save: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 1, "observed", "top_k")
        at_least(self, -math.inf, "scale")


def run(config: SusceptibilitiesConfig, say: Say = quiet) -> Outcome:
    """Sample if need be, and probe the tokens.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        A summary of every restriction.
    """
    _check(config)
    c = config
    chains = with_keep(c.chains, "moments")
    words = ("full", *(word for word in c.restrictions if word != "full"))
    what = sampling_of(config, chains=chains, restrictions=words)
    samples = sampled("susceptibilities", config, what, say)
    if isinstance(samples, Outcome):
        return samples
    tokenizer = tokenizer_of(what)
    return outcome(config, samples, examples_of(samples, words_of(tokenizer), pad_of(tokenizer)))


def examples_of(samples: Samples, words: Any, pad: int) -> dict[str, list[Example]]:
    """Return what the examples of every observable say."""
    whole = next(iter(samples.runs.values()))
    return {name: examples(whole, [name], words, pad) for name in whole.observables}


def outcome(config: SusceptibilitiesConfig, samples: Samples, said: Mapping[str, list[Example]]) -> Outcome:
    """Return the susceptibilities of finished chains."""
    c = config
    if not said:
        raise ValueError(
            f"{samples.directory} has no observables, whose tokens may be probed: sample with --observables"
        )
    task = c.sampling_task or next(iter(said))
    for name in (task, *c.probes):
        if name not in said:
            raise ValueError(f"there is no observable {name!r}; there are {', '.join(said)}")
    found = susceptibility.estimate(samples.runs, task, c.probes or None, sign=c.sign, scale=c.scale)
    names = list(next(iter(found.values())).restrictions)
    matrix = torch.cat([each.matrix() for each in found.values()])
    errors = torch.cat([each.stderr[each.labelled] for each in found.values()])
    tokens = [word for name in found for example in said[name] for word in example.tokens]
    kind = "examples" if all(each.labelled.shape[1] == 1 for each in found.values()) else "tokens"
    tokens = [short(word, WIDTH) for word in tokens] if kind == "examples" else tokens
    groups = [name for name in found for example in said[name] for _ in example.tokens]
    summary: list[list[Any]] = []
    facts: dict[str, Any] = {**samples.facts, "sampling_task": task, "tokens": len(tokens), "restrictions": {}}
    for k, name in enumerate(names):
        column = matrix[:, k]
        order = column.argsort()
        low, high = order[: c.top_k].tolist(), order.flip(0)[: c.top_k].tolist()
        clear = float((column.abs() > 2 * errors[:, k]).double().mean())
        unclear = bool(errors[:, k].isnan().any())
        facts["restrictions"][name] = {
            "mean": float(column.mean()),
            "mean_absolute": float(column.abs().mean()),
            "mean_stderr": None if unclear else float(errors[:, k].mean()),
            "clear": None if unclear else clear,
            "expresses": [{"token": tokens[i], "value": float(column[i])} for i in low],
            "suppresses": [{"token": tokens[i], "value": float(column[i])} for i in high],
        }
        summary.append(
            [
                name,
                float(column.abs().mean()),
                "" if unclear else f"{100 * clear:.0f} %",
                " ".join(f"{tokens[i].strip()!r}" for i in low),
                " ".join(f"{tokens[i].strip()!r}" for i in high),
            ]
        )
    head = ["restriction", "mean |χ|", "beyond 2 s.e.", "expresses most", "suppresses most"]
    text = f"{len(tokens):,} {kind}, the loss on {task!r} as the task\n{table(head, summary)}"
    if c.save is not None:
        _save(c.save, found, said)
        text += f"\n{c.save}"
    if c.plot is not None:
        drawn = viz.susceptibility_plane(matrix, names, tokens, groups if len(found) > 1 else (), kind=kind)
        viz.save(drawn, c.plot)
        text += f"\n{c.plot}"
    return Outcome(c.run, facts, text)


def _save(path: str, found: Mapping[str, Susceptibility], said: Mapping[str, list[Example]]) -> None:
    names = list(next(iter(found.values())).restrictions)
    with output_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["observable", "index", "position", "token", *names, *(f"{name} s.e." for name in names)]
        writer.writerow(as_row(head))
        for name, each in found.items():
            for row, example in enumerate(said[name]):
                for position, token in zip(example.labelled, example.tokens, strict=True):
                    values = [*each.value[row, position].tolist(), *each.stderr[row, position].tolist()]
                    writer.writerow(as_row([name, example.number, position, token, *values]))


def _check(config: SusceptibilitiesConfig) -> None:
    """Refuse what does not fit, before the chains are run."""
    if config.plot is not None:
        viz.check(config.plot)
    if config.save is not None and Path(config.save).suffix != ".csv":
        raise ValueError(f"--save writes .csv files; got {config.save}")
    if config.model.model and not {*config.restrictions} - {"full"}:
        raise ValueError("there is no component to probe: pass --restrictions, such as l0h0 l0h1 or 'l0 attn' 'l0 mlp'")
    known = [word.partition("=")[0] for word in config.observables]
    asked = [name for name in (config.sampling_task, *config.probes) if name is not None and name not in known]
    if config.model.model and asked:
        raise ValueError(f"there is no observable {asked[0]!r}; --observables has {', '.join(known)}")
