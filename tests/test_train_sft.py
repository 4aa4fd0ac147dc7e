"""TRL's SFTTrainer and bitsandbytes' optimizers, where they are installed: neither is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import as_blocks, chain, functionalize, per_example_grads, project
from influence.index import open_index
from influence.train import (
    GradientCollectorCallback,
    load_from_optimizer,
    prepare_for_gradient_collection,
    read_optimizer,
    read_order,
)
from tests.pipeline_world import world
from tests.test_train_callback import Snapshots

TRANSFORM = chain(as_blocks(), project(3))


@pytest.mark.parametrize(
    ("share", "adapters"), [(True, False), (True, True), (False, False)], ids=["shared", "adapters", "again"]
)
def test_trl_sft_rows_are_those_of_an_autograd_loop(tmp_path: Path, share: bool, adapters: bool) -> None:
    """Its model gets another forward, and its loss never makes the logits; checkpointing is on unless switched off."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    import datasets
    import peft
    import transformers

    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(world() / "model", dtype=torch.float64)

    tokenizer = transformers.AutoTokenizer.from_pretrained(world() / "model")
    data = datasets.load_dataset("json", data_files=str(world() / "corpus.jsonl"))["train"].select(range(10))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.3)
    callback = GradientCollectorCallback(tmp_path / "rows", TRANSFORM, share=share, dtype="float64")
    snapshots = Snapshots()
    trainer = trl.SFTTrainer(
        fresh(),
        trl.SFTConfig(
            str(tmp_path / "trainer"),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            activation_checkpointing=not share,
            bf16=False,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[snapshots, callback],
        peft_config=lora if adapters else None,
    )
    prepare_for_gradient_collection(trainer).train()
    order = read_order(tmp_path / "rows")
    assert len(order.example) == 20
    assert order.step.max() == 3
    if adapters:  # a step's dropout is its own: rows there are, and what they sum to was checked
        assert open_index(tmp_path / "rows/epoch-1").matrix().norm(dim=1).min() > 0
        return
    for epoch in (0, 1):
        index, visits = open_index(tmp_path / f"rows/epoch-{epoch}"), order.where(order.epoch == epoch).first()
        for i, step in zip(visits.example.tolist(), visits.step.tolist(), strict=True):
            model = fresh()
            model.load_state_dict(snapshots.weights[step], strict=False)
            loss_fn, params = functionalize(model, targets="*_proj.weight")
            ids = torch.tensor(trainer.train_dataset[i]["input_ids"])[None]
            rows = per_example_grads(loss_fn, params, {"input_ids": ids}, transform=TRANSFORM, engine="loop")
            expected = torch.cat([row.flatten(1) for row in rows.values()], 1)[0]
            error = float((index.matrix(i, i + 1)[0] - expected).norm() / expected.norm())
            assert error < (1e-5 if share else 1e-10), (i, error)  # TRL's loss is computed in float32
            assert visits.length[i] == ids.shape[1] - 1


def updated(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Three updates by gradients of one's own; return them."""
    draw, given = torch.Generator().manual_seed(0), []
    for _ in range(3):
        given.append({name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = given[-1][name].clone()
        optimizer.step()
    return given


@pytest.mark.parametrize("kind", ["AdamW8bit", "Adam8bit", "AdamW32bit"])
def test_bitsandbytes_own_optimizers(tmp_path: Path, kind: str) -> None:
    """Moments of codes that the library itself wrote are near those of the gradients, live and from a file."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    draw = torch.Generator().manual_seed(1)
    model = nn.Linear(128, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    try:
        optimizer = getattr(bnb.optim, kind)(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        given = updated(model, optimizer)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # bitsandbytes has kernels for some devices only; the library under test has not been called yet
        pytest.skip(f"{kind} does not run here: {error}")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for source in (optimizer, tmp_path):
        found = read_optimizer(model, source)
        for name, entry in found.entries.items():
            first = sum(0.1 * 0.9 ** (2 - t) * grads[name] for t, grads in enumerate(given))
            second = sum(0.01 * 0.99 ** (2 - t) * grads[name] ** 2 for t, grads in enumerate(given))
            for got, exact in ((entry.first, first), (entry.second, second)):
                off = float((got - exact).norm() / exact.norm())
                print(kind, name, off)
                assert off < (0.03 if name == "weight" and "8bit" in kind else 1e-5)
            assert entry.step == 3
    corrected = load_from_optimizer(model, tmp_path, bias_correction=True).second["bias"]
    torch.testing.assert_close(corrected, found.entries["bias"].second / (1 - 0.99**3))
