"""Methods as functions: against dense algebra in float64, and against the command line's recipes."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from influence import attribute, functionalize, hessians, train
from influence.attribute import Scores
from influence.func.transform.blocks import as_blocks
from influence.store import BadFileError
from tests.pipeline_world import FAST, corpus, flat, lines, model_config, oracle, power_of, questions, sketched, world

D = 0.1


@functools.cache
def net() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """Return a small classifier in float64, and 12 examples."""
    gen = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=gen, dtype=torch.float64)
    loss_fn, params = functionalize(model)
    x = torch.randn(12, 4, generator=gen, dtype=torch.float64)
    return loss_fn, params, x, torch.randint(0, 3, (12,), generator=gen)


def grads(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return every example's gradient, one example at a time by autograd."""
    found = []
    for n in range(len(x)):
        moved = {name: value.clone().requires_grad_() for name, value in params.items()}
        hidden = (x[n] @ moved["0.weight"].T).tanh()
        loss = nn.functional.cross_entropy((hidden @ moved["2.weight"].T)[None], y[n, None])
        found.append(torch.autograd.grad(loss, list(moved.values())))
    return {name: torch.stack(rows).flatten(1) for name, rows in zip(params, zip(*found, strict=True), strict=True)}


def close(a: Tensor, b: Tensor, bound: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert float((a.double() - b.double()).abs().max() / b.double().abs().max()) < bound


def loader(x: Tensor, y: Tensor, size: int = 5) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=size)


def test_influence_functions_are_query_inverse_train() -> None:
    loss_fn, params, x, y = net()
    factors = hessians.autocorrelation.fit(loss_fn, params, [(x, y)], transform=as_blocks(), progress=False)
    scores = attribute.ekfac(
        loss_fn,
        params,
        train=loader(x, y),
        queries=(x[:2], y[:2]),
        factors=factors,
        self_influence=True,
        progress=False,
    )
    want, own = torch.zeros(()), torch.zeros(())
    for g in grads(params, x, y).values():
        inverse = power_of(g.T @ g / len(g), -1.0, D)
        want, own = want + g[:2] @ inverse @ g.T, own + (g @ inverse * g).sum(1)
    close(scores.values, want)
    assert scores.own is not None
    close(scores.own, own)
    assert scores.ids.tolist() == list(range(12))
    assert scores.self_influence(1).ids.tolist() == [[int(own.argmax())]]


def test_curvature_is_fitted_where_none_is_given() -> None:
    loss_fn, params, x, y = net()
    for compress in (None, 2):
        found = attribute.ekfac(
            loss_fn,
            params,
            train=loader(x, y),
            queries=(x[:2], y[:2]),
            labels="exact",
            compress=compress,
            progress=False,
        )
        factors = hessians.ekfac.fit(
            loss_fn, params, [{"input": x, "labels": y}], transform=as_blocks(), labels="exact", progress=False
        )
        again = attribute.ekfac(
            loss_fn,
            params,
            train=loader(x, y),
            queries=(x[:2], y[:2]),
            factors=factors,
            compress=compress,
            progress=False,
        )
        close(found.values, again.values, 1e-7)


def test_cosines() -> None:
    loss_fn, params, x, y = net()
    scores = attribute.cosine(
        loss_fn,
        params,
        train=loader(x, y),
        queries=loader(x[3:5], y[3:5]),
        dim=None,
        self_influence=True,
        progress=False,
    )
    g = torch.cat(list(grads(params, x, y).values()), 1)
    unit = g / g.norm(dim=1, keepdim=True)
    close(scores.values, unit[3:5] @ unit.T)
    assert scores.own is not None
    close(scores.own, g.square().sum(1))
    assert scores.top(1).ids.tolist() == [[3], [4]]


def test_tracin_and_trak_sum_over_checkpoints() -> None:
    loss_fn, params, x, y = net()
    other = {name: value * 0.5 for name, value in params.items()}
    ask: dict[str, Any] = {"train": loader(x, y), "queries": (x[:2], y[:2]), "progress": False}
    both = [torch.cat(list(grads(p, x, y).values()), 1) for p in (params, other)]
    tracin = attribute.tracin(loss_fn, [params, other], rates=[0.1, 0.2], self_influence=True, **ask)
    close(tracin.values, 0.1 * both[0][:2] @ both[0].T + 0.2 * both[1][:2] @ both[1].T)
    assert tracin.own is not None
    close(tracin.own, 0.1 * both[0].square().sum(1) + 0.2 * both[1].square().sum(1))
    trak = attribute.trak(loss_fn, [params, other], dim=8, **ask)
    alone = [attribute.trak(loss_fn, each, dim=8, **ask).values for each in (params, other)]
    close(trak.values, (alone[0] + alone[1]) / 2)


def test_less_takes_the_best_subtask() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = train.read_optimizer(model, optimizer)
    loss_fn, params = functionalize(model)
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    ask: dict[str, Any] = {"train": [(x, y)], "rates": [0.3], "optimizers": [state], "dim": 512, "progress": False}
    both = attribute.less(loss_fn, params, queries=[(x[:2], y[:2])], subtask=torch.tensor([0, 1]), **ask)
    each = [attribute.less(loss_fn, params, queries=[(x[i : i + 1], y[i : i + 1])], **ask) for i in range(2)]
    close(both.values, torch.maximum(each[0].values, each[1].values), 1e-5)


@functools.cache
def language() -> tuple[Any, dict[str, Tensor], Any, Any]:
    """Return the world's model as a function, and its corpus and questions as batches of one document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from influence.models import layer_matrices

    model = AutoModelForCausalLM.from_pretrained(world() / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(world() / "model")
    loss_fn, params = functionalize(model, targets=layer_matrices(model))

    def batches(name: str) -> list[dict[str, Tensor]]:
        ids = [torch.tensor([tokenizer(row["text"])["input_ids"]]) for row in lines(name)]
        return [{"input_ids": each, "labels": each, "index": torch.tensor([n])} for n, each in enumerate(ids)]

    return loss_fn, params, batches("corpus.jsonl"), batches("questions.jsonl")


def test_trackstar_is_the_recipe_of_the_command_line(tmp_path: Path) -> None:
    from influence.index import open_index
    from influence.pipelines import trackstar
    from influence.pipelines.frame.configs import TransformConfig

    view = TransformConfig(projection_dim=4)
    config = trackstar.TrackstarConfig(
        str(tmp_path / "t"), model_config(), corpus(), questions(), components=2, transform=view, execution=FAST
    )
    trackstar.run(config)
    loss_fn, params, documents, asked_for = language()
    scores = attribute.trackstar(
        loss_fn, params, train=documents, queries=asked_for, dim=4, components=2, progress=False
    )
    close(scores.values.T, open_index(tmp_path / "t" / "scores").matrix(), 1e-7)


def test_trackstar_is_whitened_by_the_mix() -> None:
    loss_fn, params, documents, asked_for = language()
    got = attribute.trackstar(loss_fn, params, train=documents, queries=asked_for, dim=4, mix=False, progress=False)
    rows = {name: flat({name: g}) for name, g in sketched(oracle("corpus.jsonl"), 4).items()}
    asked = {name: flat({name: g}) for name, g in sketched(oracle("questions.jsonl"), 4).items()}
    root = {name: power_of(g.T @ g / len(g), -0.5, D) for name, g in rows.items()}
    left, right = (torch.cat([side[n] @ root[n] for n in root], 1) for side in (asked, rows))
    left, right = (side / side.norm(dim=1, keepdim=True) for side in (left, right))
    close(got.values, left @ right.T, 1e-7)


def test_scores_are_ranked_tabulated_and_kept(tmp_path: Path) -> None:
    scores = Scores(
        torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]),
        torch.tensor([7, 8, 9]),
        torch.tensor([0, 4]),
        "cosine",
        {"dim": 2},
    )
    assert scores.top(2).ids.tolist() == [[8, 9], [9, 7]]
    assert scores.bottom(1).values.tolist() == [[1.0], [-1.0]]
    assert scores.top(9).ids.shape == (2, 3)
    assert "Scores by cosine: 2 queries, 3 examples" in repr(scores)
    assert "query 4: 9 (5), 7 (0), 8 (-1)" in repr(scores)
    table = scores.top(2).to_pandas()
    assert table[table["query"] == 4]["id"].tolist() == [9, 7]
    assert scores.to_pandas().loc[8].tolist() == [3.0, -1.0]
    scores.save(tmp_path / "scores.h5")
    back = attribute.load(tmp_path / "scores.h5")
    assert torch.equal(back.values, scores.values)
    assert (back.method, dict(back.settings), back.own) == ("cosine", {"dim": 2}, None)
    bad = scores._replace(ids=torch.arange(2))
    bad.save(tmp_path / "bad.h5")
    with pytest.raises(BadFileError, match=r"bad.h5 is not what it says: scores of shape \[2, 3\] for \[2\] × \[2\]"):
        attribute.load(tmp_path / "bad.h5")


def test_refusals_say_what_to_do() -> None:
    loss_fn, params, x, y = net()
    ask = functools.partial(attribute.cosine, loss_fn, params, progress=False)
    with pytest.raises(ValueError, match="train is seen more than once: pass a list"):
        ask(train=iter([(x, y)]), queries=(x, y))
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator())
    with pytest.raises(ValueError, match="train is a shuffled DataLoader whose batches do not say which examples"):
        ask(train=shuffled, queries=(x, y))
    with pytest.raises(ValueError, match="queries: there is no batch"):
        ask(train=(x, y), queries=[])
    with pytest.raises(ValueError, match=r"run attribute.cosine\(…, self_influence=True\)"):
        ask(train=(x, y), queries=(x, y)).self_influence()
    with pytest.raises(ValueError, match="2 rates came for 1 checkpoints"):
        attribute.tracin(loss_fn, params, train=(x, y), queries=(x, y), rates=[1.0, 2.0])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        attribute.trak(loss_fn, [], train=(x, y), queries=(x, y))
