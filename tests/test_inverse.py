"""The exact inverse of the Gauss-Newton matrix: conjugate gradients with EK-FAC beside a dense solve."""

import pytest
import torch
from torch import Tensor, nn

from influence import functionalize, hessians, per_example_grads
from tests.test_curvature import classes, data, error, net, with_index

DAMPING = 1e-4


def problem() -> tuple:
    model = net(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 4))
    scale = torch.logspace(1, 0, 12, dtype=torch.float64)  # inputs of unequal scale: an ill-conditioned A
    labels = classes(600, count=4)  # more outputs than parameters, or the zeros of the spectrum are all alike
    batch = with_index({"input": data(600, 12) * scale, "labels": labels})
    loss_fn, params = functionalize(model, loss="cross_entropy")
    queries = {"input": data(3, 12, seed=30) * scale, "labels": labels[:3]}
    return loss_fn, params, batch, per_example_grads(loss_fn, params, queries)


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten(1) for v in vectors.values()], 1)


def dense_ggn(loss_fn, params, batch) -> Tensor:
    """Explicit Jacobians, explicit output Hessians."""
    jacobian = torch.func.jacrev(lambda p: loss_fn.outputs(p, batch))(params)
    j = torch.cat([x.flatten(2) for x in jacobian.values()], 2)  # [n, v, d]
    p = loss_fn.outputs(params, batch).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nvd,nvw,nwe->de", j, h, j) / len(p)


def test_conjugate_gradients_with_ekfac_solve_the_dense_system_in_fewer_steps() -> None:
    loss_fn, params, batch, rhs = problem()
    ggn = dense_ggn(loss_fn, params, batch)
    exact = torch.linalg.solve(ggn + DAMPING * torch.eye(len(ggn), dtype=torch.float64), flat(rhs).mT).mT
    product = hessians.products.ggn_product(loss_fn, params, [batch])
    factors = hessians.ekfac.fit(loss_fn, params, [batch], labels="exact")
    # damped more than the system itself: the preconditioner's small eigenvalues are the least certain
    inverse = lambda v: factors.solve(v, loss_fn.layout, damping=10 * DAMPING, inversion="absolute")  # noqa: E731
    plain = hessians.cg.solve(product, rhs, DAMPING, tolerance=1e-9, max_iterations=2000)
    helped = hessians.cg.solve(product, rhs, DAMPING, tolerance=1e-9, preconditioner=inverse)
    for solution in (plain, helped):
        assert error(flat(solution.x), exact) <= 1e-6
        assert float(solution.residuals.max()) <= 1e-9
    assert helped.iterations.sum() <= 0.6 * plain.iterations.sum(), (helped.iterations, plain.iterations)
    print(f"{len(ggn)} parameters: {plain.iterations.tolist()} steps alone, {helped.iterations.tolist()} with EK-FAC")
    print(f"errors {error(flat(plain.x), exact):.1e} and {error(flat(helped.x), exact):.1e}")


def test_ekfac_alone_is_nearer_to_the_exact_inverse_than_the_identity() -> None:
    loss_fn, params, batch, rhs = problem()
    ggn = dense_ggn(loss_fn, params, batch)
    c = 0.1 * float(ggn.trace()) / len(ggn)
    exact = torch.linalg.solve(ggn + c * torch.eye(len(ggn), dtype=torch.float64), flat(rhs).mT).mT
    fitted = hessians.ekfac.fit(loss_fn, params, [batch], labels="exact")
    found = flat(fitted.solve(rhs, loss_fn.layout, damping=c, inversion="absolute"))
    cosine = lambda a, b: float(torch.cosine_similarity(a, b).min())  # noqa: E731
    assert cosine(found, exact) > cosine(flat(rhs), exact) + 0.1


@pytest.mark.parametrize("number", range(2))
def test_lissa_comes_to_the_same_place_more_slowly(number: int) -> None:
    loss_fn, params, batch, rhs = problem()
    ggn = dense_ggn(loss_fn, params, batch)
    damping = 0.05 * float(torch.linalg.eigvalsh(ggn)[-1])
    exact = torch.linalg.solve(ggn + damping * torch.eye(len(ggn), dtype=torch.float64), flat(rhs).mT).mT
    product = hessians.products.ggn_product(loss_fn, params, [batch])
    scale = 1.1 * (hessians.products.largest_eigenvalue(product, params) + damping)
    found = hessians.lissa.solve(product, rhs, damping, scale=scale, depth=(50, 400)[number])
    assert error(flat(found.x), exact) <= (0.2, 1e-6)[number]
