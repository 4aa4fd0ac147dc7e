"""Every command and function that writes, small: what the faults happen to."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.forks import refusing

Work = list[str] | Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        name: its name.
        protocol: which way of writing to a disk it is an instance of.
        work: what it does in its folder: what is typed after `influence`, or a function of Python.
        given: finished runs that lie in the folder before it starts, by the name there.
        needs: finished runs elsewhere, which it reads.
        every: whether each of its file events is killed; otherwise a seeded thirty.
        over: whether it takes `--overwrite`, and does not already.
        again: what is done after it was killed, where that is not the same again.
        writes: what it makes in its folder; this alone is compared.
        directory: whether that is a directory, in which no other may write.
    """

    name: str
    protocol: str
    work: Work
    given: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    every: bool = False
    over: bool = True
    again: Work | None = None
    writes: str = "run"
    directory: bool = True

    def call(self, *more: str) -> Callable[[], Any]:
        """Return what a child does."""
        return called(self.work, *more)

    def call_again(self) -> Callable[[], Any]:
        """Return what a child does where a killed one left off."""
        return called(self.again or self.work)


def called(work: Work, *more: str) -> Callable[[], Any]:
    """Return what a child does of some work."""
    if callable(work):
        return refusing(work)

    def run() -> int:
        from influence.cli import main

        return main([*work, *more])

    return run


def commands(root: Path) -> list[Case]:
    """Return every command that writes.

    Args:
        root: where the world is: its model, data, and finished runs in `made`.
    """
    model, corpus, questions = (str(root / name) for name in ("model", "corpus.jsonl", "questions.jsonl"))
    made = {
        name: str(root / "made" / name / "run")
        for name in ("build", "reduce", "hessian autocorrelation", "fitted", "sample")
    }
    saved = [str(root / "made/checkpoints/trainer" / f"checkpoint-{step}") for step in (1, 2)]

    def of(data: str, shard: int, *more: str) -> list[str]:
        known = ["--model", model, "--token-budget", "256", "--dtype", "float64", "--progress", "False"]
        return ["run", *known, "--dataset", data, "--shard-size", str(shard), *more]

    rows = ["--projection-dim", "4"]
    two = ["--targets", "*q_proj.weight", "*down_proj.weight"]
    fit = of(corpus, 13, *two)
    recipe = [*of(corpus, 13, *two), "--query.dataset", questions]
    chains = ["run", "--model", model, "--dataset", corpus, "--no-progress", "--num-draws", "4"]
    chains += ["--num-burnin-steps", "2", "--batch-size", "4", "--num-chains", "2", "--localization", "1000"]
    chains += ["--checkpoint-every", "2"]
    head, heads = ["--restriction", "l0h0"], ["--restrictions", "l0h0"]
    watched = ["--observables", f"questions={questions}", "data", "--observed", "4"]
    score = ["score", *of(corpus, 8), *rows, "--query", made["reduce"]]
    return [
        Case("build", "index", ["build", *of(corpus, 8), *rows], every=True),
        Case("append", "index", ["build", *of(str(root / "more.jsonl"), 8), *rows, "--append"], {"run": "build"},
             every=True, over=False),
        Case("build over", "index", ["build", *of(corpus, 8), *rows, "--overwrite"], {"run": "reduce"}, every=True,
             over=False),
        Case("reduce", "index", ["reduce", *of(questions, 2), *rows]),
        Case("python build", "index", python_build, again=lambda: python_build(overwrite=True), over=False),
        Case("score", "scores", score, needs=("reduce",), every=True),
        Case("score top", "scores", [*score, "--top-k", "3"], needs=("reduce",), every=True),
        Case("score over", "scores", [*score, "--overwrite"], {"run": "score top"}, ("reduce",), over=False),
        Case("hessian kfac", "factors", ["hessian", *fit, "--method", "kfac"], every=True),
        Case("hessian ekfac", "factors", ["hessian", *fit, "--method", "ekfac"], every=True),
        Case("hessian tkfac", "factors", ["hessian", *fit, "--method", "tkfac"]),
        Case("hessian shampoo", "factors", ["hessian", *fit, "--method", "shampoo"]),
        Case("hessian autocorrelation", "factors", ["hessian", *fit, *rows, "--method", "autocorrelation"]),
        Case("hessian over", "factors", ["hessian", *fit, "--method", "kfac", "--overwrite"], {"run": "hessian ekfac"},
             over=False),
        Case("mix", "factors", ["mix", "run", "--query", made["fitted"], "--index",
             made["hessian autocorrelation"], "--components", "2"], needs=("fitted", "hessian autocorrelation")),
        Case("ekfac", "recipe", ["ekfac", *recipe]),
        Case("ekfac over", "recipe", ["ekfac", *recipe, "--method", "kfac", "--overwrite"], {"run": "ekfac"},
             over=False),
        Case("trackstar", "recipe", ["trackstar", *recipe, *rows, "--components", "2"]),
        Case("trak", "recipe", ["trak", *recipe, "--projection-dim", "16", "--checkpoints", *saved],
             needs=("checkpoints",)),
        Case("tracin", "recipe", ["tracin", *recipe, *rows, "--checkpoints", *saved], needs=("checkpoints",)),
        Case("less", "recipe", ["less", *recipe, "--projection-dim", "16", "--checkpoints", *saved],
             needs=("checkpoints",)),
        Case("sample", "chains", ["sample", *chains, *heads, *watched[:2], "--observed", "3"], every=True),
        Case("sample over", "chains", ["sample", *chains, *heads, "--overwrite"], {"run": "sample"}, every=True,
             over=False),
        Case("python sample", "chains", python_sample, every=True, over=False),
        Case("llc", "chains", ["llc", *chains, *heads]),
        Case("bif", "chains", ["bif", *chains, *head, *watched, "--rows", "questions", "--columns", "data"]),
        Case("susceptibilities", "chains", ["susceptibilities", *chains, *heads, "full", *watched, "--sampling-task",
             "data", "--probes", "questions"]),
        Case("bif to a file", "file", ["bif", made["sample"], *head, "--save", "b.npy"], needs=("sample",),
             writes="b.npy", directory=False),
        *(
            Case(f"export {kind}", "file", ["export", made["build"], "--to", f"rows.{kind}"], needs=("build",),
                 writes=f"rows.{kind}", directory=False)
            for kind in ("npy", "parquet", "safetensors")
        ),
        Case("explore", "file", ["explore", made["build"], "--to", "page.html", "--progress", "False"],
             needs=("build",), writes="page.html", directory=False),
        Case("query faiss", "faiss", ["query", "run", "--text", "the home of bacy is the attic",
             "--faiss.index-factory", "Flat", "--faiss.num-shards", "2"], {"run": "build"}, over=False),
        Case("callback", "callback", callback, every=True, over=False, writes="rows"),
    ]  # fmt: skip


def inputs(root: Path) -> dict[str, Case]:
    """Return what commands read and no fault happens to."""
    model, questions = str(root / "model"), str(root / "questions.jsonl")
    fit = [
        "hessian",
        "run",
        "--model",
        model,
        "--dataset",
        questions,
        "--dtype",
        "float64",
        "--progress",
        "False",
    ]
    fit += ["--targets", "*q_proj.weight", "*down_proj.weight", "--projection-dim", "4", "--method", "autocorrelation"]
    reverse = str(root / "reverse.jsonl")
    known = {case.name: case for case in commands(root)}

    def other(name: str, *changed: str) -> Case:
        typed = known[name].work
        assert isinstance(typed, list)
        return Case(f"{name} other", "", [*typed, *changed], known[name].given, known[name].needs)

    return {
        "fitted": Case("fitted", "", fit),
        **{f"{name} other": other(name, "--dataset", reverse) for name in ("build", "hessian kfac", "hessian ekfac")},
        "reduce other": other("reduce", "--method", "sum"),
        "score other": other("score", "--dataset", reverse),
        "sample other": other("sample", "--seed", "1"),
        "callback other": Case("callback other", "", lambda: callback(learning_rate=0.06), writes="rows"),
        "checkpoints": Case("checkpoints", "", lambda: _checkpoints(root), writes="trainer"),
    }


def python_build(overwrite: bool = False) -> None:
    """Collect rows of a function of Python."""
    import torch

    from influence.index import build

    batches = [torch.arange(12.0, dtype=torch.float64).view(6, 2)[n : n + 2] for n in (0, 2, 4)]
    params = {"w": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    build(lambda p, x: (x @ p["w"]).square() / 2, params, batches, "run", shard_size=2, dtype="float64",
          overwrite=overwrite)  # fmt: skip


def python_sample(seed: int = 0) -> None:
    """Run chains of a function of Python."""
    import torch

    from influence import sgmcmc

    sgmcmc.sample(lambda w, _: w["w"].square().sum() / 2, {"w": torch.zeros(4, dtype=torch.float64)}, None, lr=0.01,
                  n_beta=10.0, num_draws=6, num_chains=2, num_burnin_steps=0, checkpoint_every=2, seed=seed,
                  output_path="run", progress=False)  # fmt: skip


def callback(**settings: Any) -> None:
    """Train, from the last checkpoint if there is one, and add up what was collected."""
    import warnings

    from influence.train import sum_epochs
    from tests import training_world

    warnings.simplefilter("ignore")
    training_world.train(Path(), resume=True, num_train_epochs=2, **settings)
    sum_epochs("rows")


def _checkpoints(root: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    examples = [{"input_ids": torch.arange(6) + n, "labels": torch.arange(6) + n} for n in range(4)]
    known = {"save_steps": 1, "max_steps": 2, "logging_steps": 1, "learning_rate": 3e-3, "optim": "adamw_torch"}
    arguments = transformers.TrainingArguments(
        os.path.abspath("trainer"),
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **known,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.processing_class = transformers.AutoTokenizer.from_pretrained(root / "model")
    trainer.train()
