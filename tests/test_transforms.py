"""Laws of transforms: folded = unfolded, chains associate, and nothing depends on how a batch is put together.

The dense oracles here are written from the formulas; of the library they take the sketch matrices alone.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from influence import (
    Factored,
    Heads,
    Moments,
    Transform,
    as_blocks,
    chain,
    explain,
    functionalize,
    per_example_grads,
    per_example_grads_fn,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    unit_norm,
)
from influence.func.transform.chain import Layout
from influence.func.transform.layout import ParamLayout, bare_layout
from influence.func.transform.project import sketch
from tests.cases import CASES, GPT2, LLAMA, hf
from tests.oracles import error
from tests.worst import function_of

BY_NAME = {case.name: case for case in CASES}
BY_NAME["gpt2"] = replace(BY_NAME["gpt2"], build=hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 1}))
BY_NAME["llama"] = replace(BY_NAME["llama"], build=lambda: exact_llama())
ZOO = ("mlp", "conv2d", "gpt2", "llama")
# Not shrunk: a failing chain prints itself, and is short.
FEW = settings(max_examples=5, derandomize=True, phases=[Phase.generate])
Rows = dict[str, Tensor]


Recipe = Callable[[], Transform]


def exact_llama() -> nn.Module:
    """Llama whose norms stay in float64: rounding inside would hide everything below 1e-7."""
    model = hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1})()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon))
    return model


class Setting(NamedTuple):
    loss_fn: Any
    params: Rows
    batch: Any
    raw: Rows
    moments: Moments
    heads: dict[str, Heads] | None
    scales: list[Recipe]


@functools.cache
def setting(name: str) -> Setting:
    case = BY_NAME[name]
    loss_fn, params = function_of(case, "sum")
    batch = case.batch(3, 5, bool(case.pads))
    generator = torch.Generator().manual_seed(7)
    moments = Moments({k: torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.01 for k, p in params.items()})
    return Setting(
        loss_fn,
        params,
        batch,
        per_example_grads(loss_fn, params, batch, engine="loop"),
        moments,
        {"mlp": {"0": Heads(2, 4)}, "conv2d": {"2": Heads(4, 2)}}.get(name),
        [
            partial(scale_by_adafactor, moments, eps=1e-3),
            partial(scale_by_adam, moments),
            partial(scale_by_adam, moments.to_adafactor(), eps=1e-3),
        ],
    )


def rows_of(name: str, transform: Transform | None, **options: Any) -> Rows:
    case = setting(name)
    return per_example_grads(case.loss_fn, case.params, case.batch, transform=transform, **options)


def apart(got: Rows, expected: Rows) -> float:
    """The largest error of an example's block, relative to that block or to a thousandth of the example's whole row."""
    assert list(got) == list(expected)
    whole = torch.stack([row.flatten(1).norm(dim=1) for row in expected.values()]).norm(dim=0)
    worst = 0.0
    for name, row in expected.items():
        assert got[name].shape == row.shape
        assert got[name].dtype == row.dtype
        off = (got[name] - row).flatten(1).norm(dim=1)
        scale = torch.maximum(row.flatten(1).norm(dim=1), 1e-3 * whole).clamp_min(1e-300)
        worst = max(worst, float((off / scale).max()))
    return worst


# Strategies give recipes, which the tests call: the type hook draws from `random`, which a strategy must not.


def projections() -> st.SearchStrategy[Recipe]:
    recipe = functools.partial(st.builds, partial, st.just(project))
    kinds, seeds = st.sampled_from(["rademacher", "normal", "sparse", "srht"]), st.integers(0, 3)
    return st.one_of(
        recipe(st.integers(2, 12), seed=seeds, kind=kinds),
        recipe(st.integers(2, 12), seed=seeds, kind=kinds, reshape_to_square=st.just(True)),
        recipe(st.integers(2, 40), seed=seeds, kind=kinds, target=st.just("global")),
        recipe(st.integers(3, 12), kind=st.just("sparse"), signs=st.integers(1, 3)),
    )


@st.composite
def chains(draw: Any, case: Setting, linear: bool = False) -> list[Recipe]:
    """A chain that makes sense, as a list: any part may be missing; unit norm may stand before the projection too."""
    found: list[Recipe] = []
    blocks = draw(st.sampled_from([True, True, False]))
    if blocks:
        found.append(partial(as_blocks, bias=draw(st.booleans())))
        found += draw(st.sampled_from([[], [partial(split_heads, case.heads)]]))
    if draw(st.booleans()):
        found.append(draw(st.sampled_from(case.scales)))
    if blocks and draw(st.booleans()):
        projection = draw(projections())
        if not linear and "reshape_to_square" not in projection.keywords and draw(st.integers(0, 3)) == 0:
            found.append(unit_norm)
        found.append(projection)
    if not linear and draw(st.booleans()):
        found.append(unit_norm)
    return found


def made(recipes: list[Recipe]) -> Transform:
    return chain(*(recipe() for recipe in recipes))


# Folding, composition, linearity


@pytest.mark.parametrize("name", ZOO)
@FEW
@given(data=st.data())
def test_folded_is_unfolded(name: str, data: st.DataObject) -> None:
    """A side folded into the wrong axis, group, head, bias column or tied use; a scale applied twice."""
    transform = made(data.draw(chains(setting(name))))
    folded = rows_of(name, transform)
    assert apart(folded, transform.apply(setting(name).raw, setting(name).loss_fn.layout)) <= 1e-12
    assert apart(folded, rows_of(name, transform, engine="loop")) <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@FEW
@given(data=st.data())
def test_chain_is_associative(name: str, data: st.DataObject) -> None:
    """A chain that composes steps two at a time: brackets would then change numbers or the fingerprint."""
    parts = [recipe() for recipe in data.draw(chains(setting(name)))]
    cut, end = sorted(data.draw(st.tuples(*[st.integers(0, len(parts))] * 2)))
    flat = chain(*parts)
    nested = chain(chain(*parts[:cut]), chain(chain(*parts[cut:end]), chain(), *parts[end:]))
    assert nested.fingerprint == flat.fingerprint
    layout = setting(name).loss_fn.layout
    assert apart(nested.apply(setting(name).raw, layout), flat.apply(setting(name).raw, layout)) == 0


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@FEW
@given(data=st.data())
def test_chain_applied_in_two_goes_is_the_whole_chain(name: str, data: st.DataObject) -> None:
    """Stored block rows: what still has to be done to them must not see another orientation or another bias."""
    layout, raw = setting(name).loss_fn.layout, setting(name).raw
    blocks, recipes = as_blocks(bias=data.draw(st.booleans())), [data.draw(projections())]
    rest = made([data.draw(st.sampled_from(setting(name).scales)), *recipes] if data.draw(st.booleans()) else recipes)
    stored = blocks.apply(raw, layout)
    assert apart(rest.apply(stored, layout), chain(blocks, rest).apply(raw, layout)) <= 1e-12


def test_blocks_of_parameters_without_a_weight_suffix_are_blocks_too() -> None:
    """A block `w` and its parameter `w` share a name: stored blocks were taken for raw gradients and refused."""
    raw = {"w": torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    layout = bare_layout({"w": raw["w"][0]})
    rows = project(2).apply(as_blocks().apply(raw, layout), layout)
    assert apart(rows, chain(as_blocks(), project(2)).apply(raw, layout)) <= 1e-12


@pytest.mark.parametrize("name", ZOO)
@FEW
@given(data=st.data())
def test_row_is_the_slope_along_the_adjoint(name: str, data: st.DataObject) -> None:
    """⟨T g_n, Z⟩ = ⟨g_n, TᵀZ⟩ = dℓ_n(θ + t TᵀZ)/dt: what a row means, by a derivative in one number."""
    case, transform = setting(name), made(data.draw(chains(setting(name), linear=True)))
    nothing = {k: torch.zeros_like(g[:1]) for k, g in case.raw.items()}
    out, adjoint = torch.func.vjp(lambda raw: transform.apply(raw, case.loss_fn.layout), nothing)
    generator = torch.Generator().manual_seed(3)
    z = {k: torch.randn(row.shape, generator=generator, dtype=row.dtype) for k, row in out.items()}
    (direction,) = adjoint(z)
    moved = {k: d[0] for k, d in direction.items()}
    slopes = torch.autograd.functional.jacobian(
        lambda t: case.loss_fn({k: p + t * moved[k] for k, p in case.params.items()}, case.batch),
        torch.zeros((), dtype=torch.float64),
    )
    rows = rows_of(name, transform)
    products = torch.stack([(row * z[k]).flatten(1).sum(1) for k, row in rows.items()]).sum(0)
    torch.testing.assert_close(products, slopes, rtol=1e-10, atol=1e-10 * float(slopes.norm()))


@FEW
@given(data=st.data())
def test_linear_transforms_are_linear(data: st.DataObject) -> None:
    """An affine or per-batch step (a mean taken off, a scale taken from the batch) hiding in a linear chain."""
    transform = made(data.draw(chains(setting("gpt2"), linear=True)))
    layout, x = setting("gpt2").loss_fn.layout, setting("gpt2").raw
    y = {k: row.flip(0) for k, row in x.items()}
    mixed = {k: 3 * x[k] - 0.5 * y[k] for k in x}
    a, b, c = (transform.apply(rows, layout) for rows in (x, y, mixed))
    assert apart(c, {k: 3 * a[k] - 0.5 * b[k] for k in a}) <= 1e-12


# How the batch is put together


@pytest.mark.parametrize("name", ZOO)
@FEW
@given(data=st.data())
def test_order_split_and_chunks_make_no_difference(name: str, data: st.DataObject) -> None:
    """Anything taken over the batch (a norm, a sketch, an order) would make a row depend on its neighbours."""
    transform = made(data.draw(chains(setting(name))))
    case = setting(name)
    planned = per_example_grads_fn(case.loss_fn, case.params, case.batch, transform=transform)
    rows = planned(case.params, case.batch)
    order = torch.tensor(data.draw(st.permutations(range(3))))
    assert apart(planned(case.params, at(case.batch, order)), at(rows, order)) <= 1e-12
    pieces = [planned(case.params, at(case.batch, torch.tensor(piece))) for piece in ([0], [1, 2])]
    assert apart({k: torch.cat([piece[k] for piece in pieces]) for k in rows}, rows) <= 1e-12
    assert apart(rows_of(name, transform, chunk_size=data.draw(st.integers(1, 4))), rows) <= 1e-12


def at(tree: Any, index: Tensor) -> Any:
    return {k: x[index] for k, x in tree.items()} if isinstance(tree, dict) else tuple(x[index] for x in tree)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_mlm"])
@FEW
@given(data=st.data())
def test_padding_makes_no_difference(name: str, data: st.DataObject) -> None:
    """Padding that gets a row, a position of its own, or a share of the norm."""
    heads = [split_heads] if data.draw(st.booleans()) else []
    transform = made([as_blocks, *heads, data.draw(projections())])
    case = setting(name)
    extra = data.draw(st.integers(1, 4))
    fill = {"input_ids": data.draw(st.integers(0, 39)), "attention_mask": 0, "labels": -100}
    longer = {k: F.pad(x, (0, extra), value=fill[k]) for k, x in case.batch.items()}
    planned = per_example_grads_fn(case.loss_fn, case.params, case.batch, transform=transform)
    assert apart(planned(case.params, longer), planned(case.params, case.batch)) <= 1e-10


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_plan_serves_batches_of_other_sizes_and_lengths(name: str) -> None:
    """A plan that remembers n or s: with n = s, with one example, and with more than it was made on."""
    case = setting(name)
    transform = chain(as_blocks(bias=True), scale_by_adafactor(case.moments), project(3), unit_norm())
    planned = per_example_grads_fn(case.loss_fn, case.params, case.batch, transform=transform)
    for n, s in ((1, 5), (4, 4), (7, 3), (2, 11)):
        batch = BY_NAME[name].batch(n, s)
        raw = per_example_grads(case.loss_fn, case.params, batch, engine="loop")
        assert apart(planned(case.params, batch), transform.apply(raw, case.loss_fn.layout)) <= 1e-12


# Dense oracles: Adafactor, Adam, projection


def test_adafactor_golden_values() -> None:
    """Row and column exchanged, the mean's root forgotten, or a sum for a mean."""
    v = torch.tensor([[4, 1], [2, 0.5], [1, 1]], dtype=torch.float64)
    row, col = torch.tensor([2.5, 1.25, 1], dtype=torch.float64), torch.tensor([7 / 3, 5 / 6], dtype=torch.float64)
    golden = torch.tensor(
        [[0.52098807, 0.87177979], [0.7367884, 1.2328828], [0.82375447, 1.37840488]], dtype=torch.float64
    )
    factored = Moments({"w": v}).to_adafactor()
    torch.testing.assert_close(factored.second["w"], Factored(row, col))
    for moments in (Moments({"w": v}), factored, factored.to_adam()):
        rows = scale_by_adafactor(moments).apply({"w": torch.ones_like(v)[None]}, bare_layout({"w": v}))
        torch.testing.assert_close(rows["w"][0], golden, rtol=1e-7, atol=0)
    expanded = row[:, None] * col / row.mean()
    torch.testing.assert_close(factored.to_adam().second["w"], expanded)
    rows = scale_by_adam(factored, eps=0.0).apply({"w": torch.ones_like(v)[None]}, bare_layout({"w": v}))
    torch.testing.assert_close(rows["w"][0], golden, rtol=1e-7, atol=0)


def multiplier(v: Tensor, scaler: str, eps: float) -> Tensor:
    """The scale of a stored parameter, from the formulas, in the parameter's own shape."""
    if scaler == "adam" or v.ndim < 2:
        return 1 / (v.sqrt() + eps) if scaler == "adam" else 1 / (v + eps).sqrt()
    matrix = v.reshape(len(v), -1)
    row, col = matrix.mean(1) + eps, matrix.mean(0) + eps
    return (row.mean() / torch.outer(row, col)).sqrt().reshape(v.shape)


@pytest.mark.parametrize("scaler", ["adam", "adafactor"])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "gpt2"])
def test_scaled_rows_are_the_dense_ones(name: str, scaler: str) -> None:
    """Conv1D's transposed moments, a bias scaled by its weight's factors, an ε on the wrong side of the root."""
    case, eps = setting(name), 1e-2
    scale = {"adam": scale_by_adam, "adafactor": scale_by_adafactor}[scaler](case.moments, eps)
    expected = {k: g * multiplier(case.moments.second[k], scaler, eps) for k, g in case.raw.items()}
    assert apart(rows_of(name, scale), expected) <= 1e-12
    blocks = as_blocks(bias=True)
    assert apart(rows_of(name, chain(blocks, scale)), blocks.apply(expected, case.loss_fn.layout)) <= 1e-12


def test_blocks_are_oriented_with_the_bias_last() -> None:
    """Conv1D left transposed, a bias in front, a convolution's kernel in front of its channels."""
    raw, blocks = setting("gpt2").raw, rows_of("gpt2", as_blocks(bias=True))
    weight, bias = (raw[f"transformer.h.0.attn.c_attn.{k}"] for k in ("weight", "bias"))
    expected = torch.cat([weight.transpose(1, 2), bias[..., None]], 2)
    assert error({"b": blocks["transformer.h.0.attn.c_attn"]}, {"b": expected}).value <= 1e-12
    assert blocks["transformer.wte"].shape == raw["transformer.wte.weight"].shape
    assert "transformer.h.0.attn.c_attn.bias" not in blocks
    conv, first = setting("conv2d").raw, rows_of("conv2d", as_blocks(bias=True))["0"]
    assert (
        error({"b": first}, {"b": torch.cat([conv["0.weight"].flatten(2), conv["0.bias"][..., None]], 2)}).value < 1e-12
    )
    assert "0.bias" in rows_of("conv2d", as_blocks())


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse", "srht"])
def test_projected_rows_are_sandwiched_between_their_sketches(kind: str) -> None:
    """Left and right exchanged, one sketch for both sides, a small side projected, a bias column left out."""
    blocks = rows_of("mlp", as_blocks(bias=True), engine="loop")
    rows = rows_of("mlp", chain(as_blocks(bias=True), project(4, seed=5, kind=kind)))
    for name, block in blocks.items():
        for axis, side in ((1, "left"), (2, "right")):
            if axis < block.ndim and block.shape[axis] > 4:
                matrix = sketch(name, side, 4, block.shape[axis], seed=5, kind=kind)
                block = torch.tensordot(block, matrix, ([axis], [1])).movedim(-1, axis)
        assert error({"b": rows[name]}, {"b": block}).value <= 1e-12, name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("bias", [False, True])
def test_head_of_a_scale_is_the_scale_of_a_head(name: str, bias: bool) -> None:
    """Adafactor's factors fitted to a head alone: its row and column means are not the whole matrix's."""
    case = setting(name)
    for scale in (scale_by_adafactor(case.moments, 1e-3), scale_by_adam(case.moments, 1e-3)):
        heads = rows_of(name, chain(as_blocks(bias), split_heads(), scale))
        whole = rows_of(name, chain(as_blocks(bias), scale))
        for block in whole:
            pieces = [v for k, v in heads.items() if k.startswith(f"{block}.") and ".head_" in k]
            axis = 2 if block.endswith(("o_proj", "attn.c_proj")) else 1
            if axis == 2 and bias and f"{block}.bias" in heads:
                pieces.append(heads[f"{block}.bias"][..., None])
            joined = torch.cat(pieces, axis) if pieces else heads[block]
            assert error({"b": joined}, {"b": whole[block]}).value <= 1e-12, block
        assert any(".head_" in block for block in heads)


def test_convolution_moments_make_the_round_trip() -> None:
    """A factored moment of a convolution came back as a matrix, which the scaler then refused."""
    case = setting("conv2d")
    back = case.moments.to_adafactor().to_adam()
    rows = rows_of("conv2d", scale_by_adam(back, eps=1e-3))
    expanded = {k: unfactored(v) for k, v in case.moments.second.items()}
    expected = {k: g / (expanded[k].sqrt() + 1e-3) for k, g in case.raw.items()}
    assert apart(rows, expected) <= 1e-12
    assert apart(rows_of("conv2d", scale_by_adam(case.moments.to_adafactor(), eps=1e-3)), expected) <= 1e-12


def unfactored(v: Tensor) -> Tensor:
    matrix = v.reshape(len(v), -1)
    if v.ndim < 2:
        return v
    return (torch.outer(matrix.mean(1), matrix.mean(0)) / matrix.mean()).reshape(v.shape)


def test_zero_second_moments_scale_by_epsilon() -> None:
    """0 / 0 where a parameter never moved: NaN, or a scale of infinity times a zero gradient."""
    zeros, layout = Moments({"w": torch.zeros(2, 3)}), bare_layout({"w": torch.zeros(2, 3)})
    for rows in ({"w": torch.zeros(1, 2, 3)}, {"w": torch.ones(1, 2, 3)}):
        for transform in (scale_by_adam(zeros), scale_by_adafactor(zeros), scale_by_adam(zeros.to_adafactor())):
            assert torch.isfinite(transform.apply(rows, layout)["w"]).all()
    torch.testing.assert_close(scale_by_adam(zeros).apply(rows, layout)["w"], torch.full((1, 2, 3), 1e8))


# Unit norm


def test_unit_norm_is_over_all_blocks_and_keeps_zero_rows() -> None:
    """A norm per block, a norm over the batch, NaN for a row of zeros."""
    rows = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]])}
    found = unit_norm().apply(rows, bare_layout({k: row[0] for k, row in rows.items()}))
    torch.testing.assert_close(found["a"], torch.tensor([[0.6], [0.0]]))
    torch.testing.assert_close(found["b"], torch.tensor([[[0.8, 0.0]], [[0.0, 0.0]]]))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 6e4),
        (torch.float16, 1e-7),
        (torch.bfloat16, 3e38),
        (torch.bfloat16, 1e-9),
        (torch.float32, 3e38),
    ],
)
def test_unit_norm_of_huge_and_tiny_rows(dtype: torch.dtype, value: float) -> None:
    """Squares that overflow or vanish: a norm taken in half precision, or of float32's largest numbers."""
    row = torch.full((1, 2, 8), value).to(dtype)
    found = unit_norm(eps=1e-30).apply({"w": row}, bare_layout({"w": row[0]}))["w"]
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full_like(row, 0.25), rtol=1e-2, atol=0)


def test_unit_norm_divides_by_no_less_than_epsilon() -> None:
    """g / (‖g‖ + ε) or g / √(‖g‖² + ε²) for g / max(‖g‖, ε)."""
    rows, layout = {"w": torch.tensor([[3e-3, 4e-3], [3.0, 4.0]])}, bare_layout({"w": torch.zeros(2)})
    expected = torch.tensor([[0.3, 0.4], [0.6, 0.8]])
    torch.testing.assert_close(unit_norm(eps=1e-2).apply(rows, layout)["w"], expected)


# Fingerprints


V = Moments({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)})
DIFFERENT = [
    chain(),
    as_blocks(),
    as_blocks(bias=True),
    chain(as_blocks(), split_heads()),
    chain(as_blocks(), split_heads({"a": Heads(2, 1)})),
    chain(as_blocks(), split_heads({"a": Heads(1, 2)})),
    chain(as_blocks(), split_heads({"a": Heads(2, 1, "in")})),
    chain(as_blocks(), split_heads({"a": Heads(2, 1, fused="interleaved")})),
    chain(as_blocks(), split_heads({"a": Heads(2, 1, fused="interleaved", kv=1)})),
    chain(as_blocks(), split_heads({"b": Heads(2, 1)})),
    project(4),
    project(5),
    project(4, seed=1),
    project(4, kind="normal"),
    project(4, kind="sparse"),
    project(4, kind="sparse", signs=2),
    project(4, kind="srht"),
    project(4, target="global"),
    project(4, kind="rademacher", target="global"),
    project(4, reshape_to_square=True),
    scale_by_adam(V),
    scale_by_adam(V, eps=1e-7),
    scale_by_adam(V.to_adafactor()),
    scale_by_adam(Moments({**V.second, "b": torch.zeros(2)})),
    scale_by_adam(Moments({"a": V.second["a"].double(), "b": torch.ones(2)})),
    scale_by_adam(Moments({"a": V.second["a"].reshape(3, 2), "b": torch.ones(2)})),
    scale_by_adam(Moments({"a": V.second["a"], "c": torch.ones(2)})),
    scale_by_adafactor(V),
    scale_by_adafactor(V, eps=1e-7),
    scale_by_adafactor(V.to_adafactor()),
    unit_norm(),
    unit_norm(eps=1e-6),
    chain(project(4), unit_norm()),
    chain(unit_norm(), project(4)),
]


def test_fingerprint_changes_with_every_setting() -> None:
    """A setting left out of the hash: an index would accept rows of another transform."""
    found = [transform.fingerprint for transform in DIFFERENT]
    assert len(set(found)) == len(found)


def test_fingerprint_says_nothing_of_what_changes_no_number() -> None:
    """A default written out, or moments listed in another order, refused as another transform."""
    assert project(4).fingerprint == project(4, 0, "rademacher", "per_block").fingerprint
    assert project(4, target="global").fingerprint == project(4, kind="sparse", target="global").fingerprint
    assert scale_by_adam(V).fingerprint == scale_by_adam(Moments(dict(reversed(V.second.items())))).fingerprint
    strided = Moments({**V.second, "a": V.second["a"].T.contiguous().T})
    assert scale_by_adam(V).fingerprint == scale_by_adam(strided).fingerprint


def test_fingerprint_takes_moments_of_any_shape_and_dtype() -> None:
    """A scalar parameter has a moment too; bfloat16 has no numpy dtype."""
    for v in (torch.tensor(1.0), torch.ones(2, dtype=torch.bfloat16), torch.ones(0)):
        assert len(scale_by_adam(Moments({"t": v})).fingerprint) == 64


def test_fingerprint_is_the_same_in_another_process() -> None:
    """Python's salted hash, an address or an order of a set in the fingerprint."""
    chosen = [t.fingerprint for t in DIFFERENT]
    code = (
        "import json; from tests.test_transforms import DIFFERENT as D; print(json.dumps([t.fingerprint for t in D]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == chosen


# Orders that make no sense


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (project(4), as_blocks()),
        (project(4), split_heads()),
        (project(4), scale_by_adam(V)),
        (project(4), scale_by_adafactor(V)),
        (project(4), project(2)),
        (unit_norm(), as_blocks()),
        (unit_norm(), split_heads()),
        (unit_norm(), scale_by_adam(V)),
        (unit_norm(), scale_by_adafactor(V)),
        (scale_by_adam(V), as_blocks()),
        (scale_by_adafactor(V), split_heads()),
        (scale_by_adam(V), scale_by_adafactor(V)),
        (scale_by_adafactor(V), scale_by_adafactor(V)),
        (split_heads(), as_blocks()),
        (split_heads(), split_heads()),
        (as_blocks(), as_blocks(bias=True)),
    ],
    ids=lambda t: t.steps[0].name,
)
def test_senseless_order_is_refused_when_the_chain_is_built(first: Transform, second: Transform) -> None:
    """An order that would give wrong numbers, found only after a long run."""
    with pytest.raises(ValueError, match="cannot follow") as refusal:
        chain(first, second)
    assert first.steps[0].name in str(refusal.value)
    assert second.steps[0].name in str(refusal.value)


@pytest.mark.parametrize("transform", [project(4), split_heads()], ids=["project", "split_heads"])
def test_what_needs_blocks_says_so(transform: Transform) -> None:
    """A projection of a stored `[i, o]` matrix, or of a 4-D kernel."""
    with pytest.raises(ValueError, match=rf"{transform.steps[0].name}.* needs blocks: put as_blocks\(\) before it"):
        rows_of("mlp", transform)


def test_unit_norm_before_a_projection_is_warned_about_once_in_explain() -> None:
    """Projected rows that are taken for unit vectors; and a plan that shows the shape before the projection."""
    case = setting("mlp")
    plan = explain(case.loss_fn, case.params, case.batch, chain(as_blocks(), unit_norm(), project(2)))
    assert str(plan).count("unit_norm comes before project") == 1
    assert {cost.row for cost in plan.costs if len(cost.shape) == 2} == {(2, 2)}
    assert "unit_norm" not in str(explain(case.loss_fn, case.params, case.batch, chain(as_blocks(), project(2))))


def test_apply_needs_a_layout_that_knows_the_rows() -> None:
    """Rows silently treated as bare: a Conv1D's would then be projected the wrong way round."""
    raw = {"w.weight": torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    stored = Layout({"w.weight": ParamLayout((6, 5), torch.float64, transposed=True)})
    plain = bare_layout({"w.weight": raw["w.weight"][0].T})
    turned = {"w.weight": raw["w.weight"].transpose(1, 2)}
    transform = chain(as_blocks(), project(3))
    assert apart(transform.apply(raw, stored), transform.apply(turned, plain)) <= 1e-12


class Whole(TorchDispatchMode):
    """Counts the operations that write a tensor of some size at least."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and not func.is_view and out.numel() >= self.size
        return out


def test_a_bias_rides_on_its_weight_and_takes_no_pass_of_its_own() -> None:
    """The bias's column was a second block of whole size, and their sum a third: 1.7 times the time."""
    loss_fn, params = functionalize(nn.Linear(30, 20).double(), loss=lambda y, batch: y.square().sum((1, 2)))
    x = torch.randn(4, 3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    writes = {}
    for bias in (False, True):
        rows_of = per_example_grads_fn(loss_fn, params, (x,), transform=as_blocks(bias=bias))
        with Whole(4 * 20 * 30) as whole:
            rows = rows_of(params, (x,))
        writes[bias] = whole.count
    y = 2 * (x @ params["weight"].mT + params["bias"])
    expected = torch.cat([y.mT @ x, y.sum(1)[..., None]], 2)
    (row,) = rows.values()
    torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)
    assert writes[True] == writes[False] > 0
