"""What projected per-example gradients cost, against the floor: one forward and one backward with no weight gradients.

All variants of a model run in one interleaved run (`benchmarks.measure`), every variant that projects is first compared
with a dense autograd loop, and a variant that fails, in its import or in its numbers, is a FAILED row. A run whose
hand-written hooks are above `HOOKS_BAR` × floor is void: the machine, or our baseline, is not fit to judge by.
"""

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import baselines, measure, peers, report
from benchmarks.models import MODELS, Workload
from benchmarks.report import Check, at_least, at_most

DIM = 16
EPS = 1e-8
TOLERANCE = 1e-4
HOOKS_BAR = 1.12
LOOP_EXAMPLES = 2


class Prepared(NamedTuple):
    """A variant that is ready to run.

    Attributes:
        step: Does one batch.
        expected: The rows that it must return, computed when asked; None where it returns none.
        scale: A whole batch costs this many steps.
        note: For the table.
    """

    step: measure.Step
    expected: Callable[[], baselines.Rows] | None = None
    scale: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """One workload with what its variants share."""

    work: Workload

    @cached_property
    def matrices(self) -> baselines.Matrices:
        """The library's own `(L, R)` per block."""
        from influence.func.project import sketch

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
    return Prepared(baselines.hooks(bench.work, bench.matrices), lambda: bench.rows)


def hooks_pruned(bench: Bench) -> Prepared:
    step = baselines.hooks(bench.work, bench.matrices, pruned=True)
    return Prepared(step, lambda: bench.rows, note="no gradient of the inputs: below the floor's work")


def batched(bench: Bench) -> Prepared:
    return Prepared(bench.ours(engine="batched"), lambda: bench.rows)


def vmap(bench: Bench) -> Prepared:
    return Prepared(bench.ours(engine="vmap"), lambda: bench.rows)


def compiled(bench: Bench) -> Prepared:
    return Prepared(bench.ours(compile=True), lambda: bench.rows)


def vmap_then_project(bench: Bench) -> Prepared:
    return Prepared(baselines.vmap_then_project(bench.work, bench.matrices), lambda: bench.rows)


def loop(bench: Bench) -> Prepared:
    step = bench.ours(engine="loop", count=LOOP_EXAMPLES)
    expected = lambda: {name: row[:LOOP_EXAMPLES] for name, row in bench.rows.items()}  # noqa: E731
    return Prepared(
        step, expected, bench.work.n / LOOP_EXAMPLES, f"timed on {LOOP_EXAMPLES} of {bench.work.n} examples"
    )


def training_step(bench: Bench) -> Prepared:
    return Prepared(baselines.training_step(bench.work), note="all weight gradients, no rows")


def adam(bench: Bench) -> Prepared:
    from influence import Moments, scale_by_adam

    step = bench.ours(scale_by_adam(Moments(bench.moments), eps=EPS))
    return Prepared(step, lambda: baselines.dense_rows(bench.work, bench.matrices, bench.moments, EPS))


def bergson(bench: Bench) -> Prepared:
    step, matrices = peers.bergson(bench.work, DIM)
    return Prepared(step, lambda: baselines.dense_rows(bench.work, matrices), note="its own matrices")


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
PEERS = ("bergson",)
EAGER = ("batched", "vmap")
# Variants that form full gradients, a block at a time.
COUNTED = ("scale_by_adam",)


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        name: The variant.
        note: For the table.
        scale: Steps per batch.
        error: From the dense loop, relative.
        failed: Why there is nothing else.
        gradients_alive: The most full weight gradients alive at once, in units of the largest block's `[n, o, i]`.
        times: Raw.
        memory: In a process of its own.
    """

    name: str
    note: str = ""
    scale: float = 1.0
    error: float | None = None
    failed: str | None = None
    gradients_alive: float | None = None
    times: measure.Times = field(default_factory=lambda: measure.Times([], []))
    memory: measure.Memory | None = None


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
        rows = measure_model(bench, chosen, rounds)
        if memory:
            for row in rows.values():
                measure_memory(row, model, threads, quick)
        summary = summarise(bench.work, rows, clock)
        found["models"].append(summary)
        print(table(summary, found["settings"]), flush=True)
    found["machine"]["load_after"] = measure.machine()["load"]
    return found


def measure_model(bench: Bench, names: Sequence[str], rounds: int) -> dict[str, Row]:
    """Prepare, verify and time the variants; one that raises becomes a failed row and leaves the others alone."""
    rows, steps = {}, {}
    for name in names:
        rows[name] = row = Row(name)
        _say(f"{bench.work.name}: {name}")
        try:
            prepared = VARIANTS[name](bench)
            row.note, row.scale = prepared.note, prepared.scale
            with warnings.catch_warnings():
                # A compiled variant that runs eagerly after all is no compiled variant.
                warnings.filterwarnings("error", message="not compiled|the compiled step differs")
                result = prepared.step()
            if prepared.expected is not None:
                row.error = baselines.worst_error(result, prepared.expected())
                if not row.error <= TOLERANCE:
                    raise ValueError(f"wrong numbers: {row.error:.1e} from the dense loop")
            prepared.step()  # a second call repeats the plan's check: no part of what a step costs
            if name in COUNTED:
                row.gradients_alive = gradients_alive(bench.work, prepared.step)
                row.note = f"{row.gradients_alive:.2f} blocks' full gradients alive at once"
            steps[name] = prepared.step
        except Exception as problem:
            row.failed = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            traceback.print_exc()
    timed = measure.interleave(steps, rounds, on_round=lambda done: _say(f"{bench.work.name}: round {done}/{rounds}"))
    for name, times in timed.items():
        rows[name].times = times
    return rows


def gradients_alive(work: Workload, step: measure.Step) -> float:
    """Run a step; return the most full weight gradients alive at once, in units of the largest block's `[n, o, i]`."""
    weights = [module.weight.flatten(1) for module in work.blocks.values()]
    shapes = {tuple(weight.shape) for weight in weights}
    with measure.Alive(shapes | {(i, o) for o, i in shapes}) as alive:
        step()
    return alive.peak / (work.n * max(weight.nbytes for weight in weights))


def measure_memory(row: Row, model: str, threads: int, quick: bool) -> None:
    """Fill in the memory of a variant that ran, from a process of its own."""
    if row.failed:
        return
    _say(f"{model}: memory of {row.name}")
    arguments = ["memory", "--model", model, "--variant", row.name, "--threads", str(threads)]
    try:
        row.memory = measure.memory_of("benchmarks", arguments + ["--quick"] * quick)
    except RuntimeError as problem:
        row.failed = "its memory could not be measured"
        _say(str(problem))


def print_memory(model: str, variant: str, threads: int, quick: bool) -> None:
    """Measure the memory of one variant in this process and print it as JSON."""
    torch.set_num_threads(threads)
    bench = Bench(MODELS[model](quick))
    measure.print_memory(lambda: VARIANTS[variant](bench).step)


def summarise(work: Workload, rows: dict[str, Row], clock: str) -> dict:
    """One model's rows with their ratios, and the raw times they come from."""
    seconds = {name: getattr(row.times, clock) for name, row in rows.items() if row.times.wall}
    base = rows["floor"].memory if "floor" in rows else None
    variants = []
    for name, row in rows.items():
        entry = {"name": name, "note": row.note, "failed": row.failed, "error": row.error, "scale": row.scale}
        entry["gradients_alive"] = row.gradients_alive
        if name in seconds:
            entry["seconds"] = row.scale * measure.ratio(seconds[name], [1.0] * len(seconds[name])).median
            for other in ("floor", "hooks"):
                if other in seconds:
                    entry[f"over_{other}"] = measure.ratio(seconds[name], seconds[other], row.scale)._asdict()
            if "bergson" in seconds:
                entry["throughput_over_bergson"] = measure.ratio(
                    seconds["bergson"], seconds[name], 1 / row.scale
                )._asdict()
            entry["raw"] = row.times._asdict()
        if row.memory:
            entry["memory"] = row.memory._asdict()
            if base:
                entry["memory"]["above_floor"] = row.memory.step / base.step - 1
        variants.append(entry)
    return {"model": work.name, "shape": work.shape, "blocks": len(work.blocks), "variants": variants}


def targets(summary: dict, *, with_peers: bool) -> list[Check]:
    """Every target, judged on one model; the first says whether the run counts at all."""
    found = {entry["name"]: entry for entry in summary["variants"]}

    def read(name: str, *path: str) -> float | None:
        value = found.get(name, {})
        for key in path:
            value = value.get(key) if value else None
        return value

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
    return checks + [
        Check(f"{name} ran", None, entry["failed"], False) for name, entry in found.items() if entry["failed"]
    ]


def table(summary: dict, settings: dict) -> str:
    """One model's rows for people."""
    title = (
        f"\n{summary['model']}: {summary['shape']}, {summary['blocks']} blocks, projected to {settings['dim']} × "
        f"{settings['dim']}; {settings['rounds']} rounds, {settings['threads']} thread(s), {settings['clock']} time\n"
    )
    return title + report.table(COLUMNS, [_line(entry) for entry in summary["variants"]])


COLUMNS = ("variant", "ms", "× floor", "quartiles", "× bergson", "peak MiB", "above floor", "held MiB", "error", "")


def _line(entry: dict) -> tuple[str, ...]:
    if entry["failed"]:
        return entry["name"], "FAILED", *[""] * (len(COLUMNS) - 3), entry["failed"]
    over, faster, memory = (entry.get(key) for key in ("over_floor", "throughput_over_bergson", "memory"))
    return (
        entry["name"],
        f"{1e3 * entry['seconds']:.0f}",
        f"{over['median']:.3f}" if over else "",
        f"{over['low']:.3f}–{over['high']:.3f}" if over else "",
        f"{faster['median']:.2f}" if faster else "",
        f"{memory['step'] / 2**20:.0f}" if memory else "",
        f"{memory['above_floor']:+.1%}" if memory and "above_floor" in memory else "",
        f"{memory['held'] / 2**20:.0f}" if memory else "",
        f"{entry['error']:.0e}" if entry["error"] is not None else "",
        entry["note"],
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
