"""During training: the optimizer's state, gradients from a Trainer, and the effect of a step."""

from influence.train.finite_diff import FiniteDiff, direction_of, step_for
from influence.train.optimizer import OptimizerState, load_from_optimizer, read_optimizer

__all__ = ["FiniteDiff", "OptimizerState", "direction_of", "load_from_optimizer", "read_optimizer", "step_for"]
