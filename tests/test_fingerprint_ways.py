"""Every way to ask an index refuses what does not fit, by name and with both values, and accepts what does.

The two sides are really collected differently: nothing here edits a fingerprint. `tests/test_index_fingerprints.py`
has the rules; this file has the doors: `Attributor.ask` of rows, of a batch and of texts, and the commands `score` and
`query`.
"""

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from influence import (
    Attributor,
    Moments,
    Transform,
    as_blocks,
    build,
    chain,
    data,
    eigen_whiten,
    per_example_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    unit_norm,
)
from influence.cli import main
from influence.hessians import load as load_factors
from influence.index import FingerprintError, Index, open_index, provenance
from influence.pipelines import hessian, score
from influence.pipelines.frame.configs import LossConfig, ModelConfig, TransformConfig
from influence.pipelines.frame.directory import fingerprint_for
from influence.pipelines.frame.loading import load_model
from influence.pipelines.frame.planning import first_batch
from influence.pipelines.frame.prepare import Measured, batches_of, measure, transform_of
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes import queries
from influence.pipelines.passes.pass_steps import plan_step
from tests.pipeline_world import FAST, build_config, corpus, flat, lines, model_config, questions, world

PLAIN = TransformConfig(projection_dim=4)
WHOLE = TransformConfig(projection_dim=0)


class Side(NamedTuple):
    """What a query measures: a transform, and where that differs the model and the loss."""

    transform: Transform
    model: ModelConfig | None = None
    loss: LossConfig = LossConfig()
    targets: tuple[str, ...] = ()


def sketch(*before: Transform, dim: int = 4, **how: Any) -> Transform:
    return chain(as_blocks(), *before, project(dim, **how))


@functools.cache
def moments(shift: float) -> Moments:
    params = measured_by(Side(Transform())).params
    return Moments({name: p.double().square() + shift for name, p in params.items()})


@functools.cache
def folder() -> Path:
    """Where the factors and the other models are."""
    place = world() / "ways"
    place.mkdir(exist_ok=True)
    return place


@functools.cache
def fitted(name: str) -> str:
    """Return a run of influence hessian on the corpus, or on the questions."""
    run = str(folder() / name)
    rows = corpus() if name == "one" else questions()
    config = hessian.HessianConfig(run, model_config(), rows, "kfac", "data", execution=FAST)
    hessian.run(config)
    return run


def curved(name: str = "one", power: float = -1.0, **how: Any) -> Transform:
    return chain(as_blocks(), precondition(load_factors(fitted(name)), power, **how))


@functools.cache
def other_weights() -> ModelConfig:
    place = folder() / "other"
    shutil.copytree(world() / "model", place)
    model = load_model(model_config())
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.5)
    model.save_pretrained(place)
    return ModelConfig(str(place))


# what differs: the query's side, the stored side as the command line has it or as Python makes it, the field
Stored = TransformConfig | Transform
REFUSED: dict[str, tuple[Callable[[], Side], Callable[[], Stored], str]] = {
    "weights": (lambda: Side(sketch(), other_weights()), lambda: PLAIN, "weights"),
    "blocks": (lambda: Side(sketch(), targets=("*q_proj.weight",)), lambda: PLAIN, "shapes"),
    "bias": (lambda: Side(chain(as_blocks(bias=True), project(4))), lambda: PLAIN, "as_blocks.bias"),
    "heads": (lambda: Side(sketch(split_heads())), lambda: PLAIN, "split_heads"),
    "kind": (lambda: Side(sketch(kind="normal")), lambda: PLAIN, "project.kind"),
    "seed": (lambda: Side(sketch(seed=1)), lambda: PLAIN, "project.seed"),
    "no projection": (lambda: Side(as_blocks()), lambda: PLAIN, "project"),
    "a dim that does not nest": (
        lambda: Side(sketch(kind="srht", dim=2)),
        lambda: TransformConfig(projection_dim=4, projection_kind="srht"),
        "project.dim",
    ),
    "a dim under a norm": (
        lambda: Side(chain(sketch(dim=2), unit_norm())),
        lambda: TransformConfig(projection_dim=4, unit_norm=True),
        "project.dim",
    ),
    "target": (
        lambda: Side(sketch(kind="sparse")),
        lambda: TransformConfig(projection_dim=4, projection_target="global"),
        "project.target",
    ),
    "signs": (
        lambda: Side(sketch(kind="sparse", signs=2)),
        lambda: TransformConfig(projection_dim=4, projection_kind="sparse"),
        "project.signs",
    ),
    "square": (lambda: Side(sketch(reshape_to_square=True)), lambda: PLAIN, "project.reshape_to_square"),
    "metric": (lambda: Side(chain(sketch(), unit_norm())), lambda: PLAIN, "unit_norm"),
    "order": (
        lambda: Side(chain(as_blocks(), unit_norm(), project(4))),
        lambda: TransformConfig(projection_dim=4, unit_norm=True),
        "order",
    ),
    "basis": (
        lambda: Side(chain(as_blocks(), eigen_whiten(load_factors(fitted("two")), 4))),
        lambda: TransformConfig(projection_dim=4, hessian=fitted("one"), whiten="eigen"),
        "eigen_whiten.factors",
    ),
    "half an inverse": (lambda: Side(curved(power=-0.5)), lambda: WHOLE, "curvature"),
    "the other half": (lambda: Side(as_blocks()), lambda: whole(-0.5), "curvature"),
    "an inverse on both sides": (lambda: Side(curved()), lambda: whole(-1.0), "curvature"),
    "roots of two curvatures": (lambda: Side(curved("two", -0.5)), lambda: whole(-0.5), "curvature"),
    "roots of two dampings": (lambda: Side(curved(power=-0.5, damping=0.2)), lambda: whole(-0.5), "curvature"),
    "roots of two inversions": (
        lambda: Side(curved(power=-0.5, inversion="tikhonov")),
        lambda: whole(-0.5),
        "curvature",
    ),
    "a scale on the query alone": (lambda: Side(sketch(scale_by_adam(moments(1)))), lambda: PLAIN, "scale_by_adam"),
    "two moments": (
        lambda: Side(sketch(scale_by_adam(moments(2)))),
        lambda: sketch(scale_by_adam(moments(1))),
        "scale_by_adam.moments",
    ),
    "two optimizers": (
        lambda: Side(sketch(scale_by_adafactor(moments(1)))),
        lambda: sketch(scale_by_adam(moments(1))),
        "scale_by_adam",
    ),
}
ACCEPTED: dict[str, tuple[Callable[[], Side], Callable[[], Stored]]] = {
    "other data": (lambda: Side(sketch()), lambda: PLAIN),
    "another loss": (lambda: Side(sketch(), loss=LossConfig("log_odds", "mean")), lambda: PLAIN),
    "the inverse on the query's side": (lambda: Side(curved()), lambda: WHOLE),
    "the inverse on the training side": (lambda: Side(as_blocks()), lambda: whole(-1.0)),
    "half on both": (lambda: Side(curved(power=-0.5)), lambda: whole(-0.5)),
    "a scale on the training side (LESS)": (lambda: Side(sketch()), lambda: sketch(scale_by_adam(moments(1)))),
    "one scale on both": (
        lambda: Side(sketch(scale_by_adam(moments(1)))),
        lambda: sketch(scale_by_adam(moments(1))),
    ),
    "a smaller dim": (lambda: Side(sketch(dim=2)), lambda: PLAIN),
    "a larger dim": (lambda: Side(sketch(dim=6)), lambda: PLAIN),
}


def whole(power: float) -> TransformConfig:
    return TransformConfig(projection_dim=0, hessian=fitted("one"), power=power)


@functools.cache
def _measured(model: ModelConfig, loss: LossConfig, targets: tuple[str, ...]) -> Measured:
    return measure(model, loss, TransformConfig(targets=targets))


def measured_by(side: Side) -> Measured:
    found = _measured(side.model or model_config(), side.loss, side.targets)
    return found._replace(transform=side.transform)


def batch_of(rows: Any, side: Side) -> dict[str, Tensor]:
    (batch,) = data.batches(read_data(rows, measured_by(side)), 4096)
    return batch


def collected(side: Side, rows: Any, run: Path) -> Index:
    """Build an index of one side from Python."""
    made = measured_by(side)
    return build(made.loss_fn, made.params, [batch_of(rows, side)], run, transform=side.transform, dtype="float64")


def made_by(stored: Stored) -> Transform:
    return stored if isinstance(stored, Transform) else transform_of(stored)


class Sides(NamedTuple):
    """Two sides on disk: the corpus's rows, and the questions'."""

    side: Side
    stored: Stored
    train: Path
    asked: Path


def sides(case: tuple[Callable[[], Side], Callable[[], Stored]], place: Path) -> Sides:
    side, stored = case[0](), case[1]()
    train = folder() / made_by(stored).fingerprint
    if not train.exists():
        collected(Side(made_by(stored)), corpus(), train)
    collected(side, questions(), place / "asked")
    return Sides(side, stored, train, place / "asked")


def by_rows(at: Sides, place: Path, force: bool) -> Tensor:
    made, batch = measured_by(at.side), batch_of(questions(), at.side)
    rows = per_example_grads(made.loss_fn, made.params, batch, transform=made.transform)
    known = provenance(made.loss_fn, made.params, rows)
    hits = Attributor(at.train).ask(rows, fingerprint=known, force=force).top(None)
    return in_order(hits, batch["index"])


def by_batch(at: Sides, place: Path, force: bool) -> Tensor:
    made, batch = measured_by(at.side), batch_of(questions(), at.side)
    asked = Attributor(at.train)
    hits = asked.ask(batch, (made.loss_fn, made.params), transform=made.transform, force=force).top(None)
    return in_order(hits, batch["index"])


def by_texts(at: Sides, place: Path, force: bool) -> Tensor:
    made, texts = measured_by(at.side), [row["text"] for row in lines("questions.jsonl")]
    asked = Attributor(at.train)
    how: dict[str, Any] = {"transform": made.transform, "force": force}
    return in_order(asked.ask(texts, (made.loss_fn, made.params), tokenizer=made.tokenizer, **how).top(None), None)


def by_score(at: Sides, place: Path, force: bool) -> Tensor:
    """Score the corpus; a transform that no configuration describes meets the queries as a pass lets it."""
    if isinstance(at.stored, TransformConfig):
        how: dict[str, Any] = {"force": force, "transform": at.stored, "execution": FAST}
        score.run(score.ScoreConfig(str(place), model_config(), corpus(), (str(at.asked),), **how))
        return open_index(place).rows(["query0"])["query0"].mT
    made = measured_by(Side(at.stored))
    tokens = read_data(corpus(), made)
    first = first_batch([tokens], batches_of(FAST))
    step = plan_step(made, first, FAST, tokens, "causal")
    known = fingerprint_for(build_config(place), made, tokens, step)
    (asked,) = queries.load_queries([str(at.asked)], known, step.shapes, force=force)
    scores = torch.cat([queries.scores_of(step.see(b).collected.rows, asked).sum(0) for b in batches_of(FAST)(tokens)])
    order = torch.cat([b["index"] for b in batches_of(FAST)(tokens)])
    return scores[order.argsort()].mT


WAYS = {"rows": by_rows, "batch": by_batch, "texts": by_texts, "score": by_score}


def in_order(hits: Any, index: Tensor | None) -> Tensor:
    values = torch.zeros(hits.values.shape, dtype=torch.float64).scatter_(1, hits.ids, hits.values.double())
    return values if index is None else values[index.argsort()]


@pytest.mark.parametrize("name", REFUSED)
def test_every_way_names_the_field_and_both_values(name: str, tmp_path: Path) -> None:
    *case, field = REFUSED[name]
    at = sides((case[0], case[1]), tmp_path)
    said = rf"the query's {field} is .+, and the stored rows' is .+\(field '{field}'\)"
    for way, ask in WAYS.items():
        with pytest.raises(FingerprintError, match=said):
            ask(at, tmp_path / way, False)
        assert not (tmp_path / way).exists()  # refused before anything is written
    with pytest.warns(UserWarning, match=rf"forced past \d+ differences: .*'{field}': the query's"), shapes_apart():
        by_rows(at, tmp_path, True)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_warns_where_it_is_forced(way: str, tmp_path: Path) -> None:
    at = sides(REFUSED["seed"][:2], tmp_path)
    with pytest.warns(
        UserWarning, match="forced past 1 differences: 'project.seed': the query's project.seed is 1, and the stored"
    ):
        found = WAYS[way](at, tmp_path / way, True)
    query, train = (flat(open_index(run).rows()) for run in (at.asked, at.train))
    torch.testing.assert_close(found, query @ train.mT)


@contextlib.contextmanager
def shapes_apart() -> Iterator[None]:
    """What was forced may still have no inner product."""
    try:
        yield
    except FingerprintError:
        raise
    except ValueError as error:
        assert any(part in str(error) for part in ("have shape", "lack")), error  # noqa: PT017


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_way_accepts_what_fits_and_they_agree(name: str, tmp_path: Path) -> None:
    at = sides(ACCEPTED[name], tmp_path)
    side, stored = at.side.transform, made_by(at.stored)
    dims = [step.settings["dim"] for t in (side, stored) for step in t.steps if step.name == "project"]
    small = len(set(dims)) == 2
    if small:  # they meet at the smaller
        collected(at.side._replace(transform=sketch(dim=min(dims))), questions(), tmp_path / "small-asked")
        collected(Side(sketch(dim=min(dims))), corpus(), tmp_path / "small-train")
    runs = (tmp_path / "small-asked", tmp_path / "small-train") if small else (at.asked, at.train)
    query, train = (flat(open_index(run).rows()) for run in runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way, ask in WAYS.items():
            found = ask(at, tmp_path / way, False)
            error = float((found - query @ train.mT).norm() / (query @ train.mT).norm())
            assert error < 1e-9, (way, error)


def told(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str]:
    """Return the exit status and what the command line said on standard error."""
    capsys.readouterr()
    return main([str(flag) for flag in flags]), capsys.readouterr().err


def flags_of(command: str, run: Path, rows: str = "corpus.jsonl", *more: object) -> list[object]:
    data = ["--model", world() / "model", "--dataset", world() / rows]
    return [command, run, *data, "--projection-dim", 4, "--shard-size", 8, *more]


def test_the_command_line_refuses_each_field_and_takes_what_fits(tmp_path: Path, capsys: Any) -> None:
    asked = tmp_path / "asked"
    assert told(capsys, *flags_of("reduce", asked, "questions.jsonl"))[0] == 0
    sparse = tmp_path / "sparse"
    assert told(capsys, *flags_of("reduce", sparse, "questions.jsonl", "--projection-kind", "sparse"))[0] == 0
    curvature = ["--projection-dim", 0, "--hessian", fitted("one"), "--power"]
    for name, power in (("half", -0.5), ("one", -1.0)):
        assert told(capsys, *flags_of("reduce", tmp_path / name, "questions.jsonl", *curvature, power))[0] == 0
    refused = {
        "kind": (asked, ["--projection-kind", "normal"], "the query's project.kind is 'rademacher', and"),
        "dim": (sparse, ["--projection-kind", "sparse", "--projection-dim", 3], "the query's project.dim is 4, and"),
        "signs": (
            sparse,
            ["--projection-kind", "sparse", "--projection-signs", 2],
            "the query's project.signs is 1, and",
        ),
        "target": (sparse, ["--projection-target", "global"], "the query's project.target is 'per_block', and"),
        "blocks": (asked, ["--targets", "*q_proj.weight", "--unit-norm"], "the query's --unit-norm is None, and"),
        "no projection": (asked, ["--projection-dim", 0], "the query's project is {'dim': 4"),
        "basis": (asked, ["--hessian", fitted("one"), "--whiten", "eigen"], "the query's eigen_whiten is None, and"),
        "half": (
            tmp_path / "half",
            ["--projection-dim", 0],
            "^-0.5 (damping 0.1, damped), and the stored rows' is none",
        ),
        "twice": (tmp_path / "one", [*curvature, -1.0], "^-1 (damping 0.1, damped), and the stored rows' is "),
        "damping": (tmp_path / "half", [*curvature, -0.5, "--damping", 0.2], "^-0.5 (damping 0.2, damped)"),
    }
    for name, (query, flags, part) in refused.items():
        status, said = told(capsys, *flags_of("score", tmp_path / "s", "corpus.jsonl", "--query", query, *flags))
        assert (status, said.count("\n")) == (1, 1), (name, said)
        assert part in said, (name, said)
    assert not (tmp_path / "s").exists()
    taken = {
        "loss": (asked, ["--loss", "log_odds"]),
        "smaller": (asked, ["--projection-dim", 3]),
        "larger": (asked, ["--projection-dim", 5]),
        "halves": (tmp_path / "half", [*curvature, -0.5]),
        "query": (tmp_path / "one", ["--projection-dim", 0]),
    }
    for name, (query, flags) in taken.items():
        told_of = flags_of("score", tmp_path / f"s-{name}", "corpus.jsonl", "--query", query, *flags)
        assert told(capsys, *told_of) == (0, ""), name


def test_the_prompts_command_line_refuses_a_second_inverse_and_takes_one(tmp_path: Path, capsys: Any) -> None:
    whole_rows, halves, ask = tmp_path / "whole", tmp_path / "halves", ["--text", "babo lives in", "--hessian"]
    curvature = ["--projection-dim", 0, "--hessian", fitted("one"), "--power", -0.5]
    assert told(capsys, *flags_of("build", whole_rows, "corpus.jsonl", "--projection-dim", 0))[0] == 0
    assert told(capsys, *flags_of("build", halves, "corpus.jsonl", *curvature))[0] == 0
    assert told(capsys, "query", whole_rows, *ask, fitted("one")) == (0, "")
    assert told(capsys, "query", halves, *ask, fitted("one"), "--power", -0.5) == (0, "")
    status, said = told(capsys, "query", whole_rows, *ask, fitted("one"), "--power", -0.5)
    assert status == 1
    assert "the query's curvature is kfac:" in said
    assert "and the stored rows' is none" in said
    for how in ([fitted("two"), "--power", -0.5], [fitted("one"), "--power", -0.5, "--damping", 0.3]):
        status, said = told(capsys, "query", halves, *ask, *how)
        assert status == 1
        assert "the query's curvature is kfac:" in said, said
    status, said = told(capsys, "query", halves, *ask, fitted("one"))
    assert status == 1
    assert "they must sum to -1: pass --power -0.5" in said
    status, said = told(capsys, "query", whole_rows, *ask, fitted("one"), "--power", -0.5, "--force")
    assert status == 0
    assert "forced past 1 differences: 'curvature'" in said
