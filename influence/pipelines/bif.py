"""Bayesian influence functions: which examples' losses move together under the posterior."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from influence import viz
from influence.data.slices import pad_of
from influence.pipelines.chains.examples import examples, words_of
from influence.pipelines.chains.finished import Samples, sampled, tokenizer_of
from influence.pipelines.chains.posterior import Posterior
from influence.pipelines.chains.settings import SamplingConfig, sampling_of, with_keep
from influence.pipelines.frame.configs import at_least
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.texts import short
from influence.sgmcmc import Run as Sampled
from influence.sgmcmc import bif
from influence.store import output_file
from influence.terminal import table

SHOWN = 3
"""Queries that are shown, unless some are named."""


@dataclass(frozen=True)
class BifConfig(SamplingConfig):
    r"""Bayesian influence functions: how the losses of two examples move together around the trained weights.

    influence bif runs/bif --model gpt2 --dataset corpus.jsonl --observables questions=q.jsonl train=corpus.jsonl \
        --rows questions --columns train --plot bif.png

    A positive influence means that what lowers the one loss lowers the other. --sign -1 --scale N_BETA gives the
    paper's: what upweighting one example does to the loss of the other.

    Attributes:
        run: the run directory; of a finished run with observables, it is read, and needs no model.
        model: the model.
        data: the data that chains are trained on.
        observables: what is measured at every draw: name=dataset, or a word for the data themselves.
        observed: use the first so many examples of each observable.
        restriction: which weights move: full, embed, unembed, l0, 'l0 attn', 'l0 mlp', l0h1, l0g0, names and globs of
            parameters; a plus joins them. Of a run with several, the one to read.
        rows: observables whose examples are the queries; default all.
        columns: observables whose examples are found; default those of --rows, or all.
        level: of whole examples, or of every pair of tokens.
        statistic: correlation, which a token's own scale does not change, or covariance.
        pooling: stacked takes all draws together; within centres each chain by itself, for chains that sit in
            different places; mean is of the chains' average.
        average: at the token level, the mean over each pair's tokens, without forming them.
        sign: multiplies the influences.
        scale: multiplies them too.
        top_k: examples that are shown at either end, for each query.
        query: numbers of the queries to show, among --rows; default the first three.
        pair: the two examples, among rows and columns, whose tokens --plot shows; default the first query and the
            example it moves with most.
        width: characters of an example that are shown.
        save: write the whole matrix to this .npy file.
        plot: draw a heat map into this file (.png, .pdf, .svg): of examples, or of the tokens of --pair.
        chains: the chains.
        loss: the loss.
        pace: how they are run.
    """

    observables: tuple[str, ...] = ("data",)
    observed: int = 64
    restriction: str = "full"
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    level: Literal["sequence", "token"] = "sequence"
    statistic: Literal["correlation", "covariance"] = "correlation"
    pooling: Literal["stacked", "within", "mean"] = "stacked"
    average: bool = False
    sign: Literal[1, -1] = 1
    scale: float = 1.0
    top_k: int = 5
    query: tuple[int, ...] = ()
    pair: tuple[int, int] | None = None
    width: int = 80
    save: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 1, "observed", "top_k")
        at_least(self, 2, "width")
        at_least(self, -math.inf, "scale")


def run(config: BifConfig, say: Say = quiet) -> Outcome:
    """Sample if need be, and relate the examples.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The strongest influences of some queries.
    """
    _check(config)
    c = config
    chains = with_keep(c.chains, "tokens" if c.level == "token" else "sequences")
    what = sampling_of(config, chains=chains, restrictions=(c.restriction,))

    def fits(made: Posterior) -> None:
        _check_numbers(c, {name: source.size for name, source in made.observables.items()})

    samples = sampled("bif", config, what, say, fits)
    if isinstance(samples, Outcome):
        return samples
    chosen = chosen_of(samples, c.restriction)
    if not chosen.observables:
        raise ValueError(
            f"{samples.directory} has no observables, whose examples may be related: sample with --observables"
        )
    tokenizer = tokenizer_of(what)
    words, pad = words_of(tokenizer), pad_of(tokenizer)
    left = examples(chosen, c.rows, words, pad)
    right = examples(chosen, c.columns or c.rows, words, pad)
    queries = c.query or tuple(range(min(SHOWN, len(left))))
    if not c.model.model:  # a finished run, whose examples are known only now
        _check_numbers(c, {name: len(each.index) for name, each in chosen.observables.items()})
    facts: dict[str, Any] = {**samples.facts, "statistic": c.statistic, "level": c.level, "queries": []}
    blocks = []
    for number in queries:
        row, error = related(config, chosen, number)
        ends = strongest(row, c.top_k, exclude=number if left == right else None)
        facts["queries"].append(
            {
                "query": left[number].facts(),
                **{
                    side: [
                        {
                            **right[i].facts(),
                            "influence": float(row[i]),
                            "stderr": None if error is None else float(error[i]),
                        }
                        for i in at
                    ]
                    for side, at in ends.items()
                },
            }
        )
        blocks.append(shown(config, left[number], right, row, error, ends))
    text = "\n".join(blocks)
    for path in (c.save, c.plot):
        if path is not None:
            (_save if path == c.save else _plot)(config, chosen, path, left, right, words)
            text += f"\n{path}"
    return Outcome(c.run, facts, text)


def chosen_of(samples: Samples, restriction: str) -> Sampled:
    """Return the run of a restriction.

    Raises:
        ValueError: listing those there are.
    """
    if restriction not in samples.runs:
        raise ValueError(
            f"{samples.directory} has no chains of the restriction {restriction!r}; it has {', '.join(samples.runs)}: "
            "name one with --restriction"
        )
    return samples.runs[restriction]


def related(config: BifConfig, run: Sampled, number: int) -> tuple[Tensor, Tensor | None]:
    """Return a query's influences with every column, and their standard errors where they are known."""
    averaged = config.level == "token"  # tokens of a pair are many: a query's list is of their mean
    found = estimated(config, run, average=averaged, row_range=slice(number, number + 1), stderr=True)
    assert found.stderr is not None
    known = bool(found.stderr.isfinite().any())
    return found.influences[0].double(), found.stderr[0].double() if known else None


def strongest(row: Tensor, k: int, exclude: int | None) -> dict[str, list[int]]:
    """Return the places of the largest and the smallest influences; a loss that does not vary has none."""
    order = [i for i in row.argsort(descending=True).tolist() if i != exclude and bool(row[i].isfinite())]
    k = min(k, len(order))
    return {"most": order[:k], "least": order[len(order) - k :][::-1]}


def shown(config: BifConfig, query: Any, right: Sequence[Any], row: Tensor, error: Tensor | None, ends: Any) -> str:
    """Return a query's strongest influences for a terminal."""
    lines = [f"{query.title} {short(query.text, config.width)}"]
    if not ends["most"]:
        return f"{lines[0]}\n  moves with none: there is no other example, or its loss or all others' do not vary"
    for title, side in (("moves with", "most"), ("moves against", "least")):
        rows = [
            [
                float(row[i]),
                "" if error is None else f"± {float(error[i]):.2g}",
                right[i].title,
                short(right[i].text, config.width),
            ]
            for i in ends[side]
        ]
        lines += [f"  {title}", table([config.statistic, "s.e.", "example", "text"], rows, "    ")]
    return "\n".join(lines)


def estimated(config: BifConfig, run: Sampled, stderr: bool = False, **some: Any) -> bif.BIF:
    """Return the influences that are asked for, or some of them."""
    return bif.estimate(
        run,
        config.rows or None,
        config.columns or config.rows or None,
        level=config.level,
        statistic=config.statistic,
        pooling=config.pooling,
        sign=config.sign,
        scale=config.scale,
        stderr=stderr,
        **some,
    )


def _save(config: BifConfig, run: Sampled, path: str, left: Any, right: Any, words: Any) -> None:
    import numpy

    influences = estimated(config, run, average=config.average).influences.numpy()
    with output_file(path) as name, open(name, "wb") as file:
        numpy.save(file, influences)


def _plot(config: BifConfig, run: Sampled, path: str, left: Any, right: Any, words: Any) -> None:
    if config.level == "sequence" or config.average:
        labels = [f"{example.title} {short(example.text, 40)}" for example in left]
        whole = estimated(config, run, average=config.average).influences
        viz.save(viz.heat_map(whole, labels, [example.title for example in right], label=config.statistic), path)
        return
    i, j = config.pair or _first_pair(config, run, left == right)
    block = estimated(config, run, row_range=slice(i, i + 1), column_range=slice(j, j + 1)).influences[0, 0]
    block = block[[*left[i].labelled]][:, [*right[j].labelled]]
    title = f"rows: {left[i].title}, columns: {right[j].title}"
    viz.save(viz.heat_map(block, left[i].tokens, right[j].tokens, label=config.statistic, title=title), path)


def _first_pair(config: BifConfig, run: Sampled, same: bool) -> tuple[int, int]:
    """Return the first query and the example it moves with most, itself left out."""
    first = config.query[0] if config.query else 0
    row = related(config, run, first)[0]
    most = strongest(row, 1, first if same else None)["most"]
    return first, most[0] if most else first


def _check_numbers(config: BifConfig, sizes: Mapping[str, int]) -> None:
    """Refuse numbers of examples that the observables do not have.

    Raises:
        ValueError: naming the first of them.
    """
    rows = config.rows or tuple(sizes)
    counts = [sum(sizes[name] for name in names if name in sizes) for names in (rows, config.columns or rows)]
    pair = config.pair or ()
    asked = [("--query", number, 0) for number in config.query] + [("--pair", n, side) for side, n in enumerate(pair)]
    for flag, number, side in asked:
        if not 0 <= number < counts[side]:
            raise ValueError(
                f"there is no example {number} for {flag}: {('rows', 'columns')[side]} have {counts[side]}, counted "
                "from 0; --observed is the most of each observable"
            )


def _check(config: BifConfig) -> None:
    """Refuse what does not fit, before the chains are run."""
    if config.plot is not None:
        viz.check(config.plot)
    if config.save is not None and Path(config.save).suffix != ".npy":
        raise ValueError(f"--save writes .npy files; got {config.save}")
    if config.average and config.level != "token":
        raise ValueError("--average is of the tokens of a pair: pass --level token")
    known = [word.partition("=")[0] for word in config.observables]
    asked = [name for name in (*config.rows, *config.columns) if name not in known]
    if config.model.model and asked:
        raise ValueError(f"there is no observable {asked[0]!r}; --observables has {', '.join(known)}")
    need = {"sequence": ("auto", "sequences", "tokens"), "token": ("auto", "tokens")}[config.level]
    keep = config.chains.options.keep
    if keep not in need:
        raise ValueError(
            f"--keep {keep} keeps no losses of {config.level}s, which --level {config.level} relates: "
            f"leave --keep out, or pass --keep {need[-1]}"
        )
