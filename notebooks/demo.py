"""Which training sentences taught a language model its answers, and what did it learn when?

    make demo    # or: python -m notebooks.demo --seed 8 --report report.html

Two small Llamas learn about invented people; every question that they are asked afterwards shares nothing but a name
with the four sentences that hold the answer. Eight ways to find them, judged by what is known; then, of the first, the
local learning coefficient along training, and the questions' neighbours by Bayesian influence. No download, under four
minutes.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from influence import functionalize, sgmcmc, viz
from influence.func.retrieval import first_gold, recall
from influence.sgmcmc.estimators.llc import LLC
from notebooks.report import page
from notebooks.tracing import MODELS, Lesson, Traced, averaged, last_word, learn, right, trace

CHECKPOINTS = (100, 200, 400, 700)
SAMPLING = {"lr": 1e-4, "localization": 1000.0, "batch_size": 64, "num_chains": 2, "num_burnin_steps": 60}
"""Around every checkpoint; the temperature is that of the corpus, nβ = n / log n."""
DRAWN = (
    "EK-FAC, whitened",
    "Bayesian influence",
    "cosine, no embedding",
    "TrackStar",
    "gradient cosine",
    "gradient dot",
    "BM25",
    "embedding similarity",
)
"""In --picture: as many as there are colours to tell apart."""
SHOWN = ("EK-FAC, whitened", "gradient dot", "BM25", "Bayesian influence")


class Stage(NamedTuple):
    """A checkpoint, as sampling sees it.

    Attributes:
        step: of training.
        llc: the local learning coefficient there.
        loss: of the corpus, per word.
        right: share of right answers.
    """

    step: int
    llc: LLC
    loss: float
    right: float


def along_training(lesson: Lesson, draws: int = 80) -> list[Stage]:
    """Return the local learning coefficient at every checkpoint."""
    corpus = lesson.documents
    loss_fn, _ = functionalize(lesson.model, reduction="mean")
    n_beta, stages = sgmcmc.default_n_beta(len(lesson.world.documents)), []
    final = {name: p.detach().clone() for name, p in lesson.model.named_parameters()}
    for step, params in lesson.checkpoints.items():
        run = sgmcmc.sample(loss_fn, params, corpus, n_beta=n_beta, num_draws=draws, progress=False, **SAMPLING)
        lesson.model.load_state_dict(params)  # to ask it; its weights are put back below
        stages.append(
            Stage(step, sgmcmc.llc.estimate(run), float(run.baseline.mean()), right(lesson.model, lesson.questions))
        )
        print(
            f"  step {step:5d}   loss {stages[-1].loss:.3f}   right answers {stages[-1].right:4.0%}   {stages[-1].llc}"
        )
    lesson.model.load_state_dict(final)
    return stages


def bayesian_influence(lesson: Lesson, draws: int = 60) -> Tensor:
    """Return correlations of losses under the posterior, `[questions, documents]`."""
    loss_fn, params = functionalize(lesson.model, reduction="mean")
    watched = {"questions": lesson.questions, "documents": last_word(lesson.documents)}
    run = sgmcmc.sample(
        loss_fn,
        params,
        lesson.documents,
        watched,
        n_beta=sgmcmc.default_n_beta(len(lesson.world.documents)),
        num_draws=draws,
        progress=False,
        keep="sequences",
        observable_batch=512,
        **SAMPLING,
    )
    return sgmcmc.bif.estimate(run, "questions", "documents").influences


def table(traced: dict[str, Traced]) -> str:
    """Return the methods' figures."""
    head = f"{'':24}{'recall@1':>10}{'recall@10':>11}{'MRR':>8}{'seconds':>10}"
    rows = [
        f"{name:24}{found.recall[1]:10.3f}{found.recall[10]:11.3f}{found.mrr:8.3f}{seconds:10.1f}"
        for name, (_, seconds, found) in traced.items()
    ]
    return "\n".join([head, *rows])


def examples(lesson: Lesson, traced: dict[str, Traced], which: tuple[int, ...] = (0, 41, 82), k: int = 3) -> str:
    """Return questions with the first documents of some methods."""
    lines = []
    for number in which:
        question = lesson.world.questions[number]
        lines.append(f"\n{question.prompt} {question.answer}")
        for name in SHOWN:
            values, found = traced[name].scores[number].topk(k)
            for value, document in zip(values.tolist(), found.tolist(), strict=True):
                known = "  <- states the fact" if document in question.gold else ""
                lines.append(f"  {name:20} {value:10.3g}   {lesson.world.documents[document].text}{known}")
                name = ""
    return "\n".join(lines)


def picture(lesson: Lesson, traced: dict[str, Traced]) -> viz.canvas.Figure:
    """Return recall@k of the methods that `DRAWN` names."""
    gold = [question.gold for question in lesson.world.questions]
    at = torch.logspace(0, 3, 60).long().unique().clamp_max(len(lesson.world.documents)).unique()
    shares = {name: recall(first_gold(traced[name].scores, gold), at.tolist()).recall.values() for name in DRAWN}
    made = viz.recall_curves({name: torch.tensor(list(each)) for name, each in shares.items()}, at=at)
    made.axes[0].set_xlabel("documents looked through (k)")
    made.axes[0].set_ylabel("questions whose source is among them")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7, help="of the world, the weights and the order (default: 7)")
    parser.add_argument("--report", default="demo.html", help="the page to write (default: demo.html)")
    parser.add_argument("--picture", help="draw recall@k into this file too (.png, .pdf, .svg)")
    options = parser.parse_args()
    if options.picture is not None:
        viz.check(options.picture)
    seconds, began = {}, time.perf_counter()

    def clock(name: str) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        began = time.perf_counter()
        print(f"  {seconds[name]:.1f} s\n")

    print(f"Training {MODELS} small Llamas on sentences about invented people")
    lessons = [learn(options.seed, keep=() if which else CHECKPOINTS, which=which) for which in range(MODELS)]
    clock("training")
    print("Tracing their answers to the documents, by each method")
    lesson, each = lessons[0], []
    for own in lessons:
        with TemporaryDirectory() as folder:
            each.append(trace(own, folder))
    traced = averaged(lesson.world, each)
    clock("tracing")
    print("The local learning coefficient along training")
    stages = along_training(lesson)
    clock("LLC")
    print("Bayesian influence of every document on every question")
    started = time.perf_counter()
    scores = bayesian_influence(lesson)
    found = recall(first_gold(scores, [question.gold for question in lesson.world.questions]))
    traced["Bayesian influence"] = Traced(scores, time.perf_counter() - started, found)
    clock("BIF")
    print(table(traced))
    print(examples(lesson, traced))
    Path(options.report).write_text(page(options.seed, lesson, traced, stages, seconds, SHOWN))
    if options.picture is not None:
        viz.save(picture(lesson, traced), options.picture)
    print(f"\n{sum(seconds.values()):.0f} s in all; everything with its plots is in {options.report}")


if __name__ == "__main__":
    main()
