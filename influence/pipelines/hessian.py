"""Fit the curvature of a model on a corpus, by any method of `hessians.METHODS`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from influence import hessians
from influence.hessians import Factors, Method
from influence.hessians.fitting import FitStep
from influence.pipelines.frame.configs import PassConfig, TransformConfig, View, at_least
from influence.pipelines.frame.directory import refuse_finished, run_directory
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.planning import first_batch, predict
from influence.pipelines.frame.prepare import batches_of, measure, own_shards
from influence.pipelines.frame.ranks import among_ranks, own_device, ranks
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes.collect import Summed, Work, collect
from influence.store.folder import run_id

if TYPE_CHECKING:
    MethodName: TypeAlias = str
    BaseName: TypeAlias = str
else:
    MethodName = Literal[tuple(hessians.METHODS)]
    BaseName = Literal[tuple(name for name, builder in hessians.METHODS.items() if builder().kronecker)]


@dataclass(frozen=True)
class HessianConfig(PassConfig):
    """Fit the curvature of a model: what scores divide by, so that directions which all documents share count less.

    kfac, tkfac and shampoo keep a Kronecker product per block; ekfac measures the eigenvalues of one of them (--base)
    in a second pass; autocorrelation keeps the dense second moment of projected rows (--projection-dim 16).

    Attributes:
        run: the run directory; factors.h5 in it is the result.
        model: the model.
        data: the corpus.
        method: which curvature.
        base: whose eigenvalues ekfac corrects; default kfac.
        labels: whose gradients: sampled from the model (the Fisher), the data's own, or exactly all; default the
            method's.
        label_seed: of sampled labels.
        label_draws: sampled labels per position.
        max_side: a side of a block with more entries is kept as a diagonal; default 8192.
        loss: the loss.
        transform: the rows whose curvature it is: kfac and tkfac need whole blocks, or a projection of them.
        execution: the pass.
    """

    method: MethodName = "kfac"
    labels: Literal["sampled", "data", "exact"] | None = None
    label_seed: int = 0
    label_draws: int = 1
    max_side: int | None = None
    base: BaseName | None = None
    transform: View = field(default_factory=lambda: TransformConfig(projection_dim=0), kw_only=True)

    def __post_init__(self) -> None:
        """Refuse numbers below 1, and options that the method does not have."""
        at_least(self, 1, "label_draws", "max_side")
        chosen_method(self.method, base=self.base, max_side=self.max_side)


def chosen_method(method: str, **options: Any) -> Method:
    """Return a method with the options that were given.

    Raises:
        ValueError: if it does not have one of them.
    """
    return hessians.build(method, **{name: value for name, value in options.items() if value is not None})


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
    method = chosen_method(config.method, base=config.base, max_side=config.max_side)

    def planned(number: int, factors: Factors | None) -> FitStep:
        return hessians.step(
            loss_fn,
            params,
            first,
            method,
            number=number,
            factors=factors,
            transform=transform,
            labels=config.labels,
            seed=config.label_seed,
            draws=config.label_draws,
        )

    step, passes = planned(0, None), len(method.passes)
    with ranks() as place:
        plan = predict(
            f"{config.method} factors of {len(step.about.shapes)} blocks",
            directory,
            shards,
            step,
            first,
            config.execution,
            world=place.world,
            disk=4 * sum(map(method.entries, step.about.shapes.values())),
            notes=[tokens.report(), f"{passes} passes" if passes > 1 else ""],
        )
        plan = plan._replace(seconds=plan.seconds * passes)
        if place.first:
            say(str(plan))
        if config.execution.dry_run:
            return Outcome(config.run, plan._asdict(), "")
        settings = {"labels": step.about.setup.labels._asdict(), "method": method.name, **method.options}
        device, shown = own_device(config.execution.device), config.execution.progress
        kept = [f"{one.name}.h5" for one in method.passes[:-1]]
        scratch = [*kept, *(f"{one.name}-#.h5" for one in method.passes[1:])]
        results = ["factors.h5"]
        where = run_directory("hessian", config, measured, tokens, shards, step, place, settings, results, scratch)
        with where as at:
            factors: Factors | None = None
            for number, one in enumerate(method.passes):
                if number:  # every rank, and whoever resumes, goes on from the same factors
                    before = at / kept[number - 1]
                    if place.first and factors is not None and not before.is_file():
                        factors.save(before, run_id(at) or "")
                    place.barrier()
                    factors = hessians.load(before, run_id(at))
                    step = planned(number, factors)
                work, sinks = Work(shards, batches, step, device), {"factors": Summed(step.sink())}
                partial = one.name if number else "partial"
                factors = collect(work, sinks, at, place, what=one.name, shown=shown, partial=partial).get("factors")
            if place.first and factors is not None:
                factors.save(at / "factors.h5", run_id(at) or "")
        return outcome(config.run, hessians.load(directory / "factors.h5"))


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
