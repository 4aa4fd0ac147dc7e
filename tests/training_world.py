"""A tiny training whose rows are collected, in a directory, for tests that stop it: begun, or taken up again.

Two matrices, twelve examples, two epochs of four steps: half a second. `train` is all that a test of another kind
needs: it is the script that a user would start again after a crash.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from influence.train import GradientCollectorCallback, prepare_for_gradient_collection

EXAMPLES, STEPS, EPOCHS = 12, 4, 2
"""Examples, steps of an epoch and epochs of a training that nobody stops."""


class Tiny(nn.Module):
    """Two matrices, with dropout between them: a row is the same again only if the random state is."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(F.dropout(self.first(x).tanh(), 0.2, self.training))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def own_loss(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output["logits"], batch["labels"], reduction="none")


def dataset(n: int = EXAMPLES) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=draw), "labels": torch.tensor(i % 3)} for i in range(n)]


def checkpoints(directory: Path) -> dict[int, Path]:
    """Return the Trainer's whole checkpoints by their step: a killed Trainer leaves some without their state."""
    found = {}
    for path in (directory / "trainer").glob("checkpoint-*"):
        try:
            found[int(json.loads((path / "trainer_state.json").read_text())["global_step"])] = path
        except (FileNotFoundError, json.JSONDecodeError):
            continue
    return dict(sorted(found.items()))


def trainer_of(
    directory: Path,
    *,
    callbacks: tuple[transformers.TrainerCallback, ...] = (),
    first: bool = False,
    collected: dict[str, Any] | None = None,
    data: Any = None,
    **arguments: Any,
) -> transformers.Trainer:
    """Return the Trainer in `directory/trainer`, whose rows go to `directory/rows`.

    Args:
        directory: of both.
        callbacks: others beside ours.
        first: ours is before them, so that it does not see what they decide.
        collected: settings of the callback.
        data: other examples.
        arguments: of `TrainingArguments`.
    """
    settings = {"path": directory / "rows", "loss": own_loss, "targets": "*", "shard_size": 5, "overwrite": True}
    ours = GradientCollectorCallback(**settings | (collected or {}))
    known = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": EPOCHS, "learning_rate": 0.05}
    known["per_device_train_batch_size"] = EXAMPLES // STEPS
    known["lr_scheduler_type"] = "constant"  # how long a training is meant to be changes none of its steps
    trainer = transformers.Trainer(
        Tiny(),
        transformers.TrainingArguments(
            str(directory / "trainer"),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            **known | arguments,
        ),
        train_dataset=dataset() if data is None else data,
        callbacks=[ours, *callbacks] if first else [*callbacks, ours],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return prepare_for_gradient_collection(trainer)


def train(
    directory: Path,
    resume: bool = False,
    *,
    at: Callable[[dict[int, Path]], int | None] = lambda found: max(found, default=None),
    **settings: Any,
) -> None:
    """Train in a directory, from the start or from a checkpoint.

    Args:
        directory: whatever a stopped training left there, or nothing.
        resume: go on from a checkpoint, where there is a whole one.
        at: chooses the checkpoint's step; default the last.
        settings: of `trainer_of`.
    """
    last = settings.get("max_steps", 0)  # from the last in the middle of an epoch, a Trainer takes a step too many
    found = {step: path for step, path in checkpoints(directory).items() if resume and step != last}
    step = at(found)
    trainer_of(directory, **settings).train(resume_from_checkpoint=None if step is None else str(found[step]))
