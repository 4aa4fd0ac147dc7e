"""Whether our EK-FAC scores are kronfluence's: same weights, same data, labels from the data, the same damping.

On a three-layer classifier and a small transformer of plain linear layers, both trained a little so that the curvature
is no random matrix. Ours: `⟨g_query, H^{-1} g_train⟩` with `precondition(factors, power=-1, …)`. Theirs: the pairwise
scores of its `Analyzer`. Everything in float32, as both do by default. `benchmarks.kronfluence` says which of our
settings are theirs: damping `1e-8` absolute by default, `0.1 ×` the block's mean eigenvalue for `None`.

Printed per model and damping: the Pearson correlation over all pairs (target: at least 0.9999), the factor between the
two scales (ours over theirs, least squares through zero; 1 if every convention is understood), and the worst absolute
difference over the largest score.
"""

import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import kronfluence, measure, report
from benchmarks.models import PlainTransformer, build
from benchmarks.report import Check, at_least

PEARSON = 0.9999
BATCH = 64
# Kronfluence's setting, and ours for the same.
DAMPINGS = {
    "1e-8, its default": (kronfluence.DAMPING, {"damping": kronfluence.DAMPING, "inversion": "absolute"}),
    "None, 0.1 × mean": (None, {"damping": 0.1, "inversion": "damped"}),
}


class Subject(NamedTuple):
    """A trained model with its data.

    Attributes:
        model: Frozen, in eval mode.
        blocks: Names of its tracked modules.
        losses: `(model, inputs, labels) -> [n]`.
        train: Inputs and labels.
        queries: The same.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


def mlp(quick: bool) -> Subject:
    """Three layers with biases: 12 → 24 → 16 → 5."""
    count = 256 if quick else 2048
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count + 32, 12, generator=draw)
    teacher = torch.randn(12, 5, generator=draw)
    y = (x @ teacher + torch.randn(count + 32, 5, generator=draw)).argmax(1)
    model = build(lambda: nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5)))
    losses = lambda net, x, y: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
    return _subject(model, ("0", "2", "4"), losses, x, y, count)


def transformer(quick: bool) -> Subject:
    """Two layers, 32 wide, MLP 128, vocabulary 48; 16 tokens; 12 blocks with biases."""
    count = 64 if quick else 1024
    draw = torch.Generator().manual_seed(2)
    # Each token follows from the one before, three times out of four.
    step, ids = torch.randperm(48, generator=draw), torch.randint(0, 48, (count + 32, 17), generator=draw)
    follows = torch.rand(ids.shape, generator=draw) < 0.75
    for t in range(1, 17):
        ids[:, t] = torch.where(follows[:, t], step[ids[:, t - 1]], ids[:, t])
    model = build(lambda: PlainTransformer(2, 32, 48))
    blocks = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head")

    def losses(net: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(ids).mT, labels, reduction="none").sum(1)

    return _subject(model, blocks, losses, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), count)


SUBJECTS: dict[str, Callable[[bool], Subject]] = {"mlp": mlp, "transformer": transformer}


def run(*, threads: int, quick: bool) -> dict:
    """Compare the scores on every model and return everything, ready for JSON."""
    torch.set_num_threads(threads)
    found = {
        "benchmark": "agree",
        "settings": {"threads": threads, "quick": quick, "batch": BATCH},
        "machine": measure.machine(),
        "versions": measure.versions("torch", "influence", "kronfluence"),
        "rows": [],
    }
    for name, make in SUBJECTS.items():
        subject = make(quick)
        for damping in DAMPINGS:
            row = {"model": name, "damping": damping, "failed": None}
            try:
                row |= compare(subject, damping)
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {problem}"
                traceback.print_exc()
            found["rows"].append(row)
    header = ("model", "damping", "pairs", "Pearson", "ours / theirs", "worst", "")
    print(report.table(header, [_line(row) for row in found["rows"]]), flush=True)
    return found


def compare(subject: Subject, damping: str) -> dict[str, float]:
    """Both libraries' scores of one model, at one damping."""
    theirs, mine = DAMPINGS[damping]
    a = ours(subject, **mine).double()
    data = (TensorDataset(*subject.train), TensorDataset(*subject.queries))
    b = kronfluence.scores(subject.model, subject.losses, subject.blocks, *data, theirs, BATCH).double()
    return {
        "pairs": a.numel(),
        "pearson": float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]),
        "factor": float((a * b).sum() / (b * b).sum()),
        "worst": float((a - b).abs().max() / b.abs().max()),
    }


def ours(subject: Subject, **inversion: object) -> Tensor:
    """The library's scores `[q, N]`."""
    from influence import as_blocks, chain, functionalize, hessians, per_example_grads, precondition, similarity

    names = [f"{block}.{kind}" for block in subject.blocks for kind in ("weight", "bias")]
    loss_fn, params = functionalize(subject.model, loss=lambda out, batch: _given(subject, out, batch), targets=names)
    batches = list(zip(*(part.split(BATCH) for part in subject.train), strict=True))
    blocks = as_blocks(bias=True)
    factors = hessians.ekfac.fit(loss_fn, params, batches, transform=blocks, labels="data", progress=False)
    inverse = chain(blocks, precondition(factors, power=-1, **inversion))
    solved = per_example_grads(loss_fn, params, subject.queries, transform=inverse)
    rows = (per_example_grads(loss_fn, params, batch, transform=blocks) for batch in batches)
    return torch.cat([similarity.dot(solved, row) for row in rows], dim=1)


def targets(found: dict) -> list[Check]:
    """Every target."""
    return [
        at_least(f"{row['model']}, damping {row['damping']}: Pearson", row.get("pearson"), PEARSON)
        for row in found["rows"]
    ]


def _line(row: dict) -> tuple[str, ...]:
    if row["failed"]:
        return row["model"], row["damping"], "", "FAILED", "", "", row["failed"]
    numbers = (str(row["pairs"]), f"{row['pearson']:.8f}", f"{row['factor']:.6f}", f"{row['worst']:.0e}")
    return row["model"], row["damping"], *numbers, ""


def _given(subject: Subject, out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The subject's losses of outputs that are there already."""
    return subject.losses(lambda _: out, *batch)


def _subject(model: nn.Module, blocks: tuple[str, ...], losses: Callable, x: Tensor, y: Tensor, count: int) -> Subject:
    """Train for a while, freeze, and split the data."""
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(100):
        some = torch.arange(step * BATCH, (step + 1) * BATCH) % count
        optimizer.zero_grad()
        losses(model, x[some], y[some]).mean().backward()
        optimizer.step()
    model.requires_grad_(False)
    return Subject(model, blocks, losses, (x[:count], y[:count]), (x[count:], y[count:]))
