"""The collector: what happens at each micro-batch, epoch, save and resume of a training run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from influence.func.axes import AnotherPath
from influence.func.functionalize import functionalize
from influence.func.module_loss import ModuleLoss
from influence.func.per_example import LOSSES, eager_step, finite_rows
from influence.func.plan import Plan
from influence.func.transform import Transform
from influence.index import Columns
from influence.models.targets import layer_matrices
from influence.train import sharing
from influence.train.epochs import FACTS, Facts, check_facts, finish_epoch, open_scratch, wipe
from influence.train.live import live
from influence.train.numbering import INDEX
from influence.train.plans import Plans
from influence.train.scratch import Scratch
from influence.train.visits import Visits, joined, processes, read_visits, visits_of, write_visits
from influence.types import ExampleLoss, Params, Rows


class Settings(NamedTuple):
    """What is collected and how; see `GradientCollectorCallback`."""

    path: Path
    transform: Transform
    share: bool
    scale: str | None
    loss: str | ExampleLoss
    reduction: str
    targets: Any
    engine: str
    dtype: str
    shard_size: int
    nonfinite: str
    overwrite: bool


class Collector:
    """One training run's rows."""

    def __init__(self, settings: Settings, model: nn.Module, compute_loss: Any, examples: int, arguments: Any) -> None:
        """Make the examples' own losses from the model, before the Trainer wraps it."""
        if settings.share:
            sharing.refuse(model, arguments)
        self.settings, self.model, self.examples = settings, model, examples
        self._compute_loss, self._arguments = compute_loss, arguments
        targets = layer_matrices(model) if settings.targets is None else settings.targets
        smoothing = float(arguments.label_smoothing_factor) if settings.loss == "cross_entropy" else 0.0
        self.loss_fn: ModuleLoss
        self.loss_fn, self.params = functionalize(
            model, settings.loss, settings.reduction, targets, label_smoothing=smoothing
        )
        self.rank, self.world = arguments.process_index, arguments.world_size
        self._plans = Plans(self.loss_fn, settings.transform, "batched" if settings.share else settings.engine)
        self._scaled = False
        self._whole: sharing.Whole | None = None
        self._parts: list[Visits] = []
        self._step, self._micro = -1, 0
        self.epoch = 0
        self._scratch: Scratch | None = None
        self._facts: Facts | None = None
        self.flight: sharing.Shared | None = None
        self.seconds = 0.0

    # What the run's events call

    def begin(self, step: int) -> None:
        """Begin, or go on after `step` updates.

        Raises:
            FileExistsError: if rows of another run are there.
            ValueError: if other processes collected before.
        """
        path = self.settings.path
        if self.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
        there = (path / FACTS).exists()
        if there and not step and not self.settings.overwrite:
            raise FileExistsError(
                f"{path} holds rows of a training run, and this one begins anew: pass overwrite=True to replace them, "
                "or write to another directory; to go on, call trainer.train(resume_from_checkpoint=True)"
            )
        if there and step and processes(path) not in (0, self.world):
            raise ValueError(
                f"{path} was collected by {processes(path)} processes, and this run has {self.world}: resume with as "
                "many, or write to another directory"
            )
        found = read_visits(path, self.rank) if there and step else None
        self._parts = [] if found is None else [found.where(found.step < step)]
        self._wait()
        if self.rank == 0 and there and not step:
            wipe(path)
        self._facts, self._step = None, -1
        self._wait()

    def begin_epoch(self, epoch: int) -> None:
        """Note the epoch."""
        self.epoch, self._scratch = epoch, None

    def end_epoch(self) -> None:
        """Write the epoch's index, in the dataset's order."""
        self.save()
        self._wait()
        if self.rank == 0 and self._facts is not None and self._scratch is not None:
            finish_epoch(self.settings.path, self._facts, self.epoch, self._scratch, self.seconds)
        self._wait()
        self._scratch = None

    def save(self) -> None:
        """Put on disk what a resume needs: a checkpoint of the Trainer was written."""
        if self._scratch is not None:
            self._scratch.flush()
        write_visits(self.settings.path, self.rank, joined(self._parts))

    # What a training step calls

    def step(self, run: Callable[[], Any], inputs: Mapping[str, Any], trainer: Any, counts: list[float]) -> Any:
        """Run a training step and collect the rows of its examples.

        Args:
            run: the Trainer's own step, whose `compute_loss` comes back to `forward`.
            inputs: its inputs, with `index`.
            trainer: the Trainer.
            counts: what it may divide its loss by.

        Returns:
            What the step returns.
        """
        index, batch = self._examples(inputs)
        began = time.perf_counter()
        self._advance(trainer)
        self._prepare(batch)
        rate = float(trainer.optimizer.param_groups[0]["lr"])
        if not self.settings.share:
            device, values = next(iter(self.params.values())).device, self._values()
            placed = {key: x.to(device) for key, x in batch.items()}
            found, _ = self._plans.run(values, batch, lambda plan: eager_step(self.loss_fn, plan)(values, placed))
            rows = {name: row for name, row in found.items() if name != LOSSES}
            losses, lengths = found[LOSSES], self._lengths(batch)
            self.seconds += time.perf_counter() - began
            result = run()
        else:
            fresh = self.world == 1 and not self._parts and all(p.grad is None for p in self._own().values())
            self.flight = None
            self.seconds += time.perf_counter() - began
            result = run()
            began, flight = time.perf_counter(), self.flight
            if flight is None:
                raise RuntimeError(
                    "share=True: the training step did not call trainer.compute_loss, so no probes rode along: pass "
                    "share=False"
                )
            used = self._plans.of(self._values(), batch).batched
            assert used is not None
            if fresh:
                sharing.check_sum(flight, used, self._own())
            rows, losses = sharing.rows_of(flight, used, counts, self.settings.reduction)
            lengths, self.flight = flight.lengths, None
            self.seconds += time.perf_counter() - began
        self._write(index, rows, losses, lengths, rate)
        return result

    def forward(self, model: nn.Module, inputs: dict[str, Any], **settings: Any) -> tuple[Tensor, Any]:
        """Compute the Trainer's loss with probes in the parameters' place."""
        if self._whole is None or self._whole.model is not model:
            self._whole = sharing.Whole(model, self._compute_loss)
        batch, whole = sharing.as_batch(inputs), self._whole
        n = next(iter(batch.values())).shape[0]

        def tapped(plan: Plan) -> tuple[Tensor, Any, sharing.Shared]:
            assert plan.batched is not None
            return sharing.forward(whole, plan.batched, self._own(), self.loss_fn, inputs, n, **settings)

        try:
            (loss, outputs, self.flight), _ = self._plans.run(self._values(), batch, tapped)
        except AnotherPath as error:
            raise ValueError(
                f"share=True: {error}; the plan is of its path in evaluation mode. Pass share=False"
            ) from error
        return loss, outputs

    # Inside

    def _own(self) -> dict[str, nn.Parameter]:
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.params}

    def _values(self) -> Params:
        return {name: p.detach() for name, p in self._own().items()}

    def _examples(self, inputs: Mapping[str, Any]) -> tuple[Int[Tensor, " n"], dict[str, Any]]:
        """Return which examples a micro-batch holds, and the batch."""
        if INDEX not in inputs:
            raise ValueError(
                f"a micro-batch holds {', '.join(map(str, inputs))} and no {INDEX!r}, so it does not say which examples"
                " it is of: train on the dataset and with the collator that the Trainer had when it was prepared"
            )
        index, batch = inputs[INDEX], sharing.as_batch(inputs)
        sizes = {key: tuple(x.shape) for key, x in batch.items() if x.ndim == 0 or x.shape[0] != len(index)}
        if sizes:
            raise ValueError(
                f"a micro-batch of {len(index)} examples came with {sizes}: every input must have the example axis "
                "first. Switch off what joins examples in one row (padding-free collators, packing in the collator)"
            )
        return index.long().cpu(), batch

    def _advance(self, trainer: Any) -> None:
        """Note the step; at a new one, take the optimizer's moments as they are now."""
        step = int(trainer.state.global_step)
        self._micro = self._micro + 1 if step == self._step else 0
        if step != self._step and self.settings.scale is not None:
            names = list(self.params)
            found, self._scaled = live(self.settings.transform, self.model, trainer.optimizer, names, step)
            self._plans.bind(found)
        self._step = step

    def _prepare(self, batch: dict[str, Any]) -> None:
        """See that there are a plan, and a place for the rows, before the step runs."""
        plan = self._plans.of(self._values(), batch)
        if self._facts is None:
            self._facts = self._describe(plan)
        if self._scratch is None:
            self._scratch = self._open(self._facts)

    def _describe(self, plan: Plan) -> Facts:
        """Return what is known of the rows, and refuse others that are there."""
        settings = self.settings
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in self.params.values()]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        facts = Facts(
            self.examples,
            Columns(plan.folded.row_shapes),
            str(wide).removeprefix("torch."),
            settings.dtype,
            settings.shard_size,
            {"share": settings.share, "scale": settings.scale, "reduction": settings.reduction},
            settings.transform,
            self.loss_fn,
            plan.layout,
        )
        check_facts(settings.path, facts, self.rank == 0)
        return facts

    def _open(self, facts: Facts) -> Scratch:
        if self.rank == 0:
            open_scratch(self.settings.path, facts, self.epoch)
        self._wait()
        return open_scratch(self.settings.path, facts, self.epoch)

    def _write(self, index: Tensor, rows: Rows, losses: Tensor, lengths: Tensor, rate: float) -> None:
        assert self._scratch is not None
        assert self._facts is not None
        began = time.perf_counter()
        finite = finite_rows(
            {name: row.detach() for name, row in rows.items()}, {INDEX: index}, self.settings.nonfinite
        )
        self._scratch.put(index, self._facts.columns.joined(finite))
        self._parts.append(
            visits_of(
                index,
                losses,
                lengths,
                step=self._step,
                micro=self._micro,
                epoch=self.epoch,
                rank=self.rank,
                rate=rate,
                scaled=self._scaled,
            )
        )
        self.seconds += time.perf_counter() - began

    def _lengths(self, batch: dict[str, Any]) -> Tensor:
        if callable(self.settings.loss):
            return torch.ones(len(next(iter(batch.values()))), dtype=torch.int64)
        return self.loss_fn.counts(batch)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()
