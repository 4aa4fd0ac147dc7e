"""The collector: what happens at each micro-batch, epoch, save and resume of a training run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from influence.func.engine.per_example import LOSSES, eager_step, finite_rows
from influence.func.engine.plan import Plan
from influence.func.engine.trace import AnotherPath
from influence.func.loss.functionalize import functionalize
from influence.func.loss.module_loss import ModuleLoss
from influence.func.transform.chain import Transform
from influence.index import Columns
from influence.models.describe import layer_matrices
from influence.store.folder import RUN
from influence.train import record, sharing
from influence.train.epochs import epoch_path, index_of
from influence.train.facts import Facts, read_training
from influence.train.facts import Plan as RunPlan
from influence.train.live import live
from influence.train.order import Order, read_logs
from influence.train.plans import INDEX, Plans
from influence.train.record import Pending, Session
from influence.train.scratch import Scratch
from influence.types import ExampleLoss, Params, Rows


class Ranks(NamedTuple):
    """The processes of a training.

    Attributes:
        rank: this one.
        world: how many.
        device: where their collectives are.
    """

    rank: int
    world: int
    device: Any

    def first(self, work: Callable[[], object]) -> None:
        """Have the first process do something while the others wait.

        Raises:
            RuntimeError: on the others, if it failed; it raises its own error.
        """
        self.each(work if self.rank == 0 else lambda: None)

    def each(self, work: Callable[[], object]) -> None:
        """Have every process do something, and go on when all have.

        Raises:
            RuntimeError: on those that did, if another failed; that raises its own error.
        """
        failed: BaseException | None = None
        try:
            work()
        except BaseException as error:
            if self.world == 1:
                raise
            failed = error  # raised below, once the others know
        if self.world > 1:
            flag = torch.tensor([int(failed is not None)], device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            if failed is not None:
                raise failed
            if int(flag):
                raise RuntimeError("another process of this training could not go on: see its message")


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
        self.ranks = Ranks(arguments.process_index, arguments.world_size, arguments.device)
        self._plans = Plans(self.loss_fn, settings.transform, "batched" if settings.share else settings.engine)
        self._scaled, self._checked = False, False
        self._whole: sharing.Whole | None = None
        self._begin, self._again = 0, False
        self._step = -1
        self._open = Session()
        self._epoch, self._least_epoch = -1, 0
        self.flight: sharing.Shared | None = None
        self.seconds = 0.0

    # What the run's events call

    def begin(self, step: int) -> None:
        """Begin, or go on after `step` updates.

        Raises:
            FileExistsError: if rows of another run are there.
            ValueError: if other processes collected before, or rows of steps before that are not there.
        """
        path, world = self.settings.path, self.ranks.world
        self._again = self._open.training is not None  # the Trainer begins anew where its batches were too large
        self.close()
        overwrite = self.settings.overwrite or self._again
        self.ranks.first(lambda: record.check(path, step, world, overwrite))
        self._begin, self._step, self._epoch = step, -1, -1
        self._least_epoch = record.last_epoch(path, self.ranks.rank, step)

    def begin_epoch(self, epoch: int) -> None:
        """Note the epoch: the first by its number, those behind it one by one, however early each ended."""
        self._epoch = max(epoch, self._least_epoch) if self._epoch < 0 else self._epoch + 1

    def end_step(self, save: bool) -> None:
        """Put the step in the order log: its update was made."""
        began = time.perf_counter()
        self._open.end_step()
        if save:
            self._open.sync()
        self.seconds += time.perf_counter() - began

    def flush(self, step: int) -> None:
        """Have every row of the steps before one on the disk, of every process: a checkpoint will count them."""
        began = time.perf_counter()
        if self._open.pending is not None and self._open.pending.step < step:
            self._open.end_step()
        self.ranks.each(self._open.sync)
        self.seconds += time.perf_counter() - began

    def end_epoch(self) -> None:
        """Write the epoch's index, in the dataset's order."""
        training, epoch = self._open.training, self._epoch
        if training is None or self._open.rows is None:
            return
        began = time.perf_counter()
        self._open.drop_step()
        self.ranks.each(self._open.close_rows)
        self.ranks.first(
            lambda: record.finish_epoch(training, read_logs(training.path, training.id, self.ranks.world), epoch)
        )
        self.seconds += time.perf_counter() - began

    def end(self, track_order: bool) -> None:
        """Write what is left to write: the training is over."""
        if self._open.training is None and not (self._begin and (self.settings.path / RUN).exists()):
            return  # nothing was collected
        self._open.drop_step()
        self.ranks.each(self._open.close_rows)
        self.ranks.first(lambda: self._end(track_order))
        self.close()

    def close(self) -> None:
        """Give everything back: another training may go on."""
        self._open.close()

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
            fresh = self.ranks.world == 1 and not self._checked and all(p.grad is None for p in self._own().values())
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
            self._checked = True
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
        if step != self._step:
            self.end_step(save=False)  # where no event told of it
        if step != self._step and self.settings.scale is not None:
            names = list(self.params)
            found, self._scaled = live(self.settings.transform, self.model, trainer.optimizer, names, step)
            self._plans.bind(found)
        self._step = step

    def _prepare(self, batch: dict[str, Any]) -> None:
        """See that there are a plan, and a place for the rows, before the step runs."""
        plan = self._plans.of(self._values(), batch)
        if self._open.training is None:
            self._open_run(plan)
        if self._open.rows is None:
            self._open_rows()

    def _facts(self, plan: Plan) -> Facts:
        """Return what is known of the rows."""
        settings = self.settings
        columns = Columns(plan.folded.row_shapes)
        planned = RunPlan(
            self.examples,
            self.ranks.world,
            columns.json(),
            settings.dtype,
            settings.shard_size,
            settings.share,
            settings.scale,
            settings.reduction,
            settings.transform.fingerprint,
        )
        return Facts(columns, planned, settings.transform, self.loss_fn, plan.layout)

    def _open_run(self, plan: Plan) -> None:
        """Take the directory, and make its record that of the checkpoint."""
        wanted, path, rank = self._facts(plan).manifest(), self.settings.path, self.ranks.rank
        overwrite = self.settings.overwrite and not self._begin and not self._again

        def take() -> None:
            self._open.lock, training = record.open_run(path, wanted, overwrite)
            record.go_on(training, self._begin, self._epoch)

        def join() -> None:
            training = read_training(path)
            self._open.order = Order(path, training.id, rank, self._begin)
            self._open.training = training

        self.ranks.first(take)
        self.ranks.each(join)

    def _open_rows(self) -> None:
        """Have a place for the epoch's rows."""
        training, rank = self._open.training, self.ranks.rank
        assert training is not None
        place = epoch_path(training.path, self._epoch)
        self.ranks.first(lambda: index_of(training, place))  # refused now rather than when the epoch is over
        self._open.rows = Scratch(training.path, training.id, self._epoch, rank, training.stored, grow=True)

    def _end(self, track_order: bool) -> None:
        """Have the record at its end; where no step was trained, make it that of the checkpoint first."""
        training = self._open.training
        if training is None:
            there = read_training(self.settings.path)
            self._open.lock, training = record.open_run(there.path, there.manifest, False)
            record.go_on(training, self._begin, None)
        record.end(training, track_order)

    def _write(self, index: Tensor, rows: Rows, losses: Tensor, lengths: Tensor, rate: float) -> None:
        training, file = self._open.training, self._open.rows
        assert training is not None
        assert file is not None
        began = time.perf_counter()
        finite = finite_rows(
            {name: row.detach() for name, row in rows.items()}, {INDEX: index}, self.settings.nonfinite
        )
        if self._open.pending is None:
            self._open.pending = Pending(self._step, self._epoch, rate, self._scaled, len(file))
        crc = file.append(training.stored.packed(training.stored.columns.joined(finite)))
        self._open.pending.add(index, losses, lengths, crc)
        self.seconds += time.perf_counter() - began

    def _lengths(self, batch: dict[str, Any]) -> Tensor:
        if callable(self.settings.loss):
            return torch.ones(len(next(iter(batch.values()))), dtype=torch.int64)
        return self.loss_fn.counts(batch)
