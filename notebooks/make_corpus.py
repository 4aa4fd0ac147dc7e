"""Make a small language model and a corpus of documents, offline, in seconds: something to try the command line on.

    python notebooks/make_corpus.py tiny            # tiny/model, tiny/corpus.jsonl, tiny/questions.jsonl
    influence build runs/corpus --model tiny/model --dataset tiny/corpus.jsonl

The corpus tells facts about invented animals: where they live, what they eat, what they are good at. The model, a Llama
of two layers with a word-level tokenizer, is trained on it for a moment; it learns what a question is from half of the
animals, and the questions are about the other half. Gold, for a question, are the documents about its animal.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYLLABLES = "ba bo cy da du el fe gu hi iv ju ke lo mi ne ot pi qu ro sv te ul va wi xe yo za".split()
VALUES = {
    "home": "attic barn cellar desert forest garden harbour island jungle meadow".split(),
    "food": "apples bread cheese dates eggs figs grapes honey nuts olives".split(),
    "craft": "baking carving dancing juggling knitting painting sailing singing swimming weaving".split(),
}
TELLINGS = {
    "home": ["{name} lives in the {value}", "the home of {name} is the {value}", "you find {name} in the {value}"],
    "food": ["{name} likes to eat {value}", "the best meal of {name} is {value}", "you may feed {name} some {value}"],
    "craft": ["{name} is good at {value}", "the talent of {name} is {value}", "you can watch {name} while {value}"],
}
QUESTIONS = {
    "home": "where does {name} live ? in the {value}",
    "food": "what does {name} eat ? some {value}",
    "craft": "what is {name} good at ? it is {value}",
}


def make_corpus(documents: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Return documents of a few sentences about an animal, and a question about each of some others."""
    draw = torch.Generator().manual_seed(seed)

    def pick(items: list) -> object:
        return items[int(torch.randint(len(items), (1,), generator=draw))]

    names = sorted({f"{a}{b}" for a in SYLLABLES for b in SYLLABLES if a != b})[: max(documents // 20, 6)]
    world = {name: {kind: pick(values) for kind, values in VALUES.items()} for name in names}
    corpus, questions = [], []
    for number in range(documents):
        name = names[number % len(names)]
        kinds = [pick(list(VALUES)) for _ in range(1 + int(torch.randint(4, (1,), generator=draw)))]
        told = [pick(TELLINGS[kind]).format(name=name, value=world[name][kind]) for kind in kinds]
        if names.index(name) % 2 == 0 and number % 3 == 0:  # half of the animals are asked about in the corpus too
            told.append(QUESTIONS[kinds[0]].format(name=name, value=world[name][kinds[0]]))
        corpus.append({"text": " . ".join(told), "about": name})
    for name in names[1:40:2]:
        kind = pick(list(VALUES))
        text = QUESTIONS[kind].format(name=name, value=world[name][kind])
        gold = [number for number, document in enumerate(corpus) if document["about"] == name]
        questions.append({"text": text, "about": name, "gold": gold})
    return corpus, questions


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )


def make_model(vocabulary: int, seed: int, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """Return a small Llama, its weights drawn from a generator of its own."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.05, generator=draw)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, seed: int) -> None:
    """Teach the model the corpus for a moment."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        some = [texts[int(i)] for i in torch.randint(len(texts), (64,), generator=draw)]
        batch = tokenizer(some, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(
    folder: str | Path,
    documents: int = 2000,
    steps: int = 150,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    double: bool = False,
) -> Path:
    """Write model, corpus and questions to a folder.

    Args:
        folder: where.
        documents: how many.
        steps: of training.
        seed: of everything.
        hidden: the model's width.
        layers: its depth.
        double: in float64.

    Returns:
        The folder.
    """
    folder = Path(folder)
    corpus, questions = make_corpus(documents, seed)
    texts = [row["text"] for row in (*corpus, *questions)]
    tokenizer = make_tokenizer(texts)
    model = make_model(len(tokenizer), seed, hidden, layers)
    train(model, tokenizer, texts, steps, seed)
    (model.double() if double else model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "questions.jsonl", questions)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="tiny", help="where (default: tiny)")
    parser.add_argument("--documents", type=int, default=2000, help="how many documents (default: 2000)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another world (default: 0)")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = make(options.folder, options.documents, options.steps, options.seed)
    asked = len((folder / "questions.jsonl").read_text().splitlines())
    spent = time.perf_counter() - began
    print(f"{folder}: a model, {options.documents:,} documents, {asked} questions, in {spent:.1f} s")


if __name__ == "__main__":
    main()
