"""Beside devinterp, where it is installed (`make bench-peers`): the same noise, the same traces, the same numbers."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import sgmcmc
from influence.sgmcmc import bif, llc, rmsprop_sgld, sgld, susceptibility
from tests.test_sgmcmc_estimators import run_of, traces
from tests.test_sgmcmc_steps import curved, setup

pytest.importorskip("devinterp", reason="the peers' environment has it")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", ["sgld", "rmsprop_sgld"])
@pytest.mark.parametrize("box", [None, 0.05])
@pytest.mark.parametrize("masked", [False, True])
def test_fifty_steps_are_the_peers(method: str, box: Any, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from devinterp.optim.sgmcmc import SGMCMC

    params, data = setup(torch.float32)
    masks = {"a": torch.tensor([True, False, True]), "b": True} if masked else None
    lr, nb, gamma, decay = 1e-3, 20.0, 5.0, 0.3
    target = sgmcmc.local_posterior(curved, params, nb, gamma, decay, mask=masks)
    sampler = {"sgld": sgld, "rmsprop_sgld": rmsprop_sgld}[method].build(target, lr, box)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    mask = [torch.tensor([1.0, 0, 1]), torch.ones(())] if masked else None
    groups = [{"params": [p], **({"mask": [mask[i]]} if mask else {})} for i, p in enumerate(theirs.values())]
    optimizer = getattr(SGMCMC, method)(
        groups, lr=lr, nbeta=nb, localization=gamma, weight_decay=decay, bounding_box_size=box
    )
    queue: list[Tensor] = []
    monkeypatch.setattr(torch, "normal", lambda mean, std, size, **kwargs: queue.pop(0).reshape(size))
    state = sampler.init(params, sampler.noise(0, 0, 0))
    for t in range(1, 51):
        noise, batch = sampler.noise(0, 0, t), data.roll(t, 0)[:3]
        state, _ = sampler.step(state, batch, noise)
        optimizer.zero_grad()
        curved(theirs, batch).mean().backward()
        queue[:] = [noise[name] for name in theirs]
        optimizer.step()
        assert not queue
    for name, p in theirs.items():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-6, atol=1e-6)


def stored(run: sgmcmc.Run, losses: Tensor | None = None, n_beta: float = 7.0, start: float = 0.0) -> Any:
    """A run as the peer's data tree."""
    xarray = pytest.importorskip("xarray")
    variables: dict[str, Any] = {}
    for name, o in run.observables.items():
        dims = ("chain", "draw", f"batch_{name}", "token_pos")
        variables[f"loss_{name}"] = (dims, (o.tokens + o.anchor).numpy())
        ids = torch.zeros(o.anchor.shape[0], o.anchor.shape[1] + 1, dtype=torch.long)
        variables[f"input_ids_{name}"] = ((f"batch_{name}", "token"), ids.numpy())
    variables["init_loss"] = (("chain", "token_pos"), torch.full((3, 4), start).numpy())
    if losses is not None:
        variables["sampling_loss_micro"] = (("chain", "step", "batch_sampling", "token_pos"), losses.numpy())
    attrs = {"metadata": {"config": {"sampler": {"n_beta": n_beta}}}}
    return SimpleNamespace(dataset=xarray.Dataset(variables, attrs=attrs))


def test_llc_is_the_peers() -> None:
    from devinterp.slt.llc import compute_llc

    source = torch.Generator().manual_seed(0)
    losses = 3 + torch.randn(3, 50, 8, 4, generator=source, dtype=torch.float64)
    found = compute_llc(stored(run_of(traces()), losses, start=2.5))
    loss = losses.mean((2, 3))
    run = sgmcmc.Run(loss, loss * 0, {}, {}, None, (0, 1, 2), 10, 1, {"n_beta": 7.0})
    ours = llc.estimate(run, "steps", init_loss=2.5)
    assert ours.mean == pytest.approx(float(found["llc_mean"]), rel=1e-5)
    assert ours.mean == pytest.approx(float(found["llc_scalar"]), rel=1e-5)
    assert ours.std == pytest.approx(float(found["llc_std"]), rel=1e-5)
    torch.testing.assert_close(ours.per_chain, torch.tensor(found["llc_per_chain"].values))
    # the first version: after burn-in, deviation over chains with n - 1
    older = llc.estimate(run, "draws", init_loss=2.5)
    per_chain = 7 * (loss[:, 10:].mean(1) - 2.5)
    torch.testing.assert_close(older.per_chain, per_chain)
    assert older.std == pytest.approx(float(per_chain.std()))


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("statistic", ["correlation", "covariance"])
@pytest.mark.parametrize(("theirs", "ours"), [("stack", "stacked"), ("mean", "mean")])
def test_influences_are_the_peers(level: str, statistic: str, theirs: str, ours: str) -> None:
    from devinterp.slt.bif import compute_bif

    run = run_of(traces(), other=traces().flip(1).roll(1, 2))
    for average, (rows, columns) in itertools.product(
        {False, level == "token"}, [(slice(None), slice(None)), (slice(2, 7), slice(1, 9))]
    ):
        wanted = compute_bif(
            stored(run),
            correlation_method=level,
            reduce_chain_dimension_method=theirs,
            average_tokenwise_bif=average,
            compute_covariance=statistic == "covariance",
            batch_index_range_1=range(10)[rows],
            batch_index_range_2=range(10)[columns],
            batch_size=3,
            device="cpu",
        )
        found = bif.estimate(
            run,
            level=level,
            statistic=statistic,
            average=average,
            pooling=ours,
            row_range=rows,
            column_range=columns,
        ).influences
        expected = torch.tensor(wanted["influences"].values)
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-5)


def test_susceptibilities_are_the_peers() -> None:
    from devinterp.slt.susceptibilities import compute_susceptibilities

    runs = {"full": run_of(traces(), other=traces().flip(1)), "l0": run_of(traces().flip(2) / 2, other=traces() / 3)}
    start = 0.4
    trees = {name: stored(run, start=start) for name, run in runs.items()}
    wanted = compute_susceptibilities(trees, "one", include_sampling_task=True)["susceptibilities"].dataset["sus"]
    found = susceptibility.estimate(runs, "one", init_loss=start)
    ours = torch.cat([found[name].value[..., 1].flatten() for name in ("one", "two")])
    torch.testing.assert_close(ours.float(), torch.tensor(wanted.values)[:, 0].float(), rtol=1e-4, atol=1e-5)
