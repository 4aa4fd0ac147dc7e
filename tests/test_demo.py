"""The demo on a small world: every method answers, nothing is left changed, the page needs nothing from elsewhere."""

import re
from pathlib import Path
from typing import Any
from xml.dom.minidom import parseString

import pytest
import torch

from notebooks import demo, tracing
from notebooks.report import page
from notebooks.tracing import Lesson, Traced, averaged, learn, mean_and_error, trace

METHODS = {
    *("BM25", "embedding similarity", "gradient dot", "gradient cosine", "cosine, no embedding"),
    *("TrackStar", "K-FAC, whitened", "EK-FAC, whitened"),
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return learn(1, steps=40, keep=(10,), people=12)


@pytest.fixture(scope="module")
def mixed() -> list[tuple[Any, int]]:
    """What was mixed while everything was traced, and how many components it asked for."""
    return []


@pytest.fixture(scope="module")
def traced(lesson: Lesson, mixed: list[tuple[Any, int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    mix = tracing.hessians.mix

    def noting(*sides: Any, **settings: Any) -> Any:
        mixed.append((mix(*sides, **settings), settings["components"]))
        return mixed[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing.hessians, "mix", noting)
        return trace(lesson, tmp_path_factory.mktemp("indexes"))


def test_every_method_scores_every_document_for_every_question(lesson: Lesson, traced: dict[str, Traced]) -> None:
    assert set(traced) == METHODS
    for name, method in traced.items():
        assert method.scores.shape == (len(lesson.world.questions), len(lesson.world.documents)), name
        assert bool(torch.isfinite(method.scores).all()), name
    for name in METHODS - {"BM25", "gradient dot"}:
        assert float(traced[name].scores.abs().max()) <= 1 + 1e-3, name


def test_trackstar_leaves_no_curvature_out_where_questions_are_few(
    traced: dict[str, Traced], mixed: list[tuple[Any, int]]
) -> None:
    """More components than the questions' curvature has leave the corpus's out: 0.40 for 0.77 in a world of 60."""
    ((factors, components),) = mixed
    assert components == 20  # of 12 questions; of the 120 that are measured, 200
    assert round(tracing.SHARED * 120) == 200
    assert "leaves" not in factors.notes["mix"]


def test_training_is_the_same_again(lesson: Lesson) -> None:
    again = learn(1, steps=40, keep=(10,), people=12, say=lambda line: None)
    for step, params in lesson.checkpoints.items():
        assert all(torch.equal(p, again.checkpoints[step][name]) for name, p in params.items())


def test_models_of_a_world_differ_and_their_scores_are_averaged(lesson: Lesson, traced: dict[str, Traced]) -> None:
    other = learn(1, steps=40, people=12, which=1, say=lambda line: None)
    assert other.world == lesson.world
    pairs = zip(lesson.model.parameters(), other.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)
    best = torch.zeros_like(traced["BM25"].scores)  # a model that is sure, and right, outweighs one that is not
    for question, row in zip(lesson.world.questions, best, strict=True):
        row[list(question.gold)] = 3.0
    sure = {name: method._replace(scores=best) for name, method in traced.items()}
    both = averaged(lesson.world, [traced, sure])
    name = "gradient cosine"
    torch.testing.assert_close(both[name].scores, (traced[name].scores + best) / 2)
    assert both[name].found.recall[1] == 1 > traced[name].found.recall[1]
    assert both[name].seconds == 2 * traced[name].seconds


def test_the_page_shows_all_of_it_and_needs_nothing_else(
    lesson: Lesson, traced: dict[str, Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.SAMPLING, "num_burnin_steps", 4)
    before = {name: p.clone() for name, p in lesson.model.named_parameters()}
    stages = demo.along_training(lesson, draws=4)
    assert [stage.step for stage in stages] == [10, 40]
    scores = demo.bayesian_influence(lesson, draws=4)
    assert scores.shape == traced["BM25"].scores.shape
    assert all(torch.equal(p, before[name]) for name, p in lesson.model.named_parameters())
    everything = traced | {"Bayesian influence": Traced(scores, 1.0, traced["BM25"].found)}
    assert all(name in demo.table(everything) for name in everything)
    assert lesson.world.questions[2].prompt in demo.examples(lesson, everything, which=(0, 2))
    html = page(1, lesson, everything, stages, {"training": 1.0}, demo.SHOWN, which=(0, 2))
    assert not re.search(r"https?:|src=|@import|url\(", html)
    plots = [parseString(svg) for svg in re.findall(r"<svg.*?</svg>", html)]
    assert len(plots) == 4
    assert len(plots[1].getElementsByTagName("polyline")) == len(everything)


def test_the_command_writes_the_page(
    lesson: Lesson, traced: dict[str, Traced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(demo, "trace", lambda lesson, folder: traced)
    monkeypatch.setattr(demo, "learn", lambda seed, keep, which: asked.append((seed, which)) or lesson)
    monkeypatch.setattr(demo, "along_training", lambda lesson: [demo.Stage(1, _llc(), 1.0, 0.5)] * 2)
    monkeypatch.setattr(demo, "bayesian_influence", lambda lesson: torch.rand(12, len(lesson.world.documents)))
    monkeypatch.setattr(demo, "examples", lambda lesson, traced: "")
    monkeypatch.setattr(demo, "page", lambda *parts: "page")
    monkeypatch.setattr(
        "sys.argv", ["demo", "--report", str(tmp_path / "x.html"), "--picture", str(tmp_path / "x.svg")]
    )
    demo.main()
    assert (tmp_path / "x.html").read_text() == "page"
    assert asked == [(7, 0), (7, 1)]
    drawn = (tmp_path / "x.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in demo.DRAWN)


def _llc():
    from influence.sgmcmc.estimators.llc import LLC

    return LLC(1.0, 0.1, torch.ones(1), 0.1, torch.ones(1, 2), 2.0, 1.0, 0.0, 1.0, "no fault found")


def test_mean_and_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
