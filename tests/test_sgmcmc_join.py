"""Chains dealt out to several runs come together as one; what may not come together is refused."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import sgmcmc
from influence.sgmcmc import llc, mala
from influence.sgmcmc.runner import joining
from tests.test_sgmcmc_runs import SETTINGS, bowl_until, classifier, same


@pytest.mark.parametrize("shared", [False, True])
def test_chains_of_several_runs_are_one_run(shared: bool, tmp_path: Path) -> None:
    """53 steps in float64; one part has its chains in another order, and one of a single chain."""
    loss_fn, params, data = classifier()
    settings = {**SETTINGS, "num_chains": 5, "shared_batches": shared, "sampler": mala.build}
    observed = {"train": data, "some": (data, 2)}
    whole = sgmcmc.sample(loss_fn, params, data, observed, **settings)
    shares = ([4, 0], [3], [1, 2])
    parts = [sgmcmc.sample(loss_fn, params, data, observed, **settings, chains=some) for some in shares]
    together = sgmcmc.join(parts)
    same(whole, together, 1e-10)
    assert together.chains == whole.chains == (0, 1, 2, 3, 4)
    assert together.facts == whole.facts
    with pytest.raises(ValueError, match="chain 3 is in two of the runs"):
        sgmcmc.join([parts[1], parts[1]])
    other = sgmcmc.sample(loss_fn, params, data, observed, **{**settings, "lr": 2e-3}, chains=[3])
    with pytest.raises(ValueError, match=r"differ in lr: 0\.001 and 0\.002"):
        sgmcmc.join([parts[0], other])


def test_folders_join_to_what_one_process_leaves(tmp_path: Path) -> None:
    loss_fn, params, data = classifier()
    arguments: Any = {**SETTINGS, "num_chains": 3, "restrictions": ["full", "0.*"]}
    alone = sgmcmc.sample_restrictions(loss_fn, params, data, {"all": data}, **arguments, output_path=tmp_path / "one")
    for name, some in (("a", [0, 1]), ("b", [2])):
        sgmcmc.sample_restrictions(
            loss_fn, params, data, {"all": data}, **arguments, chains=some, output_path=tmp_path / name
        )
    joining.join_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "two")
    found = sgmcmc.load(tmp_path / "two")
    for name, run in alone.items():
        same(run, found[name], 1e-10)
    again = sgmcmc.sample_restrictions(loss_fn, params, data, {"all": data}, **arguments, output_path=tmp_path / "two")
    same(again["0.*"], found["0.*"])  # the whole's settings are those of one process: it is read, not run


def test_a_chain_that_diverged_in_one_part_is_missing_in_the_whole(tmp_path: Path) -> None:
    data, loss = torch.arange(4.0), bowl_until(0.6)
    arguments: Any = {"lr": 1e-2, "n_beta": 1e-6, "batch_size": 2, "num_draws": 40, "num_chains": 4, "progress": False}
    start = {"w": torch.zeros(2)}
    whole = sgmcmc.sample(loss, start, data, {"all": data}, **arguments, on_divergence="drop")
    left = sorted({0, 1, 2, 3} - {*whole.chains})
    shares: dict[str, Any] = {"lost": left[:1], "rest": [*whole.chains, *left[1:]]}  # in one, every chain diverges
    for name, some in shares.items():
        call = functools.partial(
            sgmcmc.sample, loss, start, data, {"all": data}, **arguments, on_divergence="drop", chains=some,
            output_path=tmp_path / name,
        )  # fmt: skip
        if name == "rest":
            call()
            continue
        with pytest.raises(sgmcmc.DivergedError, match=r"every chain of \[''\] diverged"):
            call()
    joining.join_folders([tmp_path / name for name in shares], tmp_path / "whole")
    together = sgmcmc.load(tmp_path / "whole")
    assert isinstance(together, sgmcmc.Run)
    assert (together.chains, together.facts["dropped"]) == (whole.chains, whole.facts["dropped"])
    same(together, whole)
    with pytest.raises(ValueError, match="cannot be stopped: pass on_divergence='drop'"):
        sgmcmc.sample(loss, start, data, **arguments, on_divergence="prefix", chains=[1])
    for some in ([4], [1, 1], []):
        with pytest.raises(ValueError, match="chains must be some of the 4 chains"):
            sgmcmc.sample(loss, start, data, **arguments, chains=some)


def test_a_grid_with_a_point_where_every_chain_diverges_says_so(tmp_path: Path) -> None:
    """It raised: a grid that finds no limit of the step size is of no use."""
    loss = lambda w, _: w["w"].square().sum() / 2  # noqa: E731
    arguments: Any = {"n_beta": 100.0, "num_draws": 300, "num_burnin_steps": 1000, "progress": False}
    for output_path in (None, tmp_path / "grid", tmp_path / "grid"):
        grid = llc.calibrate(
            loss, {"w": torch.zeros(2, dtype=torch.float64)}, None, lrs=[1e-3, 1.0], localizations=[0.0], **arguments,
            output_path=output_path,
        )  # fmt: skip
        assert grid.estimates[1.0, 0.0] is None
        assert grid.estimates[1e-3, 0.0].mean == pytest.approx(1 / (1 - 0.1 / 4), abs=0.3)
        assert str(grid).splitlines()[2].endswith("diverged")


def test_a_stale_folder_names_the_leaf(tmp_path: Path) -> None:
    loss = lambda w, _: w["w"].square().sum() / 2  # noqa: E731
    arguments: Any = {"n_beta": 1.0, "num_draws": 3, "progress": False, "output_path": tmp_path / "run"}
    sgmcmc.sample(loss, {"w": torch.zeros(2)}, None, lr=1e-3, **arguments)
    with pytest.raises(ValueError, match=r"another lr: it has 0\.001, this one 0\.002"):
        sgmcmc.sample(loss, {"w": torch.zeros(2)}, None, lr=2e-3, **arguments)


def test_susceptibilities_of_chains_that_do_not_pair_have_no_error() -> None:
    """The jackknife deletes the same chain in both runs; by place it deleted chain 2 here and chain 3 there."""
    loss_fn, params, data = classifier()
    arguments: Any = {**SETTINGS, "num_chains": 4, "restrictions": ["full", "0.*"]}
    runs = sgmcmc.sample_restrictions(loss_fn, params, data, {"all": data}, **arguments)
    found = sgmcmc.susceptibility.estimate(runs, "all")["all"]
    assert bool(found.stderr.isfinite().all())
    lame = {"full": runs["full"].keep([0, 1, 2]), "0.*": runs["0.*"].keep([0, 1, 3])}
    found = sgmcmc.susceptibility.estimate(lame, "all")["all"]
    assert bool(found.stderr[..., 1].isnan().all())
    assert bool(found.stderr[..., 0].isfinite().all())
