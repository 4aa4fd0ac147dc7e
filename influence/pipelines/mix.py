"""Mix two curvatures: the queries' plays down what is common to all queries (TrackStar, appendix A.1.3)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influence import hessians
from influence.index import Fingerprint, start
from influence.pipelines import hessian
from influence.pipelines.frame.config_file import to_mapping, write_config
from influence.pipelines.frame.configs import Run, at_least
from influence.pipelines.frame.directory import CONFIG
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks, ranks


@dataclass(frozen=True)
class MixConfig:
    """Mix the curvature of queries with the corpus's, so that what all queries share counts less.

    Attributes:
        run: the run directory to write. The mix is its factors.h5.
        query: the run of influence hessian on the queries.
        index: the run of influence hessian on the corpus.
        components: number of directions to play down.
        weight: the queries' share, between 0 and 1. Then --components is not used.
        overwrite: replace what is there.
    """

    run: Run
    query: str
    index: str
    components: int = 1000
    weight: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 0, "weight", most=1)
        at_least(self, 1, "components")


@among_ranks
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
    with ranks() as place:
        if place.first:
            _write(config, file, say)
    return hessian.outcome(config.run, hessians.load(file))


def _write(config: MixConfig, file: Path, say: Say) -> None:
    if file.exists() and not config.overwrite:
        raise FileExistsError(f"{config.run} holds factors: pass --overwrite to replace them, or name another run")
    query, index = hessians.load(config.query), hessians.load(config.index)
    mixed = hessians.mix(query, index, components=config.components, weight=config.weight)
    say(f"plan: mix of {query!r} and {index!r} → {config.run}")
    say(f"      {mixed.notes['mix']}")
    kept = replace(config, overwrite=False)
    command = ["influence", "mix", "ANOTHER_RUN", "--config", str(file.parent / "config.yaml")]
    plan = {"shards": [], "query": query.digest, "index": index.digest, "components": config.components}
    plan["weight"] = config.weight
    results = [file.name, CONFIG]
    how: dict[str, Any] = {"overwrite": config.overwrite, "results": results}
    with start(file.parent, "mix", to_mapping(kept), command, plan, Fingerprint(), **how) as run:
        write_config(file.parent / CONFIG, kept, "mix", run.manifest.id)
        mixed.save(file, run.manifest.id)
