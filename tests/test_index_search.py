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
    found = Attributor(index).scores(query, unchecked=True)
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
        hits = Attributor(index).search(rows_of(transform, QUERIES), k, reverse=reverse, unchecked=True)
        torch.testing.assert_close(hits.values, truth.values[:, :k], rtol=1e-10, atol=1e-14)
        assert hits.indices.equal(truth.indices[:, :k])
        assert hits.documents.equal(hits.indices)
        assert hits.positions is None


def test_reverse_is_the_search_of_the_negated_query() -> None:
    attr, query = Attributor(index_of(as_blocks(), "float16")), rows_of(as_blocks(), QUERIES)
    backwards = attr.search(query, 7, reverse=True, unchecked=True)
    negated = attr.search({name: -row for name, row in query.items()}, 7, unchecked=True)
    assert backwards.values.equal(-negated.values)
    assert backwards.indices.equal(negated.indices)


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
        attr.scores(rows_of(sides.query, QUERIES), unchecked=True), expected, rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(
        attr.trace((ell, PARAMS), QUERIES, 3, transform=sides.query).values,
        ordered(expected).values[:, :3],
        rtol=1e-8,
        atol=1e-12,
    )
    if inversion == "one sided":
        with pytest.raises(FingerprintError, match="curvature"):
            Attributor(index_of(sides.query)).search(rows_of(sides.query, QUERIES), unchecked=True)


# Blocks and heads


def test_some_blocks_alone() -> None:
    transform = as_blocks()
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    parts = attr.block_scores(query, unchecked=True)
    for blocks in (["a"], ["c"], ["a", "c"], ["c", "b"], "[ab]"):
        names = ["a", "b"] if blocks == "[ab]" else sorted(blocks)
        expected = sum(query[name].flatten(1) @ train[name].flatten(1).mT for name in names)
        torch.testing.assert_close(attr.scores(query, blocks, unchecked=True), expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(sum(parts[name] for name in names), expected, rtol=1e-10, atol=1e-13)
        only = CollectedRows({name: query[name] for name in names}, transform, query.layout)
        assert attr.search(only, 4, blocks, unchecked=True).indices.equal(ordered(expected).indices[:, :4])
        with pytest.raises(ValueError, match="shapes"):
            attr.search(only, 4, unchecked=True)


def test_heads_are_blocks() -> None:
    transform = chain(as_blocks(), split_heads({"b": Heads(1, 5), "a": Heads(7, 1)}), project(4))
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    torch.testing.assert_close(attr.scores(query, unchecked=True), flat(query) @ flat(train).mT, rtol=1e-10, atol=1e-13)
    expected = query["a.head_3"].flatten(1) @ train["a.head_3"].flatten(1).mT
    torch.testing.assert_close(attr.scores(query, "a.head_3", unchecked=True), expected, rtol=1e-10, atol=1e-13)
    assert attr.trace((ell, PARAMS), QUERIES, 3).indices.equal(attr.search(query, 3, unchecked=True).indices)


def test_a_global_projection_is_one_block() -> None:
    transform = chain(as_blocks(), project(16, target="global"), unit_norm())
    query, train = rows_of(transform, QUERIES), rows_of(transform)
    attr = Attributor(index_of(transform))
    torch.testing.assert_close(attr.scores(query, unchecked=True), flat(query) @ flat(train).mT, rtol=1e-10, atol=1e-13)
    assert attr.search(query, 3, ["global"], unchecked=True).indices.equal(
        attr.trace((ell, PARAMS), QUERIES, 3).indices
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
    torch.testing.assert_close(attr.scores(query, unchecked=True), expected, rtol=1e-10, atol=1e-12)
    mine = fingerprint_of(ell, PARAMS, at[asked], {name: tuple(row.shape[1:]) for name, row in query.items()})
    torch.testing.assert_close(attr.scores(query, fingerprint=mine), expected, rtol=1e-10, atol=1e-12)
    assert attr.trace((ell, PARAMS), QUERIES, 3, transform=at[asked]).indices.equal(ordered(expected).indices[:, :3])
    parts = attr.scores(query, ["b"], unchecked=True)
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
        Attributor(index_of(at[4])).search(rows_of(at[2], QUERIES), unchecked=True)
    with pytest.raises(ValueError, match="nest"):
        Attributor(index_of(at[2])).search(rows_of(at[4], QUERIES), unchecked=True)


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
    hits = attr.search(query, 5, unchecked=True)
    assert hits.indices.equal(ordered(expected).indices[:, :5])
    for q in range(3):
        for j in range(5):
            row = int(hits.indices[q, j])
            example = int((tokens.offsets <= row).sum()) - 1
            assert int(hits.documents[q, j]) == 100 + example
            assert hits.positions is not None
            assert int(hits.positions[q, j]) == int(tokens.positions[row])
    traced = attr.trace(language_model(), documents(3, seed=2), 5)
    assert traced.indices.equal(hits.indices)
    # a document's tokens sum to its row, and so do their scores
    whole = per_example_grads(loss_fn, params, documents(), transform=transform)
    ids, sums = attr.document_scores(query, unchecked=True)
    assert ids.tolist() == list(range(100, 108))
    torch.testing.assert_close(sums, flat(query) @ flat(whole).mT, rtol=1e-6, atol=1e-9)
    top = attr.search(query, 3, by_document=True, unchecked=True)
    assert top.indices.equal(ordered(sums).indices[:, :3] + 100)
    assert top.documents.equal(top.indices)
    assert attr.search(query, 3, by_document=True, reverse=True, unchecked=True).indices.equal(
        ordered(sums, True).indices[:, :3] + 100
    )
    assert "position" in index.dataset().column_names
    assert set(hits.to_dict()) == {"query", "rank", "score", "row", "document", "position"}
    with pytest.raises(ValueError, match="number of documents, 8; got 9"):
        attr.search(query, 9, by_document=True, unchecked=True)
    tokenwise = attr.search(dict(query.items()), None, unchecked=True)
    assert tokenwise.values.shape == (3, len(index))


# What is refused


def test_zero_queries_have_zero_scores() -> None:
    transform = chain(as_blocks(), project(3), unit_norm())
    attr = Attributor(index_of(transform, "float16"))
    query = {name: torch.zeros_like(row) for name, row in rows_of(transform, QUERIES).items()}
    hits = attr.search(query, 4, unchecked=True)
    assert (hits.values == 0).all()
    assert hits.indices.equal(torch.arange(4).expand(Q, 4))
    still = attr.search(rows_of(transform, QUERIES * 0), 4, unchecked=True)
    assert (still.values == 0).all()


def test_bad_questions() -> None:
    transform = as_blocks()
    attr, query = Attributor(index_of(transform)), rows_of(transform, QUERIES)
    for k in (0, -1, N + 1):
        with pytest.raises(ValueError, match=rf"k must be from 1 to the number of rows, {N}; got {k}"):
            attr.search(query, k, unchecked=True)
    with pytest.raises(ValueError, match="do not say how they were made"):
        attr.search(dict(query.items()))
    for bad in (float("nan"), float("inf")):
        broken = {name: row.clone() for name, row in query.items()}
        broken["b"][2, 1, 1] = bad
        with pytest.raises(ValueError, match="1 of 6 query rows are not finite, the first of them row 2"):
            attr.search(broken, unchecked=True)
    with pytest.raises(ValueError, match="the query is empty"):
        attr.search({name: row[:0] for name, row in query.items()}, unchecked=True)
    with pytest.raises(ValueError, match="'d' matches none of the index's 3 blocks"):
        attr.search(query, blocks=["d"], unchecked=True)


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
        attr.search(rows_of(mine, QUERIES), unchecked=True)
    if field != "dim":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attr.search(rows_of(mine, QUERIES), force=True, unchecked=True)
        assert any(field in str(warning.message) for warning in said)


def test_other_weights_are_refused_where_they_are_known() -> None:
    attr = Attributor(index_of(as_blocks()))
    other = {name: 2 * p for name, p in PARAMS.items()}
    with pytest.raises(FingerprintError, match="weights"):
        attr.trace((ell, other), QUERIES)
    with pytest.warns(UserWarning, match="weights"):
        attr.trace((ell, other), QUERIES, force=True)
    rows = per_example_grads(ell, other, QUERIES, transform=as_blocks())
    with pytest.raises(FingerprintError, match="weights"):
        attr.search(rows, fingerprint=provenance(ell, other, rows))
    with pytest.raises(ValueError, match="do not say of which weights they are"):
        attr.search(rows)
    own = per_example_grads(ell, PARAMS, QUERIES, transform=as_blocks())
    assert attr.search(own, fingerprint=provenance(ell, PARAMS, own)).indices.equal(
        attr.trace((ell, PARAMS), QUERIES).indices
    )


def test_training_side_scaling_is_accepted() -> None:
    moments = Moments({name: p.square() for name, p in PARAMS.items()})
    attr = Attributor(index_of(chain(as_blocks(), scale_by_adam(moments))))
    query = rows_of(as_blocks(), QUERIES)
    expected = flat(query) @ flat(rows_of(chain(as_blocks(), scale_by_adam(moments)))).mT
    torch.testing.assert_close(attr.scores(query, unchecked=True), expected, rtol=1e-10, atol=1e-12)


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
        expected = Attributor(path).search(query, 4, unchecked=True)
        hits = Attributor(path).trace(language_model(), documents(3, seed=2), 4)
        assert hits.indices.equal(expected.indices)
        torch.testing.assert_close(hits.values, expected.values, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"has no parameter .* not the model"):
        Attributor(path).trace(nn.Linear(2, 2), documents())


def test_texts_are_asked_as_tokens(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    loss_fn, params = functionalize(language_model(), targets=TARGETS)
    build(loss_fn, params, [documents()], tmp_path / "run", transform=as_blocks(), dtype="float64")
    attr = Attributor(tmp_path / "run")
    hits = attr.query(["hi ok yes", "no hi"], language_model(), tokenizer, 3)
    for i, text in enumerate(("hi ok yes", "no hi")):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = attr.trace(language_model(), {"input_ids": ids, "labels": ids}, 3)
        assert alone.indices[0].equal(hits.indices[i])
        torch.testing.assert_close(alone.values[0], hits.values[i], rtol=1e-6, atol=1e-9)
    assert attr.query("hi ok yes", language_model(), tokenizer, 3).indices.equal(hits.indices[:1])
    own = attr.query(["x"], language_model(), k=2, tokenize=lambda texts: documents(len(texts)))
    assert own.values.shape == (1, 2)
    with pytest.raises(ValueError, match="needs two"):
        attr.query("hi", language_model(), bpe())
    with pytest.raises(ValueError, match="the query is empty"):
        attr.query([], language_model(), tokenizer)
    with pytest.raises(ValueError, match="need tokenizer="):
        attr.query("hi", language_model())


def test_a_loss_of_the_users_needs_the_function() -> None:
    attr = Attributor(index_of(as_blocks()))
    with pytest.raises(ValueError, match=r"cannot be made from a model alone: pass \(loss_fn, params\)"):
        attr.trace(nn.Linear(2, 2), QUERIES)


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
        Attributor(index).trace((ell, PARAMS), QUERIES)
    expected = Attributor(index).search(rows_of(sides.query, QUERIES), 3, unchecked=True)
    for attr in (Attributor(index, factors=[factors]), Attributor(index, transform=sides.train)):
        assert attr.trace((ell, PARAMS), QUERIES, 3).indices.equal(expected.indices)
    with pytest.raises(FingerprintError):
        Attributor(index, transform=as_blocks()).trace((ell, PARAMS), QUERIES)


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
                found, exact = (one.search(query, 5, blocks, reverse, unchecked=True) for one in (attr, scanned))
                torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=1e-5)
                assert found.indices.equal(exact.indices)


def test_ids_that_faiss_does_not_find_are_dropped() -> None:
    transform = chain(as_blocks(), project(3), unit_norm())
    attr = Attributor(index_of(transform, "float32"), faiss=FaissConfig("IVF8,Flat", nprobe=1))
    query = rows_of(transform, QUERIES)
    few = attr._neighbours.search(flat(query), 30, 1)
    assert (few.indices < 0).any()
    hits = attr.search(query, 30, unchecked=True)
    exact = Attributor(attr.index).search(query, 30, unchecked=True)
    missing = (few.indices < 0).any(1)
    assert (hits.indices >= 0).all()
    assert hits.indices[missing].equal(exact.indices[missing])
    assert hits.indices.sort(dim=1).values.diff(dim=1).ne(0).all()
    assert attr.search(query, None, unchecked=True).values.shape == (Q, N)


def test_the_faiss_cache_is_keyed_by_everything(tmp_path: Path) -> None:
    transform = chain(as_blocks(), project(3))

    def kept(config: FaissConfig, path: Path) -> dict[str, int]:
        Attributor(path, faiss=config).search(rows_of(transform, QUERIES), 2, unchecked=True)
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
    exact = Attributor(tmp_path / "one").search(rows_of(transform, QUERIES), 2, unchecked=True)
    for _ in range(2):
        after = kept(FaissConfig("Flat"), tmp_path / "one")
        found = Attributor(tmp_path / "one", faiss=FaissConfig("Flat")).search(
            rows_of(transform, QUERIES), 2, unchecked=True
        )
        assert found.indices.equal(exact.indices)
        (new,) = after.keys() - before.keys()
        path = tmp_path / "one" / "faiss" / new / "0.faiss"
        path.write_bytes(path.read_bytes()[:50])


def test_appended_rows_are_found_by_faiss(tmp_path: Path) -> None:
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    Attributor(tmp_path / "run", faiss=config).search(query, 2, unchecked=True)
    build(ell, PARAMS, [DATA * 2], tmp_path / "run", transform=transform, append=True)
    found = Attributor(tmp_path / "run", faiss=config).search(query, 7, unchecked=True)
    assert found.indices.equal(Attributor(open_index(tmp_path / "run")).search(query, 7, unchecked=True).indices)
    assert len(list((tmp_path / "run" / "faiss").glob("[!.]*"))) == 1  # what was kept of fewer rows is gone


def test_a_flipped_byte_of_a_kept_faiss_index_is_made_again(tmp_path: Path) -> None:
    """It gave `inf` scores and exit status 0: FAISS has no checksum."""
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    exact = Attributor(tmp_path / "run").search(query, 5, unchecked=True)
    Attributor(tmp_path / "run", faiss=config).search(query, 5, unchecked=True)
    (path,) = (tmp_path / "run" / "faiss").glob("*/0.faiss")
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 12)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        found = Attributor(tmp_path / "run", faiss=config).search(query, 5, unchecked=True)
        assert found.indices.equal(exact.indices)
        torch.testing.assert_close(found.values, exact.values)
        assert path.read_bytes() == whole
    (path.parent / "notes.txt").write_text("mine")
    path.write_bytes(whole[:-1])
    with pytest.raises(FileExistsError, match=r"notes.txt is not of the run"):
        Attributor(tmp_path / "run", faiss=config).search(query, 5, unchecked=True)


def test_a_faiss_index_of_a_disk_that_cannot_be_written_is_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = chain(as_blocks(), project(3))
    index_of(transform, "float32", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    config, query = FaissConfig("Flat"), rows_of(transform, QUERIES)
    exact = Attributor(tmp_path / "run").search(query, 5, unchecked=True)
    for _ in range(2):
        found = Attributor(tmp_path / "run", faiss=config).search(query, 5, unchecked=True)
        assert found.indices.equal(exact.indices)
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "cache" not in (path, *path.parents)] == before
    assert len(list((tmp_path / "cache" / "influence" / "faiss").glob("*/0.faiss"))) == 1


def test_bad_faiss_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = chain(as_blocks(), project(3))
    query, index = rows_of(transform, QUERIES), index_of(transform, "float32")
    with pytest.raises(ValueError, match="does not understand index_factory='Flut'"):
        Attributor(index, faiss=FaissConfig("Flut")).search(query, unchecked=True)
    with pytest.raises(ValueError, match="cannot learn 'IVF100,Flat' from 41 rows"):
        Attributor(index, faiss=FaissConfig("IVF100,Flat")).search(query, unchecked=True)
    with pytest.raises(ValueError, match="nprobe=0"):
        FaissConfig(nprobe=0)
    monkeypatch.setattr(faiss_search, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"1kB are available\. Use mmap_index=True"):
        Attributor(index, faiss=FaissConfig()).search(query, unchecked=True)


# Hits


def test_hits_read_as_a_table() -> None:
    attr = Attributor(index_of(as_blocks()))
    hits = attr.search(rows_of(as_blocks(), QUERIES), 2, unchecked=True)
    lines = repr(hits).splitlines()
    assert lines[0].split() == ["query", "rank", "score", "row", "document"]
    assert len(lines) == 1 + 2 * Q
    assert hits.rows()[1] == {key: column[1] for key, column in hits.to_dict().items()}
    assert len(hits) == Q
    assert "of 6 queries with 41 hits each" in repr(attr.search(rows_of(as_blocks(), QUERIES), None, unchecked=True))
