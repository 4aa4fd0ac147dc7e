r"""Bayesian influence functions: covariances of losses under the posterior (Kreer et al. 2025).

Upweighting example `i` changes the expected loss of `j` by `-Cov(ℓ_i, ℓ_j)`. As in devinterp the sign here is plus: a
large value means that the two losses move together. `sign=-1, scale=n_beta` gives the paper's.

With `Z` the losses of all draws, centred and divided by their deviation, the correlations are `Z^T Z / (n - 1)`: rows,
blocks and top-k are products with `Z`, and nothing of size N × N need exist.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from influence.func.numbers import check_number
from influence.sgmcmc.estimators import batch_means, moments
from influence.sgmcmc.runner.draws import Observed, Run
from influence.visible import visible

STATISTICS = ("correlation", "covariance")
POOLINGS = ("stacked", "within", "mean")


class Draws(NamedTuple):
    """Losses along chains, centred and scaled, so that a statistic is a product.

    Attributes:
        z: `[n, t, draws]` of examples and positions; one position where they are averaged.
        freedom: what products are divided by.
        names: `(observable, row of its dataset)` of each example.
        chains: how many the draws are of, one after the other.
        labelled: which positions count.
    """

    z: Float[Tensor, "n t r"]
    freedom: float
    names: Sequence[tuple[str, int]]
    chains: int
    labelled: Bool[Tensor, "n t"]


class Strongest(NamedTuple):
    """The strongest influences on each of some examples, as a table.

    Attributes:
        queries: `(observable, row of its dataset)` of each example.
        ids: the same of the examples that move with it, strongest first.
        values: their influences.
        stderr: the standard errors of these, where they are known.
    """

    queries: Sequence[tuple[str, int]]
    ids: Sequence[Sequence[tuple[str, int]]]
    values: Float[Tensor, "n k"]
    stderr: Float[Tensor, "n k"] | None

    def __str__(self) -> str:
        shown, lines = 10, []
        for q, query in enumerate(self.queries[:shown]):
            lines.append(_called(query))
            for k, found in enumerate(self.ids[q]):
                error = "" if self.stderr is None else f" ± {float(self.stderr[q, k]):<8.2g}"
                lines.append(f"  {float(self.values[q, k]):+10.4g}{error}  {_called(found)}")
        left = len(self.queries) - shown
        return "\n".join([*lines, *([f"… and {left} more"] if left > 0 else [])])

    def __repr__(self) -> str:
        return f"<the {self.values.shape[1]} strongest influences on each of {len(self.queries)} examples>"


class BIF(NamedTuple):
    """Influences between the losses of examples.

    Attributes:
        influences: `[n, m]`, or `[n, m, t, u]` for tokens.
        stderr: their standard errors, of that shape, where they were asked for.
        rows: `(observable, row)` of the first axis.
        columns: of the second.
        statistic: what they are: `correlation` or `covariance`.
    """

    influences: Float[Tensor, "n m ..."]
    stderr: Float[Tensor, "n m ..."] | None
    rows: Sequence[tuple[str, int]]
    columns: Sequence[tuple[str, int]]
    statistic: str = "influence"

    def top(self, k: int = 5) -> Strongest:
        """Return the strongest influences on each example of the first axis, itself left out.

        Args:
            k: how many; all, where there are fewer.

        Returns:
            Them; NaN, of losses that do not vary, last.

        Raises:
            ValueError: if `k` is below 1, or the influences are of tokens.

        Example:
            >>> import torch
            >>> names = [("code", 0), ("code", 1), ("code", 2)]
            >>> values = torch.tensor([[1.0, 0.2, 0.7], [0.2, 1.0, -0.1], [0.7, -0.1, 1.0]])
            >>> print(BIF(values, None, names, names).top(1))
            code[0]
                    +0.7  code[2]
            code[1]
                    +0.2  code[0]
            code[2]
                    +0.7  code[0]
        """
        if self.influences.ndim != 2:
            raise ValueError("top ranks examples, and these influences are of tokens: estimate with average=True")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        places = {name: i for i, name in enumerate(self.columns)}
        own = [(i, places[name]) for i, name in enumerate(self.rows) if name in places]
        values = self.influences.nan_to_num(nan=-torch.finfo(self.influences.dtype).max)
        for i, j in own:
            values[i, j] = -torch.inf
        at = values.argsort(dim=1, descending=True, stable=True)[:, : min(k, len(self.columns) - bool(own))]
        ids = [[self.columns[j] for j in row] for row in at.tolist()]
        errors = None if self.stderr is None else self.stderr.gather(1, at)
        return Strongest(self.rows, ids, self.influences.gather(1, at), errors)

    def __str__(self) -> str:
        n, m, *positions = self.influences.shape
        known = self.influences[self.influences.isfinite()]
        of = f"{n:,} × {m:,} examples" + (f", {positions[0]} × {positions[1]} positions each" if positions else "")
        text = f"{self.statistic}s of the losses of {of}"
        if known.numel():
            text += f": from {float(known.min()):.3g} to {float(known.max()):.3g}"
        if known.numel() < self.influences.numel():
            text += f", {self.influences.numel() - known.numel():,} unknown"
        return text + _typical(self.stderr)

    def __repr__(self) -> str:
        return f"<{self}>"


def _called(example: tuple[str, int]) -> str:
    """Return an example's name as a table shows it."""
    return visible(f"{example[0]}[{example[1]}]", lines=False)


def _typical(stderr: Tensor | None) -> str:
    """Return the median of standard errors in words, where there are any."""
    known = torch.empty(0) if stderr is None else stderr[stderr.isfinite()]
    return f", median s.e. {float(known.median()):.2g}" if known.numel() else ""


def estimate(
    run: Run,
    rows: str | Sequence[str] | None = None,
    columns: str | Sequence[str] | None = None,
    *,
    level: str = "sequence",
    statistic: str = "correlation",
    average: bool = False,
    pooling: str = "stacked",
    row_range: slice = slice(None),
    column_range: slice = slice(None),
    sign: int = 1,
    scale: float = 1.0,
    stderr: bool | None = None,
) -> BIF:
    r"""Return Bayesian influences between the examples of a run's observables.

    $$\mathrm{Cov}(\ell_i, \ell_j) = \frac{1}{n - 1} \sum_{c,d} (\ell_{icd} - \bar\ell_i)(\ell_{jcd} - \bar\ell_j)$$

    over `n` draws of all chains, or with `pooling="within"` about each chain's own mean over `n - c`, or with `"mean"`
    of the chains' average over `d - 1`. The correlation divides by both deviations.

    A covariance about an estimated mean is low by the share `τ / n` of it, `τ` the draws in which a loss forgets: of
    all draws when stacked, but of *one chain's* within, since slow directions then move a chain's mean. Within is for
    chains that sit in different places.

    Args:
        run: a run with `keep="sequences"`, or `"tokens"` for the token level.
        rows: observables of the first axis; default all, in order.
        columns: of the second; default the same.
        level: `"sequence"` correlates examples' mean losses; `"token"` positions'.
        statistic: `"correlation"` or `"covariance"`.
        average: at the token level, average each pair's block over its labelled positions, without forming it.
        pooling: `"stacked"`, `"within"` or `"mean"`.
        row_range: which of the rows; a block of any size is asked for so.
        column_range: which of the columns.
        sign: multiplies the result.
        scale: multiplies the result.
        stderr: also return standard errors by `batch_means`; default for whole examples, and not for tokens, where they
            take the room of the influences again. Of an averaged correlation the deviations are taken for known, and
            the error is too large where it is near one.

    Returns:
        The influences. At the token level unlabelled positions are zero, without an error: NaN. Where a loss does not
        vary, its correlation is NaN, as the peer's is.

    Raises:
        ValueError: if the run did not keep what is needed, or an option is unknown.

    Example:
        >>> import torch
        >>> from influence import sgmcmc
        >>> data = torch.tensor([1.0, 2.0, -1.0])
        >>> loss = lambda w, x: (1 + w["w"] * x).square()
        >>> run = sgmcmc.sample(loss, {"w": torch.zeros(())}, data, {"all": data}, lr=1e-5, n_beta=1.0, batch_size=3,
        ...     num_draws=20, progress=False)
        >>> sgmcmc.bif.estimate(run).influences.round(decimals=2).float()
        tensor([[ 1.,  1., -1.],
                [ 1.,  1., -1.],
                [-1., -1.,  1.]])
        >>> sgmcmc.bif.estimate(run).top(1).ids[0]
        [('all', 1)]
    """
    _check(statistic, pooling, level, average, run)
    check_number("scale", scale)
    stderr = level == "sequence" if stderr is None else stderr
    if run.pairs is not None and level == "sequence":
        return _from_pairs(run, rows, columns, statistic, pooling, row_range, column_range, sign * scale, stderr)
    averaged = level == "token" and average
    others = rows if columns is None else columns
    left = draws(run, rows, level, statistic, pooling, averaged, row_range)
    same = others == rows and row_range == column_range
    right = left if same else draws(run, others, level, statistic, pooling, averaged, column_range)
    correlation = statistic == "correlation" and not averaged
    value, error = product(left, right), None
    if stderr:
        error = batch_means.of_draws(left.z, right.z, value, left.chains, correlation).mul_(abs(scale))
        counts = left.labelled[:, None, :, None] & right.labelled[None, :, None, :]
        error.masked_fill_(~counts, torch.nan)
    value.mul_(sign * scale)
    if averaged or level == "sequence":
        value, error = value[:, :, 0, 0], None if error is None else error[:, :, 0, 0]
    if correlation and same:
        _unit_diagonal(value, sign * scale)
    return BIF(value, error, left.names, right.names, statistic)


def draws(
    run: Run,
    observables: str | Sequence[str] | None,
    level: str = "sequence",
    statistic: str = "correlation",
    pooling: str = "stacked",
    average: bool = False,
    of: slice = slice(None),
) -> Draws:
    """Return losses along chains such that products of them are the statistic; see `estimate`.

    With `average` a correlation's position traces are scaled before they are averaged, so a product is the mean of the
    block: `(1/T²) Σ_{st} ρ_{st} = ⟨z̄_i, z̄_j⟩ / (n - 1)`.
    """
    names = _names(run, observables)
    found = [_losses(name, run.observable(name), level) for name in names]
    who = [(name, int(row)) for name in names for row in run.observable(name).index]
    width = max(x.shape[3] for x in found)
    x = torch.cat([pad(x, (0, width - x.shape[3])) for x in found], 2)[:, :, of]
    labelled = torch.ones(x.shape[2:], dtype=torch.bool)
    if level == "token":
        labels = (run.observable(name).labelled for name in names)
        labelled = torch.cat([pad(each, (0, width - each.shape[1])) for each in labels])[of]
    _check_draws(run, x.shape[1])
    z, freedom = _centred(x, pooling)
    if statistic == "correlation":
        deviation = (z.double().square().sum(2) / freedom).sqrt()
        z = z / torch.where(labelled, deviation, 1.0)[:, :, None].to(z.dtype)
    if average:
        counts = labelled.sum(1).clamp_min(1)[:, None]
        z = ((z * labelled[:, :, None]).sum(1) / counts)[:, None]
        labelled = labelled.any(1, keepdim=True)
    return Draws(z, freedom, who[of], 1 if pooling == "mean" else x.shape[0], labelled)


def product(left: Draws, right: Draws) -> Float[Tensor, "n m t u"]:
    """Return all products of rows and columns: one matrix product, viewed with the positions last."""
    flat = (left.z.flatten(0, 1) / left.freedom) @ right.z.flatten(0, 1).T
    return flat.view(*left.z.shape[:2], *right.z.shape[:2]).permute(0, 2, 1, 3)


def top_k(queries: Draws, candidates: Draws, k: int, *, block: int = 8192) -> tuple[Tensor, Int[Tensor, "n k"]]:
    """Return each query's strongest influences and whose they are, without the N × N matrix.

    Args:
        queries: from `draws`, at the sequence level or averaged.
        candidates: the same.
        k: how many.
        block: candidates at a time.

    Returns:
        The values `[n, k]`, largest first, and indices into `candidates.names`; NaN, of losses that do not vary, last.

    Raises:
        ValueError: if the draws have positions, or there are fewer candidates.
    """
    if queries.z.shape[1] != 1 or candidates.z.shape[1] != 1:
        raise ValueError("top_k ranks examples: take draws(level='sequence'), or average=True")
    total = candidates.z.shape[0]
    if not 1 <= k <= total:
        raise ValueError(f"k must be between 1 and the number of candidates, {total}; got {k}")
    z, best, last = queries.z[:, 0], torch.empty(0), -torch.inf
    where = torch.empty(0, dtype=torch.int64)
    for begin in range(0, total, block):
        values = (z @ candidates.z[begin : begin + block, 0].T / queries.freedom).nan_to_num(nan=last)
        places = torch.arange(begin, begin + values.shape[1]).expand_as(values)
        if begin:
            values, places = torch.cat([best, values], 1), torch.cat([where, places], 1)
        best, at = values.topk(min(k, values.shape[1]), 1)
        where = places.gather(1, at)
    return best.where(best > last, torch.nan), where


def _names(run: Run, which: str | Sequence[str] | None) -> list[str]:
    return list(run.observables) if which is None else [which] if isinstance(which, str) else list(which)


def _losses(name: str, o: Observed, level: str) -> Float[Tensor, "c d n t"]:
    if level == "token":
        if o.tokens is None:
            raise ValueError(f"the run kept no losses of positions of {name!r}: sample with keep='tokens'")
        return o.tokens
    if o.sequences is None:
        raise ValueError(f"the run kept no losses of examples of {name!r}: sample with keep='sequences'")
    return o.sequences[..., None]


def _centred(x: Float[Tensor, "c d n t"], pooling: str) -> tuple[Float[Tensor, "n t r"], float]:
    """Return losses less their means, draws last, and the degrees of freedom."""
    if pooling == "mean":
        x = x.double().mean(0, keepdim=True).to(x.dtype)
    c, d = x.shape[:2]
    freedom = float(c * (d - 1) if pooling == "within" else c * d - 1)
    axes = (1,) if pooling == "within" else (0, 1)
    # losses are shifted by the anchor's already: float32 loses nothing that matters
    centred = x - x.double().mean(axes, keepdim=True).to(x.dtype)
    return centred.flatten(0, 1).permute(1, 2, 0).contiguous(), freedom


def _check_draws(run: Run, draws: int) -> None:
    """Refuse one draw: without burn-in it is the anchor, where all chains are alike."""
    if draws < 2:
        raise ValueError(f"influences need at least two draws of a chain; there are {draws}: {run.remedy}")


def _unit_diagonal(value: Tensor, scale: float) -> None:
    """Set the correlation of each trace with itself, as the peer does."""
    diagonal = torch.diagonal(value, dim1=0, dim2=1)
    if value.ndim == 4:
        diagonal = torch.diagonal(diagonal, dim1=0, dim2=1)
    diagonal.copy_(torch.where(diagonal.isnan() | (diagonal == 0), diagonal, scale))


def _from_pairs(
    run: Run,
    rows: str | Sequence[str] | None,
    columns: str | Sequence[str] | None,
    statistic: str,
    pooling: str,
    row_range: slice,
    column_range: slice,
    scale: float,
    stderr: bool,
) -> BIF:
    """Return influences from streamed co-moments."""
    assert run.pairs is not None
    if pooling == "mean":
        raise ValueError("the run kept co-moments, not traces: sample with keep='sequences' for pooling='mean'")
    _check_draws(run, int(run.pairs.draws.min()))
    whole = moments.covariance(run.pairs, pooling)
    if statistic == "correlation":
        deviation = whole.diagonal().sqrt()
        whole = whole / deviation[:, None] / deviation
    errors = None
    if stderr:
        errors = batch_means.of_moments(run.pairs, whole, pooling == "within", statistic == "correlation")
    names = [(name, int(row)) for name, o in run.observables.items() for row in o.index]

    def at(which: str | Sequence[str] | None, of: slice) -> list[int]:
        return [i for want in _names(run, which) for i, (name, _) in enumerate(names) if name == want][of]

    left, right = at(rows, row_range), at(columns if columns is not None else rows, column_range)
    error = None if errors is None else errors[left][:, right] * abs(scale)
    return BIF(whole[left][:, right] * scale, error, [names[i] for i in left], [names[i] for i in right], statistic)


def _check(statistic: str, pooling: str, level: str, average: bool, run: Run) -> None:
    for name, value, values in (
        ("statistic", statistic, STATISTICS),
        ("pooling", pooling, POOLINGS),
        ("level", level, ("sequence", "token")),
    ):
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}; got {value!r}")
    if average and level != "token":
        raise ValueError("average is of the positions of a pair: pass level='token'")
    if not run.observables:
        raise ValueError("the run has no observables: sample with observables={'name': data}")
