"""A vocabulary of 128,256: projected rows with the logits whole, and a few positions at a time.

The model is a small Llama (2 layers, 256 wide), so that the logits are nearly all there is: 4 × 512 positions of
128,256 logits are 1,002 MiB in float32. `whole` runs the same library with the cut switched off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks import measure, report

VARIANTS = ("whole", "pieces")
WORDS, LENGTH, ROWS = 128_256, 512, 4


def run(*, rounds: int, threads: int, quick: bool) -> dict:
    """Measure both, and print the table."""
    torch.set_num_threads(threads)
    measure.keep_heap()
    steps = {name: prepare(name, quick) for name in VARIANTS}
    rows = {name: step() for name, step in steps.items()}
    times = measure.interleave(steps, rounds)
    arguments = ["memory", "vocabulary", "--threads", str(threads), *(["--quick"] if quick else [])]
    lines, found = [], {}
    for name in VARIANTS:
        memory = measure.memory_of("benchmarks", [*arguments, "--variant", name])
        over = measure.ratio(times[name].cpu, times["whole"].cpu)
        pairs = [(rows[name][block], rows["whole"][block]) for block in rows["whole"]]
        error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        found[name] = {"times": times[name]._asdict(), "memory": memory._asdict(), "over_whole": over, "error": error}
        lines.append([name, f"{over.median:.3f}", f"{memory.step / 2**20:.0f}", f"{error:.0e}"])
    positions = ROWS * LENGTH if not quick else 2 * 192
    print(f"{positions:,} positions × {WORDS:,} logits: {positions * WORDS * 4 / 2**20:,.0f} MiB in float32")
    print(report.table(["logits", "× whole", "peak MiB", "error"], lines))
    return {"benchmark": "vocabulary", "machine": measure.machine(), "variants": found}


def prepare(variant: str, quick: bool) -> Callable[[], dict[str, torch.Tensor]]:
    """Return a step: one batch's projected rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from influence import as_blocks, chain, functionalize, per_example_grads_fn, project

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).eval()
    n, s = (2, 192) if quick else (ROWS, LENGTH)
    batch = {"input_ids": torch.randint(WORDS, (n, s), generator=torch.Generator().manual_seed(1))}
    loss_fn, params = functionalize(model, targets="*.layers.*_proj.weight")
    with switched(variant):
        rows_of = per_example_grads_fn(loss_fn, params, batch, transform=chain(as_blocks(), project(16)))

    def step() -> dict[str, torch.Tensor]:
        with switched(variant):
            return rows_of(params, batch)

    return step


@contextmanager
def switched(variant: str) -> Iterator[None]:
    """Let logits of any size exist whole, or not."""
    from influence.func.loss import module_loss

    before = module_loss.ENTRIES
    module_loss.ENTRIES = 1 << 60 if variant == "whole" else before
    try:
        yield
    finally:
        module_loss.ENTRIES = before


def print_memory(variant: str, threads: int, quick: bool) -> None:
    """Print the memory of one variant."""
    torch.set_num_threads(threads)
    measure.print_memory(lambda: prepare(variant, quick))
