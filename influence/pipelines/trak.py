r"""TRAK (Park et al. 2023): gradients of log-odds under one global projection, whitened by their Gram matrix.

$$\tau(q, n) = \frac1C \sum_c \phi_c(q)^\top \Bigl(\tfrac1N \Phi_c^\top \Phi_c + \text{damping}\Bigr)^{-1} \phi_c(n)$$

over checkpoints `c`; `\phi` is the projected gradient of the log-odds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from influence.index import Columns, open_index
from influence.pipelines import build, hessian, score
from influence.pipelines.checkpoints import model_at
from influence.pipelines.configs import (
    Data,
    DataConfig,
    Execution,
    Loss,
    LossConfig,
    Model,
    Run,
    RunConfig,
    TransformConfig,
    View,
)
from influence.pipelines.outcome import Outcome, Say, quiet
from influence.pipelines.ranks import ranks
from influence.pipelines.recipe import run_steps
from influence.pipelines.sums import over_checkpoints, write_scores
from influence.types import Rows


@dataclass(frozen=True)
class TrakConfig:
    """Score a corpus as TRAK does: log-odds, one global projection, their Gram matrix, a mean over checkpoints.

    influence trak --model gpt2 --dataset corpus.jsonl --query.dataset questions.jsonl --run runs/trak

    Steps, each in a directory of the run's: each checkpoint's hessian, query and scores; scores, their mean.

    Attributes:
        run: the run directory to write.
        model: the model; its tokenizer serves every checkpoint.
        data: the corpus.
        query: the queries.
        checkpoints: folders or Hub ids of the same architecture, or adapters on the model, to average over; default the
            model alone.
        loss: TRAK's output function.
        transform: the projection and the damping.
        execution: every pass.
    """

    run: Run
    model: Model
    data: Data
    query: DataConfig
    checkpoints: tuple[str, ...] = ()
    loss: Loss = field(default_factory=lambda: LossConfig("log_odds"))
    transform: View = field(default_factory=lambda: TransformConfig(projection_dim=2048, projection_target="global"))
    execution: Execution = field(default_factory=RunConfig)


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
        rows = build.BuildConfig(query, model, config.query, loss=config.loss, transform=inverse)
        scored = score.ScoreConfig(scores, model, config.data, (query,), loss=config.loss, transform=plain)
        steps[names[0]] = lambda e: hessian.run(replace(fitted, loss=config.loss, execution=e), say)
        steps[names[1]] = lambda e: build.run(replace(rows, execution=e), say)
        steps[names[2]] = lambda e: score.run(replace(scored, execution=e), say)
        return scores

    parts = [add(number, path) for number, path in enumerate(checkpoints)]
    steps["scores"] = lambda execution: average(parts, str(at / "scores"))
    return score.of_recipe(config.run, run_steps("trak", config, steps, say))


def average(parts: list[str], to: str) -> Outcome:
    """Write the mean of several runs' scores, shard by shard.

    Args:
        parts: runs of score on one corpus.
        to: the run to write.

    Returns:
        The mean.
    """
    with ranks() as place:
        if place.first:
            indexes = [open_index(part) for part in parts]

            def mean(begin: int, end: int) -> Rows:
                matrix = torch.stack([index.matrix(begin, end) for index in indexes]).mean(0)
                return Columns(indexes[0].blocks).split(matrix)

            plan = {"parts": [index.fingerprint.digest for index in indexes]}
            write_scores(to, indexes[0], mean, plan, over_checkpoints(indexes))
        place.barrier()
    return score.outcome_of(to)
