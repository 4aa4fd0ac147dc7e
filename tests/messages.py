"""Every kind of bad input and what the library answers: `python -m tests.messages` prints the table.

`python -m tests.messages cli` prints what the command line says to its mistakes (tests/cli_messages.py).
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence import (
    Heads,
    Moments,
    as_blocks,
    chain,
    down_project,
    eigen_whiten,
    functionalize,
    hessians,
    kfac_whiten,
    per_example_grads,
    per_token_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    similarity,
    split_heads,
    unit_norm,
)
from influence.func.transform.chain import Transform

W = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]])}
X = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0]])


def ell(params: dict[str, Tensor], x: Any) -> Tensor:
    return (x @ params["w"]).square().sum(1)


def rows(*transforms: Any, **settings: Any) -> Any:
    return per_example_grads(ell, W, X, transform=chain(*transforms) if transforms else None, **settings)


def net(*layers: nn.Module, **settings: Any) -> Any:
    return functionalize(nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2)), **settings)


class OwnForCausalLM(nn.Linear):
    """A module whose name ends as those of transformers' causal language models do."""


def with_batch_norm(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.batch_norm(x @ params["w"], None, None, training=True).square().sum(1)


def with_dropout(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (F.dropout(x, 0.5) @ params["w"]).square().sum(1)


def overflowing(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (batch["x"] @ params["w"]).square().sum(1) * batch["scale"]


BROKEN = {"x": X, "scale": torch.tensor([1.0, float("inf"), 1.0]), "index": torch.tensor([70, 81, 92])}
UNFINISHED = {key: value for key, value in BROKEN.items() if key != "index"}
MOMENTS = Moments({"other": torch.ones(3, 2)})


class Bad(NamedTuple):
    """One mistake: what it is, how it is made, and the words its message must hold."""

    name: str
    call: Callable[[], Any]
    words: tuple[str, ...]


CASES = [
    Bad("wrong glob", lambda: net(targets="*.wieght"), ("*.wieght", "near misses", "0.weight")),
    Bad("glob leaves nothing", lambda: net(exclude="*"), ("leave no parameter",)),
    Bad("unmatched batch axis", lambda: rows_of_pair(X, X[:2]), ("batch[0]: [3, 3]", "batch[1]: [2, 3]", "Close over")),
    Bad("empty batch", lambda: per_example_grads(ell, W, X[:0]), ("no example",)),
    Bad("batch without a tensor", lambda: per_example_grads(ell, W, {"x": [1, 2]}), ("no tensor",)),
    Bad(
        "a loss that returns a scalar",
        lambda: per_example_grads(lambda p, x: ell(p, x).mean(), W, X),
        ("one loss per example", "got []", "before their mean or sum"),
    ),
    Bad(
        "a loss per position",
        lambda: per_example_grads(lambda p, x: x @ p["w"], W, X),
        ("got [2, 2]", "sum each example's own losses"),
    ),
    Bad("BatchNorm in train mode", lambda: net(nn.BatchNorm1d(4), mode="train"), ("['1']", "batch", "mode='eval'")),
    Bad(
        "batch_norm in a function",
        lambda: per_example_grads(with_batch_norm, W, X),
        ("loss changes from", "another example joins", "BatchNorm"),
    ),
    Bad("dropout left on, module", lambda: net(nn.Dropout(0.1), mode="train"), ("dropout is active in ['1']",)),
    Bad(
        "dropout left on, function",
        lambda: per_example_grads(with_dropout, W, X),
        ("draws random numbers", "dropout was left on"),
    ),
    Bad(
        "a key that the model does not take",
        lambda: per_example_grads(*net(), {"input": X, "label": torch.tensor([0, 1, 0])}),
        ("'label'", "Sequential.forward does not take (it takes input)", "leave it out", "labels, index, weight"),
    ),
    Bad(
        "a language model of one's own that takes no use_cache",
        lambda: per_example_grads(*functionalize(OwnForCausalLM(3, 4)), {"input": X, "labels": X[:, 0].long()}),
        ("OwnForCausalLM is called as a causal language model", "use_cache=False", "let it take that too"),
    ),
    Bad(
        "a row that is not finite",
        lambda: per_example_grads(overflowing, W, BROKEN),
        ("example 81 of the dataset (row 1 of the batch)", "block 'w'", "nonfinite='zero'"),
    ),
    Bad(
        "the same without an index",
        lambda: per_example_grads(overflowing, W, UNFINISHED),
        ("example 1 ", "1 of 3 examples"),
    ),
    Bad(
        "the same in chunks",
        lambda: per_example_grads(overflowing, W, UNFINISHED, chunk_size=1),
        ("example 1 ", "1 of 3 examples"),
    ),
    Bad(
        "the same in chunks, with an index",
        lambda: per_example_grads(overflowing, W, BROKEN, chunk_size=1),
        ("example 81 of the dataset (row 1 of the batch)",),
    ),
    Bad("unknown policy", lambda: rows(nonfinite="skip"), ("'error' or 'zero'", "'skip'")),
    Bad("chunks of nothing", lambda: rows(chunk_size=0), ("chunk_size must be at least 1", "0")),
    Bad(
        "a block two transforms disagree on",
        lambda: chain(as_blocks(), project(2), as_blocks()),
        ("as_blocks(bias=False) cannot follow project(dim=2", "come first"),
    ),
    Bad("projection without blocks", lambda: rows(project(2)), ("needs blocks", "as_blocks()")),
    Bad("blocks twice", lambda: chain(as_blocks(), as_blocks()), ("leave one out",)),
    Bad("projected twice", lambda: chain(as_blocks(), project(4), project(2)), ("project(dim=2", "down_project")),
    Bad(
        "optimizer scale after projection",
        lambda: chain(as_blocks(), project(2), scale_by_adam(MOMENTS)),
        ("scale_by_adam", "project(dim=2", "not indexed by parameters"),
    ),
    Bad("optimizer scale after unit norm", lambda: chain(unit_norm(), scale_by_adam(MOMENTS)), ("unit_norm", "unit v")),
    Bad("moments missing", lambda: rows(scale_by_adam(MOMENTS)), ("no second moment for 1 of 1", "w")),
    Bad(
        "moments of another shape",
        lambda: rows(scale_by_adam(Moments({"w": torch.ones(2, 3)}))),
        ("[2, 3]", "[3, 2]"),
    ),
    Bad(
        "heads that do not tile",
        lambda: rows(as_blocks(), split_heads({"w": Heads(3, 1)})),
        ("covers 3 of the 2", "count × size"),
    ),
    Bad("heads of no block", lambda: rows(as_blocks(), split_heads({"v*": Heads(1, 2)})), ("'v*'", "near misses")),
    Bad("unknown heads", lambda: rows(as_blocks(), split_heads()), ("knows no attention heads",)),
    Bad(
        "unknown loss",
        lambda: net(loss="crossentropy"),
        ("cross_entropy, squared_error, kl, log_odds", "'crossentropy'"),
    ),
    Bad("unknown reduction", lambda: net(reduction="avg"), ("'sum' or 'mean'", "'avg'")),
    Bad("kl without a reference", lambda: net(loss="kl"), ("reference=another model",)),
    Bad("unknown engine", lambda: rows(engine="hooks"), ("auto, batched, vmap, loop", "'hooks'")),
    Bad("unknown kind", lambda: project(4, kind="gaussian"), ("rademacher, normal, sparse, srht", "'gaussian'")),
    Bad("dim out of range", lambda: project(0), ("dim must be at least 1",)),
    Bad(
        "an engine that cannot",
        lambda: rows_by_vmap_of_a_branch(),
        ("engine='vmap' cannot serve", "branches on the values", "engine='auto' or 'loop'"),
    ),
    Bad("no parameters", lambda: per_example_grads(ell, {}, X), ("dictionary", "at least one entry")),
    Bad("an integer parameter", lambda: per_example_grads(ell, {"w": torch.ones(3, 2).long()}, X), ("'w'", "int64")),
    Bad(
        "parameters that are not used",
        lambda: per_example_grads(lambda p, x: x.sum(1), W, X),
        ("no gradient with respect to any of w",),
    ),
    Bad("inference mode", lambda: in_inference_mode(), ("inference_mode",)),
    Bad(
        "examples that mix (check=True)", lambda: per_example_grads(coupled, W, X, check=True), ("is exchanged", "loss")
    ),
    Bad(
        "down-projection upwards",
        lambda: down_project(rows(as_blocks(), project(1)), 2),
        ("stored at dim 1", "larger 2"),
    ),
    Bad(
        "down-projection of a sketch that does not nest",
        lambda: down_project(rows(as_blocks(), project(1, kind="srht")), 1),
        ("does not nest", "rademacher and normal"),
    ),
    Bad("down-projection of bare rows", lambda: down_project({"w": X}, 1), ("do not know how they were made",)),
    Bad(
        "rows of different blocks",
        lambda: similarity.dot(rows(as_blocks()), rows(as_blocks(), project(1))),
        ("different blocks",),
    ),
    Bad("k too large", lambda: similarity.nearest(rows(), rows(), k=4), ("between 1 and", "got 4")),
    Bad(
        "no positions",
        lambda: per_token_grads(lambda p, x: x * p["w"].sum(), W, torch.ones(3)),
        ("no axis of positions",),
    ),
    Bad(
        "token losses of a bare function",
        lambda: per_token_grads(ell, W, X, position="loss"),
        ("loss_fn.positions", "functionalize"),
    ),
    Bad("an all-zero block", lambda: precondition_of(zero_block()), ("2 blocks is zero", "(0, 1)", "exclude")),
    Bad(
        "a rank-deficient Gram without damping",
        lambda: precondition_of(fit(), damping=0.0),
        ("no inverse without damping", "Raise damping", "pseudoinverse"),
    ),
    Bad(
        "a covariance that is not finite",
        lambda: fit(batch=BATCH | {"input": torch.full((4, 3), 1e30)}),
        ("the covariance of block '0' (right) is not finite", "wider dtype"),
    ),
    Bad(
        "corrected factors on a separable path",
        lambda: kfac_whiten(corrected(), dim=2),
        ("was corrected (EK-FAC", "eigen_whiten", "the uncorrected factors"),
    ),
    Bad(
        "corrected factors with a factored inversion",
        lambda: precondition_of(corrected(), inversion="factored"),
        ("needs Kronecker factors", "inversion='damped'"),
    ),
    Bad(
        "factors of another model",
        lambda: precondition_of(fit(nn.Linear(3, 5), nn.Linear(5, 2))),
        ("block '0' has rows of shape [4, 4]", "another model's"),
    ),
    Bad(
        "factors of other weights",
        lambda: hessians.ekfac.correct(fit(), *weights(1), [BATCH]),
        ("fitted at other weights",),
    ),
    Bad(
        "factors of other blocks",
        lambda: precondition_of(fit(), as_blocks()),
        ("fitted under as_blocks(bias=True)", "chain(as_blocks(bias=False))"),
    ),
    Bad(
        "the inverse twice",
        lambda: chain(as_blocks(bias=True), precondition(fit()), kfac_whiten(fit())),
        ("H is applied once",),
    ),
    Bad("unknown inversion", lambda: precondition(fit(), inversion="inverse"), ("damped, absolute", "'inverse'")),
    Bad("a power out of range", lambda: precondition(fit(), power=1.0), ("[-1, 0]", "got 1.0")),
    Bad("negative damping", lambda: precondition(fit(), damping=-0.1), ("at least 0", "got -0.1")),
    Bad("no dimension", lambda: eigen_whiten(fit(), 0), ("dim must be at least 1",)),
    Bad("unknown labels", lambda: fit(labels="true"), ("sampled, data, exact", "'true'")),
    Bad(
        "sampled labels of nobody",
        lambda: hessians.kfac.fit(*weights(0), DataLoader(TensorDataset(*PAIR), batch_size=2, shuffle=True)),
        ("labels='sampled'", "'index', int64 [n]"),
    ),
    Bad(
        "labels that cannot be drawn",
        lambda: fit(loss=lambda output, batch: output.sum(1)),
        ("needs a loss with a likelihood", "labels='data'"),
    ),
    Bad(
        "a transform that does not separate",
        lambda: fit(labels="data", transform=chain(as_blocks(), unit_norm())),
        ("needs a separable transform", "hessians.shampoo"),
    ),
    Bad("curvature without blocks", lambda: fit(labels="data", transform=Transform()), ("put as_blocks(…) first",)),
    Bad(
        "weight and bias scaled apart",
        lambda: fit(labels="data", transform=chain(as_blocks(bias=True), scale_by_adafactor(NET_MOMENTS))),
        ("the weight and the bias of block '0' are scaled apart", "as_blocks(bias=False)"),
    ),
    Bad("no batches", lambda: hessians.kfac.fit(*weights(0), []), ("batches is empty",)),
    Bad("batches that come once", lambda: hessians.ekfac.fit(*weights(0), iter([BATCH])), ("sees the batches twice",)),
    Bad(
        "a dense Gram of long rows",
        lambda: hessians.autocorrelation.fit(
            *functionalize(nn.Linear(200, 100), loss="cross_entropy"),
            [{"input": torch.zeros(2, 200), "labels": torch.zeros(2, dtype=torch.int64)}],
            transform=as_blocks(),
        ),
        ("too long for a dense second moment", "project"),
    ),
    Bad(
        "nothing to correct",
        lambda: hessians.ekfac.correct(
            hessians.autocorrelation.fit(*weights(0), [BATCH], transform=as_blocks()), *weights(0), [BATCH]
        ),
        ("no Kronecker factors to correct",),
    ),
    Bad(
        "a quantised layer",
        lambda: functionalize(nn.Sequential(nn.Linear(2, 2), Quantised(2, 2))),
        ("1 layers (1, …) are quantised", "influence.models.load(precision="),
    ),
    Bad("a file of something else", lambda: hessians.load(__file__), ("is no file of influence",)),
]


class Quantised(nn.Linear):
    """What a library of quantised layers brings."""

    __module__ = "bitsandbytes.nn.modules"


BATCH = {
    "input": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    "labels": torch.tensor([0, 1, 1, 0]),
    "index": torch.arange(4),
}


PAIR = (BATCH["input"], BATCH["labels"])


def weights(seed: int, *layers: nn.Module, loss: Any = "cross_entropy") -> Any:
    model = nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Linear(4, 2))))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return functionalize(model, loss=loss)


NET_MOMENTS = Moments({name: torch.rand_like(p) + 0.1 for name, p in weights(0)[1].items()})


def fit(*layers: nn.Module, batch: Any = None, loss: Any = "cross_entropy", **settings: Any) -> Any:
    settings = {"transform": as_blocks(bias=True)} | settings
    return hessians.kfac.fit(*weights(0, *layers, loss=loss), [BATCH if batch is None else batch], **settings)


def corrected() -> Any:
    return hessians.ekfac.correct(fit(), *weights(0), [BATCH])


def zero_block() -> Any:
    return fit(batch=BATCH | {"labels": torch.full((4,), -100)})


def precondition_of(factors: Any, blocks: Any = None, **settings: Any) -> Any:
    transform = chain(blocks or as_blocks(bias=True), precondition(factors, **settings))
    return per_example_grads(*weights(0), BATCH, transform=transform)


def coupled(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Every loss reads its successor, by an amount too small for the check that every plan makes."""
    return ell(params, x) + 0.01 * ell(params, x.roll(-1, 0))


def scaled(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return x * params["w"].sum()


def rows_of_pair(x: Tensor, y: Tensor) -> Any:
    return per_example_grads(lambda p, batch: ell(p, batch[0]), W, (x, y))


def rows_by_vmap_of_a_branch() -> Any:
    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return ell(params, x if bool((x.sum(1) > -100).all()) else -x)

    return per_example_grads(loss_fn, W, X, engine="vmap")


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return per_example_grads(ell, W, X)


ERRORS = (ValueError, RuntimeError, OSError)


def message_of(case: Bad) -> str:
    """Return what the library says to a mistake."""
    try:
        case.call()
    except ERRORS as error:
        return str(error)
    return "(nothing was said)"


if __name__ == "__main__" and "cli" in sys.argv[1:]:
    from tests.cli_messages import print_all

    print_all(*sys.argv[2:])
elif __name__ == "__main__":
    from tests import messages_training

    warnings.simplefilter("ignore")
    for case in [*CASES, *messages_training.CASES]:
        print(f"* {case.name}:\n    {message_of(case)}")
