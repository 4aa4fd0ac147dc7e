"""Runs: chains together and alone, killed and resumed, refused and cut short; no global state."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn

from influence import functionalize, sgmcmc
from influence.sgmcmc import llc, mala, sghmc
from influence.sgmcmc.runner import draws, loop, schedule, traces
from influence.sgmcmc.runner.minibatches import batch_index
from influence.sgmcmc.samplers.target import PerChain, gradient
from tests.agreement import Group, check, exact, worst
from tests.cases import LLAMA, VOCAB, hf

F64 = torch.float64


def classifier() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=source, dtype=F64) / 2)
    loss_fn, params = functionalize(model)
    data = {
        "input": torch.randn(20, 4, generator=source, dtype=F64),
        "labels": torch.randint(3, (20,), generator=source),
    }
    return loss_fn, params, data


SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "n_beta": 20.0,
    "localization": 5.0,
    "batch_size": 6,
    "num_draws": 10,
    "num_burnin_steps": 3,
    "num_steps_bw_draws": 5,
    "keep": "tokens",
    "progress": False,
}


def same(a: sgmcmc.Run, b: sgmcmc.Run, tolerance: float = 0.0) -> None:
    """Two runs agree in everything measured."""
    one, two = (draws.pack(run, "")[0] for run in (a, b))
    assert one.keys() == two.keys()
    for name, x in one.items():
        if tolerance and x.is_floating_point():
            torch.testing.assert_close(x, two[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(x, two[name]), name


def company(shared: bool) -> Group:
    """53 steps: together, in chunks that do not divide, alone, or as the third of a run of others."""
    loss_fn, params, data = classifier()
    settings = {**SETTINGS, "shared_batches": shared}
    observed = {"train": data, "some": (data, 2)}
    measured = lambda run: draws.pack(run, "")[0]  # noqa: E731
    together = sgmcmc.sample(loss_fn, params, data, observed, **settings, num_chains=3)
    name = f"chains, {'shared' if shared else 'own'} batches"
    rows = []
    for chunk in (1, 2):
        alone = sgmcmc.sample(loss_fn, params, data, observed, **settings, num_chains=3, chain_chunk=chunk)
        rows.append(worst(f"{name}, {chunk} at a time", measured(together), measured(alone), 1e-10, 1e-10))
    fewer = sgmcmc.sample(loss_fn, params, data, observed, **settings, num_chains=1)
    rows.append(worst(f"{name}, one alone", measured(together.keep([0])), measured(fewer), 1e-10, 1e-10))
    assert not torch.equal(together.loss[0], together.loss[1])
    assert torch.equal(together.baseline[0], together.baseline[1]) == shared
    return Group(rows)


@pytest.mark.parametrize("shared", [False, True])
def test_a_chain_is_the_same_whatever_runs_beside_it(shared: bool) -> None:
    check(company(shared))


def test_restrictions_together_are_restrictions_alone() -> None:
    loss_fn, params, data = classifier()
    settings = {**SETTINGS, "num_chains": 2}
    words = {"full": None, "low": "0.*", "part": {"2.weight": torch.eye(3, 6, dtype=torch.bool)}}
    runs = sgmcmc.sample_restrictions(loss_fn, params, data, {"all": data}, **settings, restrictions=words)
    by_one = sgmcmc.sample_restrictions(
        loss_fn, params, data, {"all": data}, **settings, restrictions=words, chain_chunk=1
    )
    for name in words:
        same(runs[name], by_one[name], 1e-10)
    same(runs["full"], sgmcmc.sample(loss_fn, params, data, {"all": data}, **settings), 1e-10)
    assert runs["part"].facts["restriction"].startswith("masks ")


def test_a_grid_is_its_points() -> None:
    loss_fn, params, data = classifier()
    settings = {key: value for key, value in SETTINGS.items() if key not in ("lr", "localization")}
    grid = llc.calibrate(loss_fn, params, data, lrs=[1e-3, 1e-4], localizations=[1.0, 50.0], num_chains=2, **settings)
    alone = sgmcmc.sample(loss_fn, params, data, lr=1e-4, localization=50.0, num_chains=2, **settings)
    torch.testing.assert_close(grid.estimates[1e-4, 50.0].trace, llc.estimate(alone).trace, rtol=1e-10, atol=1e-10)
    assert str(grid).count("±") == 4


def global_state() -> Group:
    """What a run changes outside itself."""
    loss_fn, params, data = classifier()
    before = {name: p.clone() for name, p in params.items()}
    state = torch.get_rng_state()
    sgmcmc.sample(loss_fn, params, data, {"all": data}, **SETTINGS)
    assert list(data) == ["input", "labels"]
    return Group(
        [
            exact("bytes of torch's generator that changed", 0, (state != torch.get_rng_state()).sum(), 0.0),
            worst("the caller's parameters", before, params, 0.0, 0.0),
        ]
    )


def test_nothing_global_and_nothing_of_the_callers_changes() -> None:
    check(global_state())


def test_baselines_agree_and_each_epoch_is_a_new_order() -> None:
    loss_fn, params, data = classifier()
    runs = [
        sgmcmc.sample(loss_fn, params, data, **SETTINGS, baseline=kind, num_chains=2) for kind in ("lookup", "paired")
    ]
    torch.testing.assert_close(runs[0].baseline, runs[1].baseline, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(runs[0].loss[:, 0], runs[0].baseline[:, 0])  # every chain starts at the anchor
    order = batch_index
    first, second = (torch.cat([order(0, 1, step, 20, 6) for step in steps]) for steps in ((0, 1, 2), (3, 4, 5)))
    assert len(set(first.tolist())) == len(set(second.tolist())) == 18
    assert not torch.equal(first, second)
    assert not torch.equal(order(0, 1, 0, 20, 6), order(0, 2, 0, 20, 6))


def test_draws_are_the_states_before_the_last_step_of_their_block() -> None:
    """With the whole data observed, an observable at draw d is the full-batch loss of step burn-in + 5(d+1) - 1."""
    loss_fn, params, data = classifier()
    run = sgmcmc.sample(loss_fn, params, data, {"all": data}, **{**SETTINGS, "batch_size": None})
    assert run.loss.shape == (4, 53)
    torch.testing.assert_close(run.observables["all"].mean, run.excess()[:, 4::5], rtol=1e-9, atol=1e-12)


class Killed(BaseException):
    """A kill: nothing may catch it."""


@pytest.mark.parametrize(
    ("build", "keep"),
    [(sgmcmc.sgld.build, "tokens"), (sghmc.build, "moments"), (mala.build, "auto")],
    ids=["sgld, tokens", "sghmc, moments", "mala, pairs"],
)
def test_a_killed_run_goes_on_bit_by_bit(
    build: Any, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Co-moments, written under an empty name, could not be found again."""
    loss_fn, params, data = classifier()
    few = {name: x[:4] for name, x in data.items()}
    arguments: Any = {
        **SETTINGS,
        "sampler": build,
        "checkpoint_every": 2,
        "keep": keep,
        "num_chains": 3,
        "lr": 1e-4,
    }
    whole = sgmcmc.sample(loss_fn, params, data, {"few": few}, **arguments)
    assert (whole.pairs is not None) == (keep == "auto")
    killed = 0
    for fatal in (2, 3, 4):  # during the second, then the third write of a resumed run, …
        writes, real = [0], traces.store.write

        def write(*args: Any, _real: Any = real, _writes: list = writes, _fatal: int = fatal, **kwargs: Any) -> None:
            _writes[0] += 1
            if _writes[0] == _fatal:
                raise Killed
            _real(*args, **kwargs)

        monkeypatch.setattr(traces.store, "write", write)
        try:
            sgmcmc.sample(loss_fn, params, data, {"few": few}, **arguments, output_path=tmp_path / "run")
        except Killed:
            killed += 1
        monkeypatch.setattr(traces.store, "write", real)
    assert killed == 3
    resumed = sgmcmc.sample(loss_fn, params, data, {"few": few}, **arguments, output_path=tmp_path / "run")
    same(whole, resumed)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "run.h5", "run.json"]
    monkeypatch.setattr(loop, "advance", None)  # a complete run is read, not run
    same(whole, sgmcmc.sample(loss_fn, params, data, {"few": few}, **arguments, output_path=tmp_path / "run"))
    loaded = sgmcmc.load(tmp_path / "run")
    assert isinstance(loaded, sgmcmc.Run)
    same(whole, loaded)
    whole.save(tmp_path / "one.h5")
    same(whole, sgmcmc.load(tmp_path / "one.h5"))


def test_a_killed_run_goes_on_in_other_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states had the chunks' shapes, and the message was torch's."""
    loss_fn, params, data = classifier()
    arguments: Any = {**SETTINGS, "sampler": sghmc.build, "checkpoint_every": 2, "num_chains": 3, "lr": 1e-4}
    go = functools.partial(sgmcmc.sample, loss_fn, params, data, **arguments, output_path=tmp_path / "run")
    for chunk in (2, 1):  # each starts from what the other chunks left
        with monkeypatch.context() as patch:
            patch.setattr(loop, "advance", _once(loop.advance))
            with pytest.raises(Killed):
                go(chain_chunk=chunk)
    resumed = go(chain_chunk=3)
    whole = sgmcmc.sample(loss_fn, params, data, **arguments)
    torch.testing.assert_close(resumed.loss, whole.loss, rtol=1e-10, atol=1e-10)


def _once(advance: Any) -> Any:
    """Return `advance`, killed when it is called again."""
    calls: list[int] = []

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise Killed
        return advance(*args)

    return killed


def test_a_stale_folder_is_refused(tmp_path: Path) -> None:
    """The peer's cache key has neither weights, data, masks nor loss in it."""
    loss_fn, params, data = classifier()
    arguments: Any = {**SETTINGS, "output_path": tmp_path / "run", "num_draws": 2}
    sgmcmc.sample(loss_fn, params, data, {"all": data}, **arguments)
    other = {name: p + 1e-9 for name, p in params.items()}
    changed = {**data, "labels": data["labels"].roll(1)}
    for call, field in (
        (lambda: sgmcmc.sample(loss_fn, other, data, {"all": data}, **arguments), "weights"),
        (lambda: sgmcmc.sample(loss_fn, params, changed, {"all": data}, **arguments), "data"),
        (lambda: sgmcmc.sample(loss_fn, params, data, {"all": changed}, **arguments), "observables"),
        (lambda: sgmcmc.sample(loss_fn, params, data, {"all": data}, **arguments, restriction="0.*"), "restriction"),
        (lambda: sgmcmc.sample(loss_fn, params, data, {"all": data}, **{**arguments, "lr": 2e-3}), "lr"),
        (lambda: sgmcmc.sample(loss_fn, params, data, {"all": data}, **arguments, seed=1), "seed"),
        (
            lambda: sgmcmc.sample(lambda w, b: 2 * loss_fn(w, b), params, data, {"all": data}, **arguments),
            "weights|loss_fn",
        ),
    ):
        with pytest.raises(ValueError, match=rf"holds a run of another ({field}).*Delete the folder"):
            call()


def bowl_until(limit: float) -> Callable[..., Tensor]:
    """A loss that is no number outside a ball."""

    def loss(w: dict[str, Tensor], batch: Tensor) -> Tensor:
        inside = w["w"].square().sum() < limit
        return torch.where(inside, (w["w"].square().sum() * (1 + 0 * batch)), float("nan"))

    return loss


def test_a_diverging_chain_raises_is_dropped_or_ends_the_run() -> None:
    data = torch.arange(4.0)
    arguments: Any = {
        "lr": 1e-2, "n_beta": 1e-6, "batch_size": 2, "num_draws": 40, "num_chains": 4, "progress": False,
    }  # fmt: skip
    start, loss = {"w": torch.zeros(2)}, bowl_until(0.6)
    with pytest.raises(sgmcmc.DivergedError, match=r"chain \d diverged: at step \d+ its loss is nan, after .*Lower lr"):
        sgmcmc.sample(loss, start, data, {"all": data}, **arguments)
    dropped = sgmcmc.sample(loss, start, data, {"all": data}, **arguments, on_divergence="drop")
    assert 0 < len(dropped.chains) < 4
    assert len(dropped.facts["dropped"]) == 4 - len(dropped.chains)
    assert bool(dropped.loss.isfinite().all())
    assert bool(dropped.observables["all"].mean.isfinite().all())
    assert dropped.observables["all"].moments.draws.tolist() == [40.0] * len(dropped.chains)
    assert "diverged and were dropped" in llc.estimate(dropped).verdict
    prefix = sgmcmc.sample(loss, start, data, {"all": data}, **arguments, on_divergence="prefix")
    steps = prefix.facts["stopped"]
    assert prefix.loss.shape == (4, steps)
    assert prefix.observables["all"].mean.shape == (4, steps)
    assert prefix.observables["all"].moments.draws.tolist() == [float(steps)] * 4
    assert bool(prefix.loss.isfinite().all())
    torch.testing.assert_close(prefix.loss[list(dropped.chains)], dropped.loss[:, :steps])
    with pytest.raises(sgmcmc.DivergedError, match="within the burn-in"):
        sgmcmc.sample(loss, start, data, **arguments, on_divergence="prefix", num_burnin_steps=100)


def test_a_batch_without_labels_is_no_divergence() -> None:
    """Its loss is 0 / 0; the advice was to lower the step size."""
    loss_fn, params = functionalize(nn.Sequential(nn.Linear(2, 3)))
    data = {"input": torch.ones(6, 2), "labels": torch.tensor([0, 1, -100, -100, 2, 0])}
    loss = lambda w, b: (loss_fn(w, b), b["labels"] >= 0)  # noqa: E731
    for baseline in ("lookup", "paired"):
        with pytest.raises(ValueError, match=r"\(rows [23]\) has the loss nan at the anchor itself") as caught:
            sgmcmc.sample(
                loss, params, data, lr=1e-3, n_beta=1.0, batch_size=1, num_draws=6, progress=False, baseline=baseline
            )
        assert not isinstance(caught.value, sgmcmc.DivergedError)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 21}, ["dataset has 20 examples", "one batch of 21", "batch_size=None"]),
        ({"num_draws": 0}, ["num_draws must be at least 1"]),
        ({"keep": "all"}, ["keep must be one of", "'all'"]),
        ({"observable_batch": -1}, ["observable_batch must be at least 1", "-1"]),
        ({"on_divergence": "skip"}, ["raise, drop, prefix"]),
        ({"baseline": "none"}, ["auto, lookup, paired"]),
        ({"restriction": "2.weigth"}, ["'2.weigth'", "2.weight"]),
        ({"restriction": "l7"}, ["l7"]),
        ({"restriction": {"2.bias": torch.zeros(3, dtype=torch.bool)}}, ["'2.bias'", "no parameter would move"]),
        ({"lr": 0.0}, ["lr must be a finite number above 0"]),
        ({"observables": {"a b": torch.ones(3)}}, ["letters, digits and underscores", "'a b'"]),
        ({"observables": {"few": (torch.ones(3), 2)}}, ["observable 'few' has 3 examples", "2 batches of 6"]),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_before_it_runs(changed: dict[str, Any], words: list[str]) -> None:
    loss_fn, params, data = classifier()
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        sgmcmc.sample(loss_fn, params, data, **{**SETTINGS, **changed})
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_grid_without_its_groups_is_refused() -> None:
    """The first point was run, and the others forgotten."""
    loss_fn, params, data = classifier()
    target = sgmcmc.local_posterior(loss_fn, params, 1.0, torch.ones(2))
    with pytest.raises(ValueError, match="localization has 2 entries, for 1 groups"):
        schedule.make_plan(target, params, data, {}, 1e-4, {"": {}}, 0, sgmcmc.Options(batch_size=5))


def test_a_loss_that_vmap_refuses_runs_one_by_one_and_says_so() -> None:
    def loss(w: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (w["w"] * batch).square() if float(batch.sum()) > -1 and float(w["w"].detach().sum()) > -9 else batch

    data, start = torch.ones(4), {"w": torch.zeros(())}
    target = sgmcmc.local_posterior(loss, start, 1.0)
    options = sgmcmc.Options(num_draws=3, batch_size=2, num_chains=2, progress=False)
    plan = schedule.make_plan(target, start, data, {}, 1e-3, {"": {}}, 0, options)
    assert "one by one, since vmap refuses this loss" in str(plan)
    assert [len(chunk.replicas) for chunk in plan.chunks] == [1, 1]
    with pytest.raises(ValueError, match="cannot be run for several chains at once"):
        sgmcmc.sample(loss, start, data, lr=1e-3, n_beta=1.0, batch_size=2, chain_chunk=2, progress=False)


def test_the_plan_says_what_will_be_kept_and_small_moments_replace_long_traces() -> None:
    data, start = torch.linspace(-1, 1, 4), {"w": torch.zeros(2, dtype=F64)}
    loss = lambda w, x: (w["w"][0] + w["w"][1] * x).square()  # noqa: E731
    arguments: Any = {
        "lr": 1e-2,
        "n_beta": 5.0,
        "batch_size": None,
        "num_draws": 60,
        "num_chains": 2,
        "progress": False,
    }
    small = sgmcmc.sample(loss, start, data, {"all": data}, **arguments)
    traced = sgmcmc.sample(loss, start, data, {"all": data}, **arguments, keep="sequences")
    assert small.pairs is not None
    assert small.observables["all"].sequences is None
    for statistic in ("correlation", "covariance"):
        for pooling in ("within", "stacked"):
            a, b = (
                sgmcmc.bif.estimate(run, statistic=statistic, pooling=pooling).influences.double()
                for run in (small, traced)
            )
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    plan = schedule.make_plan(
        sgmcmc.local_posterior(loss, start, 5.0), start, data, {"all": data}, 1e-2, {"": {}}, 0,
        sgmcmc.Options(num_draws=60, batch_size=None),
    )  # fmt: skip
    assert "kept: pairs" in str(plan)
    assert "60 draws of 1" in str(plan)


def test_a_language_model_under_several_chains() -> None:
    """Padded batches, token losses, rows of labelled positions; vmapped and alone."""
    model = hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1})().double().eval()
    loss_fn, params = functionalize(model)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (8, 6), generator=source)
    mask = (torch.arange(6) < torch.tensor([6, 5, 4, 3, 6, 6, 6, 2])[:, None]).long()
    data = {"input_ids": ids, "attention_mask": mask}
    arguments: Any = {**SETTINGS, "batch_size": 4, "num_draws": 3, "num_chains": 2}
    runs = [sgmcmc.sample(loss_fn, params, data, {"text": data}, **arguments, chain_chunk=chunk) for chunk in (2, 1)]
    same(runs[0], runs[1], 1e-9)
    text = runs[0].observables["text"]
    assert text.labelled.sum().item() == int(mask.sum()) - 8
    assert torch.equal(text.ids, ids)
    losses, labelled = loss_fn.positions(params, data)
    assert runs[0].observables["text"].anchor_mean == pytest.approx(float(losses.sum() / labelled.sum()))
    run = sgmcmc.sample(loss_fn, params, data, lr=1e-6, n_beta=1.0, batch_size=None, num_draws=1, progress=False)
    assert float(run.loss[0, 0]) == pytest.approx(float(losses.sum() / labelled.sum()))


def test_the_padding_row_of_an_embedding_stays_where_it_is_in_every_chain() -> None:
    """Torch's rule for vmap keeps `padding_idx` for the first chain's table only: the others' row would move."""
    table = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Flatten(), nn.Linear(12, 2)).double()
    loss_fn, params = functionalize(table)
    data = {"input": torch.tensor([[0, 1, 2], [1, 3, 4]]), "labels": torch.tensor([0, 1])}
    target = sgmcmc.local_posterior(loss_fn, params, 1.0)
    stacked = {name: torch.stack([p, p + 0.1]) for name, p in params.items()}
    shared = gradient(target, stacked, data)
    own = gradient(target, stacked, PerChain({k: torch.stack([x, x]) for k, x in data.items()}))
    for c in (0, 1):
        _, alone = gradient(target, {name: p[c] for name, p in stacked.items()}, data)
        assert float(alone["0.weight"][1].abs().max()) == 0
        for _, grads in (shared, own):
            torch.testing.assert_close({name: g[c] for name, g in grads.items()}, alone, rtol=1e-12, atol=1e-14)


def test_files_name_their_dimensions_and_xarray_reads_them(tmp_path: Path) -> None:
    loss_fn, params, data = classifier()
    run = sgmcmc.sample(loss_fn, params, data, {"all": data}, **SETTINGS)
    run.save(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5") as file:
        losses = file["shifted_loss_all"]
        assert [losses.dims[axis].keys()[0] for axis in range(4)] == ["chain", "draw", "batch_all", "token_pos_all"]
    xarray = pytest.importorskip("xarray")
    found = run.to_xarray()
    assert found["loss_all"].dims == ("chain", "draw", "batch_all", "token_pos_all")
    assert found["sampling_loss"].dims == ("chain", "step")
    pytest.importorskip("h5netcdf")
    with xarray.open_dataset(tmp_path / "run.h5", engine="h5netcdf") as read:
        assert read["sampling_loss"].dims == ("chain", "step")
        assert read["shifted_loss_all"].shape == (4, 10, 20, 1)


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A dataset that is read by number."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.data.items()}


def test_a_torch_dataset_is_sampled_as_the_tensors_that_it_holds() -> None:
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=gen), torch.randint(0, 2, (9,), generator=gen)
    loss_fn, params = functionalize(nn.Linear(3, 2))
    how: dict[str, Any] = {
        "lr": 1e-3,
        "n_beta": 2.0,
        "num_draws": 3,
        "num_chains": 2,
        "batch_size": 4,
        "progress": False,
    }
    plain = sgmcmc.sample(loss_fn, params, (x, y), **how)
    assert torch.equal(sgmcmc.sample(loss_fn, params, torch.utils.data.TensorDataset(x, y), **how).loss, plain.loss)
    named = {"input": x, "labels": y}
    read = sgmcmc.sample(loss_fn, params, Examples(named), {"all": Examples(named)}, **how)
    want = sgmcmc.sample(loss_fn, params, named, {"all": named}, **how)
    assert torch.equal(read.loss, want.loss)
    assert torch.equal(read.observables["all"].mean, want.observables["all"].mean)
    with pytest.raises(TypeError, match="cannot be read by number: pass a Dataset with __len__ and __getitem__"):
        sgmcmc.sample(loss_fn, params, torch.utils.data.ChainDataset([]), **how)
