"""Kronfluence 1.0.1: what it computes, read in its source, and how it is driven here.

Facts (paths are its own):

- **Which modules.** `nn.Linear` and `nn.Conv2d` alone (`module/linear.py`, `module/conv2d.py`), each wrapped in a
  `TrackedModule`. Every parameter is frozen; an output that requires no gradient gets a constant added which does, so
  the backward pass stops at the first tracked modules and no weight gradient is formed: a little less than the floor.
- **Bias.** The bias is one more input: a column of ones is concatenated to the activations, so `A` is `[i + 1, i + 1]`
  and a row `[o, i + 1]`, exactly our `as_blocks(bias=True)`.
- **Covariances** (`module/tracker/factor.py`). `A = Σ ãã^T / T` and `S = Σ gg^T / T`, both over `T` positions, both
  in float32; `g` is the gradient of the *summed* loss. Ours is `S / N` over `N` documents, `T/N` times theirs. Only
  their eigenvectors reach the EK-FAC scores, so the factor is lost there. Layers fed one tensor are summed apart.
- **Eigendecomposition** (`factor/eigen.py`). `torch.linalg.eigh` in float64 of `(C + C^T) / 2`, returned in float32.
- **Eigenvalues** ("lambda", `factor/eigen.py`, `factor/config.py`). `Λ = (1/N) Σ_n (Q_S^T G_n Q_A)²` over `N` examples,
  `G_n` the gradient of the example's whole loss: our definition and our scale. Each `G_n` is formed and rotated.
- **Damping** (`arguments.py`, `factor/config.py`). `ScoreArguments.damping_factor` defaults to `1e-8` and is absolute:
  `H^{-1} = Q diag(1 / (Λ + 1e-8)) Q^T`, inverted in float64. That is our `inversion="absolute", damping=1e-8`. `None`,
  not the default in 1.0.1, takes `0.1 × mean(Λ)` of the block: our `inversion="damped", damping=0.1`.
- **Scores** (`module/tracker/pairwise_score.py`). `⟨H^{-1} ∇m_query, ∇ℓ_train⟩` summed over modules, no sign and no
  `1/N`; `m` is what the task's `compute_measurement` returns. With the loss as measurement: our score, factor 1.

How it is timed: `set_mode` once, then the body of its own loops (`fit_covariance_matrices_with_loader`,
`fit_lambda_matrices_with_loader`): `zero_grad`, the task's loss, `backward`, its hooks. Left out, in its favour: the
hooks' registration, data loading, `find_batch_size`, progress bars, copies of the results and every file.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.models import Workload, twin
from benchmarks.peers import torch_settings_kept

# `{block: (left, right)}`: a matrix for each side of a block.
Sides = dict[str, tuple[Tensor, Tensor]]
DAMPING = 1e-8


class Driver:
    """A workload's model with its blocks tracked.

    Attributes:
        model: A twin over the same storage.
        covariances: What its covariance fit returned for the batch, in its own nested form; set by `fit`.
    """

    def __init__(self, work: Workload) -> None:
        with torch_settings_kept():
            from kronfluence.analyzer import prepare_model
            from kronfluence.arguments import FactorArguments
            from kronfluence.utils.state import State

        self.work, self.task = work, task(work.losses, tuple(work.blocks))
        self.model = prepare_model(twin(work.model), self.task)
        self.settings = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self.state = State(cpu=True)
        self.covariances: dict[str, dict[str, Tensor]] = {}

    def covariance_step(self) -> Callable[[], None]:
        """A step of its covariance fit; the sums stay in its modules (`sums`)."""
        from kronfluence.module.tracked_module import ModuleMode

        return self._step(ModuleMode.COVARIANCE)

    def lambda_step(self, eigen: dict[str, dict[str, Tensor]], iterative: bool = False) -> Callable[[], None]:
        """A step of its fit of eigenvalues.

        Args:
            eigen: What `eigendecompose` returned.
            iterative: Its own option to rotate the gradients one example at a time.
        """
        from kronfluence.module.tracked_module import ModuleMode
        from kronfluence.module.utils import set_factors

        self.settings.use_iterative_lambda_aggregation = iterative
        step = self._step(ModuleMode.LAMBDA)
        for name, factors in eigen.items():
            set_factors(model=self.model, factor_name=name, factors=factors, clone=True)
        return step

    def fit(self) -> None:
        """Its covariance fit of the batch, by its own function."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

        _, self.covariances = fit_covariance_matrices_with_loader(
            model=self.model,
            state=self.state,
            task=self.task,
            loader=[self._batch()],
            factor_args=self.settings,
            disable_tqdm=True,
        )

    def eigendecompose(self) -> dict[str, dict[str, Tensor]]:
        """Its eigendecomposition of what `fit` found, by its own function."""
        from kronfluence.factor.eigen import perform_eigendecomposition

        return perform_eigendecomposition(self.covariances, self.model, self.state, self.settings, disable_tqdm=True)

    def sums(self, left: str, right: str | None = None) -> dict[str, Any]:
        """What its modules hold: `{block: (left, right)}`, or `{block: left}`."""
        held = {name: self.model.get_submodule(name).storage for name in self.work.blocks}
        return {name: s[left] if right is None else (s[left], s[right]) for name, s in held.items()}

    def _batch(self) -> tuple[Tensor, Tensor]:
        return self.work.inputs(), self.work.labels

    def _step(self, mode: Any) -> Callable[[], None]:
        from kronfluence.module.utils import set_mode, update_factor_args

        update_factor_args(model=self.model, factor_args=self.settings)
        set_mode(model=self.model, mode=mode, release_memory=True)

        def step() -> None:
            self.model.zero_grad(set_to_none=True)
            self.task.compute_train_loss(batch=self._batch(), model=self.model, sample=False).backward()

        return step


def task(losses: Callable[[nn.Module, Tensor, Tensor], Tensor], modules: Sequence[str]) -> Any:
    """Its `Task`: the summed loss, also as the measurement of a query, over batches `(inputs, labels)`.

    Args:
        losses: `(model, inputs, labels) -> [n]`.
        modules: Names of the modules to track.
    """
    from kronfluence.task import Task

    class SummedLoss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if sample:
                raise ValueError("only labels from the data are compared")
            return losses(model, *batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return losses(model, *batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return list(modules)

    return SummedLoss()


def scores(
    model: nn.Module,
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor],
    modules: Sequence[str],
    train: Dataset,
    queries: Dataset,
    damping: float | None = DAMPING,
    batch: int = 64,
) -> Tensor:
    """EK-FAC pairwise scores `[q, N]` of its public `Analyzer`, from the first pass to the last.

    Args:
        model: Left alone: a twin is tracked.
        losses: `(model, inputs, labels) -> [n]`.
        modules: Names of the modules to track.
        train: Of `(input, label)`.
        queries: The same.
        damping: Its `damping_factor`.
        batch: Examples per batch.
    """
    with torch_settings_kept():
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

    what = task(losses, modules)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "agree", prepare_model(twin(model), what), what, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "ekfac",
            train,
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            queries,
            train,
            per_device_query_batch_size=batch,
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]
