"""Experts: each is a block of its own, however its family stores all of them in one parameter.

The oracle is the plain gradient of the whole parameter, cut and turned by hand; which tokens an expert sees is asked of
the family's own experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from influence import (
    Factored,
    Moments,
    as_blocks,
    chain,
    down_project,
    explain,
    functionalize,
    hessians,
    per_example_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    unit_norm,
)
from influence.func.transform.layout import Layout, ParamLayout
from influence.func.transform.project import sketch
from influence.models import describe, layer_matrices
from tests.cases import LLAMA, causal_batch, hf
from tests.oracles import error, per_example

E, D, F = 6, 16, 12
ONE = {**LLAMA, "num_hidden_layers": 1}
TOP2 = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
GROUPED = {**TOP2, "experts_implementation": "grouped_mm"}
STACKS = ("gate_up_proj", "down_proj")


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    within: str = "model.layers.0.mlp.experts"
    transposed: bool = False  # stores [E, i, o]
    bias: bool = False
    engine: str = "loop"  # what `auto` takes
    listens: bool = True  # its experts are told which tokens are theirs
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10


def mixtral(**settings: Any) -> Callable[[], nn.Module]:
    sizes = {**ONE, "intermediate_size": F, "num_local_experts": E}
    return hf("MixtralForCausalLM", "MixtralConfig", **sizes, **settings)


QWEN = {**ONE, **TOP2, "num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 20}
LOCAL = {**ONE, "intermediate_size": F, "head_dim": 4, "num_local_experts": E}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES = {
    "mixtral": Family(mixtral(**TOP2)),
    "mixtral, grouped": Family(mixtral(**GROUPED), engine="vmap", listens=False, dtype=torch.float32, tolerance=1e-4),
    "qwen2_moe": Family(hf("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **QWEN)),
    "qwen3_moe": Family(hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **QWEN)),
    "gpt_oss": Family(
        hf("GptOssForCausalLM", "GptOssConfig", **LOCAL, **TOP2, **ROPE), transposed=True, bias=True
    ),
    "llama4": Family(
        hf("Llama4ForCausalLM", "Llama4TextConfig", **LOCAL, num_experts_per_tok=1, intermediate_size_mlp=20),
        "model.layers.0.feed_forward.experts",
        transposed=True,
        engine="vmap",
        listens=False,
        tolerance=2e-6,  # its router's scores are float32
    ),
    "aria": Family(
        hf("AriaTextForCausalLM", "AriaTextConfig", **{**ONE, "intermediate_size": F}, moe_num_experts=E, moe_topk=2,
           experts_implementation="eager"),
        transposed=True,
    ),
}  # fmt: skip
PLAIN = [name for name in FAMILIES if name != "mixtral, grouped"]


class Setting(NamedTuple):
    family: Family
    model: nn.Module
    loss_fn: Any
    params: dict[str, Tensor]
    batch: Any
    raw: dict[str, Tensor]  # plain gradients of whole parameters
    seen: list[set[int]]  # experts that see a token of an example which predicts another

    def name(self, stack: str) -> str:
        return f"{self.family.within}.{stack}"

    def slices(self, bias: bool) -> dict[str, Tensor]:
        """What the blocks of the experts should be, cut out of the plain gradients."""
        blocks = {}
        for stack in STACKS:
            for e in range(E):
                grad = self.raw[self.name(stack)][:, e]
                block = grad.mT if self.family.transposed else grad
                if self.family.bias:
                    column = self.raw[f"{self.name(stack)}_bias"][:, e]
                    if bias:
                        block = torch.cat([block, column[..., None]], -1)
                    else:
                        blocks[f"{self.name(stack)}_bias.expert_{e}"] = column
                blocks[f"{self.name(stack)}.expert_{e}"] = block
        return blocks

    def rows(self, *transforms: Any, bias: bool = False, **settings: Any) -> dict[str, Tensor]:
        transform = chain(as_blocks(bias), *transforms)
        return dict(per_example_grads(self.loss_fn, self.params, self.batch, transform=transform, **settings))


@functools.cache
def setting(name: str) -> Setting:
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.build().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model = model.to(family.dtype)
    batch = causal_batch(4, 3, "", torch.Generator().manual_seed(2))
    loss_fn, params = functionalize(model, targets=f"{family.within}.*")
    plain = model if name != "mixtral, grouped" else mixtral(**TOP2)()  # grouped products refuse float64
    plain.load_state_dict(model.state_dict())
    experts, asked = plain.get_submodule(family.within), []
    with pytest.MonkeyPatch.context() as patch:
        if family.listens:
            own = type(experts).forward

            def forward(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                asked.append({*index[:-1].flatten().tolist()})  # the last token predicts nothing
                return own(self, x, index, weights)

            patch.setattr(type(experts), "forward", forward)
        raw = per_example(plain, batch, "causal").rows
    return Setting(family, model, loss_fn, params, batch, {name: raw[name] for name in params}, asked)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_is_a_slice_of_the_plain_gradient(name: str, bias: bool) -> None:
    """All experts as one matrix `[E, 2 f d]`; `[i, o]` taken for `[o, i]`; a bias given to no expert."""
    here = setting(name)
    rows, expected = here.rows(bias=bias), here.slices(bias)
    assert error(rows, expected).value <= here.family.tolerance
    extra = int(bias and here.family.bias)
    for e in range(E):  # the input of the first matrix is as wide as the model, whatever is stored
        assert rows[f"{here.name('gate_up_proj')}.expert_{e}"].shape == (4, 2 * F, D + extra)
        assert rows[f"{here.name('down_proj')}.expert_{e}"].shape == (4, D, F + extra)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].listens])
def test_an_expert_without_a_token_has_a_zero_row(name: str) -> None:
    here = setting(name)
    rows = here.rows(project(3), bias=True)
    assert any(len(experts) < E for experts in here.seen)
    for stack in STACKS:
        for e in range(E):
            row = rows[f"{here.name(stack)}.expert_{e}"]
            assert [bool(one.any()) for one in row] == [e in experts for experts in here.seen]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_engine_that_can_gives_the_same_blocks(name: str) -> None:
    here = setting(name)
    plan = explain(here.loss_fn, here.params, here.batch, as_blocks())
    assert plan.engine == here.family.engine
    assert f"{here.name('down_proj')}.expert_{E - 1} " in str(plan)
    rows, expected = here.rows(engine=plan.engine), here.rows(engine="loop")
    assert error(rows, {name: row.double() for name, row in expected.items()}).value <= here.family.tolerance


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_projected_experts_are_sketches_of_their_slices(name: str, bias: bool) -> None:
    """Sketches drawn for the whole parameter, or one sketch for all experts."""
    here, expected = setting(name), {}
    for block, slice_ in here.slices(bias).items():
        left = sketch(block, "left", 5, slice_.shape[1])
        if slice_.ndim == 2:
            expected[block] = slice_ @ left.T
        else:
            expected[block] = left @ slice_ @ sketch(block, "right", 5, slice_.shape[2]).T
    wide = per_example_grads(here.loss_fn, here.params, here.batch, transform=chain(as_blocks(bias), project(5)))
    assert error(dict(wide), expected).value <= here.family.tolerance
    assert error(down_project(wide, 3), here.rows(project(3), bias=bias)).value <= 1e-4


def moments_of(here: Setting) -> Moments:
    generator = torch.Generator().manual_seed(3)
    return Moments({n: torch.rand(p.shape, generator=generator).to(p.dtype) + 0.01 for n, p in here.params.items()})


def slices_of(here: Setting, values: dict[str, Tensor], bias: bool) -> dict[str, Tensor]:
    return here._replace(raw={name: value[None] for name, value in values.items()}).slices(bias)


@pytest.mark.parametrize("name", PLAIN)
def test_adam_scales_every_expert_by_its_own_moments(name: str) -> None:
    here = setting(name)
    moments = moments_of(here)
    second = slices_of(here, moments.second, True)
    expected = {b: row / (second[b].sqrt() + 1e-3) for b, row in here.slices(True).items()}
    norm = torch.cat([row.flatten(1) for row in expected.values()], 1).norm(dim=1)[:, None, None]
    rows = here.rows(scale_by_adam(moments, eps=1e-3), unit_norm(), bias=True)
    assert error(rows, {b: row / norm for b, row in expected.items()}).value <= here.family.tolerance


@pytest.mark.parametrize("given", ["whole", "factored"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_adafactor_factors_every_expert_by_itself(name: str, bias: bool, given: str) -> None:
    """One row and one column for all experts; the first expert's columns for all of them; a turned matrix."""
    here, expected = setting(name), {}
    moments = moments_of(here)
    second = slices_of(here, moments.second, False)
    for block, row in here.slices(bias).items():
        v = second[block][0]
        if v.ndim == 1:
            expected[block] = row * v.rsqrt()
            continue
        scale = (torch.outer(v.mean(1), v.mean(0)) / v.mean()).rsqrt()
        if bias and here.family.bias:
            stack, expert = block.rsplit(".", 1)
            scale = torch.cat([scale, second[f"{stack}_bias.{expert}"][0].rsqrt()[:, None]], 1)
        expected[block] = row * scale
    if given == "factored":
        moments = Moments(
            {n: Factored(v.mean(-1), v.mean(-2)) if v.ndim == 3 else v for n, v in moments.second.items()}
        )
    rows = here.rows(scale_by_adafactor(moments), bias=bias)
    assert error(rows, expected).value <= here.family.tolerance
    if given == "factored":
        assert error(here.rows(scale_by_adam(moments, eps=0.0), bias=bias), rows).value <= 1e-6


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_dense_curvature_is_fitted_and_inverted_expert_by_expert(name: str) -> None:
    here = setting(name)
    factors = hessians.autocorrelation.fit(
        here.loss_fn, here.params, [here.batch], transform=as_blocks(bias=True), progress=False
    )
    rows = here.rows(precondition(factors, damping=0.1, missing="identity"), bias=True)
    compared = 0
    for block, slice_ in here.slices(True).items():
        flat = slice_.flatten(1)
        gram = flat.T @ flat / len(flat)
        if not gram.any():
            continue
        damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        expected = torch.linalg.solve(damped, flat.T).T
        torch.testing.assert_close(rows[block].flatten(1), expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
        compared += 1
    assert compared > E
    solved = factors.solve(here.raw, here.loss_fn.layout, damping=0.1, inversion="absolute")
    assert {n: v.shape for n, v in solved.items()} == {n: v.shape for n, v in here.raw.items()}
    again = here._replace(raw=solved).slices(True)
    absolute = here.rows(precondition(factors, damping=0.1, inversion="absolute"), bias=True)
    assert error(again, absolute).value <= 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_rows_at_hand_are_those_of_the_folded_chain(name: str, bias: bool) -> None:
    """Blocks at hand which are not put together again; some of the experts taken for all of them."""
    here = setting(name)
    layout, moments = here.loss_fn.layout, moments_of(here)
    for later in (project(3), chain(scale_by_adam(moments), project(3)), scale_by_adafactor(moments)):
        folded = here.rows(later, bias=bias)
        raw = chain(as_blocks(bias), later).apply(here.raw, layout)
        assert [*raw] == [*folded]
        assert error(raw, folded).value <= 1e-10
        blocks = per_example_grads(here.loss_fn, here.params, here.batch, transform=as_blocks(bias))
        made = later.apply(blocks, layout)
        assert [*made] == [*folded]
        assert error(made, folded).value <= 1e-10
        turned = dict(reversed(blocks.items()))
        assert error(later.apply(turned, layout), folded).value <= 1e-10
    some = {block: row for block, row in here.rows(bias=bias).items() if not block.endswith("expert_0")}
    expected = {block: row for block, row in here.rows(project(3), bias=bias).items() if block in some}
    assert error(project(3).apply(some, layout), expected).value <= 1e-10


def test_plain_parameters_keep_their_shape() -> None:
    """Without `as_blocks` nothing is cut; a moment of the parameter's shape scales it as it is."""
    here = setting("gpt_oss")
    moments = moments_of(here)
    rows = per_example_grads(here.loss_fn, here.params, here.batch, transform=scale_by_adam(moments, eps=1e-3))
    expected = {n: row / (moments.second[n].sqrt() + 1e-3) for n, row in here.raw.items()}
    assert error(dict(rows), expected).value <= 1e-10


def test_heads_are_split_and_experts_are_left() -> None:
    model = setting("mixtral").model
    loss_fn, params = functionalize(model, targets=["*experts*", "*q_proj*"])
    batch = setting("mixtral").batch
    rows = per_example_grads(loss_fn, params, batch, transform=chain(as_blocks(), split_heads()))
    kinds = {name.rsplit(".", 1)[1].rstrip("0123456789") for name in rows}
    assert kinds == {"head_", "expert_"}
    assert len(rows) == 4 + 2 * E


@pytest.mark.parametrize("turned", [False, True])
def test_an_expert_costs_what_its_own_matrix_costs(turned: bool) -> None:
    """A hundred experts, each sketched and scaled by way of all of them."""
    count, o, i = 32, 24, 20
    shape = (count, i, o) if turned else (count, o, i)
    layout = Layout({"up": ParamLayout(shape, transposed=turned, experts=count)})
    grads, work = {"up": torch.ones(2, *shape)}, []
    sketched = chain(as_blocks(), project(4)).bind(layout)
    with FlopCounterMode(display=False) as counter:
        sketched.rows(grads)
    assert counter.get_total_flops() == 2 * 2 * count * (4 * o * i + 4 * o * 4)
    moments = Moments({"up": torch.ones(shape)})

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            work.append(out.numel() if func is torch.ops.aten.sqrt.default else 0)
            return out

    with Counted():
        chain(as_blocks(), scale_by_adam(moments)).bind(layout)
    assert sum(work) == count * o * i


class Mixed(nn.Module):
    """Every token goes to every expert, by its own weight: nothing is routed by value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 3), TinyExperts()

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).softmax(-1)[..., None] * self.experts(x)).sum(-2)


class TinyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 4, 5, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nsi,eoi->nseo", x, self.up).tanh()


def test_experts_that_are_not_routed_take_the_batched_engine() -> None:
    model = Mixed().double()
    loss_fn, params = functionalize(model, loss=lambda output, batch: output.square().sum((1, 2)), targets="experts*")
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = (x, torch.zeros(4))
    truth = per_example(model, batch, lambda output, batch: output.square().sum((1, 2))).rows["experts.up"]
    for transform in (as_blocks(), chain(as_blocks(), project(3))):
        rows = per_example_grads(loss_fn, params, batch, transform=transform, engine="batched")
        expected = {f"experts.up.expert_{e}": truth[:, e] for e in range(3)}
        if transform.steps[1:]:
            for block, row in expected.items():
                expected[block] = sketch(block, "left", 3, 4) @ row @ sketch(block, "right", 3, 5).T
        assert error(dict(rows), expected).value <= 1e-12
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks(), progress=False)
    assert all("diagonal: used by" in factors.notes[f"experts.up.expert_{e}"] for e in range(3))
    got = factors.blocks["experts.up.expert_1"].dense().diagonal()
    torch.testing.assert_close(got, truth[:, 1].flatten(1).square().mean(0))


@pytest.mark.parametrize("fit", [hessians.kfac.fit, hessians.tkfac.fit])
def test_kronecker_factors_of_routed_experts_are_refused(fit: Any) -> None:
    here = setting("mixtral")
    words = r"fac needs layer inputs.*2 parameters hold experts: model.layers.0.mlp.experts.gate_up_proj, .*shampoo"
    with pytest.raises(ValueError, match=words):
        fit(here.loss_fn, here.params, [{**here.batch, "index": torch.arange(4)}], progress=False)


def test_shampoo_takes_experts() -> None:
    here = setting("mixtral")
    factors = hessians.shampoo.fit(
        here.loss_fn, here.params, [here.batch], labels="data", transform=as_blocks(), progress=False
    )
    assert [*factors.blocks] == [*here.rows()]
    expected = sum(float(row.square().sum()) for row in here.raw.values()) / 4
    assert factors.trace == pytest.approx(expected, rel=1e-6)


def test_adafactor_of_a_whole_stack_is_refused() -> None:
    here = setting("mixtral")
    moments = moments_of(here)
    with pytest.raises(ValueError, match=r"gate_up_proj.* holds 6 experts.*as_blocks\(\) before it"):
        per_example_grads(here.loss_fn, here.params, here.batch, transform=scale_by_adafactor(moments))
    with pytest.raises(ValueError, match=r"\(\(6, 24\), \(6, 16\)\), factored expert by expert \(leave it in full"):
        here.rows(scale_by_adafactor(moments.to_adafactor()))


@pytest.mark.parametrize("name", PLAIN)
def test_experts_are_described_and_are_targets(name: str) -> None:
    """A stack of biases taken for a matrix; the tree showing one wide matrix."""
    here = setting(name)
    tree = describe(here.model)
    bias = " + bias" if here.family.bias else ""
    numbers = {"gate_up_proj": E * 2 * F * (D + bool(bias)), "down_proj": E * D * (F + bool(bias))}
    for stack, (o, i) in {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}.items():
        assert f"experts.{stack}* {E} × [{o}, {i}]{bias} {numbers[stack]:,}\n" in tree
        assert here.name(stack) in layer_matrices(here.model)
    assert not any(target.endswith("bias") for target in layer_matrices(here.model))
