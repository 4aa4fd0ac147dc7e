r"""LESS (Xia et al. 2024): which examples' Adam updates go where the gradients of a task point.

$$\text{score}(n) = \max_j \sum_k \eta_k
\cos\bigl(\overline{\nabla \ell}(D_j; \theta_k), \Gamma(n; \theta_k)\bigr)$$

over the subtasks `D_j` of the queries and the checkpoints `\theta_k` of a warm-up; `\Gamma` is Adam's update.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from influence.data.sources import column_names
from influence.index import open_index
from influence.pipelines.frame.configs import DataConfig, Loss, LossConfig, TransformConfig, View
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.ranks import among_ranks
from influence.pipelines.frame.tokens import load_rows
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
class LessConfig(SumConfig):
    """Choose training data as LESS does: cosines of Adam's updates with a task's gradients, over a warm-up.

    influence less runs/less --model base --checkpoints warmup/checkpoint-* --dataset pool.jsonl
    --query.dataset task.jsonl

    The checkpoints are those of a short training by Adam, of LoRA as a rule, saved with their optimizers. Steps, each
    in a directory of the run's: the rows of both sides at each checkpoint, which are indexes; scores, one an example.

    Attributes:
        model: the model; its tokenizer serves every checkpoint, and adapters go on it.
        data: the pool to choose from.
        query: examples of what is wanted.
        checkpoints: the folders that a Trainer saved, of adapters or of whole models.
        learning_rates: one for each checkpoint; default the mean of those that the Trainer logged since the one before.
        subtask: a column of the queries that says which subtask each is of; the best subtask counts.
        transform: targets and projection; the optimizer is each checkpoint's own.
    """

    subtask: str | None = None
    loss: Loss = field(default_factory=lambda: LossConfig(reduction="mean"), kw_only=True)
    transform: View = field(
        default_factory=lambda: TransformConfig(projection_dim=8192, projection_target="global"), kw_only=True
    )


@among_ranks
def run(config: LessConfig, say: Say = quiet) -> Outcome:
    """Run the recipe.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        The scores.

    Raises:
        FileNotFoundError: if a checkpoint has no optimizer.
        ValueError: if a checkpoint does not say its learning rate, or there is no such column of subtasks.
    """
    from influence.train.checkpoints import find_state

    refuse_optimizer(config.transform, "less")
    rates = rates_of(config, say)
    for checkpoint in config.checkpoints:
        find_state(checkpoint)
    subtasks = None if config.subtask is None else subtasks_of(config.query, config.subtask)
    updates = [replace(config.transform, optimizer=path, optimizer_view="update") for path in config.checkpoints]
    at, steps = Path(config.run), row_steps(config, config.transform, updates, say)
    plan = f"the best subtask's sums over {len(rates)} checkpoints → {at / 'scores'}"
    steps["scores"] = lambda execution: planned(plan, execution, say) or _best(at, rates, subtasks)
    return result(config, run_steps("less", config, steps, say))


def subtasks_of(config: DataConfig, column: str) -> Int[Tensor, " rows"]:
    """Return which subtask each row of a dataset is of, numbered as they come.

    Raises:
        ValueError: if there is no such column, or examples are no rows.
    """
    if config.chunk_length is not None:
        raise ValueError("chunks are of several documents, and so of several subtasks: leave chunk_length out")
    rows = load_rows(config)
    if column not in column_names(rows):
        raise ValueError(
            f"{config.dataset} has no column {column!r} of subtasks; it has {', '.join(map(repr, column_names(rows)))}"
        )
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(str(row[column]), len(numbers)) for row in rows], dtype=torch.int64)


def _best(at: Path, rates: list[float], subtasks: Int[Tensor, " rows"] | None) -> Outcome:
    """Write the best subtask's sums."""
    from influence.train import less, subtask_means

    def write() -> None:
        sides = []
        for number, (index, rows) in enumerate(pairs(at, len(rates))):
            examples = open_index(at / f"checkpoint{number}-query").index
            of = torch.zeros_like(examples) if subtasks is None else subtasks[examples]
            sides.append((index, subtask_means(rows, of)))
        write_sums(at, sides, rates, lambda checkpoints: less(checkpoints)[:, None])

    return written(at / "scores", write)
