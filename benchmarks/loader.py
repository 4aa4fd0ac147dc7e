"""The loader beside the model: tokens a second of `data.batches`, and of projected rows.

Documents of log-normal length (median 64 tokens, cut at 256), tokenised already; the batches are packed, padded and
made by the prefetching thread or without it. The model is the collection benchmark's NeoX, on the very same batches.
Both are timed in turn, round by round. Padding counts for neither: tokens are the documents' own.
"""

import time

import torch

from benchmarks import measure, models, report

DOCUMENTS, BUDGET = 20_000, 2_048


def run(*, rounds: int, threads: int, quick: bool) -> dict:
    """Measure, and print the table."""
    from influence import as_blocks, chain, functionalize, per_example_grads_fn, project
    from influence.data import batches, load, shards, tokenize

    torch.set_num_threads(threads)
    work = models.MODELS["neox"](quick)
    assert isinstance(work.batch, dict)
    words = work.model.config.vocab_size
    count = DOCUMENTS // 20 if quick else DOCUMENTS
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randn(count, generator=draw).mul(0.7).add(4.16).exp().round().clamp(2, 256).long()
    ids = torch.randint(words, (int(lengths.sum()),), generator=draw)
    started = time.perf_counter()
    data = tokenize(load([{"input_ids": row.tolist()} for row in ids.split(lengths.tolist())]))
    reading = len(data.ids) / (time.perf_counter() - started)
    loss_fn, params = functionalize(work.model, loss=work.loss, targets=list(work.targets))
    parts = shards(data, 2_000)
    some = [batch for _, batch in zip(range(1 if quick else 4), batches(parts, BUDGET), strict=False)]
    rows_of = per_example_grads_fn(loss_fn, params, some[0], transform=chain(as_blocks(), project(16)))
    rows_of(params, some[0])

    def made(prefetch: int) -> float:
        began, tokens = time.perf_counter(), 0
        for batch in batches(parts, BUDGET, prefetch=prefetch):
            tokens += int(batch["attention_mask"].sum())
        return tokens / (time.perf_counter() - began)

    def collect() -> float:
        began = time.perf_counter()
        for batch in some:
            rows_of(params, batch)
        return sum(int(batch["attention_mask"].sum()) for batch in some) / (time.perf_counter() - began)

    speeds: dict[str, list[float]] = {"model": [], "batches": [], "batches, prefetched": []}
    for _ in range(rounds):
        speeds["model"].append(collect())
        speeds["batches"].append(made(0))
        speeds["batches, prefetched"].append(made(4))
    lines = [
        [name, f"{sorted(each)[len(each) // 2]:,.0f}", f"{measure.ratio(each, speeds['model']).median:,.0f}"]
        for name, each in speeds.items()
    ]
    print(f"{count:,} documents, {len(data.ids):,} tokens; tokenize() takes {reading:,.0f} ready tokens/s")
    print(report.table(["", "tokens/s", "× model"], lines))
    return {
        "benchmark": "loader",
        "settings": {"rounds": rounds, "threads": threads, "quick": quick},
        "machine": measure.machine(),
        "tokens_per_second": speeds,
        "tokenize": reading,
    }


def targets(found: dict) -> list[report.Check]:
    """Return the bar: 20 × the model."""
    speeds = found["tokens_per_second"]
    return [
        report.at_least(f"{name} / model", measure.ratio(speeds[name], speeds["model"]).median, 20)
        for name in ("batches", "batches, prefetched")
    ]
