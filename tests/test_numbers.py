"""Numbers that mean nothing (NaN, infinite, negative, zero) are refused by name, by every function that takes one."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from influence import (
    Factored,
    FaissConfig,
    Moments,
    as_blocks,
    chain,
    data,
    down_project,
    eigen_whiten,
    functionalize,
    hessians,
    index,
    kept_energy,
    kfac_whiten,
    one_sided,
    per_example_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    sgmcmc,
    similarity,
    train,
    two_sided,
    unit_norm,
    viz,
)
from influence.cli import COMMANDS, CONFIGS, main
from influence.func.retrieval import recall
from influence.hessians import cg, lissa
from influence.pipelines.chains.settings import ChainConfig

W = {"weight": torch.tensor([[1.0, -2.0, 0.5], [3.0, 2.0, 1.0]])}
X = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
BATCH = {"input": X, "labels": torch.tensor([0, 1, 1, 0])}


def ell(params: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    return (batch["input"] @ params["weight"].mT).square().sum(1)


@functools.cache
def net() -> Any:
    return functionalize(nn.Linear(3, 2, bias=False))


@functools.cache
def factors() -> Any:
    return hessians.kfac.fit(*net(), [BATCH], progress=False, labels="exact")


@functools.cache
def dense() -> Any:
    return hessians.autocorrelation.fit(*net(), [BATCH], transform=as_blocks(), progress=False)


@functools.cache
def run() -> Any:
    return sgmcmc.sample(
        *net(), BATCH, {"q": BATCH}, lr=1e-3, n_beta=2.0, num_draws=8, num_chains=2, batch_size=2, progress=False
    )


@functools.cache
def tokenized() -> Any:
    return data.tokenize(data.load([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]))


def identity(vectors: Any) -> Any:
    return vectors


@functools.cache
def rows() -> Any:
    return per_example_grads(*net(), BATCH, transform=chain(as_blocks(), project(2)))


def target(**settings: Any) -> Any:
    return sgmcmc.local_posterior(*net(), **{"n_beta": 1.0, **settings})


def sampled(**settings: Any) -> Any:
    return sgmcmc.sample(*net(), BATCH, {"q": BATCH}, **{"lr": 1e-3, "n_beta": 2.0, "batch_size": 2, **settings})


NAN, INF = math.nan, math.inf
ANY = (NAN, INF, -INF)
POSITIVE = (*ANY, -1.0, 0.0)
AT_LEAST_0 = (*ANY, -1.0)
SHARE = (*ANY, -0.5, 1.5)

TABLE: list[tuple[str, Callable[[Any], Any], tuple[Any, ...]]] = [
    ("label_smoothing", lambda x: functionalize(nn.Linear(3, 2), label_smoothing=x), SHARE),
    ("damping", lambda x: precondition(factors(), damping=x), AT_LEAST_0),
    ("damping", lambda x: eigen_whiten(factors(), damping=x), AT_LEAST_0),
    ("damping", lambda x: kfac_whiten(factors(), damping=x), AT_LEAST_0),
    ("damping", lambda x: kept_energy(factors(), 2, damping=x), AT_LEAST_0),
    ("damping", lambda x: one_sided(factors(), damping=x), AT_LEAST_0),
    ("damping", lambda x: two_sided(factors(), damping=x), AT_LEAST_0),
    ("power", lambda x: precondition(factors(), power=x), (*ANY, -2.0, 0.5)),
    ("power", lambda x: eigen_whiten(factors(), power=x), (*ANY, -2.0, 0.5)),
    ("dim", lambda x: eigen_whiten(factors(), dim=x), (0, -1)),
    ("dim", lambda x: kfac_whiten(factors(), dim=x), (0, -1)),
    ("dim", lambda x: kept_energy(factors(), dim=x), (0, -1)),
    ("dim", lambda x: project(x), (0, -1)),
    ("signs", lambda x: project(4, kind="sparse", signs=x), (0, -1)),
    ("dim", lambda x: down_project(rows(), x), (0, -1)),
    ("eps", lambda x: scale_by_adam(moments(), eps=x), AT_LEAST_0),
    ("eps", lambda x: scale_by_adafactor(moments(), eps=x), AT_LEAST_0),
    ("eps", lambda x: unit_norm(eps=x), AT_LEAST_0),
    ("eps", lambda x: similarity.cosine(rows(), rows(), eps=x), AT_LEAST_0),
    ("k", lambda x: similarity.nearest(rows(), rows(), k=x), (0, -1)),
    ("chunk_size", lambda x: per_example_grads(*net(), BATCH, chunk_size=x), (0, -1)),
    ("k", lambda x: recall(torch.tensor([1]), [x]), (0, -1)),
    ("damping", lambda x: cg.solve(identity, W, x), AT_LEAST_0),
    ("tolerance", lambda x: cg.solve(identity, W, 0.1, tolerance=x), AT_LEAST_0),
    ("max_iterations", lambda x: cg.solve(identity, W, 0.1, max_iterations=x), (0, -1)),
    ("damping", lambda x: lissa.solve(identity, W, x, scale=10.0, depth=2), AT_LEAST_0),
    ("scale", lambda x: lissa.solve(identity, W, 0.1, scale=x, depth=2), POSITIVE),
    ("depth", lambda x: lissa.solve(identity, W, 0.1, scale=10.0, depth=x), (0, -1)),
    ("damping", lambda x: factors().solve({"weight": W["weight"][None]}, net()[0].layout, damping=x), AT_LEAST_0),
    ("weight", lambda x: hessians.mix(dense(), dense(), x), SHARE),
    ("regularization", lambda x: hessians.select_damping(factors(), *net(), [BATCH], regularization=x), AT_LEAST_0),
    ("candidates", lambda x: hessians.select_damping(factors(), *net(), [BATCH], candidates=[0.1, x]), AT_LEAST_0),
    ("draws", lambda x: hessians.kfac.fit(*net(), [BATCH], draws=x, labels="sampled"), (0, -1)),
    ("max_side", lambda x: hessians.kfac.fit(*net(), [BATCH], max_side=x, labels="data"), (-1,)),
    ("max_side", lambda x: hessians.shampoo.fit(*net(), [BATCH], max_side=x, labels="data"), (-1,)),
    ("iterations", lambda x: hessians.products.largest_eigenvalue(identity, W, iterations=x), (0, -1)),
    ("step", lambda x: train.FiniteDiff(W, x).moved(W), (NAN, INF, 0.0)),
    ("rate", lambda x: train.tracin([train.Checkpoint(rows(), rows(), x)]), AT_LEAST_0),
    ("rate", lambda x: train.less([train.Checkpoint(rows(), rows(), x)]), AT_LEAST_0),
    ("max_length", lambda x: data.tokenize(data.load([{"input_ids": [1]}]), max_length=x), (0, -1)),
    ("chunk_length", lambda x: data.tokenize(data.load([{"input_ids": [1]}]), chunk_length=x), (0, -1)),
    ("max_tokens", lambda x: data.tokenize(data.load([{"input_ids": [1]}]), max_tokens=x), (0, -1)),
    ("length", lambda x: data.chunk(tokenized(), x), (0, -1)),
    ("a shard holds at least 1", lambda x: data.shards(tokenized(), x), (0, -1)),
    ("token_budget", lambda x: list(data.batches(tokenized(), x)), (0, -1)),
    ("max_rows", lambda x: list(data.batches(tokenized(), 8, max_rows=x)), (0, -1)),
    ("token_budget", lambda x: data.pack(torch.tensor([1]), x), (0, -1)),
    ("shard_size", lambda x: index.build(*net(), [BATCH], shard_size=x), (0, -1)),
    ("nprobe", lambda x: FaissConfig(nprobe=x), (0, -1)),
    ("batch_size", lambda x: FaissConfig(batch_size=x), (0, -1)),
    ("num_shards", lambda x: FaissConfig(num_shards=x), (0, -1)),
    ("max_train_examples", lambda x: FaissConfig(max_train_examples=x), (0, -1)),
    ("n_beta", lambda x: target(n_beta=x), AT_LEAST_0),
    ("localization", lambda x: target(localization=x), AT_LEAST_0),
    ("weight_decay", lambda x: target(weight_decay=x), AT_LEAST_0),
    ("init_noise", lambda x: target(init_noise=x), AT_LEAST_0),
    ("accumulate", lambda x: target(accumulate=x), (0, -1)),
    *(
        ("lr", functools.partial(lambda build, x: build(target(), lr=x), sampler), POSITIVE)
        for sampler in sgmcmc.SAMPLERS.values()
    ),
    ("bounding_box", lambda x: sgmcmc.sgld.build(target(), lr=0.1, bounding_box=x), POSITIVE),
    ("alpha", lambda x: sgmcmc.rmsprop_sgld.build(target(), lr=0.1, alpha=x), SHARE),
    ("eps", lambda x: sgmcmc.rmsprop_sgld.build(target(), lr=0.1, eps=x), POSITIVE),
    ("init", lambda x: sgmcmc.rmsprop_sgld.build(target(), lr=0.1, init=x), AT_LEAST_0),
    ("beta1", lambda x: sgmcmc.adam_sgld.build(target(), lr=0.1, beta1=x), SHARE),
    ("beta2", lambda x: sgmcmc.adam_sgld.build(target(), lr=0.1, beta2=x), SHARE),
    ("eps", lambda x: sgmcmc.adam_sgld.build(target(), lr=0.1, eps=x), POSITIVE),
    ("diffusion", lambda x: sgmcmc.sgnht.build(target(), lr=0.1, diffusion=x), POSITIVE),
    ("friction", lambda x: sgmcmc.sghmc.build(target(), lr=0.1, friction=x), SHARE),
    *(
        (name, functools.partial(lambda name, x: sampled(**{name: x}), name), bad)
        for name, bad in {
            "lr": POSITIVE,
            "n_beta": AT_LEAST_0,
            "localization": AT_LEAST_0,
            "weight_decay": AT_LEAST_0,
            "init_noise": AT_LEAST_0,
            "accumulate": (0, -1),
            "batch_size": (0, -1),
            "num_chains": (0, -1),
            "num_draws": (0, -1),
            "num_burnin_steps": (-1,),
            "num_steps_bw_draws": (0, -1),
            "chain_chunk": (0, -1),
            "observable_batch": (0, -1),
            "checkpoint_every": (0, -1),
        }.items()
    ),
    ("n / log n", lambda x: sgmcmc.default_n_beta(x), (1, 0, -5)),
    ("init_loss", lambda x: sgmcmc.llc.estimate(run(), "draws", init_loss=x), ANY),
    ("scale", lambda x: sgmcmc.bif.estimate(run(), scale=x), ANY),
    ("scale", lambda x: sgmcmc.susceptibility.estimate({"full": run(), "a": run()}, "q", scale=x), ANY),
    ("init_loss", lambda x: sgmcmc.susceptibility.estimate({"full": run(), "a": run()}, "q", init_loss=x), ANY),
    ("lrs", lambda x: sgmcmc.llc.grid([x], [1.0]), POSITIVE),
    ("localizations", lambda x: sgmcmc.llc.grid([0.1], [x]), AT_LEAST_0),
    ("limit", lambda x: viz.heat_map(torch.eye(2), limit=x), POSITIVE),
    ("k", lambda x: viz.score_distributions(torch.arange(5.0), k=x), (0, -1)),
    ("k", lambda x: sgmcmc.bif.top_k(draws(), draws(), x), (0, -1)),
    ("n", lambda x: sgmcmc.llc.wbic(run(), x), (1, 0, -1)),
]


def draws() -> Any:
    return sgmcmc.bif.draws(run(), "q")


def moments(value: float = 1.0) -> Moments:
    return Moments({"weight": torch.full((2, 3), value)})


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda row: f"{TABLE[row][0]}-{row}")
def test_a_number_that_means_nothing_is_refused_by_name(row: int) -> None:
    name, call, bad = TABLE[row]
    for value in bad:
        with pytest.raises(ValueError, match=name) as refused:
            call(value)
        assert f"{value}" in str(refused.value)


MEANT = {
    **dict.fromkeys([("TransformConfig", "power"), ("QueryConfig", "power")], (-1, 0)),
    **dict.fromkeys([("BifConfig", "scale"), ("SusceptibilitiesConfig", "scale")], (-1, 0)),
    **dict.fromkeys([("TracinConfig", "learning_rates"), ("LessConfig", "learning_rates")], (0,)),
    **dict.fromkeys([("LossConfig", "label_smoothing"), ("MeanLossConfig", "label_smoothing")], (0,)),
    **dict.fromkeys([("TransformConfig", "damping"), ("QueryConfig", "damping"), ("MixConfig", "weight")], (0,)),
    **dict.fromkeys([("TransformConfig", "projection_dim"), ("LlcConfig", "localizations")], (0,)),
}
"""Which of -1 and 0 mean something, where one does."""

LATER = ("ChainConfig", "Options", "ExploreConfig", "RecallConfig.k", "BifConfig.query", "BifConfig.pair")
"""What is finite here, and whose range the run refuses: `test_the_run_refuses_by_the_flag` and the tests of each."""


def made(kind: Any) -> Any:
    """Return a configuration with its defaults, and something where it has none."""
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            hint = hints[field.name]
            plain = ("x",) if get_origin(hint) is tuple else "x"
            given[field.name] = made(hint) if dataclasses.is_dataclass(hint) else plain
    return kind(**given)


def numeric() -> Iterator[tuple[Any, str, Any]]:
    """Yield every numeric field of every command's configuration, and how it is spelt."""
    waiting, seen = [getattr(import_module(f"influence.pipelines.{c}"), CONFIGS[c]) for c in COMMANDS], set()
    while waiting:
        kind = waiting.pop()
        seen.add(kind)
        for field in dataclasses.fields(kind):
            hint = get_type_hints(kind)[field.name]
            if dataclasses.is_dataclass(hint):
                waiting += [hint] * (hint not in seen)
            elif {int, float} & {hint, *get_args(hint)} and not field.name.endswith("seed"):
                seen.add(hint)
                yield kind, field.name, hint


FIELDS = sorted({(kind.__name__, name): (kind, name, hint) for kind, name, hint in numeric()}.values(), key=str)


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name, _ in FIELDS])
def test_every_number_of_the_command_line_is_refused_where_it_means_nothing(kind: Any, name: str, hint: Any) -> None:
    config, change = made(kind), dataclasses.replace
    if kind is sgmcmc.Options:  # a value of the library, which the command's own configuration holds

        def change(options: Any, **new: Any) -> Any:
            return ChainConfig(options=dataclasses.replace(options, **new))

    meant = MEANT.get((kind.__name__, name), ())
    many = get_origin(hint) is tuple
    real = float in {hint, *get_args(hint)}
    later = kind.__name__ in LATER or f"{kind.__name__}.{name}" in LATER
    for value in (*((NAN, INF, -INF) if real else ()), *(() if later else (-1, 0))):
        given: Any = float(value) if real else value
        if value in meant:
            change(config, **{name: (given,) * 2 if many else given})
            continue
        own = kind is FaissConfig  # a value of the library, whose options are no flags
        with pytest.raises(ValueError, match=f"{name if own else '--' + name.replace('_', '-')} must be") as refused:
            change(config, **{name: (given,) * 2 if many else given})
        assert str(refused.value).endswith(f"; got {given}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((name, "-1") for name in ("lr", "n-beta", "localization", "weight-decay", "init-noise", "accumulate")),
        *((name, "-1") for name in ("batch-size", "num-chains", "num-draws", "num-burnin-steps", "num-steps-bw-draws")),
        *((name, "-1") for name in ("chain-chunk", "observable-batch", "checkpoint-every")),
        *((name, "0") for name in ("lr", "accumulate", "num-chains", "num-draws", "num-steps-bw-draws")),
        *((name, "0") for name in ("chain-chunk", "observable-batch", "checkpoint-every")),
    ],
)
def test_the_run_refuses_by_the_flag_before_it_loads(flag: str, value: str, tmp_path: Path, capsys: Any) -> None:
    flags = ["sample", str(tmp_path / "run"), "--model", "nowhere/nothing", "--dataset", "none.jsonl"]
    assert main([*flags, f"--{flag}", value]) == 1
    said = capsys.readouterr().err
    assert flag in said
    assert "must be" in said
    assert value in said


def test_the_command_line_says_it_by_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for smoothing in ("-0.5", "nan", "inf"):
        flags = ["build", "r", "--model", "m", "--dataset", "d", "--label-smoothing", smoothing]
        assert main(flags) == 2
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "--label-smoothing must be" in said
        assert f"from 0 to 1; got {smoothing}" in said


def adam(spoil: Callable[[dict[str, Any]], None] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if spoil is not None:
        spoil(state)
    return model, state


def entry(state: dict[str, Any]) -> dict[str, Any]:
    return state["state"][0]


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "second NaN": (lambda s: entry(s)["exp_avg_sq"][0].fill_(NAN), "second moment of 'weight' has 3 of 6"),
    "second infinite": (lambda s: entry(s)["exp_avg_sq"][0, :1].fill_(INF), "second moment of 'weight' has 1 of 6"),
    "second negative": (lambda s: entry(s)["exp_avg_sq"][0, :1].fill_(-1), "second moment of 'weight' has 1 of 6"),
    "first NaN": (lambda s: entry(s)["exp_avg"][0, :1].fill_(NAN), "first moment of 'weight'"),
    "first infinite": (lambda s: entry(s)["exp_avg"][0, :1].fill_(INF), "first moment of 'weight'"),
    "updates NaN": (lambda s: entry(s).update(step=torch.tensor(NAN)), "number of updates of 'weight'.*got nan"),
    "updates negative": (lambda s: entry(s).update(step=-1), "number of updates of 'weight'.*got -1"),
    "eps NaN": (lambda s: s["param_groups"][0].update(eps=NAN), "eps of the group of 'weight'.*got nan"),
    "lr infinite": (lambda s: s["param_groups"][0].update(lr=INF), "lr of the group of 'weight'.*got inf"),
    "betas of one": (lambda s: s["param_groups"][0].update(betas=(0.9,)), "betas of the group of 'weight'"),
    "beta of 1": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), "betas of the group of 'weight'"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_moments_that_no_training_leaves_behind_are_refused(how: str) -> None:
    spoil, words = SPOILED[how]
    model, state = adam()
    assert train.load_from_optimizer(model, state).second["weight"].shape == (2, 3)
    model, state = adam(spoil)
    with pytest.raises(ValueError, match=words):
        train.load_from_optimizer(model, state)


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("scale", [scale_by_adam, scale_by_adafactor])
def test_moments_at_hand_are_refused_by_the_parameter(scale: Any, factored: bool, value: float) -> None:
    second = torch.ones(2, 3)
    second[0] = value  # -1 over a whole row, so that a row's mean is negative too
    v = Factored(second[:, 0].clone(), torch.ones(3)) if factored else second
    with pytest.raises(ValueError, match=f"{scale.__name__}: the second moment of 'weight'"):
        per_example_grads(*net(), BATCH, transform=scale(Moments({"weight": v})))


def test_bias_correction_of_no_update_is_refused() -> None:
    model, state = adam(lambda s: entry(s).update(step=0))
    with pytest.raises(ValueError, match="'weight' had no update yet"):
        train.load_from_optimizer(model, state, bias_correction=True)


def test_draws_that_are_not_finite_are_not_folded_into_moments() -> None:
    state = sgmcmc.moments.init(2, 1, 1)
    draw = torch.tensor([[[1.0]], [[NAN]]])
    with pytest.raises(ValueError, match="not finite"):
        sgmcmc.moments.update(state, draw, draw)
    kept = sgmcmc.moments.update(state, draw, draw, torch.tensor([True, False]))
    assert kept.x.isfinite().all()
