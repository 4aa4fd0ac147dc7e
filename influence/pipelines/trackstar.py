"""TrackStar (Chang et al. 2024): whitened, unit-norm rows of both sides, in a mix of both sides' curvature."""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from influence.pipelines import build, hessian, mix, score
from influence.pipelines.frame.configs import DataConfig, RunConfig, at_least
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks, ranks
from influence.pipelines.frame.tokens import load_rows
from influence.pipelines.recipes.frame import (
    RecipeConfig,
    fewer,
    planned,
    refuse_decided,
    result,
    run_steps,
    without_what_is_not_there,
)


@dataclass(frozen=True)
class TrackstarConfig(RecipeConfig):
    """Score a corpus against queries as TrackStar does: cosines in the metric of a mixed curvature.

    influence trackstar runs/trackstar --model gpt2 --dataset corpus.jsonl --query.dataset questions.jsonl

    Steps, each in a directory of the run's: query_hessian, index_hessian, mixed, query, scores.

    Attributes:
        components: how many directions that all queries share to play down; of all blocks together, so at most as many
            as queries times blocks.
        mix: mix the queries' curvature into the corpus's.
        stats_examples: fit each curvature on so many examples.
        mode: a score for each query, or the best over all of them.
        top_k: keep the so many best and worst examples of each query only.
        transform: the projection; curvature and unit norm are the recipe's.
    """

    components: int = 1000
    mix: bool = True
    stats_examples: int | None = 10_000
    mode: score.Mode = "individual"
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "components", "stats_examples", "top_k")
        refuse_decided(self.transform, "trackstar")


@among_ranks
def run(config: TrackstarConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The scores.
    """
    at = Path(config.run)
    with ranks() as place:
        if place.first and (few := few_queries(config)):
            say(few)
    plain = replace(config.transform, hessian=None, whiten=None, unit_norm=False)
    curvature = str(at / "mixed") if config.mix else str(at / "index_hessian")
    white = replace(plain, hessian=curvature, power=-0.5, unit_norm=True)

    def fit(name: str, data: DataConfig, execution: RunConfig) -> Outcome:
        few = fewer(data, config.stats_examples)
        made = hessian.HessianConfig(
            str(at / name), config.model, few, "autocorrelation", loss=config.loss, transform=plain, execution=execution
        )
        return hessian.run(made, say)

    def mixed(execution: RunConfig) -> Outcome:
        made = mix.MixConfig(str(at / "mixed"), str(at / "query_hessian"), str(at / "index_hessian"), config.components)
        return planned(f"mix of both curvatures → {made.run}", execution, say) or mix.run(made, say)

    def rows(execution: RunConfig) -> Outcome:
        to, view = str(at / "query"), without_what_is_not_there(white, execution)
        made = build.BuildConfig(to, config.model, config.query, loss=config.loss, transform=view, execution=execution)
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
            transform=without_what_is_not_there(white, execution),
            execution=execution,
        )
        return score.run(made, say, ahead=len(load_rows(config.query)))

    both = {"query_hessian": lambda e: fit("query_hessian", config.query, e)} if config.mix else {}
    steps = {
        **both,
        "index_hessian": lambda e: fit("index_hessian", config.data, e),
        **({"mixed": mixed} if config.mix else {}),
        "query": rows,
        "scores": scores,
    }
    return result(config, run_steps("trackstar", config, steps, say))


def few_queries(config: TrackstarConfig) -> str:
    """Say what becomes of the mix if the queries span fewer directions than it plays down; nothing if they may not."""
    if not config.mix:
        return ""
    count = len(load_rows(fewer(config.query, config.stats_examples)))
    if count >= config.components:
        return ""
    return (
        f"plan: {count:,} queries span at most {count:,} directions of each block, and --components is "
        f"{config.components:,}: with fewer than {ceil(config.components / max(count, 1)):,} blocks the mix is the "
        "queries' curvature alone (weight 1), and the corpus's is left out. Lower --components to play down fewer"
    )
