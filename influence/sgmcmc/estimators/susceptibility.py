r"""Susceptibilities: how a component's part of the posterior answers to each token (Baker et al. 2025).

For a restriction `C`, with `φ = A - A(w^*)` the excess loss of the sampling task on a fixed sample, and `ℓ_b` the loss
of a probe token,

$$χ_b = \mathrm{Cov}_C(φ,\, A - ℓ_b) + E_C[φ]\,\bigl(E_C[A - ℓ_b] - E_F[A - ℓ_b]\bigr)$$

`E_C` is over the chains in which only `C` moves, `E_F` over those of all weights.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influence.func.numbers import check_number
from influence.sgmcmc.estimators import moments
from influence.sgmcmc.runner.draws import Run
from influence.visible import visible


class Terms(NamedTuple):
    """Both terms of susceptibilities, for the positions of one observable under one restriction."""

    covariance: Float[Tensor, "n t"]
    shift: Float[Tensor, "n t"]


class Susceptibility(NamedTuple):
    """Susceptibilities of one observable's positions.

    Attributes:
        value: per position and restriction; zero where no label is.
        covariance: their first term.
        shift: their second.
        stderr: by deleting a chain at a time; NaN where no label is, for one chain, or where the two runs lost
            different ones.
        restrictions: names along the last axis.
        labelled: which positions count.
    """

    value: Float[Tensor, "n t r"]
    covariance: Float[Tensor, "n t r"]
    shift: Float[Tensor, "n t r"]
    stderr: Float[Tensor, "n t r"]
    restrictions: Sequence[str]
    labelled: Bool[Tensor, "n t"]

    def matrix(self) -> Float[Tensor, "tokens r"]:
        """Return the (labelled tokens × restrictions) matrix."""
        return self.value[self.labelled]

    def __str__(self) -> str:
        matrix, errors = self.matrix().double(), self.stderr[self.labelled]
        kind = "examples" if self.labelled.shape[1] == 1 else "tokens"
        names = [visible(name, lines=False) for name in self.restrictions]
        width = max(map(len, ["restriction", *names]))
        head = f"{'restriction':{width}}  {'mean |χ|':>10} {'smallest':>10} {'largest':>10} {'median s.e.':>11}"
        lines = [f"susceptibilities of {len(matrix):,} {kind}", f"{head}  beyond 2 s.e."]
        for name, x, e in zip(names, matrix.T, errors.T, strict=True):
            row = f"{name:{width}}  {float(x.abs().mean()):10.3g} {float(x.min()):10.3g} {float(x.max()):10.3g}"
            known = bool(e.isfinite().all())
            clear = f"{float(e.median()):11.2g}  {100 * float((x.abs() > 2 * e).double().mean()):.0f} %"
            lines.append(f"{row} {clear if known else 'unknown':>11}".rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        tokens = int(self.labelled.sum())
        return f"<susceptibilities of {tokens:,} positions under {len(self.restrictions)} restrictions>"


class Susceptibilities(dict[str, Susceptibility]):
    """Susceptibilities by observable; `print` shows how large they are under each restriction, beside their errors."""

    def __str__(self) -> str:
        return "\n".join(f"{visible(name, lines=False)}: {each}" for name, each in self.items())

    def __repr__(self) -> str:
        return f"<susceptibilities of {', '.join(visible(name, lines=False) for name in self)}>"


def estimate(
    runs: Mapping[str, Run] | Run,
    sampling_task: str | None = None,
    observables: Sequence[str] | None = None,
    *,
    restrictions: Sequence[str] | None = None,
    full: str = "full",
    ddof: int = 0,
    init_loss: float | None = None,
    sign: int = 1,
    scale: float = 1.0,
) -> Susceptibilities:
    r"""Return susceptibilities of every position of some observables, for every restriction, or those that are named.

    All from streamed moments: no traces are needed. Draws are pooled over chains; the standard error is the jackknife's
    over chains, deleting the same chain in both runs.

    Args:
        runs: a run per restriction, and that of all weights under `full`; `sample_restrictions` makes them. That of all
            weights alone is taken for a mapping of itself.
        sampling_task: the observable whose loss is `A`; default the first.
        observables: which to probe; default all, the sampling task's too.
        restrictions: which of the runs to return; default all, `full` too.
        full: the name of the run of all weights.
        ddof: covariances are divided by the number of draws less this; the peer's is 0.
        init_loss: `A(w^*)` of another sample, as the peer takes it; default the anchor's loss on the very same
            examples, which adds no noise to the second term.
        sign: multiplies the result.
        scale: multiplies the result; with `n_beta` it is the derivative of `⟨φ⟩` by the share of the token's data.

    Returns:
        Susceptibilities by observable.

    Raises:
        ValueError: if the runs do not belong together.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = lambda w, x: (1 + x @ w["w"]).square()
        >>> runs = {"full": sgmcmc.sample(loss, {"w": torch.zeros(2)}, data, {"code": data}, lr=1e-3, n_beta=1.0,
        ...     batch_size=2, num_draws=50, progress=False)}
        >>> found = sgmcmc.susceptibility.estimate(runs, "code")["code"]  # L - ℓ_b sums to zero over b
        >>> found.value.shape, bool(found.value.sum().abs() < 1e-9)
        (torch.Size([2, 1, 1]), True)
    """
    if isinstance(runs, Run):
        runs = {str(runs.facts.get("restriction", full)): runs}
    _check(runs, full, restrictions or ())
    check_number("scale", scale)
    if init_loss is not None:
        check_number("init_loss", init_loss)
    whole = runs[full]
    names = list(whole.observables) if observables is None else list(observables)
    sampling_task = next(iter(whole.observables)) if sampling_task is None else sampling_task
    whole.observable(sampling_task)
    asked = {name: runs[name] for name in (runs if restrictions is None else restrictions)}
    offset = 0.0 if init_loss is None else whole.observable(sampling_task).anchor_mean - init_loss
    place = list(whole.observables).index(sampling_task)
    found = Susceptibilities()
    for name in names:
        shape = whole.observable(name).anchor.shape
        parts: dict[str, list[Tensor]] = {"covariance": [], "shift": [], "stderr": []}
        for run in asked.values():
            terms = _terms(run, whole, name, place, offset, ddof, None)
            values = []
            shared = run.chains == whole.chains
            for left_out in range(len(run.chains)) if shared and len(run.chains) > 1 else []:
                some = _terms(run, whole, name, place, offset, ddof, left_out)
                values.append(some.covariance + some.shift)
            count = len(values)
            spread = (
                torch.stack(values).var(0, correction=0) * (count - 1)
                if count
                else torch.full_like(terms.shift, float("nan"))
            )
            parts["covariance"].append(terms.covariance)
            parts["shift"].append(terms.shift)
            parts["stderr"].append(spread.sqrt())
        factor = sign * scale
        labelled = whole.observable(name).labelled
        stacked = {key: torch.stack(each, -1).reshape(*shape, -1) * labelled[..., None] for key, each in parts.items()}
        covariance, shift = stacked["covariance"] * factor, stacked["shift"] * factor
        stderr = (stacked["stderr"] * abs(factor)).masked_fill(~labelled[..., None], float("nan"))
        found[name] = Susceptibility(covariance + shift, covariance, shift, stderr, list(asked), labelled)
    return found


class Components(NamedTuple):
    """Principal components of the (token × restriction) matrix.

    Attributes:
        scores: of tokens.
        loadings: of restrictions.
        explained: share of the variance of each.
    """

    scores: Float[Tensor, "tokens k"]
    loadings: Float[Tensor, "r k"]
    explained: Float[Tensor, " k"]


def pca(matrix: Float[Tensor, "tokens r"], k: int, *, standardise: bool = True) -> Components:
    """Return principal components of susceptibilities, restrictions standardised unless told otherwise.

    Args:
        matrix: `Susceptibility.matrix()`, of one observable or of several below one another.
        k: how many.
        standardise: divide each restriction's column by its deviation.

    Raises:
        ValueError: if there are fewer than `k`.

    Example:
        >>> import torch
        >>> pca(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]), 1).explained
        tensor([1.], dtype=torch.float64)
    """
    most = min(matrix.shape)
    if not 1 <= k <= most:
        raise ValueError(f"a {list(matrix.shape)} matrix has {most} components at most; got k={k}")
    x = matrix.double() - matrix.double().mean(0)
    if standardise:
        x = x / x.std(0).clamp_min(1e-300)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return Components(u[:, :k] * s[:k], v[:k].T, s[:k].square() / s.square().sum())


def _terms(run: Run, whole: Run, name: str, place: int, offset: float, ddof: int, left_out: int | None) -> Terms:
    """Return both terms, of all chains or all but one, as `[1, n t]` each."""
    here, there = (_pooled(r.observable(name).moments, left_out) for r in (run, whole))
    count = float(here.draws[0])
    if count < 2 or count - ddof < 1:
        need = max(2, ddof + 1)
        raise ValueError(f"susceptibilities need at least {need} draws; there are {count:.0f}: {run.remedy}")
    # shifted losses: a = A - A(w*), s = l - l(w*); the anchor's part cancels in every difference
    phi = here.x[0, place] + offset
    covariance = (here.xx[0, place] - here.xy[0, place]) / (count - ddof)
    shift = phi * ((here.x[0, place] - here.y[0]) - (there.x[0, place] - there.y[0]))
    return Terms(covariance[None], shift[None])


def _pooled(state: moments.Moments, left_out: int | None) -> moments.Moments:
    if left_out is not None:
        kept = [c for c in range(state.draws.shape[0]) if c != left_out]
        state = moments.Moments(*(each[kept] for each in state))
    return moments.stacked(state)


def _check(runs: Mapping[str, Run], full: str, restrictions: Sequence[str]) -> None:
    if full not in runs:
        raise ValueError(f"the run of all weights is missing: runs needs {full!r}, it has {', '.join(runs)}")
    unknown = [name for name in restrictions if name not in runs]
    if unknown:
        raise ValueError(
            f"there is no run of the restriction {unknown[0]!r}; there are {', '.join(runs)}: "
            "sample_restrictions makes one of each"
        )
    whole = runs[full]
    if not whole.observables:
        raise ValueError("the runs have no observables: sample with observables={'name': data}")
    for name, run in runs.items():
        if list(run.observables) != list(whole.observables):
            raise ValueError(f"run {name!r} observed {list(run.observables)}, the full one {list(whole.observables)}")
        for key, o in run.observables.items():
            other = whole.observable(key)
            if o.identity != other.identity or not torch.equal(o.index, other.index):
                raise ValueError(
                    f"run {name!r} measured other examples of {key!r} than the full one: use one seed and data"
                )
