"""What each of two ranks does: train a Trainer on gloo, collecting; be killed, and go on."""

from pathlib import Path

import pytest
import torch
import transformers

from influence.train import GradientCollectorCallback
from tests.test_train_callback import TARGETS, TRANSFORM, Crash, trainer_of


def collect(path: Path) -> None:
    callback = GradientCollectorCallback(
        path / "rows", TRANSFORM, targets=TARGETS, scale="optimizer", dtype="float64", shard_size=4
    )
    trainer, snapshots = trainer_of(path, callback, ddp_backend="gloo", gradient_accumulation_steps=2)
    assert trainer.args.world_size == 2
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if torch.distributed.get_rank() == 0:
        moments = {step: dict(m.second) for step, m in snapshots.moments.items()}
        torch.save({"weights": snapshots.weights, "moments": moments}, path / "snapshots.pt")


def resume(path: Path) -> None:
    """Two epochs of two updates: never stopped, and killed at the fourth, to go on from the first or the third."""

    def trainer(name: str) -> transformers.Trainer:
        callback = GradientCollectorCallback(
            path / name, TRANSFORM, targets=TARGETS, scale="optimizer", dtype="float64", shard_size=4
        )
        settings = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 1}
        return trainer_of(path / f"{name}-trainer", callback, **settings)[0]

    trainer("whole").train()
    for name, step in (("early", 1), ("late", 3)):
        killed = trainer(name)
        killed.add_callback(Crash(4))
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        torch.distributed.barrier()
        trainer(name).train(resume_from_checkpoint=str(path / f"{name}-trainer/trainer/checkpoint-{step}"))
