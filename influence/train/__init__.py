"""During training: the optimizer's state, gradients from a Trainer, and the effect of a step."""

from influence.train.optimizer import OptimizerState, load_from_optimizer, read_optimizer

__all__ = ["OptimizerState", "load_from_optimizer", "read_optimizer"]
