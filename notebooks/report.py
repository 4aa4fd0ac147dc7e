"""The demo's page: one file, its plots in it, nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from influence.func.retrieval import first_gold, recall
from notebooks.svg import bars, lines
from notebooks.tracing import MODELS, Lesson, Traced

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
svg { width: 100%; max-width: 640px; font-family: inherit; display: block }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
.legend span { margin-right: 1.2rem; white-space: nowrap; font-size: .85rem }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -1px }
.found { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem }
.found ol { padding-left: 1.3rem; margin: .2rem 0; font-size: .9rem } .found b { font-size: .85rem }
mark { background: #cfeadf; color: inherit; border-left: 3px solid #009E73; padding: 0 .25rem } small { color: #666 }
"""


def page(
    seed: int,
    lesson: Lesson,
    traced: Mapping[str, Traced],
    stages: Sequence[Any],
    seconds: Mapping[str, float],
    shown: Sequence[str],
    which: Sequence[int] = (0, 41, 82),
) -> str:
    """Return the page.

    Args:
        seed: of the world.
        lesson: the world and the model.
        traced: the methods' scores.
        stages: the checkpoints.
        seconds: what each phase took.
        shown: the methods whose documents are shown.
        which: the questions that are shown.

    Returns:
        HTML.
    """
    world = lesson.world
    gold = [question.gold for question in world.questions]
    at = [1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100]
    curves = {
        name: list(recall(first_gold(method.scores, gold), at).recall.values()) for name, method in traced.items()
    }
    size = sum(p.numel() for p in lesson.model.parameters())
    steps = [stage.step for stage in stages]
    head = ["", "recall@1", "recall@10", "MRR", "seconds"]
    rows = [
        [name, f"{m.found.recall[1]:.3f}", f"{m.found.recall[10]:.3f}", f"{m.found.mrr:.3f}", f"{m.seconds:.1f}"]
        for name, m in traced.items()
    ]
    stage_rows = [
        [str(s.step), f"{s.loss:.3f}", f"{s.right:.0%}", f"{s.llc.mean:.1f} ± {s.llc.stderr:.1f}", s.llc.verdict]
        for s in stages
    ]
    parts = [
        "<h1>Which sentences taught a language model its answers?</h1>",
        f"<p>{MODELS} Llamas of {size:,} weights learned {len(world.documents):,} sentences about invented people "
        f"(world {seed}). Of {len(world.questions)} questions that no sentence asks the first "
        f"answers {stages[-1].right:.0%} right. A method's scores are averaged over the models; Bayesian influence, "
        "and what was learned when, are of the first. "
        "A question shares its person's name, and no other content word, with the four sentences that state the "
        "answer; twenty more have the name, and sixty ask the very same of somebody else. A method finds an answer's "
        "source if one of the four comes first (recall@1) or among the first ten.</p>",
        "<h2>What each method finds</h2>",
        bars({name: list(m.found.recall.values()) for name, m in traced.items()}, ["recall@1", "recall@10"], "recall"),
        _table(head, rows),
        lines(at, curves, "documents looked through (k)", "recall@k", logarithmic=True, bounds=(0, 1)),
        "<h2>Three questions, and what comes first</h2>",
        "<p>Sentences that state the fact are <mark>marked</mark>.</p>",
        *(_question(lesson, traced, number, shown) for number in which),
        "<h2>What was learned when</h2>",
        "<p>The local learning coefficient counts the directions of weight space that matter to the loss (± two "
        "standard errors), at checkpoints of the training.</p>",
        lines(
            steps,
            {"LLC": [s.llc.mean for s in stages]},
            "training step",
            "local learning coefficient",
            {"LLC": [s.llc.stderr for s in stages]},
        ),
        lines(steps, {"right answers": [s.right for s in stages]}, "training step", "share", bounds=(0, 1)),
        _table(["step", "loss per word", "right answers", "LLC", "verdict"], stage_rows),
        "<h2>How long it took</h2>",
        _table(["", "seconds"], [[name, f"{spent:.1f}"] for name, spent in seconds.items()]),
        f"<p><small>torch {torch.__version__}, {torch.get_num_threads()} threads.</small></p>",
    ]
    head_html = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Fact tracing</title>'
    return f"{head_html}<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"


def _question(lesson: Lesson, traced: Mapping[str, Traced], number: int, shown: Sequence[str], k: int = 5) -> str:
    question = lesson.world.questions[number]
    columns = []
    for name in shown:
        items = []
        for document in traced[name].scores[number].topk(k).indices.tolist():
            text = escape(lesson.world.documents[document].text)
            items.append(f"<li>{f'<mark>{text}</mark>' if document in question.gold else text}</li>")
        columns.append(f"<div><b>{escape(name)}</b><ol>{''.join(items)}</ol></div>")
    asked = f"<h3>{escape(question.prompt)} <em>{escape(question.answer)}</em></h3>"
    return f'{asked}<div class="found">{"".join(columns)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
