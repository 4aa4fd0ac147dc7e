"""Gradients from a Trainer: a callback that collects them, and the preparation that lets it see who is who.

There is no hook: a training step is wrapped, and the loss inside it is computed as a function of probes.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from influence.func.transform.chain import Transform, chain
from influence.train.collector import Collector, Settings
from influence.train.plans import numbered
from influence.types import ExampleLoss

PREPARED = "_prepared_for_gradient_collection"


class GradientCollectorCallback(TrainerCallback):
    r"""Collect the gradients of training examples while a Trainer trains on them.

    A row is the (transformed) gradient of the example's own loss at the weights of its step,

    $$\text{row}_n = T\bigl(\nabla \ell_n(\theta_t)\bigr)$$

    whatever the Trainer divides its loss by. `path/epoch-0`, `path/epoch-1`, … are indexes in the order of the dataset
    (`sum_epochs(path)` adds them), and `read_order(path)` says at which step of which epoch each example was seen, at
    which learning rate. Rows are on the disk before the Trainer writes a checkpoint that counts them; a training that
    goes on from it keeps them, and drops those of later steps.

    Args:
        path: a directory for this run; ranks and resumed runs share it.
        transform: what is wanted of the gradients, as in `chain(as_blocks(), project(16))`.
        share: take rows from the training's own forward and backward: no second pass, and with the dropout of that
            step. False computes them again in evaluation mode, without mixed precision, by the pure function.
        scale: `"optimizer"` divides by the optimizer's second moments at that step, bias-corrected, as its update is
            about to (before it adds this step's gradient). Visits before the first update have none: they are marked
            in `read_order(path).scaled`. `None`: as they are.
        track_order: keep the order logs when training is done; without them it cannot be taken up again.
        loss: each example's loss, as `functionalize` takes it. It must be what the Trainer's loss is the mean of.
        reduction: `"sum"` or `"mean"` over an example's labelled positions.
        targets: globs over parameter names; default the matrices of the repeated layers.
        engine: of `share=False`.
        dtype: how rows are stored.
        shard_size: most examples of a shard.
        nonfinite: `"error"`, or `"zero"` with a warning.
        overwrite: replace the run that is in `path` when a training begins at step 0; one that goes on keeps it.

    Example:
        >>> from influence import as_blocks, chain, project
        >>> from influence.train import GradientCollectorCallback
        >>> callback = GradientCollectorCallback("runs/warmup", chain(as_blocks(), project(16)))
        >>> # trainer = prepare_for_gradient_collection(Trainer(…, callbacks=[callback])); trainer.train()
    """

    def __init__(
        self,
        path: str | Path,
        transform: Transform | None = None,
        *,
        share: bool = True,
        scale: str | None = None,
        track_order: bool = True,
        loss: str | ExampleLoss = "cross_entropy",
        reduction: str = "sum",
        targets: Any = None,
        engine: str = "auto",
        dtype: str = "float32",
        shard_size: int = 4096,
        nonfinite: str = "error",
        overwrite: bool = False,
    ) -> None:
        if scale not in (None, "optimizer"):
            raise ValueError(f"scale must be 'optimizer' or None; got {scale!r}")
        self.settings = Settings(
            Path(path),
            transform or chain(),
            share,
            scale,
            loss,
            reduction,
            targets,
            engine,
            dtype,
            shard_size,
            nonfinite,
            overwrite,
        )
        self.track_order = track_order
        self.collector: Collector | None = None
        self.collecting = False

    @property
    def seconds(self) -> float:
        """Seconds spent on collection so far, but for what shares the training's own forward and backward."""
        return 0.0 if self.collector is None else self.collector.seconds

    def prepare(self, trainer: Trainer, compute_loss: Any) -> None:
        """Make the examples' losses from the Trainer's model, before training wraps it."""
        assert trainer.train_dataset is not None
        model, examples = trainer.model, len(trainer.train_dataset)  # type: ignore[arg-type]
        assert isinstance(model, nn.Module)
        self.collector = Collector(self.settings, model, compute_loss, examples, trainer.args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on.

        Raises:
            RuntimeError: if the Trainer was not prepared.
        """
        if self.collector is None:
            raise RuntimeError(
                "this Trainer was not prepared: its batches do not say which examples they hold. Add the callback, "
                "then call trainer = prepare_for_gradient_collection(trainer), then trainer.train()"
            )
        self.collector.begin(int(state.global_step))
        self.collecting = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the epoch."""
        if self.collector is not None:
            self.collector.begin_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the step's update was made."""
        if self.collector is not None:
            self.collector.end_step(control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the epoch's index."""
        if self.collector is not None:
            self.collector.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop collecting; write the index of an epoch that was cut short."""
        self.collecting = False
        if self.collector is not None:
            self.collector.end(self.track_order)

    def close(self) -> None:
        """Let the directory go, however the training ended."""
        self.collecting = False
        if self.collector is not None:
            self.collector.close()


def prepare_for_gradient_collection(trainer: Trainer) -> Trainer:
    """Let a Trainer's batches say which examples they hold, and its training step collect their rows.

    Its training set gets numbers, its collator hands them through, and `training_step` and `compute_loss` are wrapped;
    evaluation goes on as it was. Call it once the callback is added.

    Args:
        trainer: a `transformers.Trainer`, or what inherits from it, as TRL's `SFTTrainer`.

    Returns:
        The same Trainer.

    Raises:
        ValueError: if it has no callback to collect for, or no dataset with an order.
    """
    if hasattr(trainer, PREPARED):
        return trainer
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, GradientCollectorCallback)]
    if len(found) != 1:
        raise ValueError(
            f"the Trainer has {len(found)} GradientCollectorCallbacks, and needs one: trainer.add_callback("
            "GradientCollectorCallback(path)) first"
        )
    (callback,) = found
    numbered(trainer)
    training_step, compute_loss = trainer.training_step, trainer.compute_loss
    train, save_checkpoint = trainer.train, trainer._save_checkpoint
    callback.prepare(trainer, compute_loss)
    collector = callback.collector
    assert collector is not None

    def wrapped_step(model: Any, inputs: Any, num_items_in_batch: Any = None, *args: Any, **kwargs: Any) -> Any:
        clean = {key: value for key, value in inputs.items() if key != "index"}

        def run() -> Any:
            return training_step(model, clean, num_items_in_batch, *args, **kwargs)

        if not callback.collecting:
            return run()
        return collector.step(run, inputs, trainer, _counts(trainer, clean, num_items_in_batch))

    def wrapped_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        settings = {"num_items_in_batch": num_items_in_batch, **kwargs}
        inputs = {key: value for key, value in inputs.items() if key != "index"}
        if not (callback.collecting and collector.settings.share and model.training and torch.is_grad_enabled()):
            return compute_loss(model, inputs, return_outputs=return_outputs, **settings)
        loss, outputs = collector.forward(model, inputs, **settings)
        return (loss, outputs) if return_outputs else loss

    def wrapped_save(*args: Any, **kwargs: Any) -> Any:
        collector.flush(int(trainer.state.global_step))  # before the checkpoint that counts them, whoever asked for it
        return save_checkpoint(*args, **kwargs)

    @functools.wraps(train)
    def wrapped_train(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            callback.close()

    trainer.train, trainer._save_checkpoint = wrapped_train, wrapped_save  # type: ignore[method-assign]
    trainer.training_step = wrapped_step  # type: ignore[method-assign]
    trainer.compute_loss = wrapped_loss  # type: ignore[method-assign]
    setattr(trainer, PREPARED, True)
    return trainer


def _counts(trainer: Trainer, inputs: Any, num_items: Any) -> list[float]:
    """Return what a Trainer may divide the sum of the examples' losses by, the likeliest first."""
    labels = inputs.get("labels")
    counts = [] if num_items is None else [float(num_items) / trainer.args.world_size, float(num_items)]
    if isinstance(labels, Tensor):
        shifted = labels[..., 1:] if labels.ndim > 1 else labels
        counts += [float(labels.ne(-100).sum()), float(shifted.ne(-100).sum()), float(labels.shape[0])]
    return [*counts, 1.0]
