"""`build` and `query` beside Bergson's, each by its own command line and its own index of the same corpus.

The corpus is text of 2,046 words, a token each, read by both with one tokenizer; the model is that of `building`. Both
project 28 matrices to 16 × 16 and pack batches of 4,096 tokens, on one thread.

| variant | what is timed |
|---|---|
| influence build, bergson build | the whole process: imports, model, tokens, rows on the disk; processor time |
| influence search, bergson search | the ten best of its own index, which is open and in the cache |
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report

PEERS = {"beside bergson": "bergson"}
BUDGET, WORDS, K, QUERIES = 4_096, 2_048, 10, (1, 32)


def run(scratch: Path, rounds: int, documents: int) -> dict:
    """Measure, and print the table; without Bergson there is nothing to compare."""
    torch.set_num_threads(1)
    corpus(scratch, documents)
    model, text = str(scratch / "model"), str(scratch / "corpus.jsonl")
    ours = ["influence", "build", str(scratch / "ours"), "--model", model, "--dataset", text, "--overwrite"]
    theirs = ["bergson", "build", str(scratch / "theirs"), "--overwrite", "--model", model, "--dataset", text]
    builds = {
        "influence build": process(ours, ["--token-budget", str(BUDGET), "--dtype", "float32"]),
        "bergson build": process(
            theirs, ["--prompt_column", "text", "--projection_dim", "16", "--token_batch_size", str(BUDGET)]
        ),
    }
    took = {name: [step() for _ in range(rounds)] for name, step in builds.items()}
    found = [_line(took, "bergson build", "influence build")]
    for q in QUERIES:
        times = measure.interleave(searches(scratch, q), 10 * rounds)
        seconds = {f"{name}, {q}": each.cpu for name, each in times.items()}
        found.append(_line(seconds, f"bergson search, {q}", f"influence search, {q}"))
    cells = [
        [name, f"{1e3 * sorted(each)[len(each) // 2]:,.1f}", over]
        for line in found
        for name, each, over in line["rows"]
    ]
    print(f"\nbeside Bergson: {documents:,} documents, {rounds} rounds, 1 thread, processor time")
    print(report.table(["variant, queries", "ms", "of bergson's"], cells))
    return {"lines": found, "documents": documents}


def _line(seconds: dict[str, list[float]], theirs: str, ours: str) -> dict[str, Any]:
    """Return both sides' times, and ours over theirs."""
    over = measure.ratio(seconds[ours], seconds[theirs]).median
    return {"rows": [(ours, seconds[ours], f"{over:.2f}"), (theirs, seconds[theirs], "1")], "over": over}


def corpus(scratch: Path, documents: int) -> None:
    """Write a model, its tokenizer, and documents of log-normal length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=BUDGET,
        )
        LlamaForCausalLM(config).eval().save_pretrained(scratch / "model")
    words = {"<unk>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(scratch / "model")
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randn(documents, generator=draw).mul(0.7).add(4.16).exp().round().clamp(2, 256).long()
    ids = torch.randint(2, WORDS, (int(lengths.sum()),), generator=draw).split(lengths.tolist())
    texts = (" ".join(f"w{number}" for number in row.tolist()) for row in ids)
    (scratch / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def process(command: list[str], more: list[str]) -> Callable[[], float]:
    """Return what runs a command of this environment, offline and on one thread, and returns its processor seconds."""
    whole = [sys.executable, "-m", *command, *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def step() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(whole, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(whole)} failed:\n{done.stderr[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return step


def searches(scratch: Path, queries: int) -> dict[str, Callable[[], object]]:
    """Return the searches, of rows that each index holds itself."""
    import bergson

    from influence import Attributor, open_index

    index = open_index(scratch / "ours")
    ours = index.rows(None, 0, queries)
    mine = Attributor(index)
    peer = bergson.Attributor(scratch / "theirs", device="cpu")
    theirs = {name: rows[:queries].clone() for name, rows in peer.grads.items()}
    steps: dict[str, Callable[[], object]] = {
        "influence search": lambda: mine.ask(ours, unchecked=True).top(K),
        "bergson search": lambda: peer.search(theirs, K),
    }
    for step in steps.values():
        step()
    return steps
