"""Fact tracing: which documents taught a model an answer, by several methods, judged by what is known.

    python -m notebooks.tracing --seeds 0 1 2 3 4 --json facts.json    # mean ± standard error over worlds

A small Llama learns a world of `facts`. A question's loss on its answer, and each document's loss on the value that it
states, are functions of the weights; a method compares their gradients. The curvature is what makes the difference: the
gradient of a question is mostly about what all questions have in common.

Each of a world's two models has its own idea of the invented names, and confuses others of them; so every method is
asked of both, and its scores are averaged (as TRAK's are, Park et al. 2023).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from influence import (
    Attributor,
    Transform,
    as_blocks,
    build,
    chain,
    functionalize,
    hessians,
    per_example_grads,
    project,
    two_sided,
)
from influence.func.retrieval import Recall, first_gold, recall
from influence.index import Index, provenance
from influence.types import Params
from notebooks.bm25 import bm25
from notebooks.facts import World, make_world
from notebooks.make_corpus import make_model, make_tokenizer

STEPS, BATCH, RATE, DECAY, HIDDEN = 1000, 96, 4e-3, 1.0, 96
"""Of training, chosen on worlds 100 and 101; twice as many steps leave gradients that are mostly noise."""
BLOCKS = ("model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight")
"""What is compared: where words enter, and the first matrix that moves what they mean to where it is needed."""
DAMPING, SKETCH, SHARED = 1e-2, 32, 5 / 3
"""Of the curvature; of TrackStar's projection, and the directions that it plays down, for each question: the curvature
of the questions has two at most, one a block, and asked for more it leaves the corpus's out."""
MODELS = 2
"""Of a world: weights from other seeds, which saw the documents in another order."""


class Lesson(NamedTuple):
    """A world and the model that learned it.

    Attributes:
        world: the world.
        model: after training.
        tokenizer: of whole words.
        checkpoints: `{step: weights}` on the way, the end included.
        documents: the corpus as a batch, all words labelled.
        questions: with their answers, which alone are labelled.
    """

    world: World
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    checkpoints: dict[int, Params]
    documents: dict[str, Tensor]
    questions: dict[str, Tensor]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return texts as a batch: `input_ids`, `attention_mask`, `labels` of all words, `index`."""
    batch = tokenizer([f"<s> {text}" for text in texts], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.arange(len(texts))}


def last_word(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of which the last word alone is labelled: the value that is stated, the answer that is given."""
    mask = batch["attention_mask"]
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    return {**batch, "labels": batch["labels"].where(last, -100)}


def pieces(batch: dict[str, Tensor], size: int = 256) -> list[dict[str, Tensor]]:
    """Return a batch in pieces."""
    return [{name: values[i : i + size] for name, values in batch.items()} for i in range(0, len(batch["index"]), size)]


def learn(
    seed: int,
    steps: int = STEPS,
    keep: Sequence[int] = (),
    people: int = 120,
    which: int = 0,
    say: Callable[[str], None] = print,
) -> Lesson:
    """Train a model on a world.

    Args:
        seed: of the world.
        steps: of training.
        keep: steps whose weights are kept; those after the last always are.
        people: of the world.
        which: of the world's models: with the seed it seeds the weights and the order.
        say: where its lines go.

    Returns:
        The world and the model.
    """
    world = make_world(seed, people)
    texts = [document.text for document in world.documents]
    asked = [f"{question.prompt} {question.answer}" for question in world.questions]
    tokenizer = make_tokenizer([*texts, *asked])
    documents, questions = encode(tokenizer, texts), last_word(encode(tokenizer, asked))
    own = seed + 1000 * which
    model = make_model(len(tokenizer), own, HIDDEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    kept: dict[int, Params] = {}
    for step, rows in enumerate(_order(len(texts), steps, own)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50) * (1 - step / steps)
        batch = {name: documents[name][rows] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in (*keep, steps):
            kept[step + 1] = {name: p.detach().clone() for name, p in model.named_parameters()}
        if (step + 1) % (steps // 4) == 0:
            say(f"  step {step + 1:5d}   loss {loss.item():.3f}   right answers {right(model, questions):.0%}")
    return Lesson(world, model, tokenizer, kept, documents, questions)


def _order(size: int, steps: int, seed: int) -> Iterator[Tensor]:
    draw, queue = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(size, generator=draw)
        yield queue[:BATCH]
        queue = queue[BATCH:]


@torch.no_grad()
def right(model: LlamaForCausalLM, questions: dict[str, Tensor]) -> float:
    """Return the share of questions whose likeliest answer is right."""
    logits = model(input_ids=questions["input_ids"], attention_mask=questions["attention_mask"]).logits[:, :-1]
    labels = questions["labels"][:, 1:]
    return (logits.argmax(-1) == labels)[labels >= 0].float().mean().item()


class Traced(NamedTuple):
    """What a method says.

    Attributes:
        scores: `[questions, documents]`, large where a document is an answer's source.
        seconds: what it took.
        found: against the gold.
    """

    scores: Tensor
    seconds: float
    found: Recall


def trace(lesson: Lesson, folder: str | Path, say: Callable[[str], None] = print) -> dict[str, Traced]:
    """Score every document for every question by every method.

    Args:
        lesson: the world and the model.
        folder: where indexes are written.
        say: where its lines go.

    Returns:
        The methods' scores, by name.
    """
    world, gold = lesson.world, [question.gold for question in lesson.world.questions]
    traced: dict[str, Traced] = {}

    def done(name: str, score: Callable[[], Tensor]) -> None:
        began = time.perf_counter()
        scores = score()
        spent = time.perf_counter() - began
        traced[name] = Traced(scores, spent, recall(first_gold(scores, gold)))
        say(f"  {name:24} {spent:5.1f} s")

    asked = [f"{question.prompt} {question.answer}" for question in world.questions]
    texts = [document.text for document in world.documents]
    done("BM25", lambda: bm25(asked, texts))
    done("embedding similarity", lambda: embedding_similarity(lesson))

    loss_fn, params = functionalize(lesson.model, targets=BLOCKS)
    batches, questions = pieces(last_word(lesson.documents)), lesson.questions

    def ask(name: str, transform: Transform) -> tuple[Index, Attributor, dict]:
        """Return the index of the documents under a transform, and the questions' rows under the same."""
        index = build(loss_fn, params, batches, Path(folder) / name, transform=transform, dtype="float16")
        rows = per_example_grads(loss_fn, params, questions, transform=transform)
        return index, Attributor(index), {"query": rows, "fingerprint": provenance(loss_fn, params, rows)}

    index, plain, query = ask("gradients", as_blocks())
    say(f"  {index!r}")
    done("gradient dot", lambda: plain.ask(**query).all())
    done("gradient cosine", lambda: plain.ask(cosine=True, **query).all())
    first = [name for name in index.blocks if "layers" in name]
    done("cosine, no embedding", lambda: plain.ask(blocks=first, cosine=True, **query).all())

    def trackstar() -> Tensor:
        sketch = chain(as_blocks(), project(SKETCH, seed=0))
        corpus = hessians.autocorrelation.fit(loss_fn, params, batches, transform=sketch, progress=False)
        queries = hessians.autocorrelation.fit(loss_fn, params, [questions], transform=sketch, progress=False)
        mixed = hessians.mix(queries, corpus, components=round(SHARED * len(gold)))
        _, attributor, query = ask("trackstar", two_sided(mixed).query)
        return attributor.ask(**query).all()

    done("TrackStar", trackstar)
    kfac = hessians.kfac.fit(loss_fn, params, batches, transform=as_blocks(), labels="data", progress=False)

    def whitened(name: str, factors: hessians.Factors, inversion: str) -> Tensor:
        both = two_sided(factors, damping=DAMPING, inversion=inversion)
        _, attributor, query = ask(name, both.query)
        return attributor.ask(**query).all()

    done("K-FAC, whitened", lambda: whitened("kfac", kfac, "factored"))
    done(
        "EK-FAC, whitened",
        lambda: whitened("ekfac", hessians.ekfac.correct(kfac, loss_fn, params, batches, progress=False), "damped"),
    )
    return traced


def averaged(world: World, each: Sequence[dict[str, Traced]]) -> dict[str, Traced]:
    """Return every method's scores averaged over models, judged anew."""
    gold, found = [question.gold for question in world.questions], {}
    for name in each[0]:
        scores = torch.stack([traced[name].scores for traced in each]).mean(0)
        found[name] = Traced(scores, sum(traced[name].seconds for traced in each), recall(first_gold(scores, gold)))
    return found


@torch.no_grad()
def embedding_similarity(lesson: Lesson) -> Tensor:
    """Return cosines of the model's own last hidden states, averaged over words: `[questions, documents]`."""

    def embed(batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        states = lesson.model.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1)

    return embed(lesson.questions) @ torch.cat([embed(piece) for piece in pieces(lesson.documents)]).T


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="worlds (default: 0 1 2 3 4)")
    parser.add_argument("--json", help="write every world's numbers there, after each world")
    options = parser.parse_args()
    worlds: dict[int, dict[str, list[float]]] = {}
    for seed in options.seeds:
        began = time.process_time()
        print(f"world {seed}", flush=True)
        lessons = [learn(seed, which=which) for which in range(MODELS)]
        each = []
        for lesson in lessons:
            with TemporaryDirectory() as folder:
                each.append(trace(lesson, folder, say=lambda line: None))
        traced = averaged(lessons[0].world, each)
        worlds[seed] = {name: [*t.found.recall.values(), t.found.mrr] for name, t in traced.items()}
        for which, (lesson, one) in enumerate(zip(lessons, each, strict=True)):
            found = one["EK-FAC, whitened"].found
            worlds[seed][f"EK-FAC of model {which} alone"] = [*found.recall.values(), found.mrr]
            worlds[seed][f"right answers of model {which}"] = [right(lesson.model, lesson.questions)]
        for name, numbers in worlds[seed].items():
            print(f"  {name:24}" + "".join(f"{number:8.3f}" for number in numbers))
        print(f"  {time.process_time() - began:.0f} s of processor time", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps({"columns": ["recall@1", "recall@10", "MRR"], "worlds": worlds}))
    print(f"\nmean ± standard error over {len(worlds)} worlds\n{'':24}{'recall@1':>16}{'recall@10':>16}{'MRR':>16}")
    for name in next(iter(worlds.values())):
        columns = zip(*(world[name] for world in worlds.values()), strict=True)
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in map(mean_and_error, columns)]
        print(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
