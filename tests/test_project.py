"""Random projection: unbiased with the variance that theory says, the same bits everywhere, nested where promised."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from influence import (
    as_blocks,
    chain,
    down_project,
    functionalize,
    per_example_grads,
    project,
    scale_by_adam,
    unit_norm,
)
from influence.func.transform import project as room
from influence.func.transform.chain import Transform
from influence.func.transform.layout import bare_layout
from influence.func.transform.project import sketch
from influence.func.transform.scale import Moments
from tests.oracles import error

KINDS = {"rademacher": 1, "normal": 1, "sparse": 1, "sparse of 3": 3, "srht": 1}
SEEDS = 150
Rows = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kind_of(label: str) -> dict[str, Any]:
    return {"kind": label.split()[0], "signs": KINDS[label]}


def projected(grads: Rows, transform: Transform) -> Rows:
    return chain(as_blocks(), transform).apply(grads, bare_layout({name: g[0] for name, g in grads.items()}))


# Unbiased, with the spread of theory


def variance(m: Tensor, p: int, label: str) -> float:
    """Var tr(LᵀL M) over sketches L [p, size]: Σ_{i≠j} M_ij (M_ij + M_ji) / p, plus the diagonal where entries vary."""
    total = m.square().sum() + (m * m.T).sum()
    if label != "normal":
        total = total - 2 * m.diagonal().square().sum()
    width = 1 << (len(m) - 1).bit_length()
    without_replacement = (width - p) / (width - 1) if label == "srht" else 1.0
    return float(total) / p * without_replacement


def z_score(found: list[float], truth: float, variances: list[float]) -> float:
    return (sum(found) - truth * len(found)) / math.sqrt(sum(variances))


@pytest.mark.parametrize("label", KINDS)
def test_vector_products_are_unbiased(label: str) -> None:
    """A scale of 1/p for 1/√p, signs that are not balanced; and, by the spread, columns that repeat."""
    g, h, p = normal(24), normal(24, seed=1), 6
    found = []
    for seed in range(SEEDS):
        a, b = projected({"w": torch.stack([g, h])}, project(p, seed, **kind_of(label)))["w"]
        found.append(float(a @ b))
    expected = variance(torch.outer(g, h), p, label)
    assert abs(z_score(found, float(g @ h), [expected] * SEEDS)) < 4
    # The variance of a variance: kurtosis is at most about 6 here, so that its relative error is √(6 / SEEDS).
    assert torch.tensor(found).var().item() == pytest.approx(expected, rel=4 * math.sqrt(6 / SEEDS))


@pytest.mark.parametrize("label", KINDS)
def test_matrix_products_are_unbiased(label: str) -> None:
    """One sketch used for both sides, or two that depend on each other: the law of total variance then fails."""
    g, h, p = normal(12, 20), normal(12, 20, seed=1) + 0.3 * normal(12, 20), 5
    found, variances = [], []
    for seed in range(SEEDS):
        a, b = projected({"w": torch.stack([g, h])}, project(p, seed, **kind_of(label)))["w"]
        found.append(float((a * b).sum()))
        right = sketch("w", "right", p, 20, seed, **kind_of(label))
        variances.append(variance(g @ right.T @ right @ h.T, p, label) + variance(g.T @ h, p, label))
    assert abs(z_score(found, float((g * h).sum()), variances)) < 4
    assert torch.tensor(found).var().item() == pytest.approx(sum(variances) / SEEDS, rel=4 * math.sqrt(12 / SEEDS))


@pytest.mark.parametrize("label", KINDS)
def test_global_products_are_unbiased(label: str) -> None:
    """Blocks that share a sketch: the products of one block with another then do not cancel."""
    grads = {"a": normal(2, 3, 4), "b": normal(2, 9, seed=1), "c": normal(2, 3, 4, seed=2)}
    flat, p = torch.cat([g.flatten(1) for g in grads.values()], 1), 8
    found = []
    for seed in range(SEEDS):
        a, b = projected(grads, project(p, seed, target="global", **kind_of(label)))["global"]
        found.append(float(a @ b))
    expected = variance(torch.outer(*flat), p, label if label != "srht" else "rademacher")
    assert abs(z_score(found, float(flat[0] @ flat[1]), [expected] * SEEDS)) < 4
    assert torch.tensor(found).var().item() <= expected * (1 + 4 * math.sqrt(6 / SEEDS))


@pytest.mark.parametrize("label", KINDS)
def test_first_entries_of_two_blocks_do_not_coincide(label: str) -> None:
    """The first column of every Hadamard matrix is constant: without a shuffle all blocks' first entries are one."""
    p, first = 16, torch.eye(32, dtype=torch.float64)[:1]
    squares = []
    for seed in range(50):
        transform = project(p, seed, target="global", **kind_of(label))
        a, b = (projected({name: first}, transform)["global"][0] for name in ("a", "b"))
        squares.append(float((a @ b) / a.norm() / b.norm()) ** 2)
    assert sum(squares) / len(squares) < 4 / p  # 1/p in theory


# The same bits everywhere


@pytest.mark.parametrize("label", KINDS)
def test_sketch_depends_on_its_key_alone(label: str) -> None:
    """Bits that follow the default dtype, the number of threads or the global generator."""
    draw = lambda: sketch("layer", "left", 5, 33, 7, **kind_of(label))  # noqa: E731
    expected, threads, dtype = draw(), torch.get_num_threads(), torch.get_default_dtype()
    try:
        for other in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(other)
            assert torch.equal(draw(), expected)
        torch.set_num_threads(threads + 1)
        assert torch.equal(draw(), expected)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
    assert expected.dtype == torch.float64


@pytest.mark.parametrize("label", KINDS)
def test_sketch_is_drawn_on_the_cpu_whatever_the_default_device(label: str) -> None:
    """Under `torch.set_default_device("cuda")` a CPU generator cannot draw, or other bits are drawn."""
    with torch.device("meta"):
        assert sketch("layer", "left", 5, 33, 7, **kind_of(label)).device.type == "cpu"


GOLDEN = {
    "rademacher": ["-++-+++-", "+-+---++", "-----+--"],
    "normal": ["+-++-+++", "---+--+-", "-----+--"],
    "sparse": ["0+0-+000", "00-00--0", "-000000-"],
    "srht": ["++++--++", "-++-+-+-", "-+-+-++-"],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_signs(kind: str) -> None:
    """A torch whose generator changed: every index on disk would silently stop matching its queries."""
    found = sketch("layers.0", "left", 3, 8, seed=0, kind=kind).sign().int().tolist()
    assert ["".join("0+-"[x] for x in row) for row in found] == GOLDEN[kind]


@pytest.mark.parametrize("label", KINDS)
def test_every_part_of_the_key_matters(label: str) -> None:
    """Two blocks, sides or seeds with the same matrix: their errors would add up instead of averaging out."""
    keys = [("a", "left", 0), ("b", "left", 0), ("a", "right", 0), ("a", "left", 1)]
    found = [sketch(name, side, 4, 40, seed, **kind_of(label)) for name, side, seed in keys]
    assert all(not torch.equal(x, y) for i, x in enumerate(found) for y in found[:i])


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_matrices_nest(kind: str) -> None:
    """A p = 8 matrix that is not the top of the p = 16 one: stored rows could not be read at a smaller dim."""
    small, large = (sketch("w", "left", p, 33, 3, kind) * math.sqrt(p) for p in (8, 16))
    torch.testing.assert_close(small, large[:8], rtol=1e-15, atol=0)


# What each kind is


@pytest.mark.parametrize("signs", [1, 2, 5])
def test_sparse_columns_have_exactly_their_signs(signs: int) -> None:
    """Two signs in one place cancel or double; an unused column forgets a parameter."""
    matrix = sketch("w", "left", 5, 200, kind="sparse", signs=signs)
    assert (matrix != 0).sum(0).tolist() == [signs] * 200
    torch.testing.assert_close(matrix.abs().sum(0), torch.full((200,), math.sqrt(signs), dtype=torch.float64))
    assert (matrix != 0).any(1).all()
    assert 0.3 < (matrix > 0).sum() / (matrix != 0).sum() < 0.7


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_srht_rows_are_orthogonal_within_the_width(size: int) -> None:
    """A row sampled twice, or a transform that is no Hadamard matrix."""
    p = min(size, 16)
    matrix = sketch("w", "left", p, size, kind="srht")
    width = max(size, 2)
    assert set(matrix.abs().flatten().tolist()) == {1 / math.sqrt(p)}
    if size == width:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(p, dtype=torch.float64) * width / p)


@pytest.mark.parametrize("label", KINDS)
def test_global_sketch_is_linear_and_is_its_matrix(label: str) -> None:
    """A butterfly or a scatter that is not the matrix it stands for: columns of another length, or not seen at all."""
    block = room.GlobalSketch("w", 6, 0, kind_of(label)["kind"], KINDS[label])
    matrix = block(torch.eye(11, dtype=torch.float64)).T
    x = normal(4, 11)
    torch.testing.assert_close(block(x.reshape(4, 11)), x @ matrix.T)
    lengths = matrix.norm(dim=0)
    assert (lengths > 0).all()
    if label != "normal":
        torch.testing.assert_close(lengths, torch.ones(11, dtype=torch.float64))
    assert torch.linalg.matrix_rank(matrix) >= (5 if "sparse" not in label else 2)


@pytest.mark.parametrize("label", KINDS)
def test_side_within_dim_is_exact(label: str) -> None:
    """A small side mixed for nothing; a block that fits whole must come out as it is."""
    grads = {"both": normal(3, 4, 6), "left": normal(3, 4, 30), "right": normal(3, 30, 6), "vector": normal(3, 6)}
    rows = projected(grads, project(6, 2, **kind_of(label)))
    assert torch.equal(rows["both"], grads["both"])
    assert torch.equal(rows["vector"], grads["vector"])
    right = sketch("left", "right", 6, 30, 2, **kind_of(label))
    left = sketch("right", "left", 6, 30, 2, **kind_of(label))
    assert error({"x": rows["left"]}, {"x": grads["left"] @ right.T}).value <= 1e-14
    assert error({"x": rows["right"]}, {"x": left @ grads["right"]}).value <= 1e-14


def test_reshape_to_square_projects_the_squarest_view() -> None:
    """A LoRA block [2, 40] has two rows left of sixteen: seen as [8, 10] both sides are projected."""
    grads = {"a": normal(3, 2, 40), "b": normal(3, 7)}
    rows = projected(grads, project(4, reshape_to_square=True))
    left, right = sketch("a", "left", 4, 8), sketch("a", "right", 4, 10)
    assert error({"x": rows["a"]}, {"x": left @ grads["a"].reshape(3, 8, 10) @ right.T}).value <= 1e-14
    assert error({"x": rows["b"]}, {"x": grads["b"] @ sketch("b", "left", 4, 7).T}).value <= 1e-14


# Memory


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_iter(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("label", KINDS)
def test_global_projection_never_holds_dim_times_parameters(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sketch of all parameters at once: at dim 4096 it is thousands of times the model."""
    monkeypatch.setattr(room, "CHUNK", 1 << 13)
    parameters, p, n = 1 << 14, 64, 2
    with Largest() as largest:
        rows = room.GlobalSketch("w", p, 0, kind_of(label)["kind"], KINDS[label])(torch.ones(n, parameters))
    assert rows.shape == (n, p)
    assert largest.size <= 4 * parameters < p * parameters


# Reading stored rows at a smaller dim


MODEL = torch.nn.Sequential(torch.nn.Linear(20, 6), torch.nn.Tanh(), torch.nn.Linear(6, 12), torch.nn.Linear(12, 3))


def collected(transform: Transform, **options: Any) -> Rows:
    loss_fn, params = functionalize(MODEL.double(), **options)
    batch = normal(4, 20), torch.tensor([0, 1, 2, 0])
    return per_example_grads(loss_fn, params, batch, transform=transform)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("options", [{}, {"targets": "*weight"}, {"exclude": "0.*"}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_down_project_is_a_fresh_projection(kind: str, options: dict[str, Any], bias: bool) -> None:
    """Sides of 3, 6, 12 and 20 entries, read at 4 of 8: kept, drawn anew, cut; also where not all was collected."""
    wide, narrow = (collected(chain(as_blocks(bias), project(p, 1, kind)), **options) for p in (8, 4))
    for dim, expected in ((4, narrow), (8, wide)):
        assert error(down_project(wide, dim), dict(expected)).value <= 1e-14
    once, twice = (down_project(rows, 2) for rows in (wide, narrow))
    assert error(once, dict(twice)).value <= 1e-14


def test_down_projected_rows_may_be_read_again_or_say_why_not() -> None:
    """Rows that remember the dim they were stored at, and not the one they were read at, would be cut wrongly."""
    wide = collected(chain(as_blocks(), project(8)))
    half = down_project(wide, 4)
    try:
        quarter = down_project(half, 2)
    except ValueError as refusal:
        assert "stored" in str(refusal)  # noqa: PT017
    else:
        assert error(quarter, down_project(wide, 2)).value <= 1e-14


@pytest.mark.parametrize(
    ("rows", "dim", "words"),
    [
        (chain(as_blocks(), project(8, kind="sparse")), 4, "does not nest"),
        (chain(as_blocks(), project(8, kind="srht")), 4, "does not nest"),
        (chain(as_blocks(), project(8, target="global")), 4, "does not nest"),
        (chain(as_blocks(), project(8, kind="normal", target="global")), 4, "does not nest"),
        (chain(as_blocks(), project(8, reshape_to_square=True)), 4, "does not nest"),
        (chain(as_blocks(), project(8)), 16, "larger"),
        (chain(as_blocks(), project(8)), 0, "at least 1"),
        (chain(as_blocks(), project(8), unit_norm()), 4, "unit_norm"),
        (as_blocks(), 4, "not projected"),
    ],
    ids=str,
)
def test_down_project_refuses(rows: Transform, dim: int, words: str) -> None:
    """Numbers of no meaning: the corner of a sketch that does not nest, or of rows of unit length."""
    with pytest.raises(ValueError, match=words):
        down_project(collected(rows), dim)


def test_down_project_of_rows_of_unknown_origin_asks() -> None:
    """Rows read from a file know neither transform nor layout."""
    transform = chain(as_blocks(), project(8))
    rows = collected(transform)
    with pytest.raises(ValueError, match=r"stored=.*layout="):
        down_project(dict(rows), 4)
    layout = functionalize(MODEL)[0].layout
    assert error(down_project(dict(rows), 4, stored=transform, layout=layout), dict(down_project(rows, 4))).value == 0
    with pytest.raises(ValueError, match="no block of this layout"):
        down_project({"other": rows["0"]}, 4, stored=transform, layout=layout)
    with pytest.raises(ValueError, match="stored at dim 8"):
        down_project({"0": rows["0"][:, :3]}, 4, stored=transform, layout=layout)


def test_projection_after_adam_reads_the_scaled_gradient() -> None:
    """The scale applied to projected rows, which it does not fit, or after the block was dropped."""
    moments = Moments({name: p.detach().square() + 0.1 for name, p in MODEL.double().named_parameters()})
    scale = scale_by_adam(moments, eps=1e-3)
    scaled = collected(chain(as_blocks(bias=True), scale))
    rows = collected(chain(as_blocks(bias=True), scale, project(4)))
    left, right = sketch("0", "left", 4, 6), sketch("0", "right", 4, 21)
    assert error({"0": rows["0"]}, {"0": left @ scaled["0"] @ right.T}).value <= 1e-13
