"""What each of two ranks does: train in shards, and save the optimizer as they do."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from influence.train import load_from_optimizer


def adam(p: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), **settings)


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def shard(path: Path) -> None:
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = small()
    fully_shard(model, mesh=mesh)
    optimizer = adam(model.parameters())
    for step in range(2):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path / "checkpoint" / "optimizer_0"
    )
    names = [name for name, _ in model.named_parameters()]
    full = {
        name: {key: value.full_tensor() for key, value in optimizer.state[p].items() if key != "step"}
        for name, p in zip(names, model.parameters(), strict=True)
    }
    moments = load_from_optimizer(model, optimizer)  # of a live one, whose state is in shards too
    assert all(torch.equal(moments.second[name], full[name]["exp_avg_sq"]) for name in names)
    if rank == 0:
        torch.save(full, path / "expected.pt")
