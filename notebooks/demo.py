"""Which training sentences taught a language model its answer?

A tiny Llama learns facts about invented animals from sentences made below. Then each sentence's gradient, the direction
in which it pulls the weights, is sketched to 16 x 16 numbers per weight matrix, and a question's gradient is compared
with all of them: the sentences that pull the same way are the ones that taught the answer.

Run it with `make demo`; it takes about a minute on two cores and needs no download.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from influence import as_blocks, chain, functionalize, per_example_grads_fn, project, similarity, unit_norm

# %% A world: every animal has three facts, told in three ways. Half of the animals are asked about in training too, so
# the model learns what a question is; the questions about the other half are kept for the end.
NAMES = "ada bolo cyra dunk elio fenn gus hilda ivo juno kemp lola miro nell otto pia quin rosa sven tess".split()
VALUES = {
    "home": "attic barn cellar desert forest garden harbour island jungle meadow".split(),
    "food": "apples bread cheese dates eggs figs grapes honey nuts olives".split(),
    "craft": "baking carving dancing juggling knitting painting sailing singing swimming weaving".split(),
}
TELLINGS = {
    "home": ["{name} lives in the {value}", "the home of {name} is the {value}", "you find {name} in the {value}"],
    "food": ["{name} likes to eat {value}", "the best meal of {name} is {value}", "you may feed {name} some {value}"],
    "craft": [
        "{name} is good at {value}",
        "the talent of {name} is {value}",
        "you can watch {name} while {value}",
    ],
}
QUESTIONS = {
    "home": "where does {name} live ? in the {value}",
    "food": "what does {name} eat ? some {value}",
    "craft": "what is {name} good at ? it is {value}",
}


class Fact(NamedTuple):
    """One thing that is true of one animal."""

    name: str
    kind: str
    value: str


def make_world(seed: int) -> list[Fact]:
    """Draw every animal's three facts."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(10, (len(NAMES), len(VALUES)), generator=generator).tolist()
    return [
        Fact(name, kind, VALUES[kind][i])
        for name, row in zip(NAMES, draws, strict=True)
        for kind, i in zip(VALUES, row, strict=True)
    ]


def ask(fact: Fact) -> str:
    return QUESTIONS[fact.kind].format(**fact._asdict())


def tell(fact: Fact) -> list[str]:
    return [telling.format(**fact._asdict()) for telling in TELLINGS[fact.kind]]


# %% A tokeniser: one number a word, padding on the right.
class Words:
    """A vocabulary of whole words; 0 pads and 1 begins a sentence. The last word of a sentence is its answer."""

    def __init__(self, sentences: list[str]):
        words = sorted({word for sentence in sentences for word in sentence.split()})
        self.ids = {word: i for i, word in enumerate(words, start=2)}

    def __call__(self, sentences: list[str]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, all [n, s]: only the answer is labelled."""
        rows = [torch.tensor([1, *(self.ids[word] for word in sentence.split())]) for sentence in sentences]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = ids != 0
        answer = torch.arange(ids.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(answer, -100)}


# %% A model: two layers, its weights drawn from a generator of its own.
def make_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.05, generator=generator)
    return model


def select(batch: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def train(model: LlamaForCausalLM, data: dict[str, Tensor], steps: int, seed: int) -> None:
    """Teach the model every word of every sentence."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    every_word = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    data = {**data, "labels": every_word}
    for step in range(steps):
        loss = model(**select(data, torch.randint(len(every_word), (32,), generator=generator))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1:4d}   loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> float:
    """How often the likeliest word is the answer."""
    guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(dim=-1)
    labels = batch["labels"][:, 1:]
    return (guesses == labels)[labels >= 0].float().mean().item()


def report(scores: Tensor, held_out: list[Fact], told: list[tuple[str, Fact]]) -> None:
    """Print the nearest sentences of three questions, and how often the nearest of all questions are the right ones."""
    hits = 0
    for i, (fact, row) in enumerate(zip(held_out, scores, strict=True)):
        cosines, nearest = row.topk(3)
        hits += sum(told[j][1] == fact for j in nearest.tolist())
        if i in (1, 14, 27):
            print(f"\n{ask(fact)}\n  cosine   nearest training sentences")
            for cosine, j in zip(cosines.tolist(), nearest.tolist(), strict=True):
                sentence, source = told[j]
                print(f"  {cosine:6.3f}   {sentence:<40}{'<- tells this fact' if source == fact else ''}".rstrip())
    share = hits / (3 * len(held_out))
    print(f"\nOf the three sentences nearest to each of the {len(held_out)} questions, {share:.0%} tell the fact")
    print(f"that was asked for (chance: {3 / len(told):.1%}).")


def main() -> None:
    world = make_world(seed=0)
    asked = [fact for fact in world if NAMES.index(fact.name) % 2 == 0]
    held_out = [fact for fact in world if fact not in asked]
    told = [(sentence, fact) for fact in world for sentence in tell(fact)] + [(ask(fact), fact) for fact in asked]
    sentences = [sentence for sentence, _ in told]
    words = Words(sentences)
    data, questions = words(sentences), words([ask(fact) for fact in held_out])
    tokens = int(data["attention_mask"].sum())

    model = make_model(len(words.ids) + 2, seed=0)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Training a Llama of {size:,} parameters on {len(sentences)} sentences")
    started, steps = time.perf_counter(), 150
    train(model, data, steps=steps, seed=0)
    seconds = time.perf_counter() - started
    print(f"  {steps * 32 * tokens / len(sentences) / seconds:,.0f} tokens/s")
    print(f"  it answers {accuracy(model, questions):.0%} of {len(held_out)} questions that it has never seen")

    # One line makes the module a pure function; the next says which view of every gradient is wanted.
    loss_fn, params = functionalize(model, loss="cross_entropy", targets=["model.layers.*_proj.weight"])
    sketch = chain(as_blocks(), project(16, seed=0), unit_norm())
    rows_of = per_example_grads_fn(loss_fn, params, select(data, slice(0, 30)), transform=sketch)
    print(f"\n{rows_of.plan}")

    started = time.perf_counter()
    batches = [rows_of(params, select(data, slice(i, i + 30))) for i in range(0, len(sentences), 30)]
    rows = {block: torch.cat([batch[block] for batch in batches]) for block in batches[0]}
    seconds = time.perf_counter() - started
    print(f"\nGradients of {len(sentences)} sentences in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s")

    # Rows of unit norm: their dot products, [questions, sentences], are cosines.
    scores = similarity.dot(rows_of(params, questions), rows)
    report(scores, held_out, told)


if __name__ == "__main__":
    main()
