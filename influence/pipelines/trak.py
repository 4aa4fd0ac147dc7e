r"""TRAK (Park et al. 2023): gradients of log-odds under one global projection, whitened by their Gram matrix.

$$\tau(q, n) = \frac1C \sum_c \phi_c(q)^\top \Bigl(\tfrac1N \Phi_c^\top \Phi_c + \text{damping}\Bigr)^{-1} \phi_c(n)$$

over checkpoints `c`; `\phi` is the projected gradient of the log-odds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from influence.index import Columns, Index, open_index
from influence.pipelines import build, hessian, score
from influence.pipelines.frame.configs import Loss, LossConfig, RunConfig, TransformConfig, View
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks
from influence.pipelines.frame.tokens import load_rows
from influence.pipelines.recipes.checkpoint_sums import model_at, over_checkpoints, write_scores, written
from influence.pipelines.recipes.frame import (
    RecipeConfig,
    planned,
    refuse_decided,
    result,
    run_steps,
    without_what_is_not_there,
)
from influence.types import Rows


@dataclass(frozen=True)
class TrakConfig(RecipeConfig):
    """Score a corpus as TRAK does: log-odds, one global projection, their Gram matrix, a mean over checkpoints.

    influence trak runs/trak --model gpt2 --dataset corpus.jsonl --query.dataset questions.jsonl

    Steps, each in a directory of the run's: each checkpoint's hessian, query and scores; scores, their mean.

    Attributes:
        model: the model; its tokenizer serves every checkpoint.
        checkpoints: folders or Hub ids of the same architecture, or adapters on the model, to average over; default the
            model alone.
        loss: TRAK's output function.
        transform: the projection and the damping.
    """

    checkpoints: tuple[str, ...] = ()
    loss: Loss = field(default_factory=lambda: LossConfig("log_odds"), kw_only=True)
    transform: View = field(
        default_factory=lambda: TransformConfig(projection_dim=2048, projection_target="global"), kw_only=True
    )

    def __post_init__(self) -> None:
        """Refuse what the recipe decides."""
        refuse_decided(self.transform, "trak")


@among_ranks
def run(config: TrakConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The mean of the checkpoints' scores.
    """
    at = Path(config.run)
    plain = replace(config.transform, hessian=None, whiten=None, unit_norm=False)
    steps: dict[str, Callable[[RunConfig], Outcome]] = {}
    checkpoints = config.checkpoints or (config.model.model,)

    def add(number: int, path: str) -> str:
        model = model_at(config.model, path) if config.checkpoints else config.model
        names = [f"checkpoint{number}-{what}" for what in ("hessian", "query", "scores")]
        curvature, query, scores = (str(at / name) for name in names)
        inverse = replace(plain, hessian=curvature, power=-1.0)
        fitted = hessian.HessianConfig(curvature, model, config.data, "autocorrelation", "data", transform=plain)
        rows = build.BuildConfig(query, model, config.query, loss=config.loss)
        scored = score.ScoreConfig(scores, model, config.data, (query,), loss=config.loss, transform=plain)

        def asked(e: RunConfig) -> Outcome:
            return build.run(replace(rows, transform=without_what_is_not_there(inverse, e), execution=e), say)

        steps[names[0]] = lambda e: hessian.run(replace(fitted, loss=config.loss, execution=e), say)
        steps[names[1]] = asked
        steps[names[2]] = lambda e: score.run(replace(scored, execution=e), say, ahead=len(load_rows(config.query)))
        return scores

    parts = [add(number, path) for number, path in enumerate(checkpoints)]
    mean = f"mean of the scores of {len(parts)} checkpoints → {at / 'scores'}"
    steps["scores"] = lambda execution: planned(mean, execution, say) or average(parts, str(at / "scores"))
    return result(config, run_steps("trak", config, steps, say))


def average(parts: list[str], to: str) -> Outcome:
    """Write the mean of several runs' scores, shard by shard.

    Args:
        parts: runs of score on one corpus.
        to: the run to write.

    Returns:
        The mean.
    """

    def write() -> None:
        indexes = [open_index(part) for part in parts]
        for part, index in zip(parts[1:], indexes[1:], strict=True):
            _check_alike(parts[0], indexes[0], part, index)

        def mean(begin: int, end: int) -> Rows:
            matrix = torch.stack([index.matrix(begin, end) for index in indexes]).mean(0)
            return Columns(indexes[0].blocks).split(matrix)

        plan = {"parts": [index.fingerprint.digest for index in indexes]}
        write_scores(to, indexes[0], mean, plan, over_checkpoints(indexes))

    return written(Path(to), write)


def _check_alike(one: str, first: Index, other: str, index: Index) -> None:
    """Refuse scores of other examples or queries: their mean means nothing.

    Raises:
        ValueError: naming what differs, and both values.
    """
    said: dict[str, tuple[object, object]] = {
        "scores a row": (dict(first.blocks), dict(index.blocks)),
        "examples": (first.examples, index.examples),
    }
    if first.examples == index.examples and not torch.equal(first.index, index.index):
        at = int((first.index != index.index).nonzero()[0])
        said[f"document of example {at}"] = int(first.index[at]), int(index.index[at])
    data = [each.fingerprint.recorded.get("data") for each in (first, index)]
    for name, (mine, theirs) in {**said, "data": (data[0], data[1])}.items():
        if mine != theirs:
            raise ValueError(
                f"the scores of {one} and {other} cannot be averaged: their {name} differ, {mine} and {theirs}. Remove "
                "the runs of the checkpoint that is not of this corpus, and run the same command again"
            )
