"""Does a projected score rank documents as the exact one does? Whitening before the projection against after it.

A 4-layer Llama (128 wide) is trained here, in under a minute, on sentences of a seeded probabilistic grammar. Exact
K-FAC scores `g_q^T H^{-1} g_t` (all block matrices, one `factored` inversion) rank 512 training sentences for each of
48 held-out ones. Every projected variant, at each `p`, is compared with that ranking by Spearman's rank correlation,
averaged over queries; the random ones over seeds as well.

| variant | what is stored |
|---|---|
| whiten, then project | `kfac_whiten(factors, dim=p)` |
| eigenbasis, cut | `eigen_whiten(factors, dim=p)` |
| project, then K-FAC | `project(p)`, K-FAC fitted on the projected rows |
| invert, then project | `one_sided(factors, dim=p)`: `H^{-1}` on the query's whole gradient, then both projected |
| project, then dense | `project(p)`, the dense second moment of the projected rows (TrackStar), where `p² ≤ 1024` |
| project alone | `project(p)`, no curvature, against the K-FAC ranking |
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure

DIMS = (8, 16, 32, 64)
SEEDS = (0, 1, 2)
DAMPING = 0.1
DENSE = 1024


class Ranked(NamedTuple):
    """One line of the table."""

    variant: str
    dim: int
    spearman: float
    spread: float


def sentences(count: int, length: int, vocabulary: int, seed: int) -> Tensor:
    """Draw token sequences from eight random Markov chains, one to a sentence: documents differ in kind."""
    draw = torch.Generator().manual_seed(0)
    chains = torch.randn(8, vocabulary, vocabulary, generator=draw).mul(2.5).softmax(-1)
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(8, (count,), generator=draw)
    rows = [torch.randint(vocabulary, (count,), generator=draw)]
    for _ in range(length - 1):
        rows.append(torch.multinomial(chains[kind, rows[-1]], 1, generator=draw)[:, 0])
    return torch.stack(rows, 1)


def trained(steps: int, quick: bool) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Return a trained model, its training documents and held-out ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 32 if quick else 128
    vocabulary, length = 64, 32
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    train, held_out = sentences(8192, length, vocabulary, 1), sentences(48, length, vocabulary, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = train[torch.randint(len(train), (32,), generator=draw)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {steps} steps to a loss of {loss.item():.3f} nats per token")
    return model.eval().requires_grad_(False), train, held_out


def spearman(scores: Tensor, truth: Tensor) -> float:
    """Mean over queries of the rank correlation over documents, `[q, n]` against `[q, n]`."""
    a, b = (x.argsort(1).argsort(1).double() for x in (scores, truth))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def batches(ids: Tensor, size: int = 64) -> list[dict[str, Tensor]]:
    """Cut documents into batches that know their rows."""
    index = torch.arange(len(ids))
    return [{"input_ids": ids[i : i + size], "index": index[i : i + size]} for i in range(0, len(ids), size)]


def run(threads: int = 2, quick: bool = False) -> dict:
    """Train, score and compare; prints the table and returns it with the machine and the settings."""
    from influence import (
        as_blocks,
        chain,
        eigen_whiten,
        functionalize,
        hessians,
        kfac_whiten,
        one_sided,
        per_example_grads_fn,
        precondition,
        project,
        similarity,
    )

    torch.set_num_threads(threads)
    model, train, held_out = trained(30 if quick else 400, quick)
    loss_fn, params = functionalize(model, loss="cross_entropy", targets="model.layers.*proj.weight")
    seen, documents, queries = batches(train[:1024]), batches(train[:512]), batches(held_out)

    def collect(transform: object, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows_of = per_example_grads_fn(loss_fn, params, data[0], transform=transform)
        pieces = [rows_of(params, batch) for batch in data]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def scores(query: object, stored: object | None = None) -> Tensor:
        return similarity.dot(collect(query, queries), collect(stored or query, documents))

    fitted = time.perf_counter()
    factors = hessians.kfac.fit(loss_fn, params, seen, transform=as_blocks(), progress=False)
    print(
        f"K-FAC of {len(factors.blocks)} blocks on {factors.documents} documents: {time.perf_counter() - fitted:.1f} s"
    )
    exact = scores(chain(as_blocks(), precondition(factors, damping=DAMPING, inversion="factored")), as_blocks())

    def projected_kfac(p: int, seed: int) -> Tensor:
        sketch = chain(as_blocks(), project(p, seed=seed))
        small = hessians.kfac.fit(loss_fn, params, seen, transform=sketch, progress=False)
        return scores(chain(sketch, precondition(small, damping=DAMPING, inversion="factored")), sketch)

    def projected_dense(p: int, seed: int) -> Tensor:
        sketch = chain(as_blocks(), project(p, seed=seed))
        small = hessians.autocorrelation.fit(loss_fn, params, seen, transform=sketch, labels="sampled", progress=False)
        return scores(chain(sketch, precondition(small, damping=DAMPING)), sketch)

    def inverted(p: int, seed: int) -> Tensor:
        return scores(*one_sided(factors, damping=DAMPING, inversion="factored", dim=p, seed=seed))

    variants: dict[str, tuple[Callable[[int, int], Tensor], tuple[int, ...]]] = {
        "whiten, then project": (
            lambda p, seed: scores(chain(as_blocks(), kfac_whiten(factors, damping=DAMPING, dim=p, seed=seed))),
            SEEDS,
        ),
        "eigenbasis, cut": (
            lambda p, seed: scores(chain(as_blocks(), eigen_whiten(factors, p, damping=DAMPING, inversion="factored"))),
            (0,),
        ),
        "project, then K-FAC": (projected_kfac, SEEDS),
        "project, then dense": (projected_dense, (0,)),
        "invert, then project": (inverted, SEEDS),
        "project alone": (lambda p, seed: scores(chain(as_blocks(), project(p, seed=seed))), SEEDS),
    }

    def lines() -> Iterator[Ranked]:
        for name, (make, seeds) in variants.items():
            for p in DIMS:
                if name == "project, then dense" and p * p > DENSE:
                    continue
                found = torch.tensor([spearman(make(p, seed), exact) for seed in seeds])
                yield Ranked(name, p, float(found.mean()), float(found.std()) if len(found) > 1 else 0.0)

    table = list(lines())
    print(f"\nSpearman with exact K-FAC scores, {len(held_out)} queries × 512 documents, damping {DAMPING}")
    print(f"{'':24}" + "".join(f"{f'p = {p}':>16}" for p in DIMS))
    for name in variants:
        cells = {line.dim: line for line in table if line.variant == name}
        shown = (f"{cells[p].spearman:.3f} ± {cells[p].spread:.3f}" if p in cells else "" for p in DIMS)
        print(f"{name:24}" + "".join(f"{cell:>16}" for cell in shown))
    return {
        "benchmark": "ranks",
        "machine": measure.machine(),
        "versions": measure.versions("torch", "transformers", "influence"),
        "settings": {"dims": DIMS, "seeds": SEEDS, "damping": DAMPING, "threads": threads, "quick": quick},
        "lines": [line._asdict() for line in table],
    }
