"""What collecting adds to a training step: the Trainer's own step with AdamW, with and without the callback.

The model is the collection benchmark's NeoX, trained in float32 on 8 × 256 tokens by the Trainer's own `training_step`
and its AdamW; one step is forward, backward, update, and what the callback does, its write included. `p = 0` keeps
whole gradients (75 MiB an example); `scaled` divides by AdamW's moments of each step, `again` is a second pass in
evaluation mode. The rows of all rounds are of one epoch: at `p = 0` each takes 600 MiB of disk. Peers state about 17 %
for projected rows (Bergson, its README); the bar is 12 % at p = 16.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, models, report

VARIANTS = {
    "plain": None,
    "p = 16": {"p": 16},
    "p = 16, scaled": {"p": 16, "scale": "optimizer"},
    "p = 0": {"p": 0},
    "p = 16, again": {"p": 16, "share": False},
}
BAR = 0.12


def run(*, rounds: int, threads: int, quick: bool) -> dict:
    """Measure, and print the table."""
    torch.set_num_threads(threads)
    measure.keep_heap()
    with folder() as place:
        steps = {name: prepare(place / str(i), variant, quick) for i, (name, variant) in enumerate(VARIANTS.items())}
        for step in steps.values():
            step()
            step()
        times = measure.interleave(steps, rounds)
    clock = "cpu" if threads == 1 else "wall"
    plain = getattr(times["plain"], clock)
    lines, found = [], {}
    for name in VARIANTS:
        over = measure.ratio(getattr(times[name], clock), plain)
        found[name] = {"times": times[name]._asdict(), "over_plain": over}
        median = sorted(getattr(times[name], clock))[rounds // 2]
        lines.append([name, f"{median:.3f}", f"{over.median - 1:+.1%}", f"{over.low - 1:+.1%} … {over.high - 1:+.1%}"])
    print(f"one training step, AdamW; {clock} seconds, {threads} threads, {rounds} rounds")
    print(report.table(["", "seconds", "overhead", "quartiles"], lines))
    settings = {"rounds": rounds, "threads": threads, "clock": clock, "quick": quick}
    return {"benchmark": "training", "settings": settings, "machine": measure.machine(), "variants": found}


@contextmanager
def folder() -> Iterator[Path]:
    """Make a folder for the rows, and delete it."""
    place = Path(tempfile.mkdtemp())
    try:
        yield place
    finally:
        shutil.rmtree(place)


def prepare(path: Path, variant: dict[str, Any] | None, quick: bool) -> Callable[[], object]:
    """Return a training step."""
    from transformers import Trainer, TrainingArguments

    from influence import as_blocks, chain, project
    from influence.train import GradientCollectorCallback, prepare_for_gradient_collection

    work = models.MODELS["neox"](quick)
    assert isinstance(work.batch, dict)
    ids = work.batch["input_ids"]
    model = models.twin(work.model, {name for name, _ in work.model.named_parameters()}).float().train()
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.clone()  # each variant trains weights of its own
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = TrainingArguments(
        str(path / "trainer"), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-5
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    if variant is not None:
        settings = {key: value for key, value in variant.items() if key != "p"}
        transform = chain(as_blocks(), project(variant["p"])) if variant["p"] else as_blocks()
        trainer.add_callback(
            GradientCollectorCallback(path / "rows", transform, targets=list(work.targets), **settings)
        )
        prepare_for_gradient_collection(trainer)
    trainer.create_optimizer_and_scheduler(10_000)
    trainer.callback_handler.on_train_begin(arguments, trainer.state, trainer.control)
    trainer.callback_handler.on_epoch_begin(arguments, trainer.state, trainer.control)
    inputs = {"input_ids": ids, "labels": ids}
    inputs |= {} if variant is None else {"index": torch.arange(len(ids))}
    trainer.current_gradient_accumulation_steps = 1
    items = torch.tensor(ids[:, 1:].numel())

    def step() -> object:
        loss = trainer.training_step(model, dict(inputs), items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        trainer.callback_handler.on_step_end(arguments, trainer.state, trainer.control)
        return loss

    return step


def targets(found: dict) -> list[report.Check]:
    """Return the bar: 12 % at p = 16."""
    return [report.at_most("overhead at p = 16, share=True", found["variants"]["p = 16"]["over_plain"].median - 1, BAR)]
