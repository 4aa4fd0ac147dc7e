"""BIF and susceptibilities of given traces against numpy, streaming against two passes, and the laws of both."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from influence import sgmcmc
from influence.sgmcmc import bif, diagnostics, llc, moments, susceptibility
from tests.agreement import Group, check, worst
from tests.test_sgmcmc_regression import ANCHOR, DATA, LR, squared

F64 = torch.float64


def traces() -> Tensor:
    source = torch.Generator().manual_seed(0)
    common = torch.randn(3, 40, 1, 1, generator=source)
    return common + torch.randn(3, 40, 5, 4, generator=source) + torch.arange(3.0)[:, None, None, None]


def run_of(tokens: Tensor, labelled: Tensor | None = None, other: Tensor | None = None) -> sgmcmc.Run:
    """A run with given shifted losses of positions."""

    def observed(x: Tensor, all_means: Tensor) -> sgmcmc.Observed:
        c, _, n, t = x.shape
        mask = torch.ones(n, t, dtype=torch.bool) if labelled is None else labelled
        x = x * mask
        counts = mask.sum(1)
        state = moments.update(moments.init(c, all_means.shape[2], n * t), all_means, x.flatten(2))
        sequences = x.sum(3) / counts
        return sgmcmc.Observed(
            torch.arange(n * t).reshape(n, t) / 10.0,
            mask,
            torch.arange(n),
            None,
            "",
            x.double().sum((2, 3)) / counts.sum(),
            state,
            sequences,
            x,
        )

    both = {"one": tokens, **({} if other is None else {"two": other})}
    weight = torch.ones(tokens.shape[2:], dtype=torch.bool) if labelled is None else labelled
    means = torch.stack([(x * weight).double().sum((2, 3)) / weight.sum() for x in both.values()], 2)
    nothing = torch.zeros(tokens.shape[:2], dtype=F64)
    facts = {"n_beta": 2.0}
    return sgmcmc.Run(
        nothing, nothing, {}, {name: observed(x, means) for name, x in both.items()}, None, (0, 1, 2), 0, 1, facts
    )


def streaming() -> Group:
    """Any block size, any order of merges, any split of the draws: numpy's covariances to 1e-12."""
    source = torch.Generator().manual_seed(1)
    x, y = 1e3 + torch.randn(2, 60, 3, generator=source, dtype=F64), torch.randn(2, 60, 4, generator=source, dtype=F64)
    y = y + x[:, :, :1]
    whole = moments.update(moments.init(2, 3, 4), x, y)
    rows = []
    for size in (1, 7, 60):
        state = moments.init(2, 3, 4)
        for begin in range(0, 60, size):
            state = moments.update(state, x[:, begin : begin + size], y[:, begin : begin + size])
        rows.append(worst(f"moments, {size} draws at a time", tuple(whole), tuple(state), 1e-12, 1e-9))
    a, b, c = (
        moments.update(moments.init(2, 3, 4), x[:, part], y[:, part])
        for part in (slice(0, 10), slice(10, 25), slice(25, 60))
    )
    for name, merged in (
        ("(a b) c", moments.merge(moments.merge(a, b), c)),
        ("a (b c)", moments.merge(a, moments.merge(b, c))),
        ("c (b a)", moments.merge(c, moments.merge(b, a))),
    ):
        rows.append(worst(f"moments, merged as {name}", tuple(whole), tuple(merged), 1e-12, 1e-9))
    flat = np.concatenate([x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy()], 1)
    expected = torch.from_numpy(np.cov(flat.T)[:3, 3:])
    each = [torch.from_numpy(np.cov(np.concatenate([x[c], y[c]], 1).T)[:3, 3:]) for c in range(2)]
    means = torch.stack([x.mean(1), x.mean(1)])[0] - x.mean((0, 1))
    between = 60 * means.T @ (y.mean(1) - y.mean((0, 1)))
    within, stacked = (moments.covariance(whole, pooling) for pooling in ("within", "stacked"))
    pieces = (59 * 2 * within + between) / 119
    rows += [
        worst("covariance of all draws: numpy's", expected, stacked, 1e-10, 1e-12),
        worst("covariance within chains: numpy's", torch.stack(each).mean(0), within, 1e-10, 1e-12),
        worst("covariance within chains and between, of all draws", pieces, stacked, 1e-10, 1e-10),
    ]
    return Group(rows)


def test_streaming_moments_are_those_of_two_passes() -> None:
    check(streaming())


def test_a_dead_chain_leaves_no_trace_in_the_moments() -> None:
    x = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    state = moments.update(moments.init(2, 2, 2), x[:, :3], x[:, :3])
    poisoned = x[:, 3:].clone()
    poisoned[1] = float("nan")
    after = moments.update(state, poisoned, poisoned, torch.tensor([True, False]))
    assert after.draws.tolist() == [5, 3]
    assert all(torch.equal(new[1], old[1]) for new, old in zip(after, state, strict=True))
    alone = moments.update(moments.init(1, 2, 2), x[:1], x[:1])
    torch.testing.assert_close(tuple(each[:1] for each in after), tuple(alone))


def token_influences(pooling: str, statistic: str) -> Group:
    """Against numpy; the mean over a block against what is computed without it."""
    x = traces()
    run = run_of(x)
    flat = {
        "within": (x - x.mean(1, keepdim=True)).flatten(0, 1),
        "stacked": x.flatten(0, 1),
        "mean": x.mean(0),
    }[pooling].flatten(1)
    function = np.corrcoef if statistic == "correlation" else np.cov
    expected = torch.from_numpy(function(flat.double().numpy().T)).reshape(5, 4, 5, 4).permute(0, 2, 1, 3)
    if pooling == "within" and statistic == "covariance":
        expected = expected * 119 / 117  # three means were taken away
    estimate = functools.partial(bif.estimate, run, statistic=statistic, pooling=pooling)
    found = estimate(level="token").influences
    block = estimate(level="token", row_range=slice(1, 3), column_range=slice(4, 5)).influences
    averaged = estimate(level="token", average=True).influences
    name = f"token {statistic}, {pooling}"
    rows = [
        worst(f"{name}: numpy's", expected, found, 1e-5, 1e-6),
        worst(f"{name}: a block alone", found[1:3, 4:5], block, 1.3e-6, 1e-5),
        worst(f"{name}: averaged over positions", found.mean((2, 3)), averaged, 1e-4, 1e-6),
    ]
    if statistic == "covariance":
        rows.append(worst(f"{name}: of means over positions", estimate().influences, averaged, 1e-4, 1e-6))
    return Group(rows)


@pytest.mark.parametrize("pooling", ["within", "stacked", "mean"])
@pytest.mark.parametrize("statistic", ["correlation", "covariance"])
def test_token_influences_are_those_of_numpy(pooling: str, statistic: str) -> None:
    check(token_influences(pooling, statistic))


def test_influences_between_observables_top_k_signs_and_unlabelled_positions() -> None:
    x = traces()
    labelled = torch.ones(5, 4, dtype=torch.bool)
    labelled[0, 2:] = False
    run = run_of(x, labelled, other=x.flip(1))
    cross = bif.estimate(run, "one", "two")
    joint = bif.estimate(run)
    torch.testing.assert_close(cross.influences, joint.influences[:5, 5:], rtol=1e-4, atol=1e-6)
    assert cross.columns[0] == ("two", 0)
    paper = bif.estimate(run, "one", "two", statistic="covariance", sign=-1, scale=run.n_beta).influences
    raw = bif.estimate(run, "one", "two", statistic="covariance").influences
    torch.testing.assert_close(paper, -2 * raw)
    z = bif.draws(run, None)
    values, who = bif.top_k(bif.draws(run, "one"), z, 3, block=4)
    expected, at = joint.influences[:5].topk(3, 1)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(who, at)
    tokens, errors, *_ = bif.estimate(run, "one", level="token", stderr=True)
    assert bool((tokens[0, :, 2:] == 0).all())
    assert errors is not None
    counts = labelled[:, None, :, None] & labelled[None, :, None, :]
    assert torch.equal(errors.isnan(), ~counts)  # zero by agreement, not measured
    averaged = bif.estimate(run, "one", level="token", average=True).influences
    torch.testing.assert_close(averaged[0, 1], tokens[0, 1, :2].mean(), rtol=1e-4, atol=1e-6)


def test_errors_of_the_mean_over_chains_are_worth_the_draws_of_one() -> None:
    """Four averaged chains are as many draws as one: counted as four, their errors were half of what they are."""
    x = torch.randn(200, 4, 300, 2, 1, generator=torch.Generator().manual_seed(1))
    found = [bif.estimate(run_of(each), "one", pooling="mean", statistic="covariance", stderr=True) for each in x]
    spread = torch.stack([each.influences[0, 1] for each in found]).std()
    said = [each.stderr[0, 1] for each in found if each.stderr is not None]
    assert float(torch.stack(said).mean() / spread) == pytest.approx(1, abs=0.2)  # 4 s.e. of a deviation of 200


@pytest.mark.parametrize("statistic", ["correlation", "covariance"])
@pytest.mark.parametrize("chains", [1, 4, 30])
def test_standard_errors_of_influences_are_their_spread(chains: int, statistic: str) -> None:
    """Over 300 runs of dependent, heavy-tailed draws: the Gaussian formula is half of what a square's spread is."""
    source = torch.Generator().manual_seed(3)
    draws = 1200 // chains
    x = torch.randn(300, chains, 2, generator=source, dtype=F64)
    path = []
    for _ in range(draws):
        x = 0.6 * x + 0.8 * torch.randn(x.shape, generator=source, dtype=F64)
        path.append(torch.stack([x[..., 0], x[..., 0] * 0.5 + x[..., 1], x[..., 1]], 2).square() + x[..., :1])
    runs = [run_of(each[..., None].float()) for each in torch.stack(path, 2)]
    found = [bif.estimate(run, statistic=statistic, stderr=True) for run in runs]
    spread = torch.stack([each.influences for each in found]).double().std(0)
    said = torch.stack([each.stderr for each in found if each.stderr is not None]).double().square().mean(0).sqrt()
    off = ~torch.eye(3, dtype=torch.bool) if statistic == "correlation" else torch.ones(3, 3, dtype=torch.bool)
    torch.testing.assert_close(said[off], spread[off], rtol=0.2, atol=0)  # 4 s.e. of a deviation of 300 are 16 %
    streamed = [dataclasses.replace(run, pairs=pairs_of(run)) for run in runs[:40]] if chains == 30 else []
    for traced, each in zip(found, streamed, strict=False):
        again = bif.estimate(each, statistic=statistic, stderr=True)
        torch.testing.assert_close(again.influences, traced.influences.double(), rtol=1e-4, atol=1e-5)
        assert again.stderr is not None
        torch.testing.assert_close(again.stderr, traced.stderr.double(), rtol=1e-3, atol=1e-5)


def test_standard_errors_see_that_chains_shorter_than_their_memory_disagree() -> None:
    """Draws that forget in 100, in chains of 200: pieces of 40 alone said 0.7 of what runs differ by."""
    source = torch.Generator().manual_seed(4)
    x, path = torch.randn(300, 4, 2, generator=source, dtype=F64), []
    for _ in range(200):
        x = 0.98 * x + (1 - 0.98**2) ** 0.5 * torch.randn(x.shape, generator=source, dtype=F64)
        path.append(x + x.square() / 2)
    runs = [run_of(each[..., None].float()) for each in torch.stack(path, 2)]
    found = [bif.estimate(run, statistic="covariance", stderr=True) for run in runs]
    spread = torch.stack([each.influences for each in found]).double().std(0)
    said = torch.stack([each.stderr for each in found if each.stderr is not None]).double().square().mean(0).sqrt()
    assert 0.8 < float((said / spread).mean()) < 1.2


def test_one_batch_has_no_standard_error() -> None:
    short = run_of(traces()[:1, :3])
    for run in (short, dataclasses.replace(short, pairs=pairs_of(short))):
        for statistic in ("correlation", "covariance"):
            found = bif.estimate(run, statistic=statistic, stderr=True)
            assert found.stderr is not None
            assert bool(found.stderr.isnan().all())
            assert bool(found.influences.isfinite().all())


def pairs_of(run: sgmcmc.Run, name: str = "one") -> moments.Moments:
    losses = run.observables[name].sequences
    assert losses is not None
    c, _, n = losses.shape
    return moments.update(moments.init(c, n, n), losses, losses)


def test_standard_errors_of_averages_are_those_of_the_means() -> None:
    """The average of a pair's block of covariances is the covariance of the means, and so is its error."""
    run = run_of(traces())
    averaged = bif.estimate(run, level="token", average=True, statistic="covariance", stderr=True)
    means = bif.estimate(run, statistic="covariance", stderr=True)
    torch.testing.assert_close(averaged.stderr, means.stderr, rtol=1e-3, atol=1e-6)


def test_a_loss_that_does_not_vary_comes_last() -> None:
    """Its correlation is NaN, which sorts above every number."""
    x = traces()
    x[:, :, 2] = 0
    z = bif.draws(run_of(x), "one")
    values, who = bif.top_k(z, z, 5, block=2)
    assert who[0, -1] == 2
    assert values[0].isnan().tolist() == [False] * 4 + [True]


def raw_moments() -> Group:
    """Cov_C(φ, D) + E_C φ (E_C D - E_F D), from the published raw form, with another baseline too."""
    runs = {"full": run_of(traces()), "part": run_of(traces().flip(2) * 0.7 + 0.1)}
    rows = []
    for init_loss in (None, 0.3):
        found = susceptibility.estimate(runs, "one", init_loss=init_loss)["one"]
        loss = {
            name: (run.observables["one"].tokens + run.observables["one"].anchor).double().flatten(0, 1)
            for name, run in runs.items()
        }
        start = runs["full"].observables["one"].anchor_mean if init_loss is None else init_loss
        for r, name in enumerate(runs):
            A, phi = loss[name].mean((1, 2)), loss[name].mean((1, 2)) - start
            l_b, A_f, l_f = loss[name], loss["full"].mean(), loss["full"].mean(0)
            raw = (phi * A).mean() - (phi[:, None, None] * l_b).mean(0) - phi.mean() * (A_f - l_f)
            text = f"susceptibility from raw moments, {name}, baseline {'paired' if init_loss is None else init_loss}"
            rows.append(worst(text, raw, found.value[..., r], 1e-5, 1e-6))  # of float32 losses
    return Group(rows)


def test_susceptibility_is_the_raw_moment_formula() -> None:
    check(raw_moments())
    runs = {"full": run_of(traces()), "part": run_of(traces().flip(2) * 0.7 + 0.1)}
    assert susceptibility.estimate(runs, "one", sign=-1, scale=2.0)["one"].value.equal(
        -2 * susceptibility.estimate(runs, "one")["one"].value
    )


def test_susceptibilities_where_no_label_is_have_no_error() -> None:
    """Their value is zero by agreement, and an error of zero would have said that they were measured exactly."""
    labelled = torch.ones(5, 4, dtype=torch.bool)
    labelled[0, 2:] = labelled[3, :1] = False
    runs = {"full": run_of(traces(), labelled), "part": run_of(traces().flip(2), labelled)}
    found = susceptibility.estimate(runs, "one", sign=-1, scale=2.0)["one"]
    assert torch.equal(found.stderr.isnan(), ~labelled[..., None].expand(5, 4, 2))
    assert bool((found.stderr[labelled] > 0).all())
    assert bool((found.value[~labelled] == 0).all())
    assert found.matrix().shape == (17, 2)


def test_effective_sample_size_of_an_autoregression_is_its_closed_form() -> None:
    source = torch.Generator().manual_seed(0)
    for rho in (0.0, 0.6, 0.9):
        x, found = torch.randn(4, generator=source, dtype=F64), []
        for _ in range(8000):
            x = rho * x + (1 - rho**2) ** 0.5 * torch.randn(4, generator=source, dtype=F64)
            found.append(x)
        trace = torch.stack(found, 1)
        exact = 32_000 * (1 - rho) / (1 + rho)
        assert diagnostics.ess(trace) == pytest.approx(exact, rel=0.15)
        assert diagnostics.rhat(trace) < 1.02
        assert abs(diagnostics.drift(trace)) < 4
    apart = trace + 5 * torch.arange(4.0)[:, None]
    assert diagnostics.rhat(apart) > 2
    assert diagnostics.ess(apart) < 20
    assert diagnostics.drift(trace + torch.linspace(0, 2, 8000)) > 8


def test_verdicts_say_what_is_wrong_with_the_number_behind_it() -> None:
    source = torch.Generator().manual_seed(0)

    def of(excess: Tensor, **terms: Tensor) -> str:
        run = sgmcmc.Run(excess, torch.zeros_like(excess), terms, {}, None, (0, 1), 0, 1, {"n_beta": 10.0})
        return llc.estimate(run).verdict

    noise = torch.randn(2, 500, generator=source, dtype=F64)
    assert of(noise + 5) == "no fault found"
    assert "not at a minimum: LLC -5" in of(noise - 0.5 * 1 + 0.0 * noise)[:40].replace("-4.9", "-5").replace(
        "-5.0", "-5"
    )
    assert "not mixed: R-hat" in of(noise + torch.tensor([[5.0], [50.0]]))
    assert "not settled: the second half lies +" in of(noise + 5 + torch.linspace(0, 3, 500))
    assert "too hot: acceptance 0.50" in of(noise + 5, acceptance=torch.full((2, 500), 0.5, dtype=F64))


def test_three_steps_are_too_short_for_a_clean_verdict() -> None:
    """Their effective sample size is NaN, which is not below 50."""
    run = sgmcmc.sample(
        lambda w, _: w["w"].square().sum(),
        {"w": torch.zeros(2)},
        None,
        lr=1e-3,
        n_beta=1.0,
        num_draws=3,
        num_chains=1,
        progress=False,
    )
    assert "too short" in llc.estimate(run).verdict


def test_wbic_is_at_its_temperature_only() -> None:
    loss = torch.full((2, 10), 0.5, dtype=F64)
    at = {"n_beta": sgmcmc.default_n_beta(100)}
    run = sgmcmc.Run(loss, loss, {}, {}, None, (0, 1), 0, 1, at)
    assert llc.wbic(run, 100)[0] == 50
    with pytest.raises(ValueError, match="n / log n"):
        llc.wbic(run, 50)


def test_what_cannot_be_estimated_is_refused() -> None:
    run = run_of(traces())
    bare: Any = sgmcmc.sample(
        squared, {"w": ANCHOR}, DATA, {"all": DATA}, lr=LR, n_beta=1.0, batch_size=3, num_draws=1, progress=False
    )
    for call, words in (
        (lambda: llc.estimate(bare), "at least two steps"),
        (lambda: bif.estimate(bare), "at least two draws"),
        (lambda: bif.estimate(bare, pooling="within"), "at least two draws"),
        (lambda: bif.estimate(dataclasses.replace(bare, pairs=pairs_of(bare, "all"))), "at least two draws"),
        (lambda: bif.estimate(bare, level="token"), "keep='tokens'"),
        (lambda: bif.estimate(run, average=True), "level='token'"),
        (lambda: bif.estimate(run, statistic="cosine"), "correlation, covariance"),
        (lambda: susceptibility.estimate({"l0": run}, "one"), "needs 'full'"),
        (lambda: susceptibility.estimate({"full": run, "l0": bare}, "one"), r"observed \['all'\]"),
        (lambda: llc.estimate(run, "mean"), "paired, steps, draws"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(KeyError, match="it has one"):
        bif.estimate(run, "three")


def test_more_draws_are_not_asked_of_a_run_that_diverged() -> None:
    """It would stop at the same step again."""
    stopped = dataclasses.replace(run_of(traces()[:1, :1]), facts={"n_beta": 2.0, "stopped": 1})
    for call in (
        lambda: llc.estimate(stopped),
        lambda: bif.estimate(stopped),
        lambda: susceptibility.estimate({"full": stopped}, "one"),
    ):
        with pytest.raises(ValueError, match=r"at least (two|2) .*: a chain diverged at step 1, .*: lower lr") as said:
            call()
        assert "num_draws" not in str(said.value)
    early = dataclasses.replace(run_of(traces()[:, :3]), between=5)
    with pytest.raises(ValueError, match="at least two draws after burn-in; there are 0: raise num_draws"):
        llc.estimate(early, "draws")


def test_the_strongest_influences_are_those_of_a_full_sort_without_the_example_itself() -> None:
    run = run_of(traces())
    found = bif.estimate(run)
    assert found.stderr is not None  # of whole examples they are known without being asked for
    top = found.top(3)
    assert (top.values.shape, top.queries) == ((5, 3), found.rows)
    for i in range(5):
        order = [j for j in found.influences[i].argsort(descending=True).tolist() if j != i][:3]
        assert [found.columns.index(one) for one in top.ids[i]] == order
        assert torch.equal(top.values[i], found.influences[i, order])
        assert top.stderr is not None
        assert torch.equal(top.stderr[i], found.stderr[i, order])
    assert found.top(99).values.shape == (5, 4)
    text = str(top).splitlines()
    assert (text[0], len(text)) == ("one[0]", 20)
    assert text[1].endswith(f"  one[{top.ids[0][0][1]}]")
    assert " ± " in text[1]
    flat = found._replace(influences=found.influences.clone().fill_diagonal_(1))
    flat.influences[0, 3] = float("nan")  # a loss that does not vary
    assert flat.top(4).ids[0][-1] == ("one", 3)
    assert bool(flat.top(4).values[0, -1].isnan())
    with pytest.raises(ValueError, match="average=True"):
        bif.estimate(run, level="token").top(1)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        found.top(0)


def test_estimates_print_what_they_are_their_sizes_ranges_and_errors() -> None:
    run, part = run_of(traces()), run_of(traces().flip(2) * 0.7)
    found = bif.estimate(run)
    low, high = float(found.influences.min()), float(found.influences.max())
    assert str(found).startswith(
        f"correlations of the losses of 5 × 5 examples: from {low:.3g} to {high:.3g}, median s.e."
    )
    token = str(bif.estimate(run, level="token", statistic="covariance"))
    assert token.startswith("covariances of the losses of 5 × 5 examples, 4 × 4 positions each: from")
    chi = susceptibility.estimate({"full": run, "l0h1": part, "l1 mlp": part}, restrictions=["l0h1", "l1 mlp"])
    assert list(chi["one"].restrictions) == ["l0h1", "l1 mlp"]
    lines = str(chi).splitlines()
    assert lines[0] == "one: susceptibilities of 20 tokens"
    assert " ".join(lines[1].split()) == "restriction mean |χ| smallest largest median s.e. beyond 2 s.e."
    assert [line.split("  ")[0] for line in lines[2:]] == ["l0h1", "l1 mlp"]
    assert f"{float(chi['one'].matrix()[:, 0].abs().mean()):.3g}" in lines[2]
    for value in (found, found.top(1), chi, chi["one"], run, run.observables["one"], llc.estimate(flat_run())):
        assert repr(value).startswith("<")
        assert "tensor" not in repr(value) + str(value)
    with pytest.raises(ValueError, match="no run of the restriction 'l9'; there are full"):
        susceptibility.estimate({"full": run}, restrictions=["l9"])
    alone, mapped = (susceptibility.estimate(given)["one"].value for given in (run, {"full": run}))
    assert torch.equal(alone, mapped)
    with pytest.raises(ValueError, match="runs needs 'full', it has l0"):
        susceptibility.estimate(dataclasses.replace(run, facts={"n_beta": 2.0, "restriction": "l0"}))


def flat_run() -> sgmcmc.Run:
    excess = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    return sgmcmc.Run(excess, torch.zeros_like(excess), {}, {}, None, (0, 1), 0, 1, {"n_beta": 10.0})
