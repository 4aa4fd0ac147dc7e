"""Similarity of rows, and inner products of gradients that were never formed, against dense rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence import functionalize, per_example_grads
from influence.func.similarity import _product, cosine, dot, nearest, products, squared_norms
from tests.cases import CASES, GPT2, LLAMA, hf
from tests.worst import function_of

BY_NAME = {case.name: case for case in CASES}
Rows = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(n: int, seed: int = 0) -> Rows:
    return {"b": normal(n, 2, 3, seed=seed), "a": normal(n, 5, seed=seed + 10)}


def flat(found: Rows) -> Tensor:
    return torch.cat([found[name].flatten(1) for name in sorted(found)], 1)


def test_dot_and_cosine_are_those_of_flat_vectors() -> None:
    """Blocks paired by place instead of by name; a norm per block."""
    a, b = rows(4), rows(3, seed=1)
    shuffled = {name: b[name] for name in sorted(b)}
    torch.testing.assert_close(dot(a, shuffled), flat(a) @ flat(b).T)
    torch.testing.assert_close(cosine(a, shuffled), F.cosine_similarity(flat(a)[:, None], flat(b)[None], dim=-1))


def test_cosine_of_a_zero_row_is_zero() -> None:
    """0 / 0 for an example without a label."""
    a = {name: row * torch.tensor([0.0, 1.0]).reshape(2, *[1] * (row.ndim - 1)) for name, row in rows(2).items()}
    found = cosine(a, rows(3, seed=1))
    assert not found[0].any()
    assert found[1].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype: torch.dtype) -> None:
    """Sums of 300 products of 30 in float16 overflow; in bfloat16 they stop growing at 256."""
    a = {"w": torch.full((1, 300), 30.0).to(dtype)}
    assert dot(a, a).dtype == torch.float32
    torch.testing.assert_close(dot(a, a), torch.tensor([[270000.0]]))
    torch.testing.assert_close(cosine(a, a), torch.ones(1, 1))


def test_rows_of_two_dtypes_meet_in_the_wider_one() -> None:
    """Queries in float64, an index in float32: the contract is at least float32, not the same."""
    a, b = rows(2), {name: row.float() for name, row in rows(3, seed=1).items()}
    torch.testing.assert_close(dot(a, b), flat(a) @ flat(b).double().T)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_nearest_are_the_best_in_order(metric: str) -> None:
    """Smallest first, or rows and queries exchanged."""
    queries, found = rows(2), rows(6, seed=1)
    scores = (dot if metric == "dot" else cosine)(queries, found)
    values, indices = nearest(queries, found, 4, metric=metric)
    torch.testing.assert_close(values, scores.sort(dim=1, descending=True).values[:, :4])
    torch.testing.assert_close(scores.gather(1, indices), values)
    assert nearest(found, found, 1, metric="cosine").indices.flatten().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dot(rows(2), {"b": rows(2)["b"]}), "differ in .*'a'"),
        (lambda: dot(rows(2), {**rows(2), "b": normal(2, 3, 2)}), r"differ in .*\(3, 2\)"),
        (lambda: nearest(rows(1), rows(3), 4), r"between 1 and .* 3; got 4"),
        (lambda: nearest(rows(1), rows(3), 0), "got 0"),
        (lambda: nearest(rows(1), rows(3), 1, metric="l2"), "'dot' or 'cosine'; got 'l2'"),
    ],
    ids=["missing block", "other shape", "too many", "none", "unknown metric"],
)
def test_what_has_no_similarity_is_refused(call: Any, words: str) -> None:
    """Blocks compared in the order of two different dictionaries."""
    with pytest.raises(ValueError, match=words):
        call()


# Without rows


class Shared(nn.Module):
    """A linear used twice with a bias used a third time, a parameter derived from another, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain, self.unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(self.linear(x).tanh() * (1 + self.gain)) + self.linear.bias)


MODELS = {
    "gpt2": hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1}),
    "llama": hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1}),
}


def setting(name: str, s: int) -> tuple[Any, Rows, Any, Any]:
    """A loss function, its parameters, and two batches of other sizes."""
    if name in MODELS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss_fn, params = functionalize(MODELS[name]().double().eval())
        ids = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :s]
        return loss_fn, params, {"input_ids": ids[:3]}, {"input_ids": ids[3:]}
    if name == "shared":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss_fn, params = functionalize(Shared().double(), loss=lambda output, batch: output.sin().sum((1, 2)))
        return loss_fn, params, (normal(3, s, 4), torch.zeros(3)), (normal(2, s, 4, seed=1), torch.zeros(2))
    case = BY_NAME[name]
    return *function_of(case, "sum"), case.batch(3, s), case.batch(2, s)


# Short sequences take the ghost product, long ones form the gradient: 3 (16 + 16) < 16² < 12 (16 + 16).
@pytest.mark.parametrize("s", [3, 12])
@pytest.mark.parametrize("name", ["gpt2", "llama", "conv2d", "mlp", "shared"])
def test_ghost_products_are_those_of_dense_rows(name: str, s: int) -> None:
    """Tied weights counted apart, Conv1D's factors exchanged, a bias left out, two uses that do not see each other."""
    loss_fn, params, batch, other = setting(name, s)
    a, b = (flat(per_example_grads(loss_fn, params, x, engine="loop")) for x in (batch, other))
    torch.testing.assert_close(squared_norms(loss_fn, params, batch), a.square().sum(1), rtol=1e-9, atol=0)
    scale = float(a.norm(dim=1).max() * b.norm(dim=1).max())
    torch.testing.assert_close(products(loss_fn, params, batch, other), a @ b.T, rtol=1e-9, atol=1e-10 * scale)
    torch.testing.assert_close(products(loss_fn, params, batch), a @ a.T, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize(("s", "t"), [(1, 2), (40, 30)])
def test_both_branches_of_a_product_agree(s: int, t: int) -> None:
    """The cheaper of two formulas is chosen by shapes: each must be right where it is chosen, for unequal lengths."""
    a, b = (normal(3, s, 6), normal(3, s, 7, seed=1)), (normal(2, t, 6, seed=2), normal(2, t, 7, seed=3))
    forms = [torch.einsum("nso,nsi->noi", *pair).flatten(1) for pair in (a, b)]
    torch.testing.assert_close(_product(a, b), forms[0] @ forms[1].T)


def test_norms_cost_no_gradient_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A [64, 64] gradient formed for a single position: the ghost product is 32 times cheaper."""
    loss_fn, params = functionalize(
        nn.Linear(64, 64, bias=False), loss=lambda output, batch: output.square().sum((1, 2))
    )
    formed = []
    matmul = Tensor.__matmul__

    def watch(a: Tensor, b: Tensor) -> Tensor:
        out = matmul(a, b)
        formed.append(tuple(out.shape[-2:]))
        return out

    monkeypatch.setattr(Tensor, "__matmul__", watch)
    squared_norms(loss_fn, params, (torch.ones(3, 1, 64), torch.zeros(3)))
    assert (1, 1) in formed
    short = len(formed)
    squared_norms(loss_fn, params, (torch.ones(3, 200, 64), torch.zeros(3)))
    assert (64, 64) in formed[short:]
    assert (200, 200) not in formed[short:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ghost_products_of_half_precision_are_raised(dtype: torch.dtype) -> None:
    """A squared norm of 1e6 is infinite in float16, and has two digits in bfloat16."""
    loss_fn, params = functionalize(nn.Linear(8, 8, dtype=dtype), loss=lambda output, batch: output.float().sum((1, 2)))
    x = torch.full((2, 4, 8), 30.0, dtype=dtype), torch.zeros(2)
    expected = flat({name: row.float() for name, row in per_example_grads(loss_fn, params, x).items()})
    for found, truth in (
        (squared_norms(loss_fn, params, x), expected.square().sum(1)),
        (products(loss_fn, params, x), expected @ expected.T),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=0)
