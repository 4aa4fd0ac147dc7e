"""What curvature costs, against the floor (one forward and one backward with no weight gradients) and kronfluence.

One model (`models.plain`), one batch, one interleaved run. A fit is timed in the middle of a pass: one step on the
batch and its sums added to those so far, as kronfluence's hooks add to theirs (`benchmarks.kronfluence` says what of it
is timed). Before anything is timed, every variant's numbers are compared with autograd, one example at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, kronfluence, measure, variants
from benchmarks.models import Workload, plain
from benchmarks.report import Check, at_most
from benchmarks.variants import Prepared

DIM = 16
DAMPING = 0.1
WHOLE_ROWS = 4
"""A quarter of the batch has its whole rows preconditioned: all at once would be 800 MB of them."""


@dataclass(frozen=True)
class Bench:
    """The workload with what its variants share."""

    work: Workload

    @cached_property
    def function(self) -> tuple[Callable, dict[str, Tensor]]:
        """`functionalize` of the workload's model, loss and targets, biases included."""
        from influence import functionalize

        names = [f"{block}.{kind}" for block in self.work.blocks for kind in ("weight", "bias")]
        return functionalize(self.work.model, loss=self.work.loss, targets=names)

    @cached_property
    def transform(self) -> Any:
        """Blocks with their biases."""
        from influence import as_blocks

        return as_blocks(bias=True)

    @cached_property
    def sums(self) -> tuple[Any, Any]:
        """The library's K-FAC sums of the batch (labels from the data), and the sink that finalises them."""
        from influence import hessians

        method, how = hessians.kfac.build(), {"transform": self.transform, "labels": "data"}
        step = hessians.step(*self.function, self.work.batch, method, **how)
        return step(self.work.batch), step.sink()

    @cached_property
    def factors(self) -> Any:
        """The library's K-FAC factors."""
        sums, sink = self.sums
        return sink.finalize(sums)

    @cached_property
    def corrected(self) -> Any:
        """The library's EK-FAC factors."""
        from influence.hessians import ekfac

        return ekfac.correct(self.factors, *self.function, [self.work.batch], progress=False)

    @cached_property
    def peer(self) -> kronfluence.Driver:
        """Kronfluence with its covariances fitted."""
        driver = kronfluence.Driver(self.work)
        driver.fit()
        return driver

    @cached_property
    def oracle(self) -> tuple[baselines.Matrices, baselines.Matrices]:
        """K-FAC's and TKFAC's sums."""
        return baselines.dense_factors(self.work)

    def squares(self, bases: kronfluence.Sides) -> baselines.Rows:
        """The oracle's `Σ_n (Q_S^T G_n Q_A)²` in the eigenbases `(Q_S, Q_A)` of whoever is compared."""
        total = {name: torch.tensor(0.0) for name in bases}
        for grads in baselines.dense_gradients(self.work, bias=True):
            for name, (left, right) in bases.items():
                total[name] = total[name] + (left.mT @ grads[name] @ right).square()
        return total

    def folded(self, step: Any, sink: Any) -> measure.Step:
        """One step of a pass: the sums of the batch, added to those so far."""
        state, index = sink.init(), torch.arange(self.work.n)

        def one() -> Any:
            nonlocal state
            state = sink.update(state, index, step(self.work.batch))
            return state

        return one

    def collected(self, *after: Any, count: int | None = None) -> measure.Step:
        """A planned collection of rows through transforms after the blocks."""
        from influence import chain, per_example_grads_fn

        loss_fn, params = self.function
        batch = self.work.batch if count is None else self.work.first(count)
        rows_of = per_example_grads_fn(loss_fn, params, batch, transform=chain(self.transform, *after))
        return lambda: rows_of(params, batch)


def floor(bench: Bench) -> Prepared:
    return Prepared(baselines.floor(bench.work))


def hooks(bench: Bench) -> Prepared:
    def error(sums: baselines.Matrices) -> float:
        lower = {name: tuple(side.tril() for side in sides) for name, sides in bench.oracle[0].items()}
        return baselines.worst_error(
            {name: tuple(side.tril() for side in sides) for name, sides in sums.items()}, lower
        )

    return Prepared(
        baselines.covariance_hooks(bench.work), error, note="covariances by hand: half of each, shared inputs"
    )


def kfac_data(bench: Bench) -> Prepared:
    return Prepared(
        _fit(bench, "kfac", "data"),
        lambda sums: baselines.worst_error(_sides(sums), bench.oracle[0]),
        note="data labels",
    )


def kfac_sampled(bench: Bench) -> Prepared:
    def error(sums: Any) -> float:
        # Labels are drawn, inputs are not.
        mine, theirs = ({name: right for name, (_, right) in x.items()} for x in (_sides(sums), bench.oracle[0]))
        return baselines.worst_error(mine, theirs)

    return Prepared(_fit(bench, "kfac", "sampled"), error, note="sampled labels; error of the input sides")


def tkfac(bench: Bench) -> Prepared:
    return Prepared(
        _fit(bench, "tkfac", "data"),
        lambda sums: baselines.worst_error(_sides(sums), bench.oracle[1]),
        note="data labels",
    )


def shampoo(bench: Bench) -> Prepared:
    def error(sums: Any) -> float:
        expected = {}
        for grads in baselines.dense_gradients(bench.work, bias=True):
            for name, g in grads.items():
                left, right = expected.get(name, (0, 0))
                expected[name] = (left + g @ g.mT, right + g.mT @ g)
        return baselines.worst_error(_sides(sums), expected)

    return Prepared(_fit(bench, "shampoo", "data"), error, note="data labels")


def ekfac(bench: Bench) -> Prepared:
    from influence import hessians

    how = {"transform": bench.transform, "labels": "data", "number": 1, "factors": bench.factors}
    step = hessians.step(*bench.function, bench.work.batch, hessians.ekfac.build(), **how)

    def error(sums: Any) -> float:
        found = {name: block["squares"] for name, block in sums.blocks.items()}
        bases = {name: tuple(basis.vectors for basis in c.bases) for name, c in bench.factors.blocks.items()}
        return baselines.worst_error(found, bench.squares(bases))

    return Prepared(bench.folded(step, step.sink()), error, note="second pass, data labels")


def kfac_eigen(bench: Bench) -> Prepared:
    sums, sink = bench.sums

    def error(factors: Any) -> float:
        found, divided = {}, {}
        for name, c in factors.blocks.items():
            found[name] = tuple((b.vectors * b.values) @ b.vectors.mT for b in c.bases)
            left, right = bench.oracle[0][name]
            divided[name] = (left / bench.work.n, right / bench.work.labels.numel())
        return baselines.worst_error(found, divided)

    return Prepared(lambda: sink.finalize(sums), error, note="eigendecomposition, once per fit")


def precondition(bench: Bench) -> Prepared:
    from influence import precondition

    few = bench.work.n // WHOLE_ROWS
    step = bench.collected(precondition(bench.corrected, power=-1, damping=DAMPING), count=few)

    def error(rows: baselines.Rows) -> float:
        expected = {name: [] for name in rows}
        for grads, _ in zip(baselines.dense_gradients(bench.work, bias=True), range(few), strict=False):
            for name, g in grads.items():
                left, right = (basis.vectors for basis in bench.corrected.blocks[name].bases)
                damped = bench.corrected.blocks[name].corrected
                damped = damped + DAMPING * damped.mean()
                expected[name].append(left @ ((left.mT @ g @ right) / damped) @ right.mT)
        return baselines.worst_error(rows, {name: torch.stack(each) for name, each in expected.items()})

    return Prepared(step, error, WHOLE_ROWS, f"EK-FAC rows [n, o, i + 1], timed on {few} of {bench.work.n} examples")


def whiten(bench: Bench) -> Prepared:
    from influence import kfac_whiten

    step = bench.collected(kfac_whiten(bench.factors, damping=DAMPING, dim=DIM, seed=0))

    def error(rows: baselines.Rows) -> float:
        from influence.func.transform.project import sketch

        matrices = {}
        for name, c in bench.factors.blocks.items():
            (u, s), (v, a) = ((basis.vectors, basis.values) for basis in c.bases)
            ratio, root = (a.mean() / s.mean()).sqrt(), (DAMPING * s.mean() * a.mean()).sqrt()
            roots = (u * (s + root / ratio) ** -0.5) @ u.mT, (v * (a + root * ratio) ** -0.5) @ v.mT
            sides = zip(("left", "right"), c.shape, roots, strict=True)
            matrices[name] = tuple(sketch(name, side, DIM, size).float() @ matrix for side, size, matrix in sides)
        return baselines.worst_error(rows, baselines.dense_rows(bench.work, matrices, bias=True))

    return Prepared(step, error, note=f"K-FAC whitened rows [n, {DIM}, {DIM}], folded into the collection")


def kronfluence_covariance(bench: Bench) -> Prepared:
    driver = kronfluence.Driver(bench.work)
    step = driver.covariance_step()

    def error(_: None) -> float:
        return baselines.worst_error(driver.sums("gradient_covariance", "activation_covariance"), bench.oracle[0])

    return Prepared(step, error, note="data labels")


def kronfluence_lambda(bench: Bench, iterative: bool = False) -> Prepared:
    driver, eigen = kronfluence.Driver(bench.work), bench.peer.eigendecompose()
    step = driver.lambda_step(eigen, iterative)

    def error(_: None) -> float:
        vectors = (eigen["gradient_eigenvectors"], eigen["activation_eigenvectors"])
        bases = {name: tuple(side[name] for side in vectors) for name in bench.work.blocks}
        return baselines.worst_error(driver.sums("lambda_matrix"), bench.squares(bases))

    return Prepared(step, error, note="second pass, data labels" + ", one example rotated at a time" * iterative)


def kronfluence_eigen(bench: Bench) -> Prepared:
    def error(eigen: dict[str, dict[str, Tensor]]) -> float:
        found, divided = {}, {}
        for name in bench.work.blocks:
            pairs = [(eigen[f"{side}_eigenvectors"][name], eigen[f"{side}_eigenvalues"][name]) for side in _THEIRS]
            found[name] = tuple((vectors * values) @ vectors.mT for vectors, values in pairs)
            divided[name] = tuple(total / bench.work.labels.numel() for total in bench.oracle[0][name])
        return baselines.worst_error(found, divided)

    driver = bench.peer
    return Prepared(driver.eigendecompose, error, note="eigendecomposition, once per fit")


_THEIRS = ("gradient", "activation")

# The name in the table, what prepares it.
VARIANTS: dict[str, Callable[[Bench], Prepared]] = {
    "floor": floor,
    "hooks": hooks,
    "kfac_data": kfac_data,
    "kfac_sampled": kfac_sampled,
    "tkfac": tkfac,
    "shampoo": shampoo,
    "ekfac": ekfac,
    "kfac_eigen": kfac_eigen,
    "precondition": precondition,
    "whiten": whiten,
    "kronfluence_covariance": kronfluence_covariance,
    "kronfluence_lambda": kronfluence_lambda,
    "kronfluence_lambda_iterative": partial(kronfluence_lambda, iterative=True),
    "kronfluence_eigen": kronfluence_eigen,
}
PEERS = dict.fromkeys([name for name in VARIANTS if name.startswith("kronfluence")], "kronfluence")
# What each is compared with: the peer's ways to the same result, of which the fastest counts.
RIVALS = {
    "kfac_data": ("kronfluence_covariance",),
    "ekfac": ("kronfluence_lambda", "kronfluence_lambda_iterative"),
    "kfac_eigen": ("kronfluence_eigen",),
}


def run(*, rounds: int, threads: int, quick: bool, names: Sequence[str], memory: bool) -> dict:
    """Measure the variants and return everything, raw times included, ready for JSON."""
    measure.keep_heap()
    torch.set_num_threads(threads)
    clock = "cpu" if threads == 1 else "wall"
    found = {
        "benchmark": "curvature",
        "settings": {"rounds": rounds, "threads": threads, "clock": clock, "quick": quick, "dim": DIM},
        "machine": measure.machine(),
        "versions": measure.versions("torch", "influence", "numpy", "kronfluence"),
    }
    work = plain(quick)
    rows = variants.run(work.name, Bench(work), VARIANTS, names, rounds)
    if memory:
        for row in rows.values():
            variants.measure_memory(row, work.name, ["curvature", "--threads", str(threads), *["--quick"] * quick])
    found |= {"model": work.name, "shape": work.shape, "blocks": len(work.blocks), "variants": summarise(rows, clock)}
    print(table(found), flush=True)
    found["machine"]["load_after"] = measure.machine()["load"]
    return found


def print_memory(variant: str, threads: int, quick: bool) -> None:
    """Measure the memory of one variant in this process and print it as JSON."""
    torch.set_num_threads(threads)
    bench = Bench(plain(quick))
    measure.print_memory(lambda: VARIANTS[variant](bench).step)


def summarise(rows: dict[str, variants.Row], clock: str) -> list[dict]:
    """Every row with its ratios to the floor and to its fastest rival."""
    entries, seconds = variants.summarise(rows, clock, ("floor",)), variants.times_of(rows, clock)
    took = {entry["name"]: entry.get("seconds") for entry in entries}
    for entry in entries:
        rivals = [rival for rival in RIVALS.get(entry["name"], ()) if rival in seconds]
        if rivals and entry["name"] in seconds:
            rival = min(rivals, key=lambda name: took[name])
            entry["rival"] = rival
            entry["over_rival"] = measure.ratio(seconds[entry["name"]], seconds[rival])._asdict()
    return entries


def targets(found: dict, *, with_peers: bool) -> list[Check]:
    """Every target."""
    read = variants.reader(found["variants"])
    checks = [
        at_most("covariance fit (kfac_data) / floor", read("kfac_data", "over_floor", "median"), 3.0),
        at_most("second pass (ekfac) / floor", read("ekfac", "over_floor", "median"), 4.0),
    ]
    if with_peers:
        checks += [
            at_most("covariance fit (kfac_data) / kronfluence", read("kfac_data", "over_rival", "median"), 0.65),
            at_most("second pass (ekfac) / kronfluence", read("ekfac", "over_rival", "median"), 0.65),
        ]
    return checks + variants.failures(found["variants"])


def table(found: dict) -> str:
    """The rows for people."""
    settings = found["settings"]
    title = (
        f"\n{found['model']}: {found['shape']}, {found['blocks']} blocks with biases; {settings['rounds']} rounds, "
        f"{settings['threads']} thread(s), {settings['clock']} time\n"
    )
    return title + variants.table(found["variants"], "× kronfluence", _over_rival)


def _over_rival(entry: dict) -> str:
    over = entry.get("over_rival")
    return f"{over['median']:.3f}" if over else ""


def _fit(bench: Bench, method: str, labels: str) -> measure.Step:
    """A step of a pass of one of the library's fits."""
    from influence import hessians

    step = hessians.step(
        *bench.function, bench.work.batch, hessians.build(method), transform=bench.transform, labels=labels
    )
    return bench.folded(step, step.sink())


def _sides(sums: Any) -> kronfluence.Sides:
    return {name: (block["left"], block["right"]) for name, block in sums.blocks.items()}
