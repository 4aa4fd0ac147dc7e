"""TrackStar (Chang et al. 2024): whitened, unit-norm rows of both sides, in a mix of both sides' curvature."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from influence.pipelines import build, hessian, mix, score
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


@dataclass(frozen=True)
class TrackstarConfig:
    """Score a corpus against queries as TrackStar does: cosines in the metric of a mixed curvature.

    influence trackstar --model gpt2 --dataset corpus.jsonl --query.dataset questions.jsonl --run runs/trackstar

    Steps, each in a directory of the run's: query_hessian, index_hessian, mixed, query, scores.

    Attributes:
        run: the run directory to write.
        model: the model.
        data: the corpus.
        query: the queries.
        components: how many directions that all queries share to play down.
        mix: mix the queries' curvature into the corpus's.
        stats_examples: fit each curvature on so many examples.
        mode: a score for each query, or the best over all of them.
        top_k: keep the so many best and worst examples of each query only.
        loss: the loss.
        transform: the projection; curvature and unit norm are the recipe's.
        execution: every pass.
    """

    run: Run
    model: Model
    data: Data
    query: DataConfig
    components: int = 1000
    mix: bool = True
    stats_examples: int | None = 10_000
    mode: score.Mode = "individual"
    top_k: int | None = None
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)


def run(config: TrackstarConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The scores.
    """
    at = Path(config.run)
    plain = replace(config.transform, hessian=None, whiten=None, unit_norm=False)
    curvature = str(at / "mixed") if config.mix else str(at / "index_hessian")
    white = replace(plain, hessian=curvature, power=-0.5, unit_norm=True)

    def fit(name: str, data: DataConfig, execution: RunConfig) -> Outcome:
        few = replace(data, max_examples=_fewer(data.max_examples, config.stats_examples))
        made = hessian.HessianConfig(
            str(at / name), config.model, few, "autocorrelation", loss=config.loss, transform=plain, execution=execution
        )
        return hessian.run(made, say)

    def mixed(execution: RunConfig) -> Outcome | None:
        made = mix.MixConfig(str(at / "mixed"), str(at / "query_hessian"), str(at / "index_hessian"), config.components)
        with ranks() as place:
            return mix.run(made, say) if place.first else None

    def rows(execution: RunConfig) -> Outcome:
        made = build.BuildConfig(
            str(at / "query"), config.model, config.query, loss=config.loss, transform=white, execution=execution
        )
        return build.run(made, say)

    def scores(execution: RunConfig) -> Outcome:
        made = score.ScoreConfig(
            str(at / "scores"),
            config.model,
            config.data,
            (str(at / "query"),),
            config.mode,
            top_k=config.top_k,
            loss=config.loss,
            transform=white,
            execution=execution,
        )
        return score.run(made, say)

    both = {"query_hessian": lambda e: fit("query_hessian", config.query, e)} if config.mix else {}
    steps = {
        **both,
        "index_hessian": lambda e: fit("index_hessian", config.data, e),
        **({"mixed": mixed} if config.mix else {}),
        "query": rows,
        "scores": scores,
    }
    return score.of_recipe(config.run, run_steps("trackstar", config, steps, say))


def _fewer(one: int | None, other: int | None) -> int | None:
    return min((n for n in (one, other) if n is not None), default=None)
