"""A small world for tests of pipelines: a float64 Llama, documents and questions, and a dense oracle of rows."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.models import layer_matrices
from influence.pipelines.build import BuildConfig
from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig, TransformConfig
from notebooks.make_corpus import make

DOCUMENTS = 25
FAST = RunConfig(shard_size=8, token_budget=256, dtype="float64", progress=False)
"""Four shards, the last of one document."""


@functools.cache
def world() -> Path:
    """Make the world, once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="influence-world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder, DOCUMENTS, steps=0, hidden=16, layers=1, double=True)
    return folder


def model_config() -> ModelConfig:
    return ModelConfig(str(world() / "model"))


def corpus() -> DataConfig:
    return DataConfig(str(world() / "corpus.jsonl"))


def questions() -> DataConfig:
    return DataConfig(str(world() / "questions.jsonl"))


def build_config(run: Path, **changes: Any) -> BuildConfig:
    known: dict[str, Any] = {"transform": TransformConfig(projection_dim=4), "execution": FAST} | changes
    return BuildConfig(str(run), model_config(), corpus(), **known)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world() / name).read_text().splitlines()]


@functools.cache
def oracle(name: str, log_odds: bool = False) -> dict[str, Tensor]:
    """Return every document's whole gradient by plain autograd, one document at a time and without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world() / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(world() / "model")
    targets = layer_matrices(model)
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {target: [] for target in targets}
    for row in lines(name):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        log_p = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        loss = -(log_p - (-log_p.exp()).log1p()).sum() if log_odds else -log_p.sum()
        for target, grad in zip(targets, torch.autograd.grad(loss, [named[t] for t in targets]), strict=True):
            found[target].append(grad)
    return {target.removesuffix(".weight"): torch.stack(grads) for target, grads in found.items()}


def flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def sketched(rows: dict[str, Tensor], p: int) -> dict[str, Tensor]:
    """Project rows block by block with the library's own matrices, by dense products."""
    from influence.func.transform.project import sketch

    out = {}
    for name, g in rows.items():
        left, right = (
            torch.eye(size, dtype=torch.float64) if size <= p else sketch(name, side, p, size)
            for side, size in zip(("left", "right"), g.shape[1:], strict=True)
        )
        out[name] = torch.einsum("po,noi,qi->npq", left, g, right)
    return out


def power_of(h: Tensor, power: float, damping: float) -> Tensor:
    """Return `(H + c λ̄ I)^power`, dense."""
    values, vectors = torch.linalg.eigh(h)
    return (vectors * (values + damping * values.mean()) ** power) @ vectors.mT
