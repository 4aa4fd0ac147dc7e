r"""TracIn (Pruthi et al. 2020): inner products of gradients, summed over checkpoints with their learning rates.

$$\text{score}(q, n) = \sum_k \eta_k\, \langle \nabla \ell(q; \theta_k), \nabla \ell(n; \theta_k) \rangle$$
"""

from dataclasses import dataclass, field
from pathlib import Path

from influence.pipelines.checkpoints import learning_rates
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
from influence.pipelines.ends import outcome_of
from influence.pipelines.outcome import Outcome, Say, quiet
from influence.pipelines.ranks import among_ranks, ranks
from influence.pipelines.recipe import planned, result, run_steps
from influence.pipelines.sums import pairs, refuse_optimizer, row_steps, write_sums


@dataclass(frozen=True)
class TracinConfig:
    """Score a corpus as TracIn does: gradient products, summed over checkpoints, each times its learning rate.

    influence tracin --model base --checkpoints out/checkpoint-* --dataset corpus.jsonl --query.dataset questions.jsonl
    --run runs/tracin

    Steps, each in a directory of the run's: the rows of both sides at each checkpoint, which are indexes; scores. With
    --unit-norm the products are cosines.

    Attributes:
        run: the run directory to write.
        model: the model; its tokenizer serves every checkpoint, and adapters go on it.
        data: the corpus.
        query: the queries.
        checkpoints: the folders that a Trainer saved, of whole models or of adapters.
        learning_rates: one for each checkpoint; default the mean of those that the Trainer logged since the one before.
        loss: the loss.
        transform: what is compared of each gradient.
        execution: every pass.
    """

    run: Run
    model: Model
    data: Data
    query: DataConfig
    checkpoints: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)


@among_ranks
def run(config: TracinConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The scores.

    Raises:
        ValueError: if a checkpoint does not say its learning rate, or an optimizer is given.
    """
    refuse_optimizer(config.transform, "tracin")
    rates, source = learning_rates(config.checkpoints, config.learning_rates)
    at, steps = Path(config.run), row_steps(config, config.transform, [config.transform] * len(rates), say)
    plan = f"sums over {len(rates)} checkpoints → {at / 'scores'}"
    steps["scores"] = lambda execution: planned(plan, execution, say) or _sum(at, rates)
    with ranks() as place:
        if place.first:
            say(f"learning rates ({source}): {', '.join(f'{rate:.6g}' for rate in rates)}")
    return result(config, run_steps("tracin", config, steps, say))


def _sum(at: Path, rates: list[float]) -> Outcome:
    """Write the sums."""
    from influence.train import tracin

    with ranks() as place:
        if place.first:
            write_sums(at, pairs(at, len(rates)), rates, tracin)
        place.barrier()
    return outcome_of(at / "scores")
