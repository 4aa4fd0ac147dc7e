"""Mix two curvatures: the queries' plays down what is common to all queries (TrackStar, appendix A.1.3)."""

from dataclasses import dataclass
from pathlib import Path

from influence import hessians
from influence.pipelines import hessian
from influence.pipelines.configs import Run, write_config
from influence.pipelines.outcome import Outcome, Say, quiet
from influence.pipelines.views import load_factors


@dataclass(frozen=True)
class MixConfig:
    """Mix the curvature of queries with the corpus's, so that what all queries share counts less.

    Attributes:
        run: the run directory; factors.h5 in it is the mix.
        query: the run of influence hessian on the queries.
        index: the run of influence hessian on the corpus.
        components: how many directions to play down.
        weight: the queries' share instead, between 0 and 1.
        overwrite: replace what is there.
    """

    run: Run
    query: str
    index: str
    components: int = 1000
    weight: float | None = None
    overwrite: bool = False


def run(config: MixConfig, say: Say = quiet) -> Outcome:
    """Mix the factors.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        What came of it.

    Raises:
        FileExistsError: if there is a mix already.
    """
    file = Path(config.run) / "factors.h5"
    if file.exists() and not config.overwrite:
        raise FileExistsError(f"{config.run} holds factors already: pass --overwrite to replace them, or another --run")
    query, index = load_factors(config.query), load_factors(config.index)
    mixed = hessians.mix(query, index, components=config.components, weight=config.weight)
    say(f"plan: mix of {query!r} and {index!r} → {config.run}")
    say(f"      {mixed.notes['mix']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_config(file.parent / "config.yaml", config, "mix")
    mixed.save(file)
    return hessian.outcome(config.run, hessians.load(file))
