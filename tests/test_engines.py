"""Every engine against the float64 loop, over the model zoo; and the user's model afterwards, untouched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence import explain, per_example_grads, per_example_grads_fn
from tests.cases import CASES, Case
from tests.oracles import error, per_example
from tests.worst import ENGINES, Combo, function_of, measure, model_of, refused, truth_of

BY_NAME = {case.name: case for case in CASES}


def covering(case: Case) -> list[Combo]:
    """A covering set of the combinations: reduction, padding and coincidence meet pairwise. `tests.worst` runs all."""
    usual, coincidence = case.sizes
    if not case.pads:
        return [("sum", False, *usual), ("mean", False, *coincidence)]
    return [
        ("sum", False, *usual),
        ("mean", True, *usual),
        ("mean", False, *coincidence),
        ("sum", True, *coincidence),
    ]


def label(value: Any) -> str | None:
    if isinstance(value, Case):
        return value.name
    if isinstance(value, tuple):
        reduction, padded, n, s = value
        return f"{reduction}-{'padded' if padded else 'full'}-{n}x{s}"
    return None


EVERY = [(case, engine, combo) for case in CASES for engine in ENGINES for combo in covering(case)]
RUN = [each for each in EVERY if not refused(*each)]
REFUSED = [each for each in EVERY if refused(*each)]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model and the global generators come out bit for bit as they went in."""
    before, bits = _identity(model), {name: x.clone() for name, x in model.state_dict().items()}
    generators = _generators()
    yield
    assert _identity(model) == before
    assert _generators() == generators
    after = model.state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[name], x) for name, x in bits.items())


def _identity(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "tensors": {name: (id(x), x.data_ptr(), x._version, *_description(x)) for name, x in tensors},
        "modules": {name: (id(m), type(m), m.training, sorted(vars(m))) for name, m in modules},
        "hooks": {name: [len(h) for key, h in sorted(vars(m).items()) if "hooks" in key] for name, m in modules},
        "config": repr(getattr(model, "config", None)),
        "default": (torch.get_default_dtype(), torch.is_grad_enabled()),
    }


def _description(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.shape, x.stride(), x.requires_grad, x.grad is None, tuple(vars(x))


def _generators() -> tuple[bytes, str]:
    # Not Python's `random`: beartype draws from it to choose which item of a list to check.
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())  # noqa: NPY002


# The zoo and the oracle


@pytest.mark.parametrize("case", CASES, ids=label)
def test_oracle_rows_sum_to_the_gradient_of_the_batch(case: Case) -> None:
    """One backward through the whole batch, by torch's own losses: the oracle shares nothing with it."""
    combo = covering(case)[-1]
    reduction, padded, n, s = combo
    model, batch = case.exact().double().requires_grad_(True), case.batch(n, s, padded)
    batch = {k: _double(x) for k, x in batch.items()} if isinstance(batch, dict) else tuple(map(_double, batch))
    total = _torch_loss(model, batch, case.oracle_loss(reduction), reduction)
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, params, allow_unused=True)
    truth = per_example(case.exact(), case.batch(n, s, padded), case.oracle_loss(reduction), reduction)
    found = {
        k: torch.zeros(1, *p.shape) if g is None else g[None] for k, g, p in zip(names, grads, params, strict=True)
    }
    tolerance = max(case.tolerance, 1e-9) if case.dtype == torch.float64 else 1e-9
    assert error(found, {name: g.sum(0, keepdim=True) for name, g in truth.rows.items()}).value <= tolerance
    assert truth.losses.sum().item() == pytest.approx(total.item(), rel=1e-6)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _torch_loss(model: nn.Module, batch: Any, loss: Any, reduction: str) -> Tensor:
    inputs = {k: x for k, x in batch.items() if k != "labels"} if isinstance(batch, dict) else {}
    output = model(**inputs) if isinstance(batch, dict) else model(batch[0])
    if callable(loss):
        return loss(output, batch).sum()
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    logits = output.logits
    if loss == "class":
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
    if loss == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return sum(nn.functional.cross_entropy(x, y, reduction=reduction) for x, y in zip(logits, labels, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.pads and case.strip], ids=label)
def test_oracle_is_the_same_with_padding_cut_out(case: Case) -> None:
    n, s = case.sizes[0]
    batch = case.batch(n, s, padded=True)
    assert (batch["attention_mask"] == 0).any()
    kept = per_example(case.exact(), batch, case.oracle_loss("mean"), "mean", strip=False)
    cut = per_example(case.exact(), batch, case.oracle_loss("mean"), "mean", strip=True)
    assert error(kept.rows, cut.rows).value <= case.tolerance


def test_error_sees_exchanged_scaled_and_invented_rows() -> None:
    truth = truth_of(BY_NAME["mlp"], ("sum", False, 3, 5)).rows
    zero = {**truth, "0.bias": torch.zeros_like(truth["0.bias"])}
    assert error(truth, truth).value == 0
    assert error({name: g.flip(0) for name, g in truth.items()}, truth).value > 0.1
    assert error({**truth, "5.bias": truth["5.bias"] * (1 + 1e-9)}, truth) == (pytest.approx(1e-9, rel=1e-3), "5.bias")
    assert error(zero, truth) == (1, "0.bias")
    assert error(truth, zero).name == "0.bias"
    assert error({"0.bias": truth["0.bias"]}, truth).value == float("inf")
    assert error({**truth, "0.bias": truth["0.bias"] * float("nan")}, truth).value == float("inf")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_zoo_is_the_same_every_time_and_every_parameter_gets_gradient(case: Case) -> None:
    with untouched(model_of(case)):
        again = case.make()
    assert all(torch.equal(p, q) for p, q in zip(model_of(case).parameters(), again.parameters(), strict=True))
    rows = truth_of(case, covering(case)[0]).rows
    assert [name for name, g in rows.items() if not g.any()] == (["unused"] if case.name == "bare" else [])


# The engines


@pytest.mark.parametrize(("case", "engine", "combo"), RUN, ids=label)
def test_rows_are_those_of_the_loop(case: Case, engine: str, combo: Combo) -> None:
    with untouched(model_of(case)):
        worst = measure(case, engine, combo)
    assert worst.value <= case.tolerance, worst.name


@pytest.mark.parametrize(("case", "engine", "combo"), REFUSED, ids=label)
def test_refused_engine_says_so_and_auto_takes_another(case: Case, engine: str, combo: Combo) -> None:
    reduction, padded, n, s = combo
    batch = case.batch(n, s, padded)
    with untouched(model_of(case)):
        loss_fn, params = function_of(case, reduction)
        with pytest.raises((ValueError, RuntimeError), match=engine) as refusal:
            per_example_grads(loss_fn, params, batch, engine=engine)
        assert type(refusal.value).__module__.split(".")[0] in ("influence", "builtins")
        plan = per_example_grads_fn(loss_fn, params, batch).plan
        assert plan.engine != engine
        assert plan.engine in str(explain(loss_fn, params, batch))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_losses_are_those_of_the_loop(case: Case) -> None:
    for combo in covering(case)[:2]:
        reduction, padded, n, s = combo
        with untouched(model_of(case)):
            loss_fn, params = function_of(case, reduction)
            losses = loss_fn(params, case.batch(n, s, padded))
        torch.testing.assert_close(
            losses.double(), truth_of(case, combo).losses.double(), rtol=case.tolerance, atol=case.tolerance
        )


@pytest.mark.parametrize("case", CASES, ids=label)
def test_plan_made_on_one_batch_serves_the_last_and_smaller_one(case: Case) -> None:
    combo = covering(case)[-1]
    reduction, padded, n, s = combo
    batch = case.batch(n, s, padded)
    with untouched(model_of(case)):
        loss_fn, params = function_of(case, reduction)
        rows_of = per_example_grads_fn(loss_fn, params, _rows(batch, slice(0, n - 1)))
        rows = rows_of(params, _rows(batch, slice(n - 1, n)))
    truth = {name: g[n - 1 :] for name, g in truth_of(case, combo).rows.items()}
    worst = error(rows, truth)
    assert worst.value <= case.tolerance, (rows_of.plan.engine, worst.name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "conv2d", "bare", "bert_classifier"])
def test_chunks_make_no_difference(name: str, engine: str) -> None:
    case = BY_NAME[name]
    for chunk_size in (1, 2):
        assert measure(case, engine, ("sum", False, 3, 5), chunk_size=chunk_size).value <= case.tolerance


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "bert_mlm"])
def test_example_without_labels_has_no_loss_and_no_row(name: str, engine: str, reduction: str) -> None:
    case = BY_NAME[name]
    batch = case.batch(3, 5)
    batch["labels"] = batch.get("labels", batch["input_ids"]).clone()
    batch["labels"][1] = -100
    loss_fn, params = function_of(case, reduction)
    rows = per_example_grads(loss_fn, params, batch, engine=engine)
    truth = per_example(case.exact(), batch, case.oracle_loss(reduction), reduction)
    assert loss_fn(params, batch)[1] == 0
    assert not any(row[1].any() for row in rows.values())
    assert error(rows, truth.rows).value <= case.tolerance


def _rows(batch: Any, place: slice) -> Any:
    return {k: x[place] for k, x in batch.items()} if isinstance(batch, dict) else tuple(x[place] for x in batch)
