"""Models that a rule, a trace or a transform could misread: each must be right by whatever route it takes.

The zoo of `tests.cases` asks whether every kind of model works; this asks whether each route knows its limits, and
whether the plan says which one was taken.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from influence import explain, functionalize, per_example_grads, per_example_grads_fn
from influence.func.engine import attention, batched, ops
from influence.func.engine.plan import Plan
from tests.cases import CASES, Case, images, labelled_tokens, labels_nll, sequences
from tests.oracles import error, per_example
from tests.worst import ENGINES, function_of, measure, model_of, truth_of

BY_NAME = {case.name: case for case in CASES}


class Functional(nn.Module):
    """Calls with arguments that a rule may overlook."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Parameter(torch.zeros(40, 8)), nn.Parameter(torch.zeros(5, 8))
        self.shift, self.lift = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(1, 1))
        self.square, self.direction = nn.Parameter(torch.eye(16, 8)), nn.Parameter(torch.zeros(8))
        self.rms, self.wide, self.head = nn.RMSNorm(8), nn.LayerNorm((2, 4)), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.table, padding_idx=-1)
        x = x + F.embedding(torch.arange(input_ids.shape[1]), self.places, padding_idx=0)
        x = torch.add(x, self.shift, alpha=2)
        x = torch.sub(self.lift, x, alpha=3)
        x = self.rms(F.linear(weight=self.square[4:12], input=x))
        x = self.wide(x.unflatten(-1, (2, 4))).flatten(-2)
        flat = torch.addmm(self.direction, x.flatten(0, 1), self.square[:8].T, beta=2, alpha=3)
        return self.head(flat.tanh().view_as(x) * (x @ self.direction).unsqueeze(-1).exp())


class Stopped(nn.Module):
    """Uses that carry no gradient beside uses that do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.layer(x)
        x = self.layer(x).tanh() + target * self.gain.detach()
        return self.head(x * self.gain / self.gain.detach().norm())


class Written(nn.Module):
    """Parameters written into data in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.bias, self.head = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.bias
        x[:, 0] = self.token
        return self.head(x.cumsum(1).tanh())


class Scale(torch.autograd.Function):
    """An old-style function of a parameter: probes do not see inside, torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Scale.apply(self.enter(x), self.gain).tanh())


class Checkpointed(nn.Module):
    """Uses its parameters once more during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Sandwiched(nn.Module):
    """A linear on ``[h · n · s, d]``: the example is neither the slow nor the fast index."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.each, self.head = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).unflatten(-1, (2, 4)).permute(2, 0, 1, 3)
        x = self.each(x.reshape(-1, 4)).view(x.shape).tanh()
        return self.head(x.permute(1, 2, 0, 3).flatten(-2))


class Attention(nn.Module):
    """Fused attention with grouped queries, a scale, and a mask that leaves some queries nothing to see."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.embed(input_ids)).split([8, 4, 4], -1)
        q, k, v = (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in (q, k, v))
        if attention_mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        else:
            seen = attention_mask[:, None, None, :].bool() & attention_mask[:, None, :, None].bool()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.tril(), enable_gqa=True)
        return self.head(y.transpose(1, 2).flatten(-2))


def plain_tokens(n: int, s: int, pads: str, generator: torch.Generator) -> dict[str, Tensor]:
    batch = labelled_tokens(n, s, pads, generator)
    batch["input_ids"][0, 1], batch["input_ids"][-1, 0] = 39, 39  # the padding row of `padding_idx=-1`
    return batch


HAZARDS = [
    Case("functional", Functional, plain_tokens, labels_nll, "alpha, beta, keywords, slices, a negative padding_idx"),
    Case("stopped", Stopped, images(4), labels_nll, "gradient through detach and no_grad"),
    Case("written", Written, sequences(6), labels_nll, "a parameter lost in the tensor it is written into",
         refuses={"batched": "writes to its argument"}),
    Case("scaled", Scaled, images(4), labels_nll, "a parameter inside an autograd.Function",
         refuses={"batched": "cannot serve", "vmap": "old-style autograd.Function"}),
    Case("sandwiched", Sandwiched, sequences(6), labels_nll, "rows of the wrong example, and nothing to show for it",
         refuses={"batched": "check|example axis"}),
    Case("attention", Attention, labelled_tokens, labels_nll, "queries without keys: NaN for zero", pads="left",
         strip=False),
]  # fmt: skip


def name_of(value: Any) -> str | None:
    return value.name if isinstance(value, Case) else None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", HAZARDS, ids=name_of)
def test_hazards_are_right_or_refused(case: Case, engine: str) -> None:
    for combo in case.combos():
        if engine in case.refuses:
            with pytest.raises(ValueError, match=f"engine='{engine}'.*({case.refuses[engine]})"):
                measure(case, engine, combo)
        else:
            worst = measure(case, engine, combo)
            assert worst.value <= case.tolerance, (combo, worst.name)


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing_is_refused_by_its_name(engine: str) -> None:
    """Recomputing in backward would read parameters that the pure call has already taken back."""
    x, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    loss_fn, params = functionalize(Checkpointed().eval(), loss="cross_entropy")
    with pytest.raises((ValueError, RuntimeError), match="checkpoint"):
        per_example_grads(loss_fn, params, (x, y), engine=engine)


# The routes


def plan_of(case: Case) -> Plan:
    loss_fn, params = function_of(case, "sum")
    return explain(loss_fn, params, case.batch(*case.sizes[0], bool(case.pads)))


ROUTED_TOKENS = {"mixtral", "qwen2_moe"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_auto_takes_the_batched_engine_wherever_tokens_are_not_routed(case: Case) -> None:
    plan = plan_of(case)
    assert (plan.engine == "batched") == (case.name not in ROUTED_TOKENS), plan.notes
    assert plan.engine in str(plan)
    if plan.engine == "batched":
        assert plan.guard is not None
        assert plan.guard <= 1e-6  # float32 inside, whatever the dtype
    else:
        assert any("not batched" in note for note in plan.notes)
        assert "not batched" in str(plan)


@pytest.mark.parametrize(
    ("name", "block", "route"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "linear"),
        ("gpt2", "transformer.wte.weight", "embedding + linear"),
        ("gpt2", "transformer.wpe.weight", "elementwise"),
        ("llama", "model.layers.1.self_attn.k_proj.weight", "linear"),
        ("llama", "model.norm.weight", "elementwise"),
        ("opt", "model.decoder.layers.0.fc1.bias", "linear"),
        ("opt", "model.decoder.final_layer_norm.weight", "norm"),
        ("conv2d", "2.weight", "conv"),
        ("resnet_groupnorm", "1.norm.bias", "norm"),
        ("conv_transpose", "0.weight", "per-op vmap"),
        ("mha_sequence_first", "layer.self_attn.in_proj_weight", "per-op vmap"),
        ("lstm", "lstm.weight_hh_l0", "masked"),
        ("bare", "enter", "linear"),
        ("bare", "mix", "per-op vmap"),
        ("bare", "unused", "unused"),
        ("mixer", "places.weight", "linear"),
        ("falcon", "transformer.h.0.self_attention.query_key_value.weight", "linear"),
        ("mamba", "backbone.layers.0.mixer.A_log", "elementwise"),
    ],
)
def test_explain_names_the_route_of_each_parameter(name: str, block: str, route: str) -> None:
    plan = plan_of(BY_NAME[name])
    assert {cost.name: cost.rule for cost in plan.costs}[block] == route
    (line,) = [line for line in str(plan).splitlines() if line.startswith(f"{block} ")]
    assert route in line


@pytest.mark.parametrize("wrong", ["exchanged", "scaled", "lost"])
def test_guard_catches_a_rule_that_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows given to the wrong example have the right sum: only random weights tell."""
    spoil = {
        "exchanged": lambda piece: piece.flip(0),
        "scaled": lambda piece: piece * 1.01,
        "lost": torch.zeros_like,
    }[wrong]
    right = ops.FAMILIES["linear"]

    def linear(*args: Any) -> Any:
        saved, backward = batched.outer_products(right.see(*args), args[2])
        return saved, lambda saved, gs: {slot: spoil(piece) for slot, piece in backward(saved, gs).items()}

    monkeypatch.setitem(ops.FAMILIES, "linear", right._replace(rows=linear))
    case = BY_NAME["mlp"]
    assert plan_of(case).engine == "vmap"
    assert "check" in str(plan_of(case))
    assert measure(case, "auto", ("sum", False, 3, 5)).value <= case.tolerance
    with pytest.raises(ValueError, match=r"engine='batched'.*check"):
        measure(case, "batched", ("sum", False, 3, 5))


# Some of the parameters


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("targets", ["*.bias", "*.c_attn.*", "transformer.wte.weight", "*ln_1.weight"])
def test_some_parameters_have_the_rows_they_have_among_all(targets: str, engine: str) -> None:
    """A bias without its weight, a weight without its bias, one use of two."""
    case, combo = BY_NAME["gpt2"], ("mean", True, 3, 5)
    loss_fn, params = functionalize(model_of(case), reduction="mean", targets=targets)
    rows = per_example_grads(loss_fn, params, case.batch(3, 5, True), engine=engine)
    truth = truth_of(case, combo).rows
    assert 0 < len(rows) < len(truth)
    assert error(rows, {name: truth[name] for name in rows}).value <= case.tolerance


# Plans that meet another kind of batch


class Routed(nn.Module):
    """Positions sorted by what they hold: examples lie in no order, and in the right one by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.enter(x).flatten(0, 1)
        order = (flat[:, 0] > 0).int().argsort(stable=True)
        y = torch.empty_like(flat).index_copy(0, order, self.expert(flat[order]).tanh())
        return self.head(y.view_as(x))


def served(case: Case, first: Any, then: Any, truth: dict[str, Tensor]) -> None:
    """The rows of a plan made on another batch are right: it serves, or a plan of that batch's own is made."""
    loss_fn, params = function_of(case, "sum")
    rows_of = per_example_grads_fn(loss_fn, params, first)
    rows = rows_of(params, then)
    worst = error(rows, truth)
    assert worst.value <= case.tolerance, (rows_of.plan.engine, worst.name)


def test_plan_made_where_routing_keeps_the_order_does_not_serve_where_it_does_not() -> None:
    case = Case("routed", Routed, sequences(4), labels_nll, "a plan that was right by accident")
    model = model_of(case)
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike, labels = x[model.enter(x)[:, 0] > 0][:12].view(4, 3, 4), torch.arange(12).view(4, 3) % 3
    mixed = (x[:12].view(4, 3, 4), labels)
    served(case, (alike, labels), mixed, per_example(model, mixed, labels_nll("sum")).rows)


@pytest.mark.parametrize("name", ["llama", "bert_tokens", "mha_sequence_first", "t5", "opt", "mamba"])
def test_plan_made_on_full_examples_serves_padded_ones(name: str) -> None:
    """Without a mask models take other branches: a causal flag, no mask at all."""
    case = BY_NAME[name]
    served(case, case.batch(3, 5), case.batch(3, 5, True), truth_of(case, ("sum", True, 3, 5)).rows)


@pytest.mark.parametrize("s", [1, 2])
def test_plan_made_on_short_examples_serves_longer_ones(s: int) -> None:
    """With one position ``[n · s, d]`` looks like ``[n, d]``."""
    case = Case("labelled_gpt2", BY_NAME["gpt2"].build, labelled_tokens, labels_nll, "one position")
    batch = case.batch(3, 5)
    truth = per_example(model_of(case), batch, labels_nll("sum")).rows
    served(case, {key: x[:, :s] for key, x in batch.items()}, batch, truth)


@pytest.mark.parametrize("name", ["gpt2", "mlp", "mha_sequence_first", "conv2d", "t5"])
def test_plan_made_on_one_example_serves_many(name: str) -> None:
    case = BY_NAME[name]
    batch = case.batch(4, 4)
    first = {k: x[:1] for k, x in batch.items()} if isinstance(batch, dict) else tuple(x[:1] for x in batch)
    served(case, first, batch, truth_of(case, ("sum", False, 4, 4)).rows)


# Attention by plain operations


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive", "nothing to see"])
def test_plain_attention_is_torchs(mask: str) -> None:
    r"""``softmax(q k^T · scale + mask) v``, with grouped queries; a query without keys gives zero, not NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 3, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    seen = torch.rand(2, 1, 5, 5, generator=generator) < 0.6
    seen[..., 0] = True
    settings: dict[str, Any] = {
        "none": {"scale": 0.3},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": seen},
        "additive": {"attn_mask": torch.randn(2, 1, 5, 5, generator=generator, dtype=torch.float64)},
        "nothing to see": {"attn_mask": seen & (torch.arange(5) != 2)[:, None]},
    }[mask]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for attend in (attention.attention, F.scaled_dot_product_attention):
        out = attend(q, k, v, enable_gqa=True, **settings)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-12, atol=1e-12)


# What the first batch does not show


def time_major(params: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Examples are the fast index of a merged axis, which constant tokens do not show."""
    h = F.embedding(ids.T, params["table"])
    s, n, d = h.shape
    return F.linear(h.reshape(s * n, d), params["w"]).reshape(s, n, -1).tanh().sum((0, 2))


@pytest.mark.parametrize("first", [torch.zeros(1, 6), torch.zeros(4, 6), torch.ones(2, 6)])
def test_alike_examples_decide_nothing(first: Tensor) -> None:
    key = torch.Generator().manual_seed(0)
    params = {name: torch.randn(5, 3, generator=key, dtype=torch.float64) for name in ("table", "w")}
    ids = torch.randint(5, (4, 6), generator=key)
    rows_of = per_example_grads_fn(time_major, params, first.long())
    assert rows_of.plan.provisional
    rows = rows_of(params, ids)
    assert rows_of.plan.engine == "batched"
    assert error(rows, per_example_grads(time_major, params, ids, engine="loop")).value <= 1e-12


def test_another_order_of_axes_on_a_later_length_stops_the_run() -> None:
    """The same operations on the same parameters, so that no use differs: only the check can see it."""

    def turned(params: dict[str, Tensor], x: Tensor) -> Tensor:
        n, s, d = x.shape
        y = (x.transpose(0, 1) if s > 3 else x).reshape(-1, d)
        y = (y @ params["w"]).sin()
        return (y.reshape(s, n, -1).transpose(0, 1) if s > 3 else y.reshape(n, s, -1)).sum((1, 2))

    params = {"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows_of = per_example_grads_fn(turned, params, x[:, :3])
    rows_of(params, x[:, :3])
    with pytest.raises(ValueError, match="plan of the first batch is wrong for this one"):
        rows_of(params, x)


def test_a_batch_without_a_gradient_is_not_taken_for_a_check() -> None:
    params = {"w": torch.eye(3)}
    plan = explain(lambda p, x: (x @ p["w"]).square().sum(1), params, torch.zeros(3, 3))
    assert plan.guard is None
    assert "not checked yet: the gradient of the batch is zero" in str(plan)
