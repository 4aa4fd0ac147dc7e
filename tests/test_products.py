"""Exact curvature, and the solvers that invert it, against dense matrices in float64.

The dense matrices come from `torch.autograd.functional`, from losses written again here, and from eager attention.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from influence import functionalize
from influence.func.engine.batch import take
from influence.hessians import cg, lissa, products
from influence.hessians import products as linearize
from tests.cases import CASES

KINDS = ("hessian", "ggn", "fisher")
DAMPING = 0.1
EYE = functools.partial(torch.eye, dtype=torch.float64)


class Net(nn.Module):
    """Named inputs, so that a batch may have weights."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def tiny_gpt2(implementation: str) -> nn.Module:
    sizes = {"vocab_size": 11, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 5, "n_inner": 6}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, attn_implementation=implementation))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors_of(n: int, *shape: int) -> dict[str, Tensor]:
    return {"x": normal(n, *shape, seed=n), "weight": torch.linspace(0.0, 2.0, n, dtype=torch.float64)}


def regression() -> Any:
    return {**vectors_of(5, 3), "labels": normal(5, 2, seed=7)}


def sequences() -> Any:
    return {**vectors_of(4, 3, 3), "labels": normal(4, 3, 2, seed=7)}


def classes() -> Any:
    return {**vectors_of(6, 3), "labels": torch.tensor([0, 1, 2, 0, -100, 2])}


def padded_tokens() -> Any:
    ids = torch.tensor([[4, 7, 1, 4, 9], [8, 2, 5, 1, 1], [0, 10, 3, 6, 1]])  # 1 pads, and is a token too
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return {"input_ids": ids, "attention_mask": mask, "weight": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)}


def token_classes() -> Any:
    return torch.tensor([[0, 1, 2], [3, 1, 1]]), torch.tensor([[0, 1, 1], [1, 0, -100]])


def smooth(width: int) -> nn.Module:
    return Net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width))


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: str
    guards: str
    smoothing: float = 0.0
    eager: Callable[[], nn.Module] | None = None


PROBLEMS = [
    Problem("regression", lambda: smooth(2), regression, "squared_error", "no position axis; a weight of zero"),
    Problem("sequences", lambda: smooth(2), sequences, "squared_error", "the mean over positions of a squared error"),
    Problem("classes", lambda: smooth(3), classes, "cross_entropy", "an example without a label"),
    Problem("smoothed", lambda: smooth(3), classes, "cross_entropy", "smoothing moves the residual alone", 0.3),
    Problem("gpt2", lambda: tiny_gpt2("sdpa"), padded_tokens, "cross_entropy", "shift, ties, padding; fused attention "
            "has no second derivative", 0.1, lambda: tiny_gpt2("eager")),
    Problem("padding_idx", lambda: nn.Sequential(nn.Embedding(4, 2, padding_idx=1), nn.Tanh(), nn.Linear(2, 2)),
            token_classes, "cross_entropy", "torch's forward mode moves a row that its backward does not"),
]  # fmt: skip
BY_NAME = {problem.name: problem for problem in PROBLEMS}


# The dense oracles


@dataclasses.dataclass
class Flat:
    """A problem as a function of one flat vector, example by example."""

    problem: Problem
    reduction: str

    def __post_init__(self) -> None:
        self.model = seeded(self.problem.eager or self.problem.build)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.batch = self.problem.batch()
        self.n = len(self.batch[0] if isinstance(self.batch, tuple) else self.batch["weight"])

    def outputs(self, theta: Tensor, i: int) -> Tensor:
        """Return the outputs `[t, v]` of an example."""
        shapes = [p.shape for p in self.model.parameters()]
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(s) for name, part, s in zip(self.names, parts, shapes, strict=True)}
        batch = take(self.batch, slice(i, i + 1))
        if isinstance(batch, tuple):
            out = torch.func.functional_call(self.model, values, (batch[0],))
        else:
            inputs = {k: x for k, x in batch.items() if k not in ("weight", "labels")}
            out = torch.func.functional_call(self.model, values, (), inputs)
        out = out if isinstance(out, Tensor) else out.logits
        return out.reshape(-1, out.shape[-1])

    def loss(self, z: Tensor, i: int) -> Tensor:
        """Return an example's loss, position by position in a Python loop."""
        batch = take(self.batch, slice(i, i + 1))
        weight = 1.0 if isinstance(batch, tuple) else batch["weight"][0]
        terms = []
        if self.problem.loss == "squared_error":
            labels = batch["labels"].reshape(z.shape)
            terms = [((z[t] - labels[t]) ** 2).sum() / 2 for t in range(len(z))]
        elif "input_ids" in batch:
            length = int(batch["attention_mask"].sum())
            terms = [self.entropy(z[t], int(batch["input_ids"][0, t + 1])) for t in range(length - 1)]
        else:
            labels = (batch[1] if isinstance(batch, tuple) else batch["labels"]).reshape(-1).tolist()
            terms = [self.entropy(z[t], y) for t, y in enumerate(labels) if y >= 0]
        total = sum(terms, 0.0 * z.sum())
        return weight * total / (max(len(terms), 1) if self.reduction == "mean" else 1)

    def entropy(self, z: Tensor, y: int) -> Tensor:
        log_p, e = F.log_softmax(z, -1), self.problem.smoothing
        return -(1 - e) * log_p[y] - e * log_p.mean()

    def dense(self, kind: str) -> Tensor:
        total = torch.zeros(len(self.theta), len(self.theta), dtype=torch.float64)
        for i in range(self.n):
            value = functools.partial(self.outputs, i=i)
            if kind == "hessian":
                total += torch.autograd.functional.hessian(lambda th: self.loss(value(th), i), self.theta)  # noqa: B023
            elif kind == "fisher":
                leaf = self.theta.clone().requires_grad_()
                (g,) = torch.autograd.grad(self.loss(value(leaf), i), leaf)
                total += torch.outer(g, g)
            else:
                z = value(self.theta)
                jacobian = torch.autograd.functional.jacobian(value, self.theta).reshape(z.numel(), -1)
                inner = torch.autograd.functional.hessian(lambda z: self.loss(z, i), z)  # noqa: B023
                total += jacobian.T @ inner.reshape(z.numel(), -1) @ jacobian
        return total / self.n


@functools.cache
def dense_of(name: str, kind: str, reduction: str) -> Tensor:
    return Flat(BY_NAME[name], reduction).dense(kind)


def function_of(name: str, reduction: str = "sum") -> tuple[Any, dict[str, Tensor]]:
    problem = BY_NAME[name]
    return functionalize(seeded(problem.build), problem.loss, reduction, label_smoothing=problem.smoothing)


def product_of(name: str, kind: str, reduction: str = "sum", batches: Any = None) -> Any:
    loss_fn, params = function_of(name, reduction)
    batches = [BY_NAME[name].batch()] if batches is None else batches
    return getattr(products, f"{kind}_product")(loss_fn, params, batches), params


def unflatten(matrix: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = matrix.split([p.numel() for p in params.values()], dim=1)
    return {name: x.reshape(-1, *p.shape) for (name, p), x in zip(params.items(), parts, strict=True)}


def flatten(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in vectors.values()], 1)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Products


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_column_is_that_of_the_dense_matrix(name: str, kind: str, reduction: str) -> None:
    product, params = product_of(name, kind, reduction)
    truth = dense_of(name, kind, reduction)
    identity = unflatten(torch.eye(len(truth), dtype=torch.float64), params)
    found = flatten(product(identity))
    assert far(found, truth) < 1e-12
    assert far(found, found.T) < 1e-12  # ⟨Hu, v⟩ = ⟨u, Hv⟩


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_of_the_batches_is_one_batch(kind: str) -> None:
    batch = padded_tokens()
    whole, params = product_of("gpt2", kind)
    v = {name: normal(2, *p.shape) for name, p in params.items()}
    split, _ = product_of("gpt2", kind, batches=[take(batch, slice(0, 1)), take(batch, slice(1, 3))])
    assert far(flatten(split(v)), flatten(whole(v))) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_resort_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product, params = product_of("gpt2", kind, "mean")
    v = {name: normal(2, *p.shape) for name, p in params.items()}
    truth = flatten(product(v))
    monkeypatch.setattr(linearize, "TRANSFORMS", linearize.AUTOGRAD)
    recorded, _ = product_of("gpt2", kind, "mean")
    found = recorded(v)
    assert far(flatten(found), truth) < 1e-13
    assert not any(x.requires_grad for x in found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("bloom", 1e-7),  # refuses torch.func; and the derivative it is given by hand is one to 8 digits only
        ("lstm", 1e-12),  # refuses vmap(grad), since its weights are batched there; here they are not
        ("mha_batch_first", 1e-12),  # a fast path without derivatives
        ("llama", 1e-6),  # has its padding token in the text; norms in float32
        ("bare", 1e-12),  # a scalar parameter, and one that is not used
        ("lora", 1e-6),  # frozen parameters
    ],
)
def test_products_with_models_at_the_edge_are_symmetric(name: str, tolerance: float, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    loss_fn, params = functionalize(case.make(), reduction="mean", targets=case.targets)
    product = getattr(products, f"{kind}_product")(loss_fn, params, [case.batch(3, 5)])
    u, v = ({k: normal(2, *p.shape, seed=i) for k, p in params.items()} for i in (1, 2))
    assert far(products.inner(product(u), v), products.inner(u, product(v))) < tolerance
    assert kind == "hessian" or bool((products.inner(product(u), u) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_float32(kind: str) -> None:
    loss_fn, params = functionalize(seeded(lambda: smooth(3)).to(torch.bfloat16), reduction="mean")
    batch = {k: x.to(torch.bfloat16) if x.is_floating_point() else x for k, x in classes().items()}
    v = {name: normal(2, *p.shape).float() for name, p in params.items()}
    found = getattr(products, f"{kind}_product")(loss_fn, params, [batch])(v)
    exact, _ = product_of("classes", kind, "mean")
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert far(flatten(found).double(), flatten(exact({k: x.double() for k, x in v.items()}))) < 0.05


def test_a_ggn_is_the_hessian_of_a_linear_model() -> None:
    loss_fn, params = functionalize(seeded(lambda: Net(nn.Linear(3, 3))))
    v = {name: normal(2, *p.shape) for name, p in params.items()}
    hessian, ggn = (f(loss_fn, params, [classes()])(v) for f in (products.hessian_product, products.ggn_product))
    assert far(flatten(ggn), flatten(hessian)) < 1e-14


def test_bare_functions_and_dataloaders() -> None:
    w = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    loader = torch.utils.data.DataLoader(normal(5, 2), batch_size=2)
    loss = lambda p, x: (x @ p["w"]).pow(2)  # noqa: E731
    x, v = normal(5, 2), {"w": normal(3, 2, seed=4)}
    hessian, fisher = (f(loss, w, loader)(v)["w"] for f in (products.hessian_product, products.fisher_product))
    g = 2 * (x @ w["w"])[:, None] * x
    assert far(hessian, v["w"] @ (2 * x.T @ x / 5)) < 1e-14
    assert far(fisher, v["w"] @ (g.T @ g / 5)) < 1e-14


def test_nothing_of_the_caller_is_changed_or_tracked() -> None:
    loss_fn, params = function_of("classes")
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    v = {name: normal(1, *p.shape).requires_grad_() for name, p in params.items()}
    before = {name: (p.clone(), v[name].clone()) for name, p in leaves.items()}
    for kind in KINDS:
        found = getattr(products, f"{kind}_product")(loss_fn, leaves, [classes()])(v)
        assert not any(x.requires_grad for x in found.values())
    for name, (p, x) in before.items():
        assert torch.equal(leaves[name], p)
        assert torch.equal(v[name], x)
        assert leaves[name].grad is None


def test_largest_eigenvalue() -> None:
    product, params = product_of("classes", "hessian")
    values = torch.linalg.eigvalsh(dense_of("classes", "hessian", "sum"))
    largest = float(values[values.abs().argmax()])
    assert products.largest_eigenvalue(product, params, iterations=300) == pytest.approx(largest, rel=1e-8)
    negated = lambda v: {name: -x for name, x in product(v).items()}  # noqa: E731
    assert products.largest_eigenvalue(negated, params, iterations=300) == pytest.approx(-largest, rel=1e-8)
    early = [products.largest_eigenvalue(product, params, iterations=3, seed=seed) for seed in (0, 0, 1)]
    assert early[0] == early[1] != early[2]
    assert abs(early[0]) <= abs(largest)
    assert products.largest_eigenvalue(lambda v: {k: 0 * x for k, x in v.items()}, params) == 0.0


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def test_products_refuse() -> None:
    loss_fn, params = function_of("classes")
    make, batch = products.hessian_product, classes()
    with refused("batches is a generator, which can be gone through once, and every product goes through all batches"):
        make(loss_fn, params, (batch for _ in range(2)))
    with refused("batches is one batch, a dict; pass a list of batches, [batch]"):
        make(loss_fn, params, batch)
    with refused("the Hessian is a mean over examples, and there is no batch"):
        make(loss_fn, params, [])
    product = make(loss_fn, params, [batch])
    v = {name: p[None] for name, p in params.items()}
    with refused("vectors must be over the 4 parameters of the product; they differ in ['net.0.bias']"):
        product({name: x for name, x in v.items() if name != "net.0.bias"})
    with refused(
        "vectors['net.0.bias'] must be [q, 4], with one q for all parameters; got [4]. One vector v is v[None]"
    ):
        product({**v, "net.0.bias": params["net.0.bias"]})
    with refused("vectors['net.0.bias'] must be [q, 4], with one q for all parameters; got [2, 4]"):
        product({**v, "net.0.bias": torch.cat([v["net.0.bias"]] * 2)})


def test_a_ggn_refuses_what_has_no_likelihood() -> None:
    with refused("loss_fn has no likelihood, so it has no Gauss-Newton matrix"):
        products.ggn_product(lambda p, x: x @ p["w"], {"w": torch.ones(2)}, [torch.ones(1, 2)])
    loss_fn, params = functionalize(seeded(lambda: smooth(3)), loss="log_odds")
    with refused("loss='log_odds' has no likelihood"):
        products.ggn_product(loss_fn, params, [classes()])
    loss_fn, params = function_of("classes")
    with refused("a negative weight turns a likelihood upside down"):
        products.ggn_product(loss_fn, params, [{**classes(), "weight": -torch.ones(6)}])


def test_torchs_refusals_are_translated() -> None:
    """Pins the upstream text: once it changes, so must the translation."""
    loss_fn, params = functionalize(seeded(lambda: Bag()), loss="cross_entropy")
    with refused(
        "the Hessian needs this function differentiated twice, and torch can do so neither by torch.func (the "
        "derivative for '_embedding_bag_backward' is not implemented.) nor by autograd (the derivative for "
    ):
        products.hessian_product(loss_fn, params, [(torch.tensor([[0, 1]]), torch.tensor([1]))])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


# Conjugate gradients


def operator(matrix: Tensor) -> products.Product:
    return lambda v: {"w": v["w"] @ matrix.to(v["w"])}


def spd(d: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    q, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return q @ torch.diag(torch.logspace(-spread, 0, d, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_cg_solves_what_the_dense_matrix_solves(kind: str) -> None:
    product, params = product_of("gpt2", kind, "mean")
    rhs = {name: normal(3, *p.shape, seed=2) for name, p in params.items()}
    found = cg.solve(product, rhs, DAMPING, tolerance=1e-13)
    dense = dense_of("gpt2", kind, "mean") + DAMPING * EYE(len(dense_of("gpt2", kind, "mean")))
    assert far(flatten(found.x), torch.linalg.solve(dense, flatten(rhs).T).T) < 1e-10


def test_cg_reports_the_residual_of_its_answer() -> None:
    matrix, b = spd(30), normal(4, 30)
    found = cg.solve(operator(matrix), {"w": b}, 1e-3)
    true = (b - found.x["w"] @ (matrix + 1e-3 * EYE(30))).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residuals, true)
    assert bool((true <= 1e-8).all())
    assert torch.equal(found.history[-1], found.residuals)
    assert found.history.shape == (int(found.iterations.max()) + 1, 4)
    assert torch.equal(found.history[0], torch.ones(4, dtype=torch.float64))


def test_cg_takes_one_step_per_eigenvalue() -> None:
    q, _ = torch.linalg.qr(normal(20, 20))
    matrix = q @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0] * 5, dtype=torch.float64)) @ q.T
    found = cg.solve(operator(matrix), {"w": torch.stack([normal(20), q[:, 0]])}, 0.5, tolerance=1e-12)
    assert found.iterations.tolist() == [4, 1]


def test_a_query_that_is_done_is_left_alone() -> None:
    """Its numbers are those it has when it is solved alone, and it is asked of no further product."""
    asked = []

    def counted(v: linearize.Vectors) -> linearize.Vectors:
        asked.append(len(v["w"]))
        return operator(matrix)(v)

    matrix = spd(20)
    _, basis = torch.linalg.eigh(matrix)
    rhs = torch.stack([basis[:, 3], normal(20), torch.zeros(20, dtype=torch.float64)])
    found = cg.solve(counted, {"w": rhs}, 1e-4)
    alone = cg.solve(operator(matrix), {"w": rhs[:1]}, 1e-4)
    assert found.iterations[0] == alone.iterations[0] == 1
    torch.testing.assert_close(found.x["w"][0], alone.x["w"][0], rtol=1e-14, atol=0)
    assert asked[0] == 2  # the zero is never asked for
    assert set(asked[2:]) == {1}  # one step with two, its check with one, all others with one
    assert bool((found.x["w"][2] == 0).all())
    assert found.iterations[2] == found.residuals[2] == 0


def test_a_zero_right_hand_side_has_a_zero_solution_wherever_it_starts() -> None:
    found = cg.solve(operator(spd(5)), {"w": torch.zeros(2, 5)}, 1.0, start={"w": torch.ones(2, 5)}, tolerance=1e-5)
    assert bool((found.x["w"] == 0).all())
    assert found.iterations.tolist() == [0, 0]
    assert found.history.shape == (1, 2)


def test_a_start_at_the_solution_takes_no_step() -> None:
    matrix, b = spd(10), normal(2, 10)
    first = cg.solve(operator(matrix), {"w": b}, 0.1, tolerance=1e-10)
    again = cg.solve(operator(matrix), {"w": b}, 0.1, start=first.x)
    assert again.iterations.tolist() == [0, 0]
    assert torch.equal(again.x["w"], first.x["w"])


def test_the_exact_inverse_as_preconditioner_takes_one_step() -> None:
    product, params = product_of("classes", "ggn")
    dense = dense_of("classes", "ggn", "sum") + DAMPING * EYE(31)
    inverse = lambda v: unflatten(torch.linalg.solve(dense, flatten(v).T).T, params)  # noqa: E731
    rhs = {name: normal(3, *p.shape) for name, p in params.items()}
    found = cg.solve(product, rhs, DAMPING, preconditioner=inverse, tolerance=1e-12)
    assert int(found.iterations.max()) <= 2
    assert far(flatten(found.x), torch.linalg.solve(dense, flatten(rhs).T).T) < 1e-10
    rough = lambda v: unflatten(flatten(v) / dense.diagonal(), params)  # noqa: E731
    jacobi = cg.solve(product, rhs, DAMPING, preconditioner=rough, tolerance=1e-12)
    assert far(flatten(jacobi.x), flatten(found.x)) < 1e-10


def test_what_rounding_hides_is_found_out() -> None:
    """In float32 the recursion's residual falls forever; the answer's does not."""
    matrix = spd(60, spread=6.0)
    with pytest.warns(RuntimeWarning, match="did not converge in 300 iterations"):
        found = cg.solve(
            operator(matrix), {"w": normal(2, 60).float()}, 0.0, tolerance=2e-7, max_iterations=300, on_failure="warn"
        )
    b, x = normal(2, 60).float(), found.x["w"]
    true = (b - x @ matrix.float()).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residuals, true, rtol=0.2, atol=0)
    assert found.x["w"].dtype == torch.float32


def test_cg_refuses_an_indefinite_hessian() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    rhs = {"w": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)}
    with refused(
        "H + damping I is not positive definite: at iteration 1 query 1 met a direction p with "
        "p^T (H + damping I) p / p^T p = -0.4. damping=0.1 is too small for an indefinite Hessian: raise it above 0.5"
    ):
        cg.solve(operator(matrix), rhs, 0.1)
    assert far(cg.solve(operator(matrix), rhs, 0.6).x["w"][1], torch.tensor([0.0, 0.0, 10.0])) < 1e-12


def test_cg_says_what_did_not_converge() -> None:
    rhs = {"w": torch.stack([normal(30), normal(30, seed=1), torch.zeros(30, dtype=torch.float64)])}
    message = (
        r"2 of 3 queries did not converge in 3 iterations: relative residuals \d\.\d+ \(query \d\), \d\.\d+ "
        r"\(query \d\), tolerance=1e-08\. Raise damping or max_iterations, pass a preconditioner \(an EK-FAC inverse\)"
    )
    with pytest.raises(cg.NotConverged, match=message):
        cg.solve(operator(spd(30)), rhs, 0.0, max_iterations=3)
    with pytest.warns(RuntimeWarning, match=message):
        found = cg.solve(operator(spd(30)), rhs, 0.0, max_iterations=3, on_failure="warn")
    true = (rhs["w"] - found.x["w"] @ spd(30)).norm(dim=1)[:2] / rhs["w"].norm(dim=1)[:2]
    torch.testing.assert_close(found.residuals[:2], true)
    assert found.iterations.tolist() == [3, 3, 0]
    assert found.history.shape == (4, 3)


def test_cg_refuses_options() -> None:
    rhs, a = {"w": torch.ones(1, 3)}, operator(torch.eye(3))
    with refused("damping must be a finite number, at least 0; got -1.0"):
        cg.solve(a, rhs, -1.0)
    with refused("max_iterations must be at least 1; got 0"):
        cg.solve(a, rhs, 1.0, max_iterations=0)
    with refused("on_failure must be 'error' or 'warn'; got 'ignore'"):
        cg.solve(a, rhs, 1.0, on_failure="ignore")
    with refused("tolerance must lie in (0, 1); got 2.0"):
        cg.solve(a, rhs, 1.0, tolerance=2.0)
    with refused("tolerance=1e-08 is below the rounding of torch.float32, 1.2e-07, so no residual can reach it"):
        cg.solve(a, rhs, 1.0)
    with refused("rhs['w'] is not finite; look for the example with per_example_grads"):
        cg.solve(a, {"w": torch.tensor([[1.0, float("nan")]])}, 1.0, tolerance=1e-3)
    with refused("the product of query 0 is not finite at iteration 1: compute in a wider dtype"):
        cg.solve(operator(float("nan") * torch.eye(3)), rhs, 1.0, tolerance=1e-3)
    with refused(
        "the preconditioner M is not positive definite: at iteration 1 query 0 met a residual r with r^T M r = -3"
    ):
        cg.solve(a, rhs, 1.0, tolerance=1e-3, preconditioner=operator(-torch.eye(3)))


# LiSSA


def test_lissa_converges_to_the_dense_solution() -> None:
    product, params = product_of("classes", "ggn", "mean")
    dense = dense_of("classes", "ggn", "mean") + DAMPING * EYE(31)
    rhs = {name: normal(3, *p.shape) for name, p in params.items()}
    scale = 1.1 * products.largest_eigenvalue(product, params) + DAMPING
    found = lissa.solve(product, rhs, DAMPING, scale=scale, depth=400)
    assert far(flatten(found.x), torch.linalg.solve(dense, flatten(rhs).T).T) < 1e-10
    true = (flatten(rhs) - flatten(found.x) @ dense).norm(dim=1) / flatten(rhs).norm(dim=1)
    torch.testing.assert_close(found.residuals, true, rtol=1e-2, atol=1e-15)
    assert found.history.shape == (401, 3)
    assert found.iterations.tolist() == [400] * 3


def test_lissa_is_the_recursion_of_its_docstring() -> None:
    """h ← b + (I − (H_j + δ I) / σ) h over the batches in order, x = h / σ."""
    matrices, b, (sigma, delta) = [spd(6, seed) for seed in range(3)], normal(2, 6), (2.0, 0.3)
    h = b
    for step in range(7):
        h = b + h - h @ (matrices[step % 3] + delta * EYE(6)) / sigma
    found = lissa.solve([operator(m) for m in matrices], {"w": b}, delta, scale=sigma, depth=7)
    assert far(found.x["w"], h / sigma) < 1e-14
    mean = sum(matrices) / 3 + delta * EYE(6)
    true = (b - found.x["w"] @ mean).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residuals, true)


def test_lissas_noise_falls_with_the_scale() -> None:
    """Over batches the answer circles the mean's solution at a distance of order 1 / σ."""
    matrices, b = [spd(6, seed) for seed in range(4)], normal(1, 6)
    exact = torch.linalg.solve(sum(matrices) / 4 + 0.5 * EYE(6), b.T).T
    errors = [
        far(lissa.solve([operator(m) for m in matrices], {"w": b}, 0.5, scale=s, depth=int(60 * s)).x["w"], exact)
        for s in (4.0, 40.0)
    ]
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.01


def test_a_zero_right_hand_side_stays_zero_in_lissa() -> None:
    found = lissa.solve(operator(spd(4)), {"w": torch.zeros(1, 4)}, 0.1, scale=2.0, depth=3)
    assert bool((found.x["w"] == 0).all())
    assert found.residuals.tolist() == [0.0]


def diverges(message: str) -> Any:
    return pytest.raises(cg.NotConverged, match=re.escape(message))


def test_lissa_says_how_to_converge() -> None:
    rhs = {"w": torch.ones(1, 2, dtype=torch.float64)}
    steep = operator(torch.diag(torch.tensor([10.0, 1.0], dtype=torch.float64)))
    with diverges("largest eigenvalue of H + damping I is at least about 10.1: raise scale=1 to 11.1 or more"):
        lissa.solve(steep, rhs, 0.1, scale=1.0, depth=50)
    with diverges("largest eigenvalue of H + damping I is at least about 10.1: raise scale=1 to 11.1 or more"):
        lissa.solve([steep, steep], rhs, 0.1, scale=1.0, depth=5000)
    assert float(lissa.solve(steep, rhs, 0.1, scale=11.1, depth=400).residuals) < 1e-10
    saddle = operator(torch.diag(torch.tensor([10.0, -1.0], dtype=torch.float64)))
    with diverges("about 10.1, for which scale=20 suffices, so one may be negative"):
        lissa.solve(saddle, rhs, 0.1, scale=20.0, depth=500)
    with diverges("of largest magnitude is about -9.9: raise damping=0.1 above 10, or use ggn_product"):
        lissa.solve(operator(-10.0 * torch.eye(2)), rhs, 0.1, scale=20.0, depth=500)
    with diverges("at step 0 a relative residual is inf"):
        lissa.solve(operator(torch.diag(torch.tensor([float("nan"), 1.0]))), rhs, 0.1, scale=20.0, depth=500)


def test_lissa_refuses_options() -> None:
    rhs, a = {"w": torch.ones(1, 3)}, operator(torch.eye(3))
    with refused("product is an empty sequence: pass a product, or one for each batch"):
        lissa.solve([], rhs, 0.1, scale=1.0, depth=1)
    with refused("damping must be a finite number, at least 0; got -0.1"):
        lissa.solve(a, rhs, -0.1, scale=1.0, depth=1)
    with refused("scale must be a finite number above 0; got 0.0"):
        lissa.solve(a, rhs, 0.1, scale=0.0, depth=1)
    with refused("depth must be at least 1; got 0"):
        lissa.solve(a, rhs, 0.1, scale=1.0, depth=0)


def test_solvers_warn_of_nothing_when_they_converge() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cg.solve(operator(spd(5)), {"w": normal(1, 5)}, 0.1, on_failure="warn")
