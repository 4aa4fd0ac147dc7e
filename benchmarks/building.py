"""Building an index beside bare collection: the same model, batches and plan, rows dropped against rows stored.

A small Llama (4 layers, 128 wide) on documents of log-normal length, tokenised already, packed into batches of 4,096
positions. Every variant plans afresh, so each pays for the plan's repeated checks.

| variant | what is timed |
|---|---|
| bare | `batches` and `per_example_grads_fn`; the rows are dropped |
| build | `influence.build` of the same batches to disk, fingerprint, checksums and fsync included |
| command | `influence build`, from loading the model and the dataset to the finished run |
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import measure, report

BUDGET, SHARD = 4_096, 1_024


def run(*, rounds: int, threads: int, documents: int, path: Path | None = None) -> dict:
    """Measure, and print the table."""
    torch.set_num_threads(threads)
    measure.keep_heap()
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        steps, tokens = prepare(Path(scratch), documents)
        for step in steps.values():
            step()
        times = measure.interleave(steps, rounds)
    clock = "cpu" if threads == 1 else "wall"
    seconds = {name: getattr(each, clock) for name, each in times.items()}
    over = {name: measure.ratio(seconds["bare"], each) for name, each in seconds.items()}
    lines = [
        [
            name,
            f"{tokens / sorted(each)[len(each) // 2]:,.0f}",
            f"{speed.median:.3f}",
            f"{speed.low:.3f}–{speed.high:.3f}",
        ]
        for (name, each), speed in zip(seconds.items(), over.values(), strict=True)
    ]
    print(f"{documents:,} documents, {tokens:,} tokens, {rounds} rounds, {threads} thread(s), {clock} time")
    print(report.table(["variant", "tokens/s", "of bare's speed", "quartiles"], lines))
    return {"times": {name: each._asdict() for name, each in times.items()}, "of_bare": over, "tokens": tokens}


def prepare(scratch: Path, documents: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Return the steps by name, and the tokens of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from influence import as_blocks, build, chain, functionalize, per_example_grads_fn, project
    from influence.data import batches, load, shards, tokenize
    from influence.models import layer_matrices
    from influence.pipelines import build as command
    from influence.pipelines.frame.configs import DataConfig, ModelConfig, RunConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(scratch / "model")
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randn(documents, generator=draw).mul(0.7).add(4.16).exp().round().clamp(2, 256).long()
    ids = torch.randint(2048, (int(lengths.sum()),), generator=draw).split(lengths.tolist())
    corpus = scratch / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    data = tokenize(load(str(corpus)))
    loss_fn, params = functionalize(model, targets=layer_matrices(model))
    transform = chain(as_blocks(), project(16))

    def made() -> Iterator[dict[str, torch.Tensor]]:
        return batches(shards(data, SHARD), BUDGET)

    def bare() -> None:
        rows_of = None
        for batch in made():
            if rows_of is None:
                rows_of = per_example_grads_fn(loss_fn, params, batch, transform=transform)
            rows_of(params, batch)

    def stored() -> None:
        build(loss_fn, params, made(), scratch / "built", transform=transform, shard_size=SHARD, overwrite=True)

    def commanded() -> None:
        shutil.rmtree(scratch / "run", ignore_errors=True)
        execution = RunConfig(token_budget=BUDGET, shard_size=SHARD, progress=False)
        asked = command.BuildConfig(
            str(scratch / "run"), ModelConfig(str(scratch / "model")), DataConfig(str(corpus)), execution=execution
        )
        command.run(asked)

    return {"bare": bare, "build": stored, "command": commanded}, len(data.ids)


def targets(found: dict) -> list[report.Check]:
    """Return the bars: 0.95 of the bare speed."""
    return [
        report.at_least(f"speed of {name} over bare collection", found["of_bare"][name].median, 0.95)
        for name in ("build", "command")
    ]
