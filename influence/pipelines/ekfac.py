"""Influence functions with EK-FAC (Grosse et al. 2023): the inverse on the queries' side, the corpus streamed by."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from influence.pipelines import build, hessian, reduce, score
from influence.pipelines.frame.configs import RunConfig, TransformConfig, View, at_least
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks
from influence.pipelines.frame.tokens import load_rows
from influence.pipelines.recipes.frame import (
    RecipeConfig,
    fewer,
    refuse_decided,
    result,
    run_steps,
    without_what_is_not_there,
)


@dataclass(frozen=True)
class EkfacConfig(RecipeConfig):
    """Score a corpus by influence functions: query gradient, inverse curvature, training gradient.

    influence ekfac runs/ekfac --model gpt2 --dataset corpus.jsonl --query.dataset questions.jsonl

    Steps, each in a directory of the run's: hessian, query, scores. Whole gradients meet, unless --compress keeps only
    the strongest directions of each block on both sides.

    Attributes:
        method: which curvature.
        base: whose eigenvalues ekfac corrects; default kfac.
        labels: whose gradients it is fitted to; default the method's.
        stats_examples: fit it on so many examples.
        query_rows: the queries' mean gradient, their sum, or one row for each.
        compress: keep so many whitened directions of each side of a block, on both sides of the score.
        mode: a score for each query row, or the best over all of them.
        top_k: keep the so many best and worst examples of each query only.
        transform: blocks, damping and inversion; the rest is the recipe's.
    """

    method: hessian.MethodName = "ekfac"
    labels: Literal["sampled", "data", "exact"] | None = None
    stats_examples: int | None = None
    query_rows: Literal["mean", "sum", "individual"] = "mean"
    compress: int | None = None
    mode: score.Mode = "individual"
    top_k: int | None = None
    base: hessian.BaseName | None = None
    transform: View = field(default_factory=lambda: TransformConfig(projection_dim=0), kw_only=True)

    def __post_init__(self) -> None:
        """Refuse numbers below 1, options that the method does not have, and another way to compress."""
        at_least(self, 1, "stats_examples", "compress", "top_k")
        hessian.chosen_method(self.method, base=self.base)
        if self.transform.whiten is not None:
            raise ValueError(
                f"whiten={self.transform.whiten!r} is no option of this recipe, which applies the inverse curvature on "
                "one side of the score: leave it out, or pass compress, which keeps whitened directions on both sides"
            )
        refuse_decided(self.transform, "ekfac")


@among_ranks
def run(config: EkfacConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The scores.
    """
    at, curvature = Path(config.run), str(Path(config.run) / "hessian")
    whole = replace(config.transform, hessian=None, whiten=None, unit_norm=False, projection_dim=0)
    if config.compress is None:
        sides = (
            replace(config.transform, hessian=curvature, power=-1.0, unit_norm=False),
            replace(config.transform, hessian=None, unit_norm=False),
        )
    else:
        both = replace(whole, hessian=curvature, whiten="eigen", power=-0.5, projection_dim=config.compress)
        sides = both, both

    def fit(execution: RunConfig) -> Outcome:
        few = fewer(config.data, config.stats_examples)
        made = hessian.HessianConfig(
            curvature,
            config.model,
            few,
            config.method,
            config.labels,
            base=config.base,
            loss=config.loss,
            transform=whole,
            execution=execution,
        )
        return hessian.run(made, say)

    def rows(execution: RunConfig) -> Outcome:
        to, model, query, how = str(at / "query"), config.model, config.query, config.query_rows
        loss, view = config.loss, without_what_is_not_there(sides[0], execution)
        if how == "individual":
            return build.run(build.BuildConfig(to, model, query, loss=loss, transform=view, execution=execution), say)
        made = reduce.ReduceConfig(to, model, query, how, loss=loss, transform=view, execution=execution)
        return reduce.run(made, say)

    def scores(execution: RunConfig) -> Outcome:
        made = score.ScoreConfig(
            str(at / "scores"),
            config.model,
            config.data,
            (str(at / "query"),),
            config.mode,
            top_k=config.top_k,
            loss=config.loss,
            transform=without_what_is_not_there(sides[1], execution),
            execution=execution,
        )
        count = len(load_rows(config.query)) if config.query_rows == "individual" else 1
        return score.run(made, say, ahead=count)

    outcomes = run_steps("ekfac", config, {"hessian": fit, "query": rows, "scores": scores}, say)
    return result(config, outcomes)
