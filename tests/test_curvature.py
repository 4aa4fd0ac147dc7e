"""Curvature fits against explicit matrices in float64: what they are, where they are exact, and their invariances."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from influence import (
    as_blocks,
    chain,
    fold,
    functionalize,
    hessians,
    per_example_grads,
    project,
    split_heads,
    unit_norm,
)
from influence.func.engine.ops.linear import Affine, Dense, symmetric_product
from influence.hessians.labels import Labels
from tests import cases
from tests.oracles import kronecker

BLOCKS = as_blocks(bias=True)
FITS = {"kfac": hessians.kfac, "tkfac": hessians.tkfac, "shampoo": hessians.shampoo}


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return model


def data(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n: int, *shape: int, count: int = 3) -> Tensor:
    return torch.randint(count, (n, *shape), generator=torch.Generator().manual_seed(2))


def with_index(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"index": torch.arange(len(next(iter(batch.values())))) + 100}


class Zoo:
    """Model, batch, blocks {block: module}, what the loss is, the fits' loss."""

    def __init__(self, model: nn.Module, batch: Any, blocks: dict[str, str], kind: str, loss: str) -> None:
        self.model, self.batch, self.blocks, self.kind, self.loss = model, batch, blocks, kind, loss


def mlp() -> Zoo:
    batch = {"input": data(6, 5), "labels": classes(6)}
    return Zoo(net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), batch, {"0": "0", "2": "2"}, "class", "cross_entropy")


def regression() -> Zoo:
    # labels at every position, [n, t, d]
    batch = {"input": data(4, 3, 5), "labels": data(4, 3, 2, seed=3)}
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    return Zoo(model, batch, {"0": "0", "2": "2"}, "squared", "squared_error")


def grouped_conv() -> Zoo:
    # groups, dilation, stride and a bias; a 1 × 1 convolution behind it
    layers = (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(6, 3, 1), nn.Tanh())
    model = net(*layers, nn.Flatten(), nn.Linear(3 * 9, 3))
    batch = {"input": data(3, 4, 6, 6), "labels": classes(3)}
    return Zoo(model, batch, {"0": "0", "2": "2", "5": "5"}, "class", "cross_entropy")


def zoo_of(case: str, blocks: dict[str, str], padded: bool) -> Zoo:
    found = next(c for c in cases.CASES if c.name == case)
    return Zoo(found.make(), found.batch(3, 5, padded), blocks, found.loss, "cross_entropy")


GPT2 = {f"transformer.h.0.{name}": f"transformer.h.0.{name}" for name in ("attn.c_attn", "mlp.c_proj")}
LLAMA = {f"model.layers.1.{name}": f"model.layers.1.{name}" for name in ("self_attn.k_proj", "mlp.down_proj")}
BERT = {
    f"bert.encoder.layer.0.{name}": f"bert.encoder.layer.0.{name}" for name in ("attention.self.key", "output.dense")
}

ZOO: dict[str, Callable[[], Zoo]] = {
    "mlp": mlp,
    "regression": regression,
    "grouped_conv": grouped_conv,
    # Conv1D's transposed weight, [n·s, d]; padding excluded though the batch has it
    "gpt2": lambda: zoo_of("gpt2", GPT2, True),
    # grouped queries
    "llama": lambda: zoo_of("llama", LLAMA, True),
    # padding seen by a model without causality; a pooler that sees one position
    "bert": lambda: zoo_of("bert_classifier", BERT | {"classifier": "classifier"}, True),
    # positions embedded: tokens are the left factor
    "embedding": lambda: zoo_of("llama", {"model.embed_tokens": "model.embed_tokens"}, True),
}


def functions(zoo: Zoo, reduction: str = "sum") -> tuple[Any, Any, Any]:
    loss_fn, params = functionalize(
        zoo.model, loss=zoo.loss, reduction=reduction, targets=[f"{m}.*" for m in zoo.blocks.values()]
    )
    return loss_fn, params, with_index(zoo.batch)


LANGUAGE = ("gpt2", "llama", "bert", "embedding")

DEFINITIONS = [
    (method, name, reduction, labels)
    for method in FITS
    for name in ZOO
    for reduction in ("sum", "mean")
    for labels in ("data", "exact")
    # one backward per position and class: one method covers what a language model adds to exact labels
    if name not in LANGUAGE or labels == "data" or method == "kfac"
]


@pytest.mark.parametrize(("method", "name", "reduction", "labels"), DEFINITIONS)
def test_a_fit_is_its_definition(method: str, name: str, reduction: str, labels: str) -> None:
    for block, off in definition_errors(method, name, reduction, labels).items():
        assert off <= 1e-12, (block, off)


def definition_errors(method: str, name: str, reduction: str, labels: str) -> dict[str, float]:
    """Relative Frobenius error of every block to the explicit matrix of the method's definition."""
    zoo = ZOO[name]()
    loss_fn, params, batch = functions(zoo, reduction)
    factors = FITS[method].fit(loss_fn, params, [batch], labels=labels, progress=False, transform=BLOCKS)
    seen = kronecker.watch(zoo.model, zoo.batch, zoo.blocks, labels, zoo.kind, reduction, bias=True)
    found = {}
    for block in zoo.blocks:
        expected = kronecker.METHODS[method](seen, block)
        got = factors.blocks[block].dense()
        if name == "embedding":  # the oracle's block is [d, V]
            v, d = factors.blocks[block].shape
            got = got.reshape(v, d, v, d).permute(1, 0, 3, 2).reshape(v * d, v * d)
        found[block] = error(got, expected)
    return found


CORRECTIONS = [
    *(
        (method, name, labels)
        for method in FITS
        for name in ("mlp", "regression", "grouped_conv")
        for labels in ("data", "exact")
    ),
    ("kfac", "gpt2", "data"),
    ("kfac", "bert", "data"),
]


@pytest.mark.parametrize(("method", "name", "labels"), CORRECTIONS)
def test_corrected_eigenvalues_are_the_best_diagonal_in_the_kronecker_basis(
    method: str, name: str, labels: str
) -> None:
    zoo = ZOO[name]()
    loss_fn, params, batch = functions(zoo)
    factors = FITS[method].fit(loss_fn, params, [batch], labels=labels, transform=BLOCKS)
    corrected = hessians.ekfac.correct(factors, loss_fn, params, [batch])
    seen = kronecker.watch(zoo.model, zoo.batch, zoo.blocks, labels, zoo.kind, "sum", bias=True)
    for block in zoo.blocks:
        truth, mine = kronecker.fisher(seen, block), corrected.blocks[block]
        left, right = (basis.vectors for basis in mine.bases)
        basis = torch.kron(left, right)
        expected = torch.diag(basis.mT @ truth @ basis)
        assert error(mine.corrected.flatten(), expected) <= 1e-11
        off = [float((c.dense() - truth).norm()) for c in (mine, factors.blocks[block])]
        assert off[0] <= off[1] + 1e-13 * float(truth.norm()), (block, off)


# Where theory says that the approximation is the truth


def exact_error(
    model: nn.Module, batch: Any, kind: str, loss: str, method: str = "kfac", labels: str = "exact"
) -> float:
    blocks = {name: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    loss_fn, params = functionalize(model, loss=loss)
    factors = FITS[method].fit(loss_fn, params, [with_index(batch)], labels=labels, transform=BLOCKS)
    seen = kronecker.watch(model, batch, blocks, labels, kind, "sum", bias=True)
    return max(error(factors.blocks[b].dense(), kronecker.fisher(seen, b)) for b in blocks)


def test_kfac_is_the_fisher_of_one_linear_layer_with_squared_loss_at_any_positions() -> None:
    batch = {"input": data(5, 4, 6), "labels": data(5, 4, 3, seed=3)}
    assert exact_error(net(nn.Linear(6, 3)), batch, "squared", "squared_error") <= 1e-13


def test_kfac_is_the_fisher_of_a_deep_linear_net_with_squared_loss() -> None:
    model = net(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    batch = {"input": data(7, 6), "labels": data(7, 3, seed=3)}
    assert exact_error(model, batch, "squared", "squared_error") <= 1e-13
    positions = {"input": data(5, 4, 6), "labels": data(5, 4, 3, seed=3)}
    assert exact_error(model, positions, "squared", "squared_error") <= 1e-13


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("method", FITS)
def test_one_datum_has_exact_kronecker_factors(method: str, labels: str) -> None:
    # one document of one position: G = g x^T, whatever the network. Exact labels make S a sum of roots: Shampoo's left
    # factor is then S |x|^2 and its right one x x^T, still exact.
    batch = {"input": data(1, 5), "labels": classes(1)}
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert exact_error(model, batch, "class", "cross_entropy", method, labels) <= 1e-12


@pytest.mark.parametrize("labels", ["data", "exact"])
def test_tkfac_has_the_trace_of_the_fisher_at_one_position_per_example_and_shampoo_at_any(labels: str) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    seen = kronecker.watch(zoo.model, zoo.batch, zoo.blocks, labels, zoo.kind, "sum", bias=True)
    truth = sum(float(kronecker.fisher(seen, block).trace()) for block in zoo.blocks)
    assert hessians.tkfac.fit(loss_fn, params, [batch], labels=labels, transform=BLOCKS).trace == pytest.approx(
        truth, rel=1e-12
    )
    assert hessians.shampoo.fit(loss_fn, params, [batch], labels=labels, transform=BLOCKS).trace == pytest.approx(
        truth, rel=1e-12
    )
    zoo = ZOO["gpt2"]()
    loss_fn, params, batch = functions(zoo)
    seen = kronecker.watch(zoo.model, zoo.batch, zoo.blocks, "data", zoo.kind, "sum", bias=True)
    truth = sum(float(kronecker.fisher(seen, block).trace()) for block in zoo.blocks)
    factors = hessians.shampoo.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS)
    assert factors.trace == pytest.approx(truth, rel=1e-12)
    corrected = hessians.ekfac.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS)
    assert corrected.trace == pytest.approx(truth, rel=1e-12)


def test_autocorrelation_is_the_gram_of_its_rows_and_the_fisher_of_whole_ones() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    for transform in (BLOCKS, chain(BLOCKS, project(2)), chain(BLOCKS, project(2), unit_norm())):
        rows = per_example_grads(loss_fn, params, batch, transform=transform)
        factors = hessians.autocorrelation.fit(loss_fn, params, [batch], transform=transform)
        for block, row in rows.items():
            flat = row.flatten(1)
            assert error(factors.blocks[block].dense(), flat.mT @ flat / len(flat)) <= 1e-12
    seen = kronecker.watch(zoo.model, zoo.batch, zoo.blocks, "exact", zoo.kind, "sum", bias=True)
    factors = hessians.autocorrelation.fit(loss_fn, params, [batch], transform=BLOCKS, labels="exact")
    for block in zoo.blocks:
        assert error(factors.blocks[block].dense(), kronecker.fisher(seen, block)) <= 1e-12


def test_a_global_projection_has_one_dense_curvature() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    transform = chain(BLOCKS, project(7, target="global"))
    rows = per_example_grads(loss_fn, params, batch, transform=transform)["global"]
    factors = hessians.autocorrelation.fit(loss_fn, params, [batch], transform=transform)
    assert error(factors.blocks["global"].dense(), (rows.mT @ rows / len(rows)).double()) <= 1e-12


# Labels


def test_sampled_labels_are_data_labels_once_they_are_drawn() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    labels = Labels("sampled", seed=5)
    natural = loss_fn.natural(params, batch)
    (cotangent,) = labels.cotangents(loss_fn, natural, natural.outputs, batch["index"])
    drawn = (natural.outputs.softmax(-1) - cotangent)[:, 0].argmax(-1)
    relabelled = batch | {"labels": drawn}
    for name, fit in FITS.items():
        got = fit.fit(loss_fn, params, [batch], labels="sampled", seed=5, transform=BLOCKS)
        expected = fit.fit(loss_fn, params, [relabelled], labels="data", transform=BLOCKS)
        for block in zoo.blocks:
            assert error(got.blocks[block].dense(), expected.blocks[block].dense()) <= 1e-12, name


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_sampled_labels_estimate_the_fisher_without_bias(name: str) -> None:
    # z-scores of every entry of S, over draws: the estimate's mean is the exact expectation
    zoo = ZOO[name]()
    loss_fn, params, batch = functions(zoo)
    exact = hessians.kfac.fit(loss_fn, params, [batch], labels="exact", transform=BLOCKS)
    block = next(iter(zoo.blocks))
    samples = torch.stack(
        [
            hessians.kfac.fit(loss_fn, params, [batch], seed=s, draws=5, transform=BLOCKS)
            .blocks[block]
            .dense()
            .flatten()
            for s in range(60)
        ]
    )
    spread = samples.std(0) / len(samples) ** 0.5
    z = (samples.mean(0) - exact.blocks[block].dense().flatten()) / spread.clamp_min(1e-12)
    assert z.abs().max() < 4.5, float(z.abs().max())
    many = hessians.kfac.fit(loss_fn, params, [batch], draws=300, transform=BLOCKS).blocks[block].dense()
    assert error(many, exact.blocks[block].dense()) < 0.15


def test_other_seeds_draws_examples_and_positions_draw_other_labels() -> None:
    zoo = ZOO["gpt2"]()
    loss_fn, params, batch = functions(zoo)
    traces = {
        hessians.kfac.fit(loss_fn, params, [b], seed=seed, draws=draws, transform=BLOCKS).trace
        for b, seed, draws in (
            (batch, 0, 1),
            (batch, 1, 1),
            (batch, 0, 2),
            (batch | {"index": batch["index"] + 1}, 0, 1),
        )
    }
    assert len(traces) == 4


# Invariances


def rows_of(batch: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {key: value[index] for key, value in batch.items()}


def same(a: hessians.Factors, b: hessians.Factors, limit: float = 1e-12) -> None:
    assert a.documents == b.documents
    assert a.positions == b.positions
    for name, curvature in a.blocks.items():
        assert error(curvature.dense(), b.blocks[name].dense()) <= limit, name


@pytest.mark.parametrize("labels", ["data", "sampled"])
@pytest.mark.parametrize("method", [*FITS, "ekfac", "autocorrelation"])
@given(cut=st.integers(1, 2), order=st.permutations(range(3)), pad=st.sampled_from([0, 7]))
@settings(max_examples=4)
def test_batches_order_and_padding_do_not_matter(
    method: str, labels: str, cut: int, order: list[int], pad: int
) -> None:
    zoo = ZOO["gpt2"]()
    loss_fn, params, batch = functions(zoo)
    extra = {"transform": chain(BLOCKS, project(3)) if method == "autocorrelation" else BLOCKS}
    fit = getattr(hessians, method).fit
    whole = fit(loss_fn, params, [batch], labels=labels, **extra)
    # another order, in two batches, each cut to its own length and padded with another token
    shuffled = rows_of(batch, torch.tensor(order))
    pieces = []
    for some in (slice(0, cut), slice(cut, 3)):
        piece = rows_of(shuffled, some)
        longest = int(piece["attention_mask"].sum(1).max())
        short = {key: x[:, :longest] if x.ndim == 2 else x for key, x in piece.items()}
        ids = torch.where(short["attention_mask"].bool(), short["input_ids"], pad)
        pieces.append(short | {"input_ids": ids})
    same(fit(loss_fn, params, pieces, labels=labels, **extra), whole)


def test_left_padding_draws_the_labels_of_right_padding() -> None:
    case = next(c for c in cases.CASES if c.name == "llama_left")
    loss_fn, params = functionalize(case.make(), targets="*mlp.down_proj*")
    left = with_index(case.batch(3, 5, True))
    lengths = left["attention_mask"].sum(1)
    right = {
        key: torch.stack([row.roll(int(length)) for row, length in zip(x, lengths, strict=True)]) if x.ndim == 2 else x
        for key, x in left.items()
    }
    assert bool((right["attention_mask"][:, 0] == 1).all())
    fits = [hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS) for batch in (left, right)]
    # positions differ, rotary embeddings are relative, and their tables are float32 whatever the dtype
    same(*fits, limit=1e-6)


@pytest.mark.parametrize("method", [*FITS, "ekfac"])
def test_ranks_merge_in_any_bracketing(method: str) -> None:
    zoo = ZOO["mlp"]()
    loss_fn, params, batch = functions(zoo)
    pieces = [rows_of(batch, slice(i, i + 2)) for i in (0, 2, 4)]
    if method == "ekfac":
        fitted = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS)
        step = hessians.step(loss_fn, params, batch, hessians.ekfac.build(), number=1, factors=fitted, transform=BLOCKS)
        whole = hessians.ekfac.correct(fitted, loss_fn, params, [batch])
    else:
        step = hessians.step(loss_fn, params, batch, FITS[method].build(), transform=BLOCKS)
        whole = FITS[method].fit(loss_fn, params, [batch], transform=BLOCKS)
    sink = step.sink()
    states = [sink.update(sink.init(), piece["index"], step(piece)) for piece in pieces]
    empty = sink.init()
    for merged in (
        sink.merge(sink.merge(states[0], states[1]), states[2]),
        sink.merge(states[0], sink.merge(states[1], sink.merge(empty, states[2]))),
    ):
        same(sink.finalize(merged), whole)


def test_one_pass_can_feed_several_fits() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    steps = {
        name: hessians.step(loss_fn, params, batch, FITS[name].build(), transform=BLOCKS, labels="data")
        for name in ("kfac", "tkfac")
    }
    sinks = {name: step.sink() for name, step in steps.items()}
    wrapped = {
        name: sink._replace(update=lambda state, index, value, n=name, s=sink: s.update(state, index, value[n]))
        for name, sink in sinks.items()
    }
    found = fold(lambda b: {name: step(b) for name, step in steps.items()}, [batch], wrapped)
    for name, factors in found.items():
        same(factors, FITS[name].fit(loss_fn, params, [batch], labels="data", transform=BLOCKS))


# Blocks of other kinds


def test_heads_have_their_own_factors_and_share_what_they_see() -> None:
    zoo = ZOO["llama"]()
    loss_fn, params = functionalize(zoo.model, targets=["*layers.1.self_attn.*_proj.weight"])
    batch = with_index(zoo.batch)
    transform = chain(BLOCKS, split_heads())
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=transform)
    name = "model.layers.1.self_attn"
    seen = kronecker.watch(
        zoo.model, zoo.batch, {"q": f"{name}.q_proj", "o": f"{name}.o_proj"}, "data", "causal", "sum", True
    )
    count = zoo.model.config.num_attention_heads
    size = zoo.model.config.hidden_size // count
    for head in range(count):
        part = slice(head * size, (head + 1) * size)
        out = [{"q": one["q"]._replace(grads=[g[:, part] for g in one["q"].grads])} for one in seen]
        assert error(factors.blocks[f"{name}.q_proj.head_{head}"].dense(), kronecker.kfac(out, "q")) <= 1e-12
        into = [{"o": one["o"]._replace(inputs=one["o"].inputs[:, part])} for one in seen]
        assert error(factors.blocks[f"{name}.o_proj.head_{head}"].dense(), kronecker.kfac(into, "o")) <= 1e-12
    rights = {id(factors.blocks[f"{name}.{kind}_proj.head_{h}"].bases[1].values) for kind in "qkv" for h in range(2)}
    assert len(rights) == 1  # one input, one A, one decomposition


def test_what_has_no_factors_has_its_diagonal_and_says_so() -> None:
    zoo = ZOO["gpt2"]()
    loss_fn, params = functionalize(zoo.model, targets=["*ln_1.weight", "*c_fc.*", "*wpe*"])
    batch = with_index(zoo.batch)
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks())
    rows = per_example_grads(loss_fn, params, batch, transform=as_blocks())
    for name in ("transformer.h.0.ln_1", "transformer.wpe", "transformer.h.0.mlp.c_fc.bias"):
        expected = rows[name].flatten(1).square().mean(0)
        assert error(factors.blocks[name].eigenvalues.flatten(), expected) <= 1e-12
        assert factors.blocks[name].kind == "diagonal"
        assert name in factors.notes
        assert name in str(factors)
    assert factors.blocks["transformer.h.0.mlp.c_fc"].kind == "kronecker"
    corrected = hessians.ekfac.correct(factors, loss_fn, params, [batch])
    assert corrected.blocks["transformer.wpe"].kind == "diagonal"


def test_tied_weights_sum_the_factors_of_both_uses() -> None:
    zoo = ZOO["gpt2"]()
    loss_fn, params = functionalize(zoo.model, targets="*wte.weight")
    batch = with_index(zoo.batch)
    factors = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=as_blocks())
    both = {"in": "transformer.wte", "out": "lm_head"}
    seen = kronecker.watch(zoo.model, zoo.batch, both, "data", "causal", "sum", False)
    # as [V, d]: tokens and output gradients on the left, their gradients and the last hidden states on the right
    lefts = torch.cat([torch.cat([one["in"].inputs, one["out"].grads[0]]) for one in seen])
    rights = torch.cat([torch.cat([one["in"].grads[0], one["out"].inputs]) for one in seen])
    (curvature,) = factors.blocks.values()
    left, right = lefts.mT @ lefts / len(seen), rights.mT @ rights / len(rights)
    assert error(curvature.dense(), torch.kron(left, right)) <= 1e-12
    corrected = hessians.ekfac.correct(factors, loss_fn, params, [batch]).blocks["transformer.wte"]
    rows = per_example_grads(loss_fn, params, batch, transform=as_blocks())["transformer.wte"]
    turned = curvature.bases[0].vectors.mT @ rows @ curvature.bases[1].vectors
    assert error(corrected.corrected, turned.square().mean(0)) <= 1e-11


def test_a_long_side_is_a_diagonal() -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    whole = hessians.kfac.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS)
    short = hessians.kfac.fit(loss_fn, params, [batch], labels="data", max_side=4, transform=BLOCKS)
    assert short.blocks["0"].bases[1].vectors is None
    a = whole.blocks["0"].bases[1]
    covariance = a.vectors @ torch.diag(a.values) @ a.vectors.mT
    assert error(short.blocks["0"].bases[1].values, covariance.diag()) <= 1e-12
    assert short.blocks["0"].bases[0].vectors is not None


def test_a_module_used_twice_counts_both_uses() -> None:
    model = net(nn.Linear(4, 4))
    twice = nn.Sequential(model[0], nn.Tanh(), model[0], nn.Linear(4, 3).double())
    batch = {"input": data(5, 4), "labels": classes(5)}
    loss_fn, params = functionalize(twice, loss="cross_entropy", targets="0.*")
    seen = kronecker.watch(twice, batch, {"0": "0"}, "data", "class", "sum", True)
    for name, fit in FITS.items():
        got = fit.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS).blocks["0"].dense()
        assert error(got, kronecker.METHODS[name](seen, "0")) <= 1e-12, name
    corrected = hessians.ekfac.fit(loss_fn, params, [batch], labels="data", transform=BLOCKS).blocks["0"]
    basis = torch.kron(*(b.vectors for b in corrected.bases))
    expected = torch.diag(basis.mT @ kronecker.fisher(seen, "0") @ basis)
    assert error(corrected.corrected.flatten(), expected) <= 1e-11


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
def test_rows_serve_where_the_batched_engine_cannot(labels: str) -> None:
    # a mixture of experts runs by the loop: no layer inputs to see, but rows of any labels
    case = next(c for c in cases.CASES if c.name == "qwen2_moe")
    loss_fn, params = functionalize(case.make(), targets="*layers.0.self_attn.q_proj.weight")
    batch = with_index(case.batch(2, 4, False))
    got = hessians.shampoo.fit(loss_fn, params, [batch], labels=labels, transform=as_blocks())
    name = "model.layers.0.self_attn.q_proj"
    if labels == "sampled":
        assert got.trace > 0
        return
    seen = kronecker.watch(case.make(), case.batch(2, 4, False), {name: name}, labels, "causal", "sum", False)
    assert error(got.blocks[name].dense(), kronecker.shampoo(seen, name)) <= 1e-10
    corrected = hessians.ekfac.correct(got, loss_fn, params, [batch])
    truth = float(kronecker.fisher(seen, name).trace())
    assert corrected.trace == pytest.approx(truth, rel=1e-10)


def test_factors_are_saved_whole_and_refuse_damage(tmp_path: Any) -> None:
    zoo = mlp()
    loss_fn, params, batch = functions(zoo)
    fitted = hessians.kfac.fit(loss_fn, params, [batch], transform=BLOCKS)
    for number, factors in enumerate((fitted, hessians.ekfac.correct(fitted, loss_fn, params, [batch]))):
        path = tmp_path / f"{number}.h5"
        factors.save(path)
        loaded = hessians.load(path)
        assert str(loaded) == str(factors)
        assert loaded.digest == factors.digest
        assert loaded.transform is not None
        assert loaded.transform.fingerprint == factors.under
        data = bytearray(path.read_bytes())
        place = data.rindex(factors.blocks["0"].bases[0].values.numpy().tobytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(ValueError, match="damaged: the checksum of '0/values_0' differs"):
            hessians.load(path)


@pytest.mark.parametrize("d", [5, 767, 801])
def test_symmetric_products_are_whole_whatever_their_panels(d: int) -> None:
    # wide sides are formed by panels of their lower triangle; odd widths leave a panel of another size
    x, weight = data(3, 7, d), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    flat = x.flatten(0, 1)
    assert error(symmetric_product(flat, flat), flat.mT @ flat) <= 1e-13
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 7])
    masked = x * real[..., None]
    ones = torch.cat([masked, real[..., None].to(x)], -1)
    for w in (None, weight):
        by = ones if w is None else ones * w[:, None, None]
        expected = by.flatten(0, 1).mT @ ones.flatten(0, 1)
        assert error(Affine(masked, real).gram(w), expected) <= 1e-13
        assert error(Dense(ones).gram(w), expected) <= 1e-13
    torch.testing.assert_close(Affine(masked, real).energy(), ones.square().sum((1, 2)))


def report() -> None:
    """Print the worst errors of everything above that is exact."""
    for method in FITS:
        worst = {}
        for entry in DEFINITIONS:
            if entry[0] == method:
                errors = definition_errors(*entry)
                worst[entry[1]] = max(worst.get(entry[1], 0.0), *errors.values())
        print(f"{method:8} to its definition: " + ", ".join(f"{name} {off:.1e}" for name, off in worst.items()))
    batch = {"input": data(5, 4, 6), "labels": data(5, 4, 3, seed=3)}
    deep = net(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    one = {"input": data(1, 5), "labels": classes(1)}
    small = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    rows = {
        "K-FAC, one linear layer, squared loss, any positions": exact_error(
            net(nn.Linear(6, 3)), batch, "squared", "squared_error"
        ),
        "K-FAC, deep linear net, squared loss, any positions": exact_error(deep, batch, "squared", "squared_error"),
        **{
            f"{method}, one datum, {labels} labels": exact_error(small, one, "class", "cross_entropy", method, labels)
            for method in FITS
            for labels in ("data", "exact")
        },
    }
    for what, off in rows.items():
        print(f"{what}: {off:.1e} of the Fisher")


if __name__ == "__main__":
    report()
