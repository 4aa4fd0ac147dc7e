"""Fit the curvature of a model on a corpus, in one pass (EK-FAC in two): any fit of `hessians`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from influence import hessians
from influence.hessians import Factors
from influence.pipelines.frame.configs import PassConfig, TransformConfig, View, at_least
from influence.pipelines.frame.directory import refuse_finished, run_directory
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.planning import first_batch, predict
from influence.pipelines.frame.prepare import Measured, batches_of, measure, own_shards
from influence.pipelines.frame.ranks import Ranks, among_ranks, own_device, ranks
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes.collect import Summed, Work, collect
from influence.store.folder import run_id

SCRATCH = ("kfac.h5", "eigenvalues-#.h5")
"""What is kept between EK-FAC's two passes."""


@dataclass(frozen=True)
class HessianConfig(PassConfig):
    """Fit the curvature of a model: what scores divide by, so that directions which all documents share count less.

    kfac, tkfac and shampoo keep a Kronecker product per block, ekfac corrects kfac's spectrum in a second pass;
    autocorrelation keeps the dense second moment of projected rows (--projection-dim 16).

    Attributes:
        run: the run directory; factors.h5 in it is the result.
        model: the model.
        data: the corpus.
        method: which curvature.
        labels: whose gradients: sampled from the model (the Fisher), the data's own, or exactly all.
        label_seed: of sampled labels.
        label_draws: sampled labels per position.
        max_side: a side of a block with more entries is kept as a diagonal.
        loss: the loss.
        transform: the rows whose curvature it is: kfac, ekfac and tkfac need whole blocks, or a projection of them.
        execution: the pass.
    """

    method: Literal["kfac", "ekfac", "tkfac", "shampoo", "autocorrelation"] = "kfac"
    labels: Literal["sampled", "data", "exact"] | None = None
    label_seed: int = 0
    label_draws: int = 1
    max_side: int = 8192
    transform: View = field(default_factory=lambda: TransformConfig(projection_dim=0), kw_only=True)

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "label_draws", "max_side")


@among_ranks
def run(config: HessianConfig, say: Say = quiet) -> Outcome:
    """Fit the factors.

    Args:
        config: the run.
        say: where its lines go.

    Returns:
        What was fitted, and where it is.
    """
    refuse_finished(config)
    measured = measure(config.model, config.loss, config.transform, config.execution)
    loss_fn, params, transform = measured.loss_fn, measured.params, measured.transform
    tokens = read_data(config.data, measured)
    shards = own_shards(tokens, config.execution)
    batches = batches_of(config.execution)
    directory, first = Path(config.run), first_batch(shards, batches)
    step, sink = _fit(config, loss_fn, params, transform, first)
    passes = 2 if config.method == "ekfac" else 1
    with ranks() as place:
        plan = predict(
            f"{config.method} factors of {len(step.about.shapes)} blocks",
            directory,
            shards,
            step,
            first,
            config.execution,
            world=place.world,
            disk=factors_size(config.method, step.about.shapes, config.max_side),
            notes=[tokens.report(), "two passes" if passes == 2 else ""],
        )
        plan = plan._replace(seconds=plan.seconds * passes)
        if place.first:
            say(str(plan))
        if config.execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        settings = {"labels": step.about.labels._asdict(), "method": config.method, "max_side": config.max_side}
        device = own_device(config.execution.device)
        where = run_directory(
            "hessian", config, measured, tokens, shards, step, place, settings, ["factors.h5"], SCRATCH
        )
        with where as at:
            work = Work(shards, batches, step, device)
            shown = config.execution.progress
            factors = collect(work, {"factors": Summed(sink)}, at, place, what=config.method, shown=shown).get(
                "factors"
            )
            if config.method == "ekfac":
                factors = _corrected(factors, work, measured, first, at, place, shown)
            if place.first and factors is not None:
                factors.save(at / "factors.h5", run_id(at) or "")
        return outcome(config.run, hessians.load(directory / "factors.h5"))


def _fit(config: HessianConfig, loss_fn: Any, params: Any, transform: Any, first: Any) -> tuple[Any, Any]:
    """Return a method's planned step and its sink."""
    room: Any = {
        "kfac": hessians.kfac,
        "ekfac": hessians.kfac,
        "tkfac": hessians.tkfac,
        "shampoo": hessians.shampoo,
        "autocorrelation": hessians.autocorrelation,
    }[config.method]
    labels = config.labels or ("data" if config.method == "autocorrelation" else "sampled")
    how: dict[str, Any] = {"transform": transform, "labels": labels, "seed": config.label_seed}
    how["draws"] = config.label_draws
    if config.method != "autocorrelation":
        how["max_side"] = config.max_side
    step = room.step(loss_fn, params, first, **how)
    return step, room.sink(step)


def _corrected(
    kfac: Factors | None, work: Work, measured: Measured, first: Any, at: Path, place: Ranks, shown: bool | None
) -> Any:
    """Measure K-FAC's eigenvalues in its basis: the second pass, whose progress is kept in files of its own."""
    if place.first and kfac is not None and not (at / "kfac.h5").is_file():
        kfac.save(at / "kfac.h5", run_id(at) or "")  # one basis on every rank and after every resume
    place.barrier()
    factors = hessians.load(at / "kfac.h5", run_id(at))
    step = hessians.ekfac.step(factors, measured.loss_fn, measured.params, first, transform=measured.transform)
    sinks = {"factors": Summed(hessians.ekfac.sink(factors, step))}
    found = collect(work._replace(step=step), sinks, at, place, what="eigenvalues", shown=shown, partial="eigenvalues")
    return found.get("factors")


def factors_size(method: str, shapes: Mapping[str, tuple[int, ...]], max_side: int) -> int:
    """Return about how many bytes factors of blocks take: a matrix of eigenvectors per side, or of the whole row."""
    sides = [[prod(shape)] if method == "autocorrelation" else [*shape] for shape in shapes.values()]
    return 4 * sum(d * d if d <= max_side or method == "autocorrelation" else d for side in sides for d in side)


def outcome(run: str, factors: Factors) -> Outcome:
    """Return what there is to say of factors."""
    facts = {
        "run": run,
        "method": factors.method,
        "documents": factors.documents,
        "blocks": {name: list(c.shape) for name, c in factors.blocks.items()},
        "trace": factors.trace,
        "under": factors.description,
        "weights": factors.weights,
    }
    return Outcome(run, facts, str(factors))
