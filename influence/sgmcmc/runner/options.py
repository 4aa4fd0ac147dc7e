"""How chains are run, as a value: what `sample` takes beside what is sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from influence.sgmcmc.runner import baselines, observables
from influence.sgmcmc.samplers import sgld
from influence.sgmcmc.samplers.langevin import Sampler

POLICIES = ("raise", "drop", "prefix")


@dataclass(frozen=True)
class Options:
    """How chains are run: what `sample` takes beside what is sampled.

    Attributes:
        sampler: builds the sampler, `(target, lr=…) -> Sampler`: `functools.partial(rmsprop_sgld.build, alpha=0.9)`.
        batch_size: examples of a step; `None` for all data at every step.
        num_chains: chains of the whole run.
        chains: which of them, by number, are run here, where processes share them (`join`); default all.
        num_draws: draws of each, at which observables are measured.
        num_burnin_steps: steps before the first draw's block; no estimator sees them.
        num_steps_bw_draws: steps of a draw.
        shared_batches: whether all chains see the same batches. Their means then share its noise, and the spread
            between chains is less than the error.
        control_variate: take gradients as differences to the anchor's on the same batch.
        accumulate: compute the gradient of a batch in that many pieces.
        init_noise: start chains that far from the anchor, per entry.
        baseline: where the anchor's loss of each batch comes from: `"auto"`, `"lookup"` or `"paired"`.
        keep: what is kept of observables beside their moments: `"sequences"` (every draw's loss per example),
            `"tokens"` (per position), `"moments"` (nothing); `"auto"` keeps sequences, or their co-moments where these
            are smaller.
        on_divergence: `"raise"`, `"drop"` the chain, or keep the `"prefix"` before it, of all chains.
        chain_chunk: how many chains are stepped together; default by the size of the model.
        observable_batch: examples of an observable evaluated at a time; default the batch size.
        checkpoint_every: draws between checkpoints, where there is an `output_path`.
        progress: show a bar.
    """

    sampler: Callable[..., Sampler] = sgld.build
    batch_size: int | None = 32
    num_chains: int = 4
    chains: Sequence[int] | None = None
    num_draws: int = 200
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    shared_batches: bool = False
    control_variate: bool = False
    accumulate: int = 1
    init_noise: float = 0.0
    baseline: str = "auto"
    keep: str = "auto"
    on_divergence: str = "raise"
    chain_chunk: int | None = None
    observable_batch: int | None = None
    checkpoint_every: int = 50
    progress: bool = True

    @property
    def numbers(self) -> list[int]:
        """Which chains are run here."""
        return list(range(self.num_chains)) if self.chains is None else list(self.chains)

    def check(self) -> None:
        """Refuse what is out of range, before anything is computed.

        Raises:
            ValueError: naming it.
        """
        least = {"num_chains": 1, "num_draws": 1, "num_burnin_steps": 0, "num_steps_bw_draws": 1, "checkpoint_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}; got {getattr(self, name)}")
        for name in ("batch_size", "observable_batch", "chain_chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None for its default; got {getattr(self, name)}")
        for name, values in (("keep", observables.KEEPS), ("on_divergence", POLICIES), ("baseline", baselines.KINDS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")
        known = set(range(self.num_chains))
        if not self.numbers or len(set(self.numbers)) < len(self.numbers) or not known.issuperset(self.numbers):
            raise ValueError(
                f"chains must be some of the {self.num_chains} chains, each once, by their numbers from 0; got "
                f"{self.numbers}: raise num_chains, or leave the others out"
            )
        if self.on_divergence == "prefix" and known != set(self.numbers):
            raise ValueError(
                "on_divergence='prefix' stops every chain where one diverges, and chains of another process cannot be "
                "stopped: pass on_divergence='drop', or run all chains here"
            )
