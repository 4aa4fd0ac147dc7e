r"""TracIn (Pruthi et al. 2020): inner products of gradients, summed over checkpoints with their learning rates.

$$\text{score}(q, n) = \sum_k \eta_k\, \langle \nabla \ell(q; \theta_k), \nabla \ell(n; \theta_k) \rangle$$
"""

from dataclasses import dataclass
from pathlib import Path

from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks
from influence.pipelines.recipes.checkpoint_sums import (
    SumConfig,
    pairs,
    rates_of,
    refuse_optimizer,
    row_steps,
    write_sums,
    written,
)
from influence.pipelines.recipes.frame import planned, result, run_steps


@dataclass(frozen=True)
class TracinConfig(SumConfig):
    """Score a corpus as TracIn does: gradient products, summed over checkpoints, each times its learning rate.

    influence tracin runs/tracin --model base --checkpoints out/checkpoint-* --dataset corpus.jsonl
    --query.dataset questions.jsonl

    Steps, each in a directory of the run's: the rows of both sides at each checkpoint, which are indexes; scores. With
    --unit-norm the products are cosines.

    Attributes:
        model: the model; its tokenizer serves every checkpoint, and adapters go on it.
        checkpoints: the folders that a Trainer saved, of whole models or of adapters.
        learning_rates: one for each checkpoint; default the mean of those that the Trainer logged since the one before.
        transform: what is compared of each gradient.
    """


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
    rates = rates_of(config, say)
    at, steps = Path(config.run), row_steps(config, config.transform, [config.transform] * len(rates), say)
    plan = f"sums over {len(rates)} checkpoints → {at / 'scores'}"
    steps["scores"] = lambda execution: planned(plan, execution, say) or _sum(at, rates)
    return result(config, run_steps("tracin", config, steps, say))


def _sum(at: Path, rates: list[float]) -> Outcome:
    """Write the sums."""
    from influence.train import tracin

    return written(at / "scores", lambda: write_sums(at, pairs(at, len(rates)), rates, tracin))
