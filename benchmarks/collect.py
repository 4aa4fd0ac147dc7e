"""What projected per-example gradients cost, against the floor: one forward and one backward with no weight gradients.

All variants of a model run in one interleaved run (`benchmarks.measure`), every variant that projects is first compared
with a dense autograd loop, and a variant that fails, in its import or in its numbers, is a FAILED row. A run whose
hand-written hooks are above `HOOKS_BAR` × floor is void: the machine, or our baseline, is not fit to judge by.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks import baselines, measure, peers, variants
from benchmarks.models import MODELS, Workload
from benchmarks.report import Check, at_least, at_most
from benchmarks.variants import Prepared

DIM = 16
EPS = 1e-8
HOOKS_BAR = 1.12
LOOP_EXAMPLES = 2


@dataclass(frozen=True)
class Bench:
    """One workload with what its variants share."""

    work: Workload

    @cached_property
    def matrices(self) -> baselines.Matrices:
        """The library's own `(L, R)` per block."""
        from influence.func.transform.project import sketch

        sizes = {name: module.weight.flatten(1).shape for name, module in self.work.blocks.items()}
        return {
            name: (sketch(name, "left", DIM, o).float(), sketch(name, "right", DIM, i).float())
            for name, (o, i) in sizes.items()
        }

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments as Adam would hold them: positive, per weight."""
        draw = torch.Generator().manual_seed(2)
        return {
            name: torch.rand(self.work.model.get_parameter(name).shape, generator=draw) * 1e-6 + 1e-7
            for name in self.work.targets
        }

    @cached_property
    def rows(self) -> baselines.Rows:
        """What every variant that projects must return."""
        return baselines.dense_rows(self.work, self.matrices)

    def error(self, rows: baselines.Rows) -> float:
        """How far a variant's rows are from those of the dense loop."""
        return baselines.worst_error(rows, self.rows)

    @cached_property
    def function(self) -> tuple[Callable, dict[str, Tensor]]:
        """`functionalize` of the workload's model, loss and targets."""
        from influence import functionalize

        return functionalize(self.work.model, loss=self.work.loss, targets=list(self.work.targets))

    def ours(self, *scalers: object, count: int | None = None, **settings: object) -> measure.Step:
        """A planned step of the library on the first `count` examples."""
        from influence import as_blocks, chain, per_example_grads_fn, project

        loss_fn, params = self.function
        batch = self.work.batch if count is None else self.work.first(count)
        transform = chain(as_blocks(), *scalers, project(DIM))
        rows_of = per_example_grads_fn(loss_fn, params, batch, transform=transform, **settings)
        return lambda: rows_of(params, batch)


def floor(bench: Bench) -> Prepared:
    return Prepared(baselines.floor(bench.work))


def hooks(bench: Bench) -> Prepared:
    return Prepared(baselines.hooks(bench.work, bench.matrices), bench.error)


def hooks_pruned(bench: Bench) -> Prepared:
    step = baselines.hooks(bench.work, bench.matrices, pruned=True)
    return Prepared(step, bench.error, note="no gradient of the inputs: below the floor's work")


def batched(bench: Bench) -> Prepared:
    return Prepared(bench.ours(engine="batched"), bench.error)


def vmap(bench: Bench) -> Prepared:
    return Prepared(bench.ours(engine="vmap"), bench.error)


def compiled(bench: Bench) -> Prepared:
    return Prepared(bench.ours(compile=True), bench.error)


def vmap_then_project(bench: Bench) -> Prepared:
    return Prepared(baselines.vmap_then_project(bench.work, bench.matrices), bench.error)


def loop(bench: Bench) -> Prepared:
    step = bench.ours(engine="loop", count=LOOP_EXAMPLES)
    return Prepared(
        step,
        lambda rows: baselines.worst_error(rows, {name: row[:LOOP_EXAMPLES] for name, row in bench.rows.items()}),
        bench.work.n / LOOP_EXAMPLES,
        f"timed on {LOOP_EXAMPLES} of {bench.work.n} examples",
    )


def training_step(bench: Bench) -> Prepared:
    return Prepared(baselines.training_step(bench.work), note="all weight gradients, no rows")


def adam(bench: Bench) -> Prepared:
    from influence import Moments, scale_by_adam

    step = bench.ours(scale_by_adam(Moments(bench.moments), eps=EPS))
    return Prepared(
        step,
        lambda rows: baselines.worst_error(rows, baselines.dense_rows(bench.work, bench.matrices, bench.moments, EPS)),
    )


def bergson(bench: Bench) -> Prepared:
    step, matrices = peers.bergson(bench.work, DIM)
    return Prepared(
        step,
        lambda rows: baselines.worst_error(rows, baselines.dense_rows(bench.work, matrices)),
        note="its own matrices",
    )


# The name in the table, what prepares it.
VARIANTS: dict[str, Callable[[Bench], Prepared]] = {
    "floor": floor,
    "hooks": hooks,
    "hooks_pruned": hooks_pruned,
    "batched": batched,
    "vmap": vmap,
    "compiled": compiled,
    "vmap_then_project": vmap_then_project,
    "loop": loop,
    "training_step": training_step,
    "scale_by_adam": adam,
    "bergson": bergson,
}
PEERS = {"bergson": "bergson"}
EAGER = ("batched", "vmap")
# Variants that form full gradients, a block at a time.
COUNTED = ("scale_by_adam",)


def run(models: Sequence[str], *, rounds: int, threads: int, quick: bool, names: Sequence[str], memory: bool) -> dict:
    """Measure the variants of each model and return everything, raw times included, ready for JSON."""
    measure.keep_heap()
    torch.set_num_threads(threads)
    clock = "cpu" if threads == 1 else "wall"
    found = {
        "benchmark": "collect",
        "settings": {"rounds": rounds, "threads": threads, "clock": clock, "quick": quick, "dim": DIM},
        "machine": measure.machine(),
        "versions": measure.versions("torch", "transformers", "influence", "numpy", "bergson"),
        "models": [],
    }
    for model in models:
        bench = Bench(MODELS[model](quick))
        # Bergson reads causal language models only.
        chosen = [name for name in names if name not in PEERS or isinstance(bench.work.batch, dict)]
        rows = variants.run(model, bench, VARIANTS, chosen, rounds, watch=partial(count, bench))
        if memory:
            for row in rows.values():
                variants.measure_memory(
                    row, model, ["collect", "--model", model, "--threads", str(threads), *["--quick"] * quick]
                )
        summary = summarise(bench.work, rows, clock)
        found["models"].append(summary)
        print(table(summary, found["settings"]), flush=True)
    found["machine"]["load_after"] = measure.machine()["load"]
    return found


def count(bench: Bench, row: variants.Row, step: measure.Step) -> None:
    """Count the full gradients alive in a step of a variant that forms them a block at a time."""
    if row.name in COUNTED:
        row.extra["gradients_alive"] = gradients_alive(bench.work, step)
        row.note = f"{row.extra['gradients_alive']:.2f} blocks' full gradients alive at once"


def gradients_alive(work: Workload, step: measure.Step) -> float:
    """Run a step; return the most full weight gradients alive at once, in units of the largest block's `[n, o, i]`."""
    weights = [module.weight.flatten(1) for module in work.blocks.values()]
    shapes = {tuple(weight.shape) for weight in weights}
    with measure.Alive(shapes | {(i, o) for o, i in shapes}) as alive:
        step()
    return alive.peak / (work.n * max(weight.nbytes for weight in weights))


def print_memory(model: str, variant: str, threads: int, quick: bool) -> None:
    """Measure the memory of one variant in this process and print it as JSON."""
    torch.set_num_threads(threads)
    bench = Bench(MODELS[model](quick))
    measure.print_memory(lambda: VARIANTS[variant](bench).step)


def summarise(work: Workload, rows: dict[str, variants.Row], clock: str) -> dict:
    """One model's rows with their ratios, and the raw times they come from."""
    entries, seconds = variants.summarise(rows, clock, ("floor", "hooks")), variants.times_of(rows, clock)
    for entry in entries:
        name = entry["name"]
        if name in seconds and "bergson" in seconds:
            ratio = measure.ratio(seconds["bergson"], seconds[name], 1 / rows[name].scale)
            entry["throughput_over_bergson"] = ratio._asdict()
    return {"model": work.name, "shape": work.shape, "blocks": len(work.blocks), "variants": entries}


def targets(summary: dict, *, with_peers: bool) -> list[Check]:
    """Every target, judged on one model; the first says whether the run counts at all."""
    read = variants.reader(summary["variants"])
    eager = min(EAGER, key=lambda name: read(name, "over_floor", "median") or math.inf)
    checks = [
        at_most("hooks / floor (above it the run is void)", read("hooks", "over_floor", "median"), HOOKS_BAR),
        at_most(f"best eager ({eager}) / floor", read(eager, "over_floor", "median"), 1.06),
        at_most(f"best eager ({eager}) / hooks", read(eager, "over_hooks", "median"), 1.0),
        at_most("compiled / floor", read("compiled", "over_floor", "median"), 1.03),
        at_most(f"memory of {eager} above the floor's", read(eager, "memory", "above_floor"), 0.10),
        at_most("scale_by_adam / floor", read("scale_by_adam", "over_floor", "median"), 2.0),
        at_most("scale_by_adam: full gradients alive, in blocks", read("scale_by_adam", "gradients_alive"), 2.0),
    ]
    if with_peers:
        checks += [
            at_least(
                f"throughput of best eager ({eager}) / bergson", read(eager, "throughput_over_bergson", "median"), 1.5
            ),
            at_least("throughput of compiled / bergson", read("compiled", "throughput_over_bergson", "median"), 1.6),
        ]
    return checks + variants.failures(summary["variants"])


def table(summary: dict, settings: dict) -> str:
    """One model's rows for people."""
    title = (
        f"\n{summary['model']}: {summary['shape']}, {summary['blocks']} blocks, projected to {settings['dim']} × "
        f"{settings['dim']}; {settings['rounds']} rounds, {settings['threads']} thread(s), {settings['clock']} time\n"
    )
    return title + variants.table(summary["variants"], "× bergson", _throughput)


def _throughput(entry: dict) -> str:
    faster = entry.get("throughput_over_bergson")
    return f"{faster['median']:.2f}" if faster else ""
