"""During training: the optimizer's state, gradients from a Trainer, and the effect of a step."""

from influence.train.callback import GradientCollectorCallback, prepare_for_gradient_collection
from influence.train.epochs import sum_epochs
from influence.train.finite_diff import FiniteDiff, direction_of, step_for
from influence.train.optimizer import OptimizerState, load_from_optimizer, read_optimizer
from influence.train.visits import Visits, read_order

__all__ = [
    "FiniteDiff",
    "GradientCollectorCallback",
    "OptimizerState",
    "Visits",
    "direction_of",
    "load_from_optimizer",
    "prepare_for_gradient_collection",
    "read_optimizer",
    "read_order",
    "step_for",
    "sum_epochs",
]
