"""Sampling: a chain-step over its bare forward and backward, four chains together over apart, token BIF over the peer.

The model is a Llama (2 layers, 64 wide, vocabulary 256). *Bare* is the model's own forward and backward of the batch
and one forward of the observable, by plain PyTorch. The peer's influences are computed on the same traces where
devinterp is installed, at its best block size.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure, peers, report

MEMORY = ("influences", "averaged")
PEERS = {"peer": "devinterp"}
SEQUENCES, TOKENS, DRAWS = 64, 255, 800


def run(*, rounds: int, threads: int, quick: bool) -> dict:
    """Measure, and print the tables."""
    torch.set_num_threads(threads)
    measure.keep_heap()
    steps = chain_steps(quick)
    for step in steps.values():
        step()
    times = measure.interleave(steps, rounds)
    ratios = {
        name: measure.ratio(times[name].cpu, times[under].cpu)
        for name, under in (("lookup", "bare"), ("paired", "bare"), ("together", "apart"))
    }
    for name, under in (("lookup", "bare"), ("paired", "bare"), ("together", "apart")):
        found = ratios[name]
        print(f"{name} / {under}: {found.median:.3f} [{found.low:.3f}, {found.high:.3f}]")
    influences = {name: [] for name in ("influences", "averaged", "product", "peer")}
    for _ in range(1 if quick else max(1, rounds // 3)):
        for name, step in bif_steps(quick).items():
            began = time.perf_counter()
            step()
            influences[name].append(time.perf_counter() - began)
    best = {name: min(each) for name, each in influences.items() if each}
    print(report.table(["token BIF", "seconds", ""], [[name, f"{each:.2f}", ""] for name, each in best.items()]))
    arguments = ["memory", "sgmcmc", "--threads", str(threads), *(["--quick"] if quick else [])]
    memory = {name: measure.memory_of("benchmarks", [*arguments, "--variant", name])._asdict() for name in MEMORY}
    n, t = (8, 31) if quick else (SEQUENCES, TOKENS)
    sizes = {"influences": 4 * (n * t) ** 2, "averaged": 4 * n * n}
    above = {name: (memory[name]["step"] - sizes[name]) / 1e9 for name in MEMORY}
    print(f"peak memory above the result: {above['influences']:.3f} GB, averaged {above['averaged']:.3f} GB")
    stored, theirs = 4 * 2 * 8 * 200, 4 * 200 * 32 * 1023 * 4 + 4 * 200 * 32 * 1024 * 8  # devinterp's losses and ids
    print(f"bytes of an LLC-only run of 4 × 200 steps: {stored:,} of the peer's {theirs:,}")
    return {
        "benchmark": "sgmcmc",
        "settings": {"rounds": rounds, "threads": threads, "quick": quick},
        "machine": measure.machine(),
        "versions": measure.versions("torch", "transformers", "devinterp"),
        "times": {name: each._asdict() for name, each in times.items()},
        "ratios": {name: each._asdict() for name, each in ratios.items()},
        "influences": best,
        "memory_above_gb": above,
        "bytes": stored / theirs,
    }


def targets(found: dict, *, with_peers: bool) -> list[report.Check]:
    """Return the bars of the acceptance."""
    checks = [
        report.at_most("a step with looked-up baselines / bare", found["ratios"]["lookup"]["median"], 1.08),
        report.at_most("four chains together / apart", found["ratios"]["together"]["median"], 0.85),
    ]
    if with_peers:
        peer = found["influences"].get("peer")
        over = None if peer is None else found["influences"]["influences"] / peer
        checks.append(report.at_most("token BIF / peer", over, 0.25))
    return [
        *checks,
        report.at_most("token BIF: GB above the result", found["memory_above_gb"]["influences"], 0.3),
        report.at_most("bytes of an LLC-only run / peer's", found["bytes"], 0.01),
    ]


def chain_steps(quick: bool) -> dict[str, Callable[[], object]]:
    """Return one step of a run and what it is measured against."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from influence import functionalize
    from influence.sgmcmc import Options, local_posterior
    from influence.sgmcmc.runner import loop, schedule

    def made(n: int, s: int) -> tuple[Any, Any, dict]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
            model = LlamaForCausalLM(config).eval()
        ids = torch.randint(256, (4 * n, s), generator=torch.Generator().manual_seed(1))
        return model, functionalize(model), {"input_ids": ids}

    def runner(n: int, s: int, chains: int, chunk: int, baseline: str) -> Callable[[], object]:
        _, (loss_fn, params), data = made(n, s)
        options = Options(
            batch_size=n, num_chains=chains, num_draws=100_000, chain_chunk=chunk, baseline=baseline, keep="moments"
        )
        probe = {"input_ids": data["input_ids"][:n]}
        target = local_posterior(loss_fn, params, 30.0, 300.0)
        plan = schedule.make_plan(target, params, data, {"probe": probe}, 1e-6, {"": {}}, 0, options)
        progress, record = loop.begin(plan, params)
        state = [progress]

        def step() -> None:
            state[0] = loop.advance(plan, state[0], record, state[0].step + 5, lambda t, record: None)

        return step

    n, s = (2, 16) if quick else (32, 64)
    model, _, data = made(n, s)
    ids = data["input_ids"][:n]

    def bare() -> None:
        for _ in range(5):
            for p in model.parameters():
                p.grad = None
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    return {
        "bare": bare,
        "lookup": runner(n, s, 1, 1, "lookup"),
        "paired": runner(n, s, 1, 1, "paired"),
        "apart": runner(4, 32, 4, 1, "lookup"),
        "together": runner(4, 32, 4, 4, "lookup"),
    }


def traced(quick: bool) -> Any:
    """A run with random traces of positions."""
    from influence import sgmcmc
    from influence.sgmcmc import moments

    n, t, d = (8, 31, 40) if quick else (SEQUENCES, TOKENS, DRAWS)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, d, n, t, generator=source)
    empty = moments.init(1, 1, n * t)
    observed = sgmcmc.Observed(
        torch.zeros(n, t), torch.ones(n, t, dtype=torch.bool), torch.arange(n), None, "", x.mean((2, 3)).double(),
        empty, None, x
    )  # fmt: skip
    nothing = torch.zeros(1, d, dtype=torch.float64)
    return sgmcmc.Run(nothing, nothing, {}, {"text": observed}, None, (0,), 0, 1, {"n_beta": 1.0})


def bif_steps(quick: bool) -> dict[str, Callable[[], object]]:
    """Token influences by the library, by one matrix product, and by the peer where it is installed."""
    from influence.sgmcmc import bif

    run = traced(quick)
    x = run.observables["text"].tokens
    flat = x[0].flatten(1)
    steps: dict[str, Callable[[], object]] = {
        "influences": lambda: bif.estimate(run, level="token", pooling="stacked"),
        "averaged": lambda: bif.estimate(run, level="token", pooling="stacked", average=True),
        "product": lambda: flat.T @ flat,
    }
    if peers.importable("devinterp"):
        from types import SimpleNamespace

        import xarray
        from devinterp.slt.bif import compute_bif

        ids = torch.zeros(x.shape[2], x.shape[3] + 1, dtype=torch.long)
        tree = SimpleNamespace(
            dataset=xarray.Dataset(
                {
                    "loss_text": (("chain", "draw", "batch_text", "token_pos"), x.numpy()),
                    "input_ids_text": (("batch_text", "token"), ids.numpy()),
                }
            )
        )
        steps["peer"] = lambda: compute_bif(tree, batch_size=8, device="cpu")  # 8 was its fastest of 4, 8, 16, 32
    return steps


def print_memory(variant: str, threads: int, quick: bool) -> None:
    """Print the memory of one variant."""
    torch.set_num_threads(threads)
    measure.print_memory(lambda: bif_steps(quick)[variant])
