"""One step of every sampler against its formula with the noise injected, and what no step may do."""

import functools
import inspect
from collections.abc import Callable
from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import sgmcmc
from influence.sgmcmc import adam_sgld, leimkuhler_matthews, mala, rmsprop_sgld, sghmc, sgld, sgnht
from influence.sgmcmc.runner.stacking import stack
from influence.sgmcmc.samplers.overdamped import NAMES
from influence.sgmcmc.samplers.target import PerChain, gradient, mean_loss
from tests.agreement import Group, Row, check, exact, worst

F64 = torch.float64
SAMPLERS: dict[str, Callable[..., sgmcmc.Sampler]] = {
    **sgmcmc.SAMPLERS,
    "rmsprop_sgld, corrected": functools.partial(rmsprop_sgld.build, init=1.0, bias_correction=True),
}
"""All samplers of the library's table: whoever adds one passes these tests without naming it again."""
BOXED = [name for name, build in SAMPLERS.items() if "bounding_box" in inspect.signature(build).parameters]


def curved(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    """A loss per example with a gradient in every entry."""
    return (batch @ params["a"] - params["b"]).square() / 2 + params["a"].pow(4).sum() / 4


def setup(dtype: torch.dtype = F64) -> tuple[dict[str, Tensor], Tensor]:
    source = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(3, generator=source, dtype=dtype), "b": torch.randn((), generator=source, dtype=dtype)}
    return params, torch.randn((5, 3), generator=source, dtype=dtype)


def moved(params: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: p + torch.randn(p.shape, generator=source, dtype=p.dtype) / 5 for name, p in params.items()}


def by_hand(params: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss, by autograd on leaves."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(curved(leaves, batch).mean(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def sgld_step() -> Group:
    """With the noise injected."""
    params, batch = setup()
    w, lr, nb, gamma, decay = moved(params), 0.01, 7.0, 3.0, 0.5
    target = sgmcmc.local_posterior(curved, params, nb, gamma, decay)
    sampler = sgld.build(target, lr)
    noise = sampler.noise(1, 2, 3)
    state, info = sampler.step(sampler.init(w, sampler.noise(1, 2, 0)), batch, noise)
    rows = []
    for name, g in by_hand(w, batch).items():
        d = nb * g + gamma * (w[name] - params[name]) + decay * w[name]
        expected = w[name] - lr / 2 * d + sqrt(lr) * noise[name]
        rows.append(worst(f"SGLD step, {name}", expected, state.params[name], 1e-15, 1e-16))
    rows.append(worst("SGLD step, loss", curved(w, batch).mean(), info.loss, 1e-7, 1e-7))
    return Group(rows)


def test_sgld_step_is_its_formula_exactly() -> None:
    check(sgld_step())


def rmsprop_metric() -> Group:
    """Both published forms on the gradients 3, 1, -2: V̂ and G = 1/(√V̂ + 0.1), computed by hand."""
    grads, rows = [3.0, 1.0, -2.0], []
    for start, corrected, squares, metric in (
        (0.0, False, [0.09, 0.0991, 0.138109], [2.5, 2.410792, 2.120305]),
        (1.0, True, [108.0, 54.231156, 37.318878], [0.0953079, 0.1339732, 0.1610587]),
    ):
        w = {"w": torch.zeros(1, dtype=F64)}
        loss = lambda p, g: (p["w"] * g).sum(1)  # noqa: E731
        build = functools.partial(rmsprop_sgld.build, init=start, bias_correction=corrected)
        sampler = build(sgmcmc.local_posterior(loss, w, 1.0), lr=2.0)
        state = sampler.init(w, sampler.noise(0, 0, 0))
        form = "corrected" if corrected else "plain"
        for t, g in enumerate(grads):
            before = state.params["w"]
            state, _ = sampler.step(state, torch.full((1, 1), g, dtype=F64), {"w": torch.zeros(1, dtype=F64)})
            v = float(state.aux.second["w"]) / (1 - float(state.aux.power) if corrected else 1)
            found = (before - state.params["w"]) / g
            rows += [
                exact(f"V̂ of RMSprop, {form}, step {t + 1}", squares[t], v, 2e-6 * squares[t]),
                exact(f"G of RMSprop, {form}, step {t + 1}", metric[t], found, 2e-6 * metric[t]),
            ]
    return Group(rows)


def test_rmsprop_metric_is_the_one_computed_by_hand() -> None:
    check(rmsprop_metric())


def test_rmsprop_at_alpha_one_and_eps_one_is_sgld() -> None:
    params, batch = setup()
    target = sgmcmc.local_posterior(curved, params, 5.0, 2.0)
    plain, scaled = sgld.build(target, 0.01), rmsprop_sgld.build(target, 0.01, alpha=1.0, eps=1.0)
    a, b = (s.init(params, s.noise(0, 0, 0)) for s in (plain, scaled))
    for t in range(1, 5):
        a, b = plain.step(a, batch, plain.noise(0, 0, t))[0], scaled.step(b, batch, plain.noise(0, 0, t))[0]
    torch.testing.assert_close(a.params, b.params, rtol=1e-14, atol=1e-15)


def adam_step() -> Row:
    params, batch = setup()
    target = sgmcmc.local_posterior(curved, params, 4.0, 3.0)
    sampler = adam_sgld.build(target, 0.02, beta1=0.8, beta2=0.95, eps=0.2)
    state = sampler.init(params, sampler.noise(0, 0, 0))
    m = {name: torch.zeros_like(p) for name, p in params.items()}
    v = {name: torch.ones_like(p) for name, p in params.items()}
    w = dict(params)
    for t in range(3):
        noise = sampler.noise(0, 0, t + 1)
        grads = by_hand(w, batch)
        for name, g in grads.items():
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            scale = 1 / ((v[name] / (1 - 0.95 ** (t + 1))).sqrt() + 0.2)
            pull = 4.0 * m[name] / (1 - 0.8 ** (t + 1)) + 3.0 * (w[name] - params[name])
            w[name] = w[name] - 0.01 * scale * pull + sqrt(0.02) * scale.sqrt() * noise[name]
        state, _ = sampler.step(state, batch, noise)
    return worst("AdamSGLD, 3 steps", w, state.params, 1e-13, 1e-14)


def leimkuhler_matthews_step() -> Row:
    """It uses the mean of two neighbouring noises, so a sampler that forgets the last one is not it."""
    params, batch = setup()
    sampler = leimkuhler_matthews.build(sgmcmc.local_posterior(curved, params, 4.0, 3.0), 0.02)
    state, w = sampler.init(params, sampler.noise(0, 0, 0)), dict(params)
    for t in (1, 2):
        old, new = sampler.noise(0, 0, t - 1), sampler.noise(0, 0, t)
        grads = by_hand(w, batch)
        for name, g in grads.items():
            d = 4 * g + 3 * (w[name] - params[name])
            w[name] = w[name] - 0.01 * d + sqrt(0.02) / 2 * (old[name] + new[name])
        state, _ = sampler.step(state, batch, new)
    return worst("Leimkuhler-Matthews, 2 steps", w, state.params, 1e-14, 1e-15)


def hamiltonian_steps() -> list[Row]:
    """The peer's SGNHT never moves its momenta, and its test compares it with itself."""
    params, batch = setup()
    target, lr, a = sgmcmc.local_posterior(curved, params, 4.0, 3.0), 0.01, 0.2
    rows = []
    for name, sampler in (
        ("sghmc", sghmc.build(target, lr, friction=a)),
        ("sgnht", sgnht.build(target, lr, diffusion=a)),
    ):
        first = sampler.noise(0, 0, 0)
        state, w, xi = sampler.init(params, first), dict(params), a
        v = {key: sqrt(lr) * x for key, x in first.items()}
        for t in (1, 2, 3):
            noise = sampler.noise(0, 0, t)
            for key, g in by_hand(w, batch).items():
                d = 4 * g + 3 * (w[key] - params[key])
                drag = (1 - a) * v[key] - lr * d if name == "sghmc" else (1 - xi) * (v[key] - lr * d)
                v[key] = drag + sqrt(2 * a * lr) * noise[key]
            w = {key: w[key] + v[key] for key in w}
            xi = xi + sum(float(x.square().sum()) for x in v.values()) / 4 - lr
            state, info = sampler.step(state, batch, noise)
        rows.append(worst(f"{name.upper()}, 3 steps", w, state.params, 1e-13, 1e-14))
        rows.append(worst(f"{name.upper()}, 3 steps, momenta", v, state.momenta, 1e-13, 1e-14))
        if name == "sgnht":
            rows.append(exact("SGNHT, 3 steps, friction", xi, state.friction, 1e-13 * xi))
            rows.append(exact("SGNHT, 3 steps, friction that it states", xi, info.terms["friction"], 1e-13 * xi))
    return rows


def other_steps() -> Group:
    return Group([adam_step(), leimkuhler_matthews_step(), *hamiltonian_steps()])


def test_steps_of_the_other_samplers_are_their_formulas() -> None:
    check(other_steps())


def acceptances() -> Group:
    """MALA's, published; and of U = |w|²/2 in closed form: e^{-ε|c|²/8} from 0 to c."""
    rows = []
    for here, there, potentials, lr, published in (
        ((0.0, 0.0), (1.5, 5.5), (0.0, 16.25), 0.1, 0.6661436),
        ((1.0, 1.0), (1.5, 0.5), (1.0, 1.25), 0.5, 0.9692332),
        ((0.0, 0.0), (10.5, 5.5), (0.0, 70.25), 0.1, 0.17268492),
        ((0.0, 0.0), (10.5, 5.5), (0.0, 70.25), 0.5, 0.00015359),
    ):
        a, b = {"w": torch.tensor(here, dtype=F64)}, {"w": torch.tensor(there, dtype=F64)}
        u, v = (torch.tensor(x, dtype=F64) for x in potentials)
        found = mala.log_acceptance(a, a, u, b, b, v, torch.tensor(lr, dtype=F64)).exp()
        name = f"acceptance of {here} to {there}, ε={lr}"
        rows.append(exact(f"{name}, published", published, found, 1e-5))  # 0.17269124 was published as 0.17268492
        if here == (0.0, 0.0):
            closed = exp(-lr * sum(x * x for x in there) / 8)
            rows.append(exact(name, closed, found, 1e-9 * closed))
    return Group(rows)


def test_acceptance_has_the_published_values() -> None:
    check(acceptances())


def test_a_refused_proposal_keeps_the_bits() -> None:
    params, batch = setup()
    sampler = mala.build(sgmcmc.local_posterior(curved, params, 50.0), 1.0)
    far = {name: torch.full_like(p, 9.0) for name, p in params.items()}
    state, info = sampler.step(
        sampler.init(params, sampler.noise(0, 0, 0)), batch, mala.Noise(far, torch.tensor(0.5, dtype=F64))
    )
    assert float(info.terms["acceptance"]) < 0.5
    assert all(torch.equal(state.params[name], p) for name, p in params.items())


def test_a_proposal_whose_loss_is_no_number_is_refused_and_counted() -> None:
    """Its acceptance was NaN, and so was that of the whole run."""
    sampler = mala.build(sgmcmc.local_posterior(lambda w, _: w["a"].sum().sqrt(), {"a": torch.ones(1)}, 1.0), 0.1)
    state = sampler.init({"a": torch.ones(1)}, sampler.noise(0, 0, 0))
    noise = mala.Noise({"a": torch.full((1,), -9.0)}, torch.tensor(0.5, dtype=F64))
    state, info = sampler.step(state, None, noise)
    assert float(info.terms["acceptance"]) == 0
    assert float(state.params["a"]) == 1


@pytest.mark.parametrize("name", BOXED)
def test_a_box_in_bfloat16_is_as_wide_as_it_was_asked_for(name: str) -> None:
    """1 ± 0.001 is 1 in bfloat16: nothing moved."""
    anchor = {"a": torch.ones(1, dtype=torch.bfloat16)}
    sampler = SAMPLERS[name](sgmcmc.local_posterior(lambda w, _: 0 * w["a"].sum(), anchor, 1.0), 1e-2, 0.001)
    state = sampler.init(anchor, {"a": torch.ones(1)})
    state, _ = sampler.step(state, None, {"a": torch.ones(1)})
    assert float(state.params["a"]) == pytest.approx(1.001, abs=1e-6)


def descent() -> Group:
    """w - ε/2 ∇(nβ L + γ/2 |w - w*|² + λ/2 |w|²)."""
    params, batch = setup()
    w = moved(params)
    sampler = sgld.build(sgmcmc.local_posterior(curved, params, 6.0, 2.0, 0.5), 0.02)
    silent = {name: torch.zeros_like(p) for name, p in params.items()}
    state, _ = sampler.step(sampler.init(w, silent), batch, silent)
    leaves = {name: p.clone().requires_grad_() for name, p in w.items()}
    away = sum((p - params[name]).square().sum() for name, p in leaves.items())
    size = sum(p.square().sum() for p in leaves.values())
    (6 * curved(leaves, batch).mean() + away + size / 4).backward()
    torch.optim.SGD(leaves.values(), lr=0.01).step()
    expected = {name: p.detach() for name, p in leaves.items()}
    return Group([worst("a step without noise: SGD's", expected, state.params, 1e-13, 1e-14)])


def test_a_step_without_noise_is_gradient_descent() -> None:
    check(descent())


def masked_entry(name: str) -> Group:
    """A masked entry after five steps."""
    params, batch = setup()
    mask = {"a": torch.tensor([True, False, True])}
    sampler = SAMPLERS[name](sgmcmc.local_posterior(curved, params, 6.0, 2.0, mask=mask), 0.01)
    state = sampler.init(params, sampler.noise(0, 0, 0))
    for t in range(1, 6):
        state, _ = sampler.step(state, batch, sampler.noise(0, 0, t))
    assert list(state.params) == ["a"]
    assert bool((state.params["a"][[0, 2]] != params["a"][[0, 2]]).all())
    return Group([exact(f"masked entry, {name}", params["a"][1], state.params["a"][1], 0.0)])


@pytest.mark.parametrize("name", SAMPLERS)
def test_masked_entries_keep_their_bits_and_frozen_ones_are_not_there(name: str) -> None:
    check(masked_entry(name))


@pytest.mark.parametrize("name", BOXED)
def test_masked_entries_keep_a_negative_zero_and_their_place_outside_the_box(name: str) -> None:
    """Adding a step of zero made it positive; the box took in what the mask holds."""
    params, batch = setup()
    w = {**params, "a": torch.tensor([-0.0, 9.0, 0.0], dtype=F64)}
    mask = {"a": torch.tensor([False, False, True])}
    sampler = SAMPLERS[name](sgmcmc.local_posterior(curved, params, 6.0, mask=mask), 0.01, 0.05)
    state, _ = sampler.step(sampler.init(w, sampler.noise(0, 0, 0)), batch, sampler.noise(0, 0, 1))
    assert state.params["a"][0].signbit()
    assert float(state.params["a"][1]) == 9


def boxed(name: str) -> Group:
    """The largest way from the anchor, after each of three steps that all want further."""
    params, batch = setup()
    sampler = SAMPLERS[name](sgmcmc.local_posterior(curved, params, 1.0), 0.5, 0.05)
    state, rows = sampler.init(params, sampler.noise(0, 0, 0)), []
    for t in range(1, 4):
        state, _ = sampler.step(state, batch, sampler.noise(0, 0, t))
        gaps = torch.cat([(state.params[key] - params[key]).abs().reshape(-1) for key in params])
        rows.append(exact(f"way within a box of 0.05, {name}, step {t}", 0.05, gaps.max(), 1e-12))
    return Group(rows)


@pytest.mark.parametrize("name", BOXED)
def test_the_box_comes_last(name: str) -> None:
    """Clamped before the noise, an entry would leave its box."""
    check(boxed(name))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains_of_different_settings_step_together_as_alone(name: str, dtype: torch.dtype) -> None:
    """A scalar parameter in float32 times a float64 step size would be float64; bfloat16 has a float32 master."""
    params, batch = setup()
    params, batch = {key: p.to(dtype) for key, p in params.items()}, batch.to(dtype)
    masks = {"a": torch.tensor([[True, True, False], [True, True, True]]), "b": True}
    pulls = torch.tensor([0.5, 20.0])
    target = sgmcmc.local_posterior(curved, params, torch.tensor([3.0, 9.0]), pulls, mask=masks)
    sampler = SAMPLERS[name](target, torch.tensor([0.01, 0.002]))
    alone, infos = [], []
    for group in (0, 1):
        state = sampler.init(params, sampler.noise(7, group, 0), group)
        for t in (1, 2, 3):
            state, info = sampler.step(state, batch, sampler.noise(7, group, t))
        alone.append(state)
        infos.append(info)
    both = stack([sampler.init(params, sampler.noise(7, g, 0), g) for g in (0, 1)])
    for t in (1, 2, 3):
        noise = stack([sampler.noise(7, g, t) for g in (0, 1)])
        both, info = torch.vmap(sampler.step, in_dims=(0, None, 0))(both, batch, noise)
    stacked = stack([sampler.init(params, sampler.noise(7, g, 0), g) for g in (0, 1)])
    for t in (1, 2, 3):  # states stacked by hand: only the gradient is vmapped
        noise = stack([sampler.noise(7, g, t) for g in (0, 1)])
        each = batch if t < 3 else PerChain(torch.stack([batch, batch]))
        stacked, _ = sampler.step(stacked, each, noise)
    exact = dtype == torch.float64
    rtol, atol = (1e-12, 1e-13) if exact else (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for one, two in zip(torch.utils._pytree.tree_leaves(both), torch.utils._pytree.tree_leaves(stacked), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)
    for group in (0, 1):
        for key, p in alone[group].params.items():
            assert p.dtype == (torch.float64 if exact else torch.float32)
            torch.testing.assert_close(both.params[key][group], p, rtol=rtol, atol=atol)
        torch.testing.assert_close(
            info.loss[group], infos[group].loss, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_metrics_are_each_their_formula_and_free_when_off() -> None:
    params, batch = setup()
    w = moved(params)
    mask = {"a": torch.tensor([True, False, True]), "b": True}
    target = sgmcmc.local_posterior(curved, params, 6.0, 2.0, 0.5, mask=mask)
    sampler = sgld.build(target, 0.02, metrics=True)
    noise = sampler.noise(0, 0, 1)
    state, info = sampler.step(sampler.init(w, noise), batch, noise)
    flat = lambda tree: torch.cat([tree[name].reshape(-1) for name in ("a", "b")])  # noqa: E731
    m = torch.tensor([1.0, 0, 1, 1], dtype=F64)
    g, away = flat(by_hand(w, batch)), flat(w) - flat(params)
    grad, local, decay, kick = (
        0.01 * 6 * g * m,
        0.01 * 2 * away * m,
        0.01 * 0.5 * flat(w) * m,
        sqrt(0.02) * flat(noise) * m,
    )
    expected = {
        "scaled_grad": grad.norm(),
        "unscaled_grad": (0.06 * g).norm(),
        "localization": local.norm(),
        "weight_decay": decay.norm(),
        "noise": kick.norm(),
        "distance": away.norm(),
        "dot_grad_prior": grad @ (local + decay),
        "dot_grad_noise": grad @ kick,
        "dot_prior_noise": (local + decay) @ kick,
    }
    assert tuple(expected) == NAMES
    for name, value in expected.items():
        torch.testing.assert_close(info.terms[name], value, msg=name)
    torch.testing.assert_close(flat(state.params) - flat(w), -(grad + local + decay) + kick)  # the parts are the step
    assert sgld.build(target, 0.02).step(state, batch, noise)[1].terms == {}


def test_gradients_in_pieces_and_with_a_control_variate() -> None:
    params, batch = setup()
    w = moved(params)
    g = by_hand(w, batch)
    cut = sgmcmc.local_posterior(curved, params, 1.0, accumulate=3)  # 5 examples: 2, 2 and 1
    torch.testing.assert_close(gradient(cut, w, batch)[1], g, rtol=1e-13, atol=1e-14)
    full = sgmcmc.gradient_at(curved, params, [batch[:4], batch[4:]])
    torch.testing.assert_close(full, by_hand(params, batch), rtol=1e-13, atol=1e-14)
    target = sgmcmc.local_posterior(curved, params, 1.0, full_gradient=full)
    torch.testing.assert_close(gradient(target, w, batch)[1], g, rtol=1e-12, atol=1e-13)
    one = batch[:1]
    torch.testing.assert_close(gradient(target, params, one)[1], full, rtol=1e-12, atol=1e-13)


def test_the_table_is_what_the_library_exports_and_what_its_pages_and_commands_offer() -> None:
    """One line of the table: what else must know a sampler's name follows, or is found here to lack it."""
    from typing import get_args, get_type_hints

    from influence.pipelines.chains.settings import ChainConfig

    assert get_args(get_type_hints(ChainConfig)["sampler"]) == tuple(sgmcmc.SAMPLERS)
    exported = {name for name in sgmcmc.__all__ if hasattr(getattr(sgmcmc, name), "build")}
    assert exported == {*sgmcmc.SAMPLERS}
    files = {path.stem for path in Path(sgmcmc.samplers.__path__[0]).glob("*.py") if "def build(" in path.read_text()}
    assert files - {"overdamped"} == exported  # what several of them are made of
    docs = Path(__file__).parent.parent / "docs"
    for name in sgmcmc.SAMPLERS:
        assert f"influence.sgmcmc.samplers.{name}\n" in (docs / "api/sgmcmc.md").read_text()
        assert f"`{name}`" in (docs / "sampling.md").read_text()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_of_any_sampler_is_the_same_in_any_chunk_and_goes_on_where_it_stood(name: str, tmp_path: Path) -> None:
    params, batch = setup()
    settings: dict[str, Any] = {"sampler": SAMPLERS[name], "lr": 1e-3, "n_beta": 5.0, "localization": 2.0}
    settings |= {"num_chains": 3, "num_draws": 6, "batch_size": 2, "checkpoint_every": 2, "progress": False}
    together, one_by_one = (
        sgmcmc.sample(curved, params, batch, {"q": batch}, **settings, chain_chunk=size) for size in (3, 1)
    )
    torch.testing.assert_close(together.loss, one_by_one.loss, rtol=1e-6, atol=1e-8)
    assert bool(together.loss.isfinite().all())
    assert torch.equal(together.loss, sgmcmc.sample(curved, params, batch, {"q": batch}, **settings).loss)
    some = sgmcmc.sample(curved, params, batch, {"q": batch}, **settings, chains=[2], chain_chunk=1)
    assert torch.equal(some.loss[0], one_by_one.loss[2])
    written = sgmcmc.sample(curved, params, batch, {"q": batch}, **settings, output_path=tmp_path)
    again = sgmcmc.load(tmp_path)
    assert isinstance(again, sgmcmc.Run)
    assert torch.equal(written.loss, again.loss)


def test_noise_is_a_function_of_seed_chain_and_step_alone() -> None:
    params, _ = setup()
    sampler = sgld.build(sgmcmc.local_posterior(curved, params, 1.0), 0.1)
    before = torch.get_rng_state()
    a = sampler.noise(0, 1, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], x) for name, x in sampler.noise(0, 1, 2).items())
    for other in ((1, 1, 2), (0, 2, 1), (0, 1, 3), (0, 2, 2)):
        assert all(bool((a[name] != x).all()) for name, x in sampler.noise(*other).items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: sgmcmc.local_posterior(curved, p, -1.0), ["n_beta", "at least 0", "-1"]),
        (lambda p: sgmcmc.local_posterior(curved, p, 1.0, mask={"c": True}), ["'c'", "no parameters", "'a', 'b'"]),
        (
            lambda p: sgmcmc.local_posterior(curved, p, 1.0, mask={"a": torch.ones(1, dtype=torch.bool)}),
            ["[1]", "[3]", "no broadcasting"],
        ),
        (lambda p: sgmcmc.local_posterior(curved, p, 1.0, mask={"a": torch.ones(3)}), ["float32", "torch.bool"]),
        (lambda p: sgmcmc.local_posterior(curved, p, 1.0, mask={}), ["empty"]),
        (lambda p: sgld.build(sgmcmc.local_posterior(curved, p, 1.0), 0.0), ["lr", "above 0"]),
        (lambda p: sgld.build(sgmcmc.local_posterior(curved, p, 1.0), 0.1, 0.0), ["bounding_box", "above 0"]),
        (
            lambda p: rmsprop_sgld.build(sgmcmc.local_posterior(curved, p, 1.0), 0.1, alpha=1.0, bias_correction=True),
            ["alpha", "below 1"],
        ),
        (lambda p: sgmcmc.default_n_beta(1), ["at least 2", "got 1"]),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[..., Any], words: list[str]) -> None:
    params, _ = setup()
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        call(params)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_mean_where_losses_should_be_is_refused() -> None:
    params, batch = setup()
    target = sgmcmc.local_posterior(lambda p, b: curved(p, b).mean(), params, 1.0)
    with pytest.raises(ValueError, match=r"batch of 5 examples has shape \[1, 1\].*not their mean"):
        mean_loss(target, params, batch)
