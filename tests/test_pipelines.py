"""Pipelines beside a dense float64 oracle: build, reduce, score, hessian, the recipes; and one pass for many sinks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import functionalize, hessians, sinks
from influence.func.loss.module_loss import ModuleLoss
from influence.hessians import load as load_factors
from influence.index import build as build_index
from influence.index import open_index
from influence.pipelines import build, ekfac, export, hessian, inspect, mix, query, reduce, score, trackstar, trak
from influence.pipelines.frame.config_file import from_mapping, read_config, to_mapping
from influence.pipelines.frame.configs import DataConfig, LossConfig, ModelConfig, RunConfig, TransformConfig
from influence.pipelines.frame.loading import load_model
from influence.pipelines.frame.prepare import transform_of
from influence.pipelines.passes import best as ends
from influence.pipelines.passes.collect import Summed
from influence.pipelines.passes.pass_steps import of_rows
from tests.pipeline_world import (
    DOCUMENTS,
    FAST,
    build_config,
    corpus,
    flat,
    lines,
    model_config,
    oracle,
    power_of,
    questions,
    sketched,
    world,
)

WHOLE = TransformConfig(projection_dim=0)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    error = (got - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


def scored(run: Path, *queries: Path, **changes: Any) -> Tensor:
    known: dict[str, Any] = {"transform": WHOLE, "execution": FAST} | changes
    config = score.ScoreConfig(str(run), model_config(), corpus(), tuple(map(str, queries)), **known)
    score.run(config)
    return open_index(run).rows(["query0"])["query0"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole rows of the questions."""
    run = tmp_path_factory.mktemp("questions") / "rows"
    build.run(replace(build_config(run, transform=WHOLE), data=questions()))
    return run


def test_an_index_holds_the_oracles_rows_in_the_datasets_order(tmp_path: Path) -> None:
    build.run(build_config(tmp_path / "a"))
    index = open_index(tmp_path / "a")
    close(flat(index.rows()), flat(sketched(oracle("corpus.jsonl"), 4)))
    assert index.index.tolist() == list(range(DOCUMENTS))
    assert len(index.about.shards) == 4
    assert index.about.kind == "index"
    assert int(index.length.sum()) == sum(len(d["text"].split()) for d in lines("corpus.jsonl"))


def test_the_same_rows_in_memory(tmp_path: Path) -> None:
    from influence import data
    from influence.pipelines.frame.prepare import measure
    from influence.pipelines.frame.tokens import read_data

    config = build_config(tmp_path / "a")
    build.run(config)
    measured = measure(config.model, config.loss, config.transform)
    tokens = read_data(config.data, measured)
    batches = data.batches(data.shards(tokens, 8), 256)
    memory = build_index(
        measured.loss_fn, measured.params, batches, transform=transform_of(config.transform), dtype="float64"
    )
    assert torch.equal(memory.matrix(), open_index(tmp_path / "a").matrix())


def test_one_pass_feeds_several_sinks_with_one_forward_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    outputs = ModuleLoss.outputs

    def counted(self: ModuleLoss, params: Any, batch: Any) -> Any:
        calls.append(len(batch["input_ids"]))
        return outputs(self, params, batch)

    config = build_config(tmp_path / "alone", transform=replace(build_config(tmp_path).transform, projection_dim=3))
    monkeypatch.setattr(ModuleLoss, "outputs", counted)
    alone = build.run(config)
    count = len(calls)
    calls.clear()
    also = {"mean": Summed(of_rows(sinks.mean())), "gram": Summed(of_rows(sinks.gram()))}
    outcome = build.run(replace(config, run=str(tmp_path / "many")), also=also)
    assert len(calls) == count
    rows = open_index(tmp_path / "many").rows()
    assert torch.equal(flat(rows), flat(open_index(tmp_path / "alone").rows()))
    for name, row in rows.items():
        close(outcome.facts["mean"][name], row.mean(0), 1e-12)
        close(outcome.facts["gram"][name], row.flatten(1).mT @ row.flatten(1) / len(row), 1e-12)
    assert alone.facts["rows"] == DOCUMENTS
    assert not list((tmp_path / "many").glob("partial-*"))


@pytest.mark.parametrize("method", ["mean", "sum"])
@pytest.mark.parametrize("norms", [(False, False), (True, True)])
def test_reduce_is_the_oracles_mean_or_sum(tmp_path: Path, method: Any, norms: tuple[bool, bool]) -> None:
    view = replace(WHOLE, unit_norm=norms[0])
    config = reduce.ReduceConfig(str(tmp_path / "r"), model_config(), corpus(), method, norms[1], transform=view)
    outcome = reduce.run(replace(config, execution=FAST))
    g = flat(oracle("corpus.jsonl"))
    g = g / g.norm(dim=1, keepdim=True) if norms[0] else g
    expected = g.mean(0) if method == "mean" else g.sum(0)
    expected = expected / expected.norm() if norms[1] else expected
    close(open_index(tmp_path / "r").matrix(), expected[None])
    assert outcome.facts["averaged"] == DOCUMENTS


def test_a_mean_is_over_what_has_a_label_to_predict(tmp_path: Path) -> None:
    """It was divided by all documents, empty ones too."""
    import json

    file = tmp_path / "some.jsonl"
    texts = ["the home of babo", "", "babo", "babo lives in"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plain = reduce.ReduceConfig(str(tmp_path / "m"), model_config(), DataConfig(str(file)), "mean")
    outcome = reduce.run(replace(plain, transform=WHOLE, execution=FAST))
    reduce.run(replace(plain, run=str(tmp_path / "s"), method="sum", transform=WHOLE, execution=FAST))
    assert (outcome.facts["examples"], outcome.facts["averaged"]) == (4, 2)
    assert "2 without a label" in outcome.text
    close(open_index(tmp_path / "m").matrix() * 2, open_index(tmp_path / "s").matrix(), 1e-13)


def test_scores_are_inner_products_of_whole_gradients(tmp_path: Path, asked: Path) -> None:
    g, q = flat(oracle("corpus.jsonl")), flat(oracle("questions.jsonl"))
    close(scored(tmp_path / "s", asked), g @ q.mT)
    index = open_index(tmp_path / "s")
    assert index.about.kind == "scores"
    assert index.about.shards[0].examples == 8


def test_nearest_several_runs_and_blocks_in_one_pass(tmp_path: Path, asked: Path) -> None:
    config = reduce.ReduceConfig(str(tmp_path / "mean"), model_config(), questions(), transform=WHOLE, execution=FAST)
    reduce.run(config)
    g, q = oracle("corpus.jsonl"), oracle("questions.jsonl")
    scored(tmp_path / "s", asked, tmp_path / "mean", mode="nearest", per_block=True)
    found = open_index(tmp_path / "s").rows()
    whole = flat(g) @ flat(q).mT
    close(found["query0"], whole.amax(1, keepdim=True))
    close(found["query1"], flat(g) @ flat(q).mean(0)[:, None])
    parts = [row for name, row in found.items() if name.startswith("query0/")]
    assert len(parts) == len(g)
    close(torch.stack(parts).sum(0), found["query0"])
    name = next(iter(g))
    best = whole.argmax(1)
    close(found[f"query0/{name}"][:, 0], (g[name].flatten(1) * q[name].flatten(1)[best]).sum(1))


def test_some_blocks_and_a_heap_instead_of_all_scores(tmp_path: Path, asked: Path) -> None:
    g, q = oracle("corpus.jsonl"), oracle("questions.jsonl")
    name = list(g)[3]
    part = g[name].flatten(1) @ q[name].flatten(1).mT
    close(scored(tmp_path / "b", asked, blocks=(name,)), part)
    config = score.ScoreConfig(str(tmp_path / "k"), model_config(), corpus(), (str(asked),), blocks=(name,), top_k=5)
    outcome = score.run(replace(config, transform=WHOLE, execution=FAST))
    found = ends.read_best(tmp_path / "k")
    close(found["query0/best"].values, part.topk(5, dim=0).values.mT)
    assert torch.equal(found["query0/best"].indices, part.topk(5, dim=0).indices.mT)
    assert torch.equal(found["query0/worst"].indices, part.topk(5, dim=0, largest=False).indices.mT)
    assert outcome.facts["queries"][0]["best"]["indices"] == found["query0/best"].indices.tolist()
    assert not (tmp_path / "k" / "index.h5").exists()
    with pytest.raises(FileExistsError, match="finished run"):
        score.run(replace(config, transform=WHOLE, execution=FAST))


@pytest.mark.parametrize(("method", "base"), [*((name, None) for name in hessians.METHODS), ("ekfac", "tkfac")])
def test_a_hessian_is_what_fit_returns(tmp_path: Path, method: Any, base: Any) -> None:
    from influence import data
    from influence.pipelines.frame.prepare import measure
    from influence.pipelines.frame.tokens import read_data

    view = replace(WHOLE, projection_dim=4 if method == "autocorrelation" else 0)
    config = hessian.HessianConfig(str(tmp_path / "h"), model_config(), corpus(), method, "data", base=base)
    outcome = hessian.run(replace(config, transform=view, execution=FAST))
    measured = measure(config.model, config.loss, view)
    batches = list(data.batches(read_data(config.data, measured), 512))
    value = hessians.build(method, **({} if base is None else {"base": base}))
    how = {"transform": measured.transform, "labels": "data", "progress": False}
    expected = hessians.fit(measured.loss_fn, measured.params, batches, value, **how)
    found = load_factors(tmp_path / "h")
    assert outcome.facts["documents"] == found.documents == DOCUMENTS
    assert (found.method, found.under) == (expected.method, expected.under)
    for name, c in found.blocks.items():
        close(c.dense(), expected.blocks[name].dense(), 1e-8)
    assert sorted(p.name for p in (tmp_path / "h").iterdir()) == [".lock", "config.yaml", "factors.h5", "run.json"]


def test_mix_is_the_hessians_room(tmp_path: Path) -> None:
    for name, data in (("q", questions()), ("i", corpus())):
        config = hessian.HessianConfig(str(tmp_path / name), model_config(), data, "autocorrelation")
        hessian.run(replace(config, transform=TransformConfig(projection_dim=3), execution=FAST))
    mix.run(mix.MixConfig(str(tmp_path / "m"), str(tmp_path / "q"), str(tmp_path / "i"), components=5))
    expected = hessians.mix(load_factors(tmp_path / "q"), load_factors(tmp_path / "i"), components=5)
    assert load_factors(tmp_path / "m").digest == expected.digest
    with pytest.raises(FileExistsError, match="--overwrite"):
        mix.run(mix.MixConfig(str(tmp_path / "m"), str(tmp_path / "q"), str(tmp_path / "i")))


def test_trackstar_is_the_cosine_in_the_metric_of_the_mixed_curvature(tmp_path: Path) -> None:
    p, c = 3, 0.1
    config = trackstar.TrackstarConfig(
        str(tmp_path / "t"),
        model_config(),
        corpus(),
        questions(),
        components=10,
        transform=TransformConfig(projection_dim=p, damping=c),
        execution=FAST,
    )
    outcome = trackstar.run(config)
    g, q = (sketched(oracle(name), p) for name in ("corpus.jsonl", "questions.jsonl"))
    grams = [{n: r.flatten(1).mT @ r.flatten(1) / len(r) for n, r in rows.items()} for rows in (q, g)]
    spectra = [
        torch.cat([torch.linalg.eigvalsh(h) for h in gram.values()]).sort(descending=True).values for gram in grams
    ]
    w = float(spectra[1][9] / (spectra[0][9] + spectra[1][9]))
    roots = {n: power_of(w * grams[0][n] + (1 - w) * grams[1][n], -0.5, c) for n in g}
    sides = [torch.cat([r.flatten(1) @ roots[n] for n, r in rows.items()], 1) for rows in (g, q)]
    unit = [x / x.norm(dim=1, keepdim=True) for x in sides]
    close(open_index(tmp_path / "t" / "scores").rows(["query0"])["query0"], unit[0] @ unit[1].mT, 1e-8)
    assert outcome.run == str(tmp_path / "t")
    assert inspect.run(inspect.InspectConfig(str(tmp_path / "t"))).facts["finished"]


def test_ekfac_is_one_inverse_on_the_queries_side(tmp_path: Path) -> None:
    config = ekfac.EkfacConfig(
        str(tmp_path / "e"), model_config(), corpus(), questions(), labels="data", execution=FAST
    )
    ekfac.run(config)
    factors = load_factors(tmp_path / "e" / "hessian")
    assert factors.method == "ekfac"
    g, q = oracle("corpus.jsonl"), oracle("questions.jsonl")
    total = torch.zeros(DOCUMENTS, dtype=torch.float64)
    for name, curvature in factors.blocks.items():
        h = power_of(curvature.dense(), -1.0, 0.1)
        total += g[name].flatten(1) @ h @ q[name].flatten(1).mean(0)
    close(open_index(tmp_path / "e" / "scores").rows(["query0"])["query0"][:, 0], total, 1e-8)


def test_compressed_ekfac_at_full_size_is_the_uncompressed_one(tmp_path: Path) -> None:
    config = ekfac.EkfacConfig(
        str(tmp_path / "a"), model_config(), corpus(), questions(), labels="data", query_rows="individual"
    )
    config = replace(config, execution=FAST)
    ekfac.run(config)
    ekfac.run(replace(config, run=str(tmp_path / "b"), compress=32))
    whole, full = (open_index(tmp_path / name / "scores").matrix() for name in "ab")
    close(full, whole, 1e-8)


def test_trak_averages_checkpoints(tmp_path: Path) -> None:
    other = load_model(model_config())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    one = str(world() / "model")
    view = TransformConfig(projection_dim=12, projection_target="global")
    config = trak.TrakConfig(str(tmp_path / "t"), model_config(), corpus(), questions(), transform=view, execution=FAST)
    trak.run(replace(config, checkpoints=(one, str(tmp_path / "other"))))
    parts = [open_index(tmp_path / "t" / f"checkpoint{n}-scores").matrix() for n in (0, 1)]
    assert not torch.allclose(parts[0], parts[1], rtol=1e-2)
    close(open_index(tmp_path / "t" / "scores").matrix(), (parts[0] + parts[1]) / 2, 1e-14)
    made = transform_of(view)
    layout = functionalize(load_model(model_config()))[0].layout
    g, q = (
        made.apply({f"{n}.weight": row for n, row in oracle(name, log_odds=True).items()}, layout)["global"]
        for name in ("corpus.jsonl", "questions.jsonl")
    )
    close(parts[0], g @ power_of(g.mT @ g / len(g), -1.0, 0.1) @ q.mT, 1e-8)


def test_query_trace_search_and_score_agree(tmp_path: Path, asked: Path) -> None:
    from influence import Attributor, data
    from influence.pipelines.frame.prepare import measure
    from influence.pipelines.frame.tokens import read_data

    build.run(build_config(tmp_path / "c", transform=WHOLE))
    expected = flat(oracle("questions.jsonl")) @ flat(oracle("corpus.jsonl")).mT
    texts = [line["text"] for line in lines("questions.jsonl")]
    answers = query.run(query.QueryConfig(str(tmp_path / "c"), tuple(texts), k=DOCUMENTS)).facts["answers"]
    by_query = torch.zeros_like(expected)
    for row, answer in enumerate(answers):
        for hit in answer["best"]:
            by_query[row, hit["example"]] = hit["score"]
    close(by_query, expected)
    assert answers[0]["worst"][0]["example"] == int(expected[0].argmin())
    assert answers[0]["best"][0]["text"] == lines("corpus.jsonl")[answers[0]["best"][0]["example"]]["text"]
    close(scored(tmp_path / "s", asked).mT, expected)
    attributor = Attributor(tmp_path / "c")
    config = build_config(tmp_path)
    measured = measure(config.model, config.loss, WHOLE)
    batch = next(data.batches(read_data(questions(), measured), 4096))
    hits = attributor.ask(batch, (measured.loss_fn, measured.params)).top(None)
    traced = torch.zeros_like(expected).scatter_(1, hits.indices, hits.values.double())
    close(traced[batch["index"].argsort()], expected)


def test_a_smaller_and_a_larger_projection_meet_in_a_score(tmp_path: Path) -> None:
    """Rows of nested sketches meet at the smaller dim, whichever side it is on."""
    small, large = TransformConfig(projection_dim=3), TransformConfig(projection_dim=5)
    for name, view in (("q3", small), ("q5", large)):
        build.run(replace(build_config(tmp_path / name, transform=view), data=questions()))
    plain = scored(tmp_path / "33", tmp_path / "q3", transform=small)
    close(scored(tmp_path / "53", tmp_path / "q5", transform=small), plain)
    close(scored(tmp_path / "35", tmp_path / "q3", transform=large), plain)


def test_token_rows_sum_to_the_documents_and_chunks_know_theirs(tmp_path: Path) -> None:
    build.run(build_config(tmp_path / "t", per_token="use", transform=WHOLE))
    index = open_index(tmp_path / "t")
    assert index.per_token
    tokens = index.matrix()
    summed = torch.stack([tokens[a:b].sum(0) for a, b in zip(index.offsets[:-1], index.offsets[1:], strict=True)])
    close(summed, flat(oracle("corpus.jsonl")))
    answer = query.run(query.QueryConfig(str(tmp_path / "t"), ("babo lives in the attic",), k=3))
    hit = answer.facts["answers"][0]["best"][0]
    assert hit["position"] < int(index.length[hit["example"]])
    assert "token" in answer.text
    words = lines("corpus.jsonl")[hit["example"]]["text"].split()
    assert f"«{words[hit['position']]}»" in hit["text"]
    chunked = replace(corpus(), chunk_length=7)
    build.run(replace(build_config(tmp_path / "c"), data=chunked))
    build.run(replace(build_config(tmp_path / "ct", per_token="use"), data=chunked))
    documents = [number for number, row in enumerate(lines("corpus.jsonl")) for _ in [*row["text"].split(), "<s>"]]
    whole = len(documents) // 7
    chunks, of_tokens = open_index(tmp_path / "c"), open_index(tmp_path / "ct")
    assert chunks.document.tolist() == documents[: 7 * whole : 7]
    assert of_tokens.document.tolist() == documents[: 7 * whole]
    said = query.run(query.QueryConfig(str(tmp_path / "c"), ("babo lives in the attic",), k=1))
    assert len(said.facts["answers"][0]["best"][0]["text"].split()) == 7


def test_examples_are_appended_behind_those_that_are_there(tmp_path: Path) -> None:
    config = build_config(tmp_path / "a")
    build.run(config)
    more = replace(config, data=questions(), append=True)
    build.run(more)
    with pytest.raises(FileExistsError, match="has these data already, appended from shard"):
        build.run(more)
    index = open_index(tmp_path / "a")
    both = [flat(sketched(oracle(name), 4)) for name in ("corpus.jsonl", "questions.jsonl")]
    close(index.matrix(), torch.cat(both))
    assert index.index.tolist() == list(range(DOCUMENTS + len(both[1])))
    assert from_mapping(build.BuildConfig, read_config(tmp_path / "a" / "config.yaml")) == config
    text = lines("questions.jsonl")[0]["text"]
    answer = query.run(query.QueryConfig(str(tmp_path / "a"), (text,), k=len(index))).facts["answers"][0]
    found = {hit["example"]: hit["text"] for hit in answer["best"]}
    assert found[DOCUMENTS] == text
    assert found[0] == lines("corpus.jsonl")[0]["text"]
    with pytest.raises(FileNotFoundError, match="no index"):
        build.run(replace(more, run=str(tmp_path / "nothing")))


def test_half_precision_scores_have_their_stated_error(tmp_path: Path) -> None:
    g = flat(sketched(oracle("corpus.jsonl"), 4))
    for dtype, bound in (("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 2e-2)):
        build.run(build_config(tmp_path / dtype, execution=replace(FAST, dtype=dtype)))
        rows = open_index(tmp_path / dtype).matrix().double()
        error = (rows @ rows.mT - g @ g.mT).abs() / (g.norm(dim=1)[:, None] * g.norm(dim=1))
        assert float(error.max()) < bound, (dtype, float(error.max()))


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet"])
def test_exports_hold_the_rows(tmp_path: Path, name: str) -> None:
    import numpy
    from pyarrow import parquet
    from safetensors.torch import load_file

    build.run(build_config(tmp_path / "a"))
    index, file = open_index(tmp_path / "a"), tmp_path / "out" / name
    export.run(export.ExportConfig(str(tmp_path / "a"), str(file)))
    if name.endswith("npy"):
        found = torch.from_numpy(numpy.load(file))
    elif name.endswith("safetensors"):
        tensors = load_file(file)
        found = flat({block: tensors[f"rows/{block}"] for block in index.blocks})
        assert torch.equal(tensors["loss"], index.loss)
    else:
        table = parquet.read_table(file)
        columns = [torch.tensor(table[block].to_pylist(), dtype=torch.float64) for block in index.blocks]
        found = torch.cat(columns, 1)
    assert torch.equal(found, index.matrix())
    with pytest.raises(FileExistsError, match="--overwrite"):
        export.run(export.ExportConfig(str(tmp_path / "a"), str(file)))


def test_exports_take_globs_of_blocks(asked: Path, tmp_path: Path) -> None:
    """Names alone, where every other option that names blocks takes globs; a glob that matches nothing exports all."""
    import numpy

    index, file = open_index(asked), tmp_path / "a.npy"
    names = [name for name in index.blocks if name.endswith(("q_proj", "down_proj"))]
    assert 0 < len(names) < len(index.blocks)
    export.run(export.ExportConfig(str(asked), str(file), blocks=("*q_proj", "*down_proj")))
    assert torch.equal(torch.from_numpy(numpy.load(file)), index.matrix(blocks=names))
    with pytest.raises(ValueError, match=r"blocks: '\*q_prj' matches none of the index's .* near misses: .*q_proj"):
        export.run(export.ExportConfig(str(asked), str(tmp_path / "b.npy"), blocks=("*q_prj",)))
    assert not (tmp_path / "b.npy").exists()


def test_a_finished_run_is_refused_before_anything_is_loaded(asked: Path, tmp_path: Path) -> None:
    """Minutes of loading, and then the words that could have come at once."""
    nowhere: Any = {"model": ModelConfig(str(tmp_path / "no-model")), "data": DataConfig(str(tmp_path / "no-data"))}
    made = {
        "build": (build.run, build.BuildConfig(str(asked), **nowhere)),
        "reduce": (reduce.run, reduce.ReduceConfig(str(asked), **nowhere)),
        "score": (score.run, score.ScoreConfig(str(asked), **nowhere, query=("no-query",))),
        "hessian": (hessian.run, hessian.HessianConfig(str(asked), **nowhere)),
    }
    for name, (run, config) in made.items():
        more = ".*--append" if name == "build" else ""
        with pytest.raises(FileExistsError, match=f"holds a run of kind 'index' .finished.*--overwrite{more}"):
            run(config)
        for execution in (RunConfig(overwrite=True), RunConfig(dry_run=True)):
            with pytest.raises(FileNotFoundError, match="no-model"):
                run(replace(config, execution=execution))
        with pytest.raises(FileNotFoundError, match="no-model"):
            run(replace(config, run=str(tmp_path / "new")))
    with pytest.raises(FileNotFoundError, match=r"new"):
        build.run(build.BuildConfig(str(tmp_path / "new"), **nowhere, append=True))
    assert open_index(asked).examples


def test_configurations_go_to_yaml_and_back(tmp_path: Path) -> None:
    view = TransformConfig(targets=("*q_proj*",), hessian=None, damping=1.0)
    config = build_config(tmp_path / "a", transform=view, loss=LossConfig("log_odds"))
    build.run(config)
    read = from_mapping(build.BuildConfig, read_config(tmp_path / "a" / "config.yaml"))
    assert read == config
    assert from_mapping(build.BuildConfig, to_mapping(config)) == config
    for change, message in (
        ({"runn": "x"}, "unknown field runn"),
        ({"data": {"dataset": 3}}, "data.dataset must be str"),
        ({"data": {}}, "data.dataset is missing"),
        ({"transform": {"whiten": "both"}}, "one of eigen, kfac"),
        ({"transform": {"targets": ["a", 1]}}, "a list of str"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(build.BuildConfig, to_mapping(config) | change)


def own_loss(output: Any, batch: Any) -> Tensor:
    """The squared logits of what is there."""
    return (output.logits.square() * batch["attention_mask"][..., None]).sum((1, 2))


def test_a_loss_of_the_users_by_name(tmp_path: Path) -> None:
    build.run(build_config(tmp_path / "a", loss=LossConfig("tests.test_pipelines:own_loss")))
    assert not torch.equal(open_index(tmp_path / "a").loss, torch.zeros(DOCUMENTS))
    for name, message in (("tests.nothing:f", "cannot be imported"), ("mean", "one of cross_entropy"), ("re:X", "X")):
        with pytest.raises(ValueError, match=message):
            build.run(build_config(tmp_path / "b", loss=LossConfig(name)))


def test_curvature_is_put_where_it_was_fitted(tmp_path: Path) -> None:
    config = hessian.HessianConfig(str(tmp_path / "h"), model_config(), corpus(), "autocorrelation")
    hessian.run(replace(config, transform=TransformConfig(projection_dim=3), execution=FAST))
    at = str(tmp_path / "h")
    names = [step.name for step in transform_of(TransformConfig(projection_dim=3, hessian=at, unit_norm=True)).steps]
    assert names == ["as_blocks", "project", "precondition", "unit_norm"]
    with pytest.raises(ValueError, match="were fitted under"):
        transform_of(TransformConfig(projection_dim=4, hessian=at))
    with pytest.raises(ValueError, match="whiten chooses"):
        transform_of(TransformConfig(projection_dim=3, hessian=at, whiten="eigen"))
    with pytest.raises(ValueError, match="whiten needs the curvature"):
        transform_of(TransformConfig(whiten="eigen"))
