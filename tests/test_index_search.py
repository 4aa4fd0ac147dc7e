"""Questions to an index against dense float64 matrices `G_q H^p G_t^T`, however and wherever it is stored."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import (
    Attributor,
    FaissConfig,
    Heads,
    Moments,
    as_blocks,
    build,
    chain,
    down_project,
    eigen_whiten,
    functionalize,
    hessians,
    one_sided,
    open_index,
    per_example_grads,
    per_token_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    two_sided,
    unit_norm,
)
from influence.func.transform.chain import CollectedRows, Transform
from influence.func.transform.nested import raise_project, unprojected
from influence.index import FingerprintError, Index, faiss_search, fingerprint_of, provenance
from influence.index.recipe import rebuild, recipe
from tests.cases import GPT2, VOCAB, hf
from tests.tokenizers_zoo import bpe, wordpiece

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
N, Q = 41, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"a.weight": normal(7, 9, seed=1), "b.weight": normal(5, 7, seed=2), "c": normal(5, seed=3)}
DATA, QUERIES = normal(N, 9, seed=4), normal(Q, 9, seed=5)


def ell(params: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["a.weight"].mT)
    return (torch.tanh(hidden @ params["b.weight"].mT) * params["c"]).sum(1).square()


def rows_of(transform: Transform, x: Tensor = DATA) -> CollectedRows:
    return per_example_grads(ell, PARAMS, x, transform=transform)


def flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def index_of(transform: Transform, dtype: str = "float64", path: Path | None = None, at_once: int = 10) -> Index:
    return build(ell, PARAMS, DATA.split(at_once), path, transform=transform, dtype=dtype, shard_size=at_once)


def ordered(scores: Tensor, reverse: bool = False) -> Any:
    return scores.sort(dim=1, descending=not reverse, stable=True)


@functools.cache
def curvature() -> hessians.Factors:
    return hessians.kfac.fit(ell, PARAMS, list(DATA.split(10)), transform=as_blocks(), labels="data", progress=False)


def dense_inverse(rows: Tensor) -> Tensor:
    """`H^{-1}` of whole rows, block by block, as dense matrices of the factors' own numbers."""
    found, at = [], 0
    for c in curvature().blocks.values():
        bases = [torch.eye(len(b.values)).double() if b.vectors is None else b.vectors for b in c.bases]
        q = functools.reduce(torch.kron, bases)
        spectrum = c.eigenvalues.flatten()
        inverse = q @ torch.diag(1 / (spectrum + 0.1 * spectrum.mean())) @ q.mT
        found.append(rows[:, at : at + len(q)] @ inverse)
        at += len(q)
    return torch.cat(found, 1)


# Scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_scores_are_those_of_the_dense_matrix(dtype: str, where: str, tmp_path: Path) -> None:
    transform = as_blocks()
    index = index_of(transform, dtype, None if where == "memory" else tmp_path / "run")
    query, truth = rows_of(transform, QUERIES), flat(rows_of(transform))
    found = Attributor(index).ask(query, unchecked=True).all()
    expected = flat(query) @ truth.mT
    lengths = flat(query).norm(dim=1)[:, None] * truth.norm(dim=1)
    bound = {"float64": 1e-14, "float32": 2**-23, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.02}[dtype]
    assert ((found - expected).abs() / lengths).max() <= bound
    rounding = 1e-14 if dtype == "float64" else 2**-23
    assert ((found - flat(query) @ index.matrix().double().mT).abs() / lengths).max() <= rounding


@pytest.mark.parametrize("k", [1, 5, N, None])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("transform", [as_blocks(), chain(as_blocks(), project(3), unit_norm())], ids=repr)
def test_hits_are_the_top_of_all_scores(k: int | None, reverse: bool, transform: Transform, tmp_path: Path) -> None:
    truth = ordered(flat(rows_of(transform, QUERIES)) @ flat(rows_of(transform)).mT, reverse)
    for index in (index_of(transform), index_of(transform, path=tmp_path / "run")):
        answer = Attributor(index).ask(rows_of(transform, QUERIES), unchecked=True)
        hits = answer.bottom(k) if reverse else answer.top(k)
        torch.testing.assert_close(hits.values, truth.values[:, :k], rtol=1e-10, atol=1e-14)
        assert hits.indices.equal(truth.indices[:, :k])
        assert hits.ids.equal(hits.indices)
        assert hits.positions is None


def test_reverse_is_the_search_of_the_negated_query() -> None:
    attr, query = Attributor(index_of(as_blocks(), "float16")), rows_of(as_blocks(), QUERIES)
    backwards = attr.ask(query, unchecked=True).bottom(7)
    negated = attr.ask({name: -row for name, row in query.items()}, unchecked=True).top(7)
    assert backwards.values.equal(-negated.values)
    assert backwards.indices.equal(negated.indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [None, ["b"], ["a", "c"]])
def test_cosines_are_over_the_norms_of_both_rows(dtype: str, blocks: list[str] | None) -> None:
    """Of rows of any size: their squares would be zero in float32."""
    index = index_of(as_blocks(), dtype)
    query = rows_of(as_blocks(), QUERIES)
    tiny = CollectedRows({name: row * 1e-30 for name, row in query.items()}, query.transform, query.layout)
    stored = index.matrix(blocks=blocks).double()
    asked = flat({name: query[name] for name in index.blocks if blocks is None or name in blocks})
    expected = asked @ stored.mT / asked.norm(dim=1)[:, None] / stored.norm(dim=1)
    for rows in (query, tiny):
        answer = Attributor(index).ask(rows, blocks=blocks, cosine=True, unchecked=True)
        close = {"rtol": 0, "atol": 1e-12 if dtype == "float64" else 2e-6}
        torch.testing.assert_close(answer.all().double(), expected, **close)
        torch.testing.assert_close(sum(answer.by_block().values()).double(), expected, **close)
        torch.testing.assert_close(answer.top(4).values.double(), ordered(expected).values[:, :4], **close)
        assert answer.by_document().all().equal(answer.all())


def test_cosines_that_are_none_are_refused() -> None:
    sides = one_sided(curvature())
    with pytest.raises(ValueError, match=r"the query's curvature has the powers \[-1.0\], and the stored rows' none"):
        Attributor(index_of(sides.train)).ask(rows_of(sides.query, QUERIES), cosine=True, unchecked=True)
    with pytest.raises(ValueError, match="build the index under unit_norm"):
        Attributor(index_of(as_blocks()), faiss=FaissConfig()).ask(
            rows_of(as_blocks(), QUERIES), cosine=True, unchecked=True
        )
    zero = build(ell, PARAMS, [DATA * 0], transform=as_blocks(), progress=False)
    assert (Attributor(zero).ask(QUERIES, cosine=True).all() == 0).all()


def test_an_index_that_build_returned_knows_its_own_function(tmp_path: Path) -> None:
    index = build(ell, PARAMS, [DATA], tmp_path / "run", transform=as_blocks(), progress=False)
    answer = Attributor(index, texts=[f"text {n}" for n in range(N)]).ask(QUERIES)
    assert answer.top(3).indices.equal(Attributor(index).ask(QUERIES, (ell, PARAMS)).top(3).indices)
    assert answer.top(2).texts == [[f"text {n}" for n in ids] for ids in answer.top(2).ids.tolist()]
    assert "text" in repr(answer.top(2)).splitlines()[0]
    assert repr(answer).startswith(f"{Q} queries over {N} rows; the best of each:")
    assert answer.ids.equal(index.document)
    rows = per_example_grads(ell, PARAMS, QUERIES, transform=as_blocks())
    assert Attributor(tmp_path / "run").ask(rows, (ell, PARAMS)).all().equal(answer.all())
    with pytest.raises(ValueError, match="opened from its files, which hold no model: pass model="):
        Attributor(tmp_path / "run").ask(QUERIES)


@pytest.mark.parametrize("inversion", ["one sided", "two sided"])
def test_scores_go_through_the_inverse_once(inversion: str) -> None:
    factors = curvature()
    sides = one_sided(factors) if inversion == "one sided" else two_sided(factors)
    attr = Attributor(index_of(sides.train))
    query, train = (flat(rows_of(as_blocks(), x)) for x in (QUERIES, DATA))
    expected = dense_inverse(query) @ train.mT
    if inversion == "two sided":
        norms = [(dense_inverse(rows) * rows).sum(1).sqrt() for rows in (query, train)]
        expected = expected / norms[0][:, None] / norms[1]
    torch.testing.assert_close(
        attr.ask(rows_of(sides.query, QUERIES), unchecked=True).all(), expected, rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(
        attr.ask(QUERIES, (ell, PARAMS), transform=sides.query).top(3).values,
        ordered(expected).values[:, :3],
        rtol=1e-8,
        atol=1e-12,
    )
    if inversion == "one sided":
        with pytest.raises(FingerprintError, match="curvature"):
            Attributor(index_of(sides.query)).ask(rows_of(sides.query, QUERIES), unchecked=True).top()


# Blocks and heads


def test_some_blocks_alone() -> None:
    transform = as_blocks()
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    parts = attr.ask(query, unchecked=True).by_block()
    for blocks in (["a"], ["c"], ["a", "c"], ["c", "b"], "[ab]"):
        names = ["a", "b"] if blocks == "[ab]" else sorted(blocks)
        expected = sum(query[name].flatten(1) @ train[name].flatten(1).mT for name in names)
        torch.testing.assert_close(
            attr.ask(query, blocks=blocks, unchecked=True).all(), expected, rtol=1e-10, atol=1e-13
        )
        torch.testing.assert_close(sum(parts[name] for name in names), expected, rtol=1e-10, atol=1e-13)
        only = CollectedRows({name: query[name] for name in names}, transform, query.layout)
        assert attr.ask(only, blocks=blocks, unchecked=True).top(4).indices.equal(ordered(expected).indices[:, :4])
        with pytest.raises(ValueError, match="shapes"):
            attr.ask(only, unchecked=True).top(4)


def test_heads_are_blocks() -> None:
    transform = chain(as_blocks(), split_heads({"b": Heads(1, 5), "a": Heads(7, 1)}), project(4))
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    torch.testing.assert_close(
        attr.ask(query, unchecked=True).all(), flat(query) @ flat(train).mT, rtol=1e-10, atol=1e-13
    )
    expected = query["a.head_3"].flatten(1) @ train["a.head_3"].flatten(1).mT
    torch.testing.assert_close(
        attr.ask(query, blocks="a.head_3", unchecked=True).all(), expected, rtol=1e-10, atol=1e-13
    )
    assert attr.ask(QUERIES, (ell, PARAMS)).top(3).indices.equal(attr.ask(query, unchecked=True).top(3).indices)


def test_a_global_projection_is_one_block() -> None:
    transform = chain(as_blocks(), project(16, target="global"), unit_norm())
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    torch.testing.assert_close(
        attr.ask(query, unchecked=True).all(), flat(query) @ flat(train).mT, rtol=1e-10, atol=1e-13
    )
    assert (
        attr.ask(query, blocks=["global"], unchecked=True)
        .top(3)
        .indices.equal(attr.ask(QUERIES, (ell, PARAMS)).top(3).indices)
    )


# Projections that nest


@pytest.mark.parametrize("stored", [4, 6, 8])
@pytest.mark.parametrize("asked", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_a_projection_is_read_at_the_smaller_dim_of_both(stored: int, asked: int, kind: str) -> None:
    at = {p: chain(as_blocks(), project(p, kind=kind)) for p in (2, 4, 6, 8)}
    smaller = at[min(stored, asked)]
    expected = flat(rows_of(smaller, QUERIES)) @ flat(rows_of(smaller)).mT
    attr, query = Attributor(index_of(at[stored])), rows_of(at[asked], QUERIES)
    torch.testing.assert_close(attr.ask(query, unchecked=True).all(), expected, rtol=1e-10, atol=1e-12)
    mine = fingerprint_of(ell, PARAMS, at[asked], {name: tuple(row.shape[1:]) for name, row in query.items()})
    torch.testing.assert_close(attr.ask(query, fingerprint=mine).all(), expected, rtol=1e-10, atol=1e-12)
    assert attr.ask(QUERIES, (ell, PARAMS), transform=at[asked]).top(3).indices.equal(ordered(expected).indices[:, :3])
    parts = attr.ask(query, blocks=["b"], unchecked=True).all()
    mine_b, theirs_b = (rows_of(smaller, x)["b"].flatten(1) for x in (QUERIES, DATA))
    torch.testing.assert_close(parts, mine_b @ theirs_b.mT, rtol=1e-10, atol=1e-12)


def test_raising_is_the_adjoint_of_reading_smaller() -> None:
    large, small = chain(as_blocks(), project(8)), chain(as_blocks(), project(3))
    train, query = rows_of(large), rows_of(small, QUERIES)
    raised = raise_project(query, 8, project(3).steps[0], unprojected(small, query.layout))
    left = flat(query) @ flat(down_project(train, 3)).mT
    torch.testing.assert_close(left, flat(raised) @ flat(train).mT, rtol=1e-10, atol=1e-12)


def test_a_sketch_that_does_not_nest_is_refused() -> None:
    at = {p: chain(as_blocks(), project(p, kind="srht")) for p in (2, 4)}
    with pytest.raises(FingerprintError, match="dim"):
        Attributor(index_of(at[4])).ask(rows_of(at[2], QUERIES), unchecked=True).top()
    with pytest.raises(ValueError, match="nest"):
        Attributor(index_of(at[2])).ask(rows_of(at[4], QUERIES), unchecked=True).top()


# Tokens


@functools.cache
def language_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1})().double().eval()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.2 * normal(*p.shape, seed=i))
    return model


def documents(n: int = 8, s: int = 6, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.rand(n, VOCAB, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :s]
    mask = torch.arange(s) < torch.tensor([[s - i % 4] for i in range(n)])
    index = torch.arange(n) + 100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100), "index": index}


TARGETS = "transformer.h.*.mlp.*weight"


@pytest.mark.parametrize("notion", ["use", "loss"])
def test_hits_on_tokens_say_document_and_position(notion: str, tmp_path: Path) -> None:
    loss_fn, params = functionalize(language_model(), targets=TARGETS)
    transform = chain(as_blocks(), project(4))
    index = build(
        loss_fn, params, [documents()], tmp_path / "run", transform=transform, dtype="float64", per_token=notion
    )
    tokens = per_token_grads(loss_fn, params, documents(), position=notion, transform=transform)
    query = per_example_grads(loss_fn, params, documents(3, seed=2), transform=transform)
    expected = flat(query) @ flat(tokens.rows).mT
    attr = Attributor(tmp_path / "run")
    hits = attr.ask(query, unchecked=True).top(5)
    assert hits.indices.equal(ordered(expected).indices[:, :5])
    for q in range(3):
        for j in range(5):
            row = int(hits.indices[q, j])
            example = int((tokens.offsets <= row).sum()) - 1
            assert int(hits.ids[q, j]) == 100 + example
            assert hits.positions is not None
            assert int(hits.positions[q, j]) == int(tokens.positions[row])
    traced = attr.ask(documents(3, seed=2), language_model()).top(5)
    assert attr.trace(language_model(), documents(3, seed=2), 5).indices.equal(traced.indices)
    assert traced.indices.equal(hits.indices)
    # a document's tokens sum to its row, and so do their scores
    whole = per_example_grads(loss_fn, params, documents(), transform=transform)
    answer = attr.ask(query, unchecked=True).by_document()
    ids, sums = answer.ids, answer.all()
    assert ids.tolist() == list(range(100, 108))
    torch.testing.assert_close(sums, flat(query) @ flat(whole).mT, rtol=1e-6, atol=1e-9)
    top = attr.ask(query, unchecked=True).by_document().top(3)
    assert top.indices.equal(ordered(sums).indices[:, :3] + 100)
    assert top.ids.equal(top.indices)
    assert (
        attr.ask(query, unchecked=True).by_document().bottom(3).indices.equal(ordered(sums, True).indices[:, :3] + 100)
    )
    assert "position" in index.dataset().column_names
    assert set(hits.to_dict()) == {"query", "rank", "score", "row", "document", "position"}
    with pytest.raises(ValueError, match="number of documents, 8; got 9"):
        attr.ask(query, unchecked=True).by_document().top(9)
    tokenwise = attr.ask(dict(query.items()), unchecked=True).top(None)
    assert tokenwise.values.shape == (3, len(index))


# What is refused


def test_zero_queries_have_zero_scores() -> None:
    transform = chain(as_blocks(), project(3), unit_norm())
    attr = Attributor(index_of(transform, "float16"))
    query = {name: torch.zeros_like(row) for name, row in rows_of(transform, QUERIES).items()}
    hits = attr.ask(query, unchecked=True).top(4)
    assert (hits.values == 0).all()
    assert hits.indices.equal(torch.arange(4).expand(Q, 4))
    still = attr.ask(rows_of(transform, QUERIES * 0), unchecked=True).top(4)
    assert (still.values == 0).all()


def test_bad_questions() -> None:
    transform = as_blocks()
    attr, query = Attributor(index_of(transform)), rows_of(transform, QUERIES)
    for k in (0, -1, N + 1):
        with pytest.raises(ValueError, match=rf"k must be from 1 to the number of rows, {N}; got {k}"):
            attr.ask(query, unchecked=True).top(k)
    with pytest.raises(ValueError, match="do not say how they were made"):
        attr.ask(dict(query.items())).top()
    for bad in (float("nan"), float("inf")):
        broken = {name: row.clone() for name, row in query.items()}
        broken["b"][2, 1, 1] = bad
        with pytest.raises(ValueError, match="1 of 6 query rows are not finite, the first of them row 2"):
            attr.ask(broken, unchecked=True).top()
    with pytest.raises(ValueError, match="the query is empty"):
        attr.ask({name: row[:0] for name, row in query.items()}, unchecked=True).top()
    with pytest.raises(ValueError, match="'d' matches none of the index's 3 blocks"):
        attr.ask(query, blocks=["d"], unchecked=True).top()


CHANGES: list[tuple[str, Transform, Transform]] = [
    ("dim", chain(as_blocks(), project(3, kind="sparse")), chain(as_blocks(), project(4, kind="sparse"))),
    ("seed", chain(as_blocks(), project(3, seed=1)), chain(as_blocks(), project(3))),
    ("project.kind", chain(as_blocks(), project(3, kind="normal")), chain(as_blocks(), project(3))),
    ("unit_norm", chain(as_blocks(), unit_norm()), as_blocks()),
    (
        "scale_by_adam",
        chain(as_blocks(), scale_by_adam(Moments({k: p.square() for k, p in PARAMS.items()}))),
        as_blocks(),
    ),
]


@pytest.mark.parametrize(("field", "mine", "theirs"), CHANGES, ids=[change[0] for change in CHANGES])
def test_rows_of_another_kind_are_refused_by_name(field: str, mine: Transform, theirs: Transform) -> None:
    attr = Attributor(index_of(theirs))
    with pytest.raises(FingerprintError, match=field):
        attr.ask(rows_of(mine, QUERIES), unchecked=True).top()
    if field != "dim":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attr.ask(rows_of(mine, QUERIES), force=True, unchecked=True).top()
        assert any(field in str(warning.message) for warning in said)


def test_other_weights_are_refused_where_they_are_known() -> None:
    attr = Attributor(index_of(as_blocks()))
    other = {name: 2 * p for name, p in PARAMS.items()}
    with pytest.raises(FingerprintError, match="weights"):
        attr.ask(QUERIES, (ell, other)).top()
    with pytest.warns(UserWarning, match="weights"):
        attr.ask(QUERIES, (ell, other), force=True).top()
    rows = per_example_grads(ell, other, QUERIES, transform=as_blocks())
    with pytest.raises(FingerprintError, match="weights"):
        attr.ask(rows, fingerprint=provenance(ell, other, rows)).top()
    with pytest.raises(ValueError, match="do not say of which weights they are"):
        attr.ask(rows).top()
    own = per_example_grads(ell, PARAMS, QUERIES, transform=as_blocks())
    assert (
        attr.ask(own, fingerprint=provenance(ell, PARAMS, own))
        .top()
        .indices.equal(attr.ask(QUERIES, (ell, PARAMS)).top().indices)
    )


def test_training_side_scaling_is_accepted() -> None:
    moments = Moments({name: p.square() for name, p in PARAMS.items()})
    attr = Attributor(index_of(chain(as_blocks(), scale_by_adam(moments))))
    query = rows_of(as_blocks(), QUERIES)
    expected = flat(query) @ flat(rows_of(chain(as_blocks(), scale_by_adam(moments)))).mT
    torch.testing.assert_close(attr.ask(query, unchecked=True).all(), expected, rtol=1e-10, atol=1e-12)


# Live models


def test_a_model_is_traced_by_the_stored_loss_and_transform(tmp_path: Path) -> None:
    for reduction, smoothing in (("sum", 0.0), ("mean", 0.1)):
        loss_fn, params = functionalize(
            language_model(), reduction=reduction, targets=TARGETS, label_smoothing=smoothing
        )
        transform = chain(as_blocks(bias=False), project(4, seed=3), unit_norm())
        path = tmp_path / reduction
        build(loss_fn, params, [documents()], path, transform=transform, dtype="float64")
        query = per_example_grads(loss_fn, params, documents(3, seed=2), transform=transform)
        expected = Attributor(path).ask(query, unchecked=True).top(4)
        hits = Attributor(path).ask(documents(3, seed=2), language_model()).top(4)
        assert hits.indices.equal(expected.indices)
        torch.testing.assert_close(hits.values, expected.values, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"has no parameter .* not the model"):
        Attributor(path).ask(documents(), nn.Linear(2, 2)).top()


def test_texts_are_asked_as_tokens(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    loss_fn, params = functionalize(language_model(), targets=TARGETS)
    build(loss_fn, params, [documents()], tmp_path / "run", transform=as_blocks(), dtype="float64")
    attr = Attributor(tmp_path / "run")
    hits = attr.ask(["hi ok yes", "no hi"], language_model(), tokenizer=tokenizer).top(3)
    for i, text in enumerate(("hi ok yes", "no hi")):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = attr.ask({"input_ids": ids, "labels": ids}, language_model()).top(3)
        assert alone.indices[0].equal(hits.indices[i])
        torch.testing.assert_close(alone.values[0], hits.values[i], rtol=1e-6, atol=1e-9)
    assert attr.ask("hi ok yes", language_model(), tokenizer=tokenizer).top(3).indices.equal(hits.indices[:1])
    with pytest.raises(ValueError, match="needs two"):
        attr.ask("hi", language_model(), tokenizer=bpe()).top()
    with pytest.raises(ValueError, match="the query is empty"):
        attr.ask([], language_model(), tokenizer=tokenizer).top()
    with pytest.raises(ValueError, match="need tokenizer="):
        attr.ask("hi", language_model()).top()


def test_a_loss_of_the_users_needs_the_function() -> None:
    attr = Attributor(index_of(as_blocks()))
    with pytest.raises(ValueError, match=r"cannot be made from a model alone: pass \(loss_fn, params\)"):
        attr.ask(QUERIES, nn.Linear(2, 2)).top()


def recipes() -> list[Callable[[], Transform]]:
    moments = Moments({name: p.square() for name, p in PARAMS.items()})
    factors = curvature()
    return [
        Transform,
        lambda: as_blocks(bias=True),
        lambda: chain(as_blocks(), split_heads(), project(8, seed=2, kind="normal")),
        lambda: chain(as_blocks(), split_heads({"b": Heads(1, 5, fused=None)}), project(8, kind="sparse", signs=2)),
        lambda: chain(as_blocks(), project(8, reshape_to_square=True), unit_norm(eps=1e-7)),
        lambda: chain(as_blocks(), project(8, target="global")),
        lambda: chain(as_blocks(), precondition(factors, power=-0.5, damping=0.3, inversion="factored"), unit_norm()),
        lambda: chain(as_blocks(), eigen_whiten(factors, dim=4, damping=0.2)),
        lambda: chain(as_blocks(), scale_by_adam(moments, eps=1e-7)),
        lambda: chain(as_blocks(), scale_by_adafactor(moments)),
    ]


@pytest.mark.parametrize("number", range(10))
def test_recipes_make_the_same_transform_again(number: int) -> None:
    transform = recipes()[number]()
    steps = json.loads(json.dumps(recipe(transform)))
    moments = Moments({name: p.square() for name, p in PARAMS.items()})
    again = rebuild(steps, [curvature()], moments)
    assert again.fingerprint == transform.fingerprint
    assert repr(again) == repr(transform)
    if any("factors" in step.settings or "moments" in step.settings for step in transform.steps):
        with pytest.raises(ValueError, match=r"pass (factors|moments)="):
            rebuild(steps)
    if any("moments" in step.settings for step in transform.steps):
        with pytest.raises(ValueError, match="not what was stored"):
            rebuild(steps, moments=Moments({name: p.square() + 1 for name, p in PARAMS.items()}))


def test_factors_of_the_recipe_are_given_and_another_transform_is_refused() -> None:
    factors = curvature()
    sides = two_sided(factors)
    index = index_of(sides.train)
    with pytest.raises(ValueError, match="made with the factors kfac"):
        Attributor(index).ask(QUERIES, (ell, PARAMS)).top()
    expected = Attributor(index).ask(rows_of(sides.query, QUERIES), unchecked=True).top(3)
    for attr in (Attributor(index, factors=[factors]), Attributor(index, transform=sides.train)):
        assert attr.ask(QUERIES, (ell, PARAMS)).top(3).indices.equal(expected.indices)
    with pytest.raises(FingerprintError):
        Attributor(index, transform=as_blocks()).ask(QUERIES, (ell, PARAMS)).top()


# Self-influence


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8"])
def test_self_influence_is_the_diagonal(dtype: str) -> None:
    index = index_of(as_blocks(), dtype)
    rows = index.matrix().double()
    attr = Attributor(index)
    tolerance = {"rtol": 1e-10, "atol": 0.0} if dtype == "float64" else {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(attr.self_influence().double(), rows.square().sum(1), **tolerance)
    inverse = attr.self_influence(precondition(curvature())).double()
    torch.testing.assert_close(inverse, (rows * dense_inverse(rows)).sum(1), rtol=max(tolerance["rtol"], 1e-8), atol=0)
    at = index.columns.spans["b"]
    torch.testing.assert_close(
        attr.self_influence(blocks="b").double(), rows[:, slice(*at)].square().sum(1), **tolerance
    )
    unit = Attributor(index_of(chain(as_blocks(), unit_norm())))
    torch.testing.assert_close(unit.self_influence(), torch.ones(N, dtype=torch.float64))


# FAISS


FACTORIES = ["Flat", "IVF4,Flat", "HNSW8"]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(("shards", "mapped"), [(1, False), (1, True), (3, False), (3, True)])
def test_faiss_finds_what_the_scan_finds(factory: str, shards: int, mapped: bool, tmp_path: Path) -> None:
    """With every cell looked into, and graphs searched widely, FAISS is exact."""
    transform = chain(as_blocks(), project(3), unit_norm())
    config = FaissConfig(factory, mmap_index=mapped, num_shards=shards, nprobe=4, batch_size=7)
    scanned = Attributor(index_of(transform, "float16", tmp_path / "run"))
    query = rows_of(transform, QUERIES)
    for attr in (Attributor(tmp_path / "run", faiss=config), Attributor(tmp_path / "run", faiss=config)):
        for reverse in (False, True):
            for blocks in (None, ["a", "c"]):
                answers = [one.ask(query, blocks=blocks, unchecked=True) for one in (attr, scanned)]
                found, exact = (one.bottom(5) if reverse else one.top(5) for one in answers)
                torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=1e-5)
                assert found.indices.equal(exact.indices)


def test_ids_that_faiss_does_not_find_are_dropped() -> None:
    transform = chain(as_blocks(), project(3), unit_norm())
    attr = Attributor(index_of(transform, "float32"), faiss=FaissConfig("IVF8,Flat", nprobe=1))
    query = rows_of(transform, QUERIES)
    few = attr._neighbours.search(flat(query), 30, 1)
    assert (few.indices < 0).any()
    hits = attr.ask(query, unchecked=True).top(30)
    exact = Attributor(attr.index).ask(query, unchecked=True).top(30)
    missing = (few.indices < 0).any(1)
    assert (hits.indices >= 0).all()
    assert hits.indices[missing].equal(exact.indices[missing])
    assert hits.indices.sort(dim=1).values.diff(dim=1).ne(0).all()
    assert attr.ask(query, unchecked=True).top(None).values.shape == (Q, N)


def test_the_faiss_cache_is_keyed_by_everything(tmp_path: Path) -> None:
    transform = chain(as_blocks(), project(3))

    def kept(config: FaissConfig, path: Path) -> dict[str, int]:
        Attributor(path, faiss=config).ask(rows_of(transform, QUERIES), unchecked=True).top(2)
        return {str(p.parent.name): p.stat().st_mtime_ns for p in sorted((path / "faiss").glob("*/0.faiss"))}

    index_of(transform, "float32", tmp_path / "one")
    first = kept(FaissConfig("Flat"), tmp_path / "one")
    assert kept(FaissConfig("Flat", mmap_index=True, nprobe=3, batch_size=3), tmp_path / "one") == first
    assert len(kept(FaissConfig("Flat", num_shards=2), tmp_path / "one")) == 2
    assert len(kept(FaissConfig("IVF2,Flat"), tmp_path / "one")) == 3
    before = kept(FaissConfig("IVF2,Flat", max_train_examples=20), tmp_path / "one")
    assert len(before) == 4
    # other rows under the same name, and a file that was cut off, are made again
    build(ell, PARAMS, [DATA + 1], tmp_path / "one", transform=transform, overwrite=True)
    exact = Attributor(tmp_path / "one").ask(rows_of(transform, QUERIES), unchecked=True).top(2)
    for _ in range(2):
        after = kept(FaissConfig("Flat"), tmp_path / "one")
        found = (
            Attributor(tmp_path / "one", faiss=FaissConfig("Flat"))
            .ask(rows_of(transform, QUERIES), unchecked=True)
            .top(2)
        )
        assert found.indices.equal(exact.indices)
        (new,) = after.keys() - before.keys()
        path = tmp_path / "one" / "faiss" / new / "0.faiss"
        path.write_bytes(path.read_bytes()[:50])


def test_appended_rows_are_found_by_faiss(tmp_path: Path) -> None:
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(2)
    build(ell, PARAMS, [DATA * 2], tmp_path / "run", transform=transform, append=True)
    found = Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(7)
    assert found.indices.equal(Attributor(open_index(tmp_path / "run")).ask(query, unchecked=True).top(7).indices)
    assert len(list((tmp_path / "run" / "faiss").glob("[!.]*"))) == 1  # what was kept of fewer rows is gone


def test_a_flipped_byte_of_a_kept_faiss_index_is_made_again(tmp_path: Path) -> None:
    """It gave `inf` scores and exit status 0: FAISS has no checksum."""
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    exact = Attributor(tmp_path / "run").ask(query, unchecked=True).top(5)
    Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(5)
    (path,) = (tmp_path / "run" / "faiss").glob("*/0.faiss")
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 12)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        found = Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(5)
        assert found.indices.equal(exact.indices)
        torch.testing.assert_close(found.values, exact.values)
        assert path.read_bytes() == whole
    (path.parent / "notes.txt").write_text("mine")
    path.write_bytes(whole[:-1])
    with pytest.raises(FileExistsError, match=r"notes.txt is not of the run"):
        Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(5)


def test_a_faiss_index_of_a_disk_that_cannot_be_written_is_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    exact = Attributor(tmp_path / "run").ask(query, unchecked=True).top(5)
    for _ in range(2):
        found = Attributor(tmp_path / "run", faiss=config).ask(query, unchecked=True).top(5)
        assert found.indices.equal(exact.indices)
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "cache" not in (path, *path.parents)] == before
    assert len(list((tmp_path / "cache" / "influence" / "faiss").glob("*/0.faiss"))) == 1


def test_bad_faiss_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = chain(as_blocks(), project(3))
    query, index = rows_of(transform, QUERIES), index_of(transform, "float32")
    with pytest.raises(ValueError, match="does not understand index_factory='Flut'"):
        Attributor(index, faiss=FaissConfig("Flut")).ask(query, unchecked=True).top()
    with pytest.raises(ValueError, match="cannot learn 'IVF100,Flat' from 41 rows"):
        Attributor(index, faiss=FaissConfig("IVF100,Flat")).ask(query, unchecked=True).top()
    with pytest.raises(ValueError, match="nprobe must be a finite number of at least 1; got 0"):
        FaissConfig(nprobe=0)
    monkeypatch.setattr(faiss_search, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"1kB are available\. Use mmap_index=True"):
        Attributor(index, faiss=FaissConfig()).ask(query, unchecked=True).top()


# Hits


def test_hits_read_as_a_table() -> None:
    attr = Attributor(index_of(as_blocks()))
    hits = attr.ask(rows_of(as_blocks(), QUERIES), unchecked=True).top(2)
    lines = repr(hits).splitlines()
    assert lines[0].split() == ["query", "rank", "score", "row", "document"]
    assert len(lines) == 1 + 2 * Q
    assert hits.rows()[1] == {key: column[1] for key, column in hits.to_dict().items()}
    assert len(hits) == Q
    assert "of 6 queries with 41 hits each" in repr(attr.ask(rows_of(as_blocks(), QUERIES), unchecked=True).top(None))
