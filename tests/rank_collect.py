"""What each of two ranks does: train a Trainer on gloo, collecting."""

import os
from pathlib import Path

import torch

from influence.train import GradientCollectorCallback
from tests.test_train_callback import TARGETS, TRANSFORM, trainer_of


def collect(rank: int, port: int, path: Path) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    callback = GradientCollectorCallback(
        path / "rows", TRANSFORM, targets=TARGETS, scale="optimizer", dtype="float64", shard_size=4
    )
    trainer, snapshots = trainer_of(path, callback, ddp_backend="gloo", gradient_accumulation_steps=2)
    assert trainer.args.world_size == 2
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if rank == 0:
        moments = {step: dict(m.second) for step, m in snapshots.moments.items()}
        torch.save({"weights": snapshots.weights, "moments": moments}, path / "snapshots.pt")
    torch.distributed.destroy_process_group()
