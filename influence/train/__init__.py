"""During training: the optimizer's state, gradients from a Trainer, and the effect of a step."""

from influence.train.adam_update import adam_update
from influence.train.callback import GradientCollectorCallback, prepare_for_gradient_collection
from influence.train.collected import read_order, sum_epochs
from influence.train.finite_diff import FiniteDiff, direction_of, step_for
from influence.train.live import scale_by_optimizer
from influence.train.optimizer import OptimizerState, load_from_optimizer, read_optimizer
from influence.train.order import Visits
from influence.train.trajectory import Checkpoint, epoch_rates, less, subtask_means, tracin

__all__ = [
    "Checkpoint",
    "FiniteDiff",
    "GradientCollectorCallback",
    "OptimizerState",
    "Visits",
    "adam_update",
    "direction_of",
    "epoch_rates",
    "less",
    "load_from_optimizer",
    "prepare_for_gradient_collection",
    "read_optimizer",
    "read_order",
    "scale_by_optimizer",
    "step_for",
    "subtask_means",
    "sum_epochs",
    "tracin",
]
