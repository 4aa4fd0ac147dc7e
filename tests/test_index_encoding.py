"""How rows are stored: what survives, and what each type costs a score. `-s` prints the measured errors."""

import pytest
import torch
from torch import Tensor

from influence.index.columns import DTYPES, Columns, Encoded, Unstorable, decode, encode

COLUMNS = Columns({"a": (8, 16), "b": (32,), "c": ()})

# worst of 64 × 16 scores, |Δ⟨g, q⟩| / (‖g‖ ‖q‖), over rows of D = 4096 entries: docs/formats.md states these
SCORE_ERROR = {"float64": 0.0, "float32": 5e-9, "float16": 3e-5, "bfloat16": 3e-4, "int8": 5e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restored(rows: Tensor, dtype: str, columns: Columns = COLUMNS) -> Tensor:
    return decode(encode(rows, dtype, columns), columns)


def relative(got: Tensor, rows: Tensor) -> float:
    return float(((got.double() - rows).norm(dim=1) / rows.norm(dim=1)).max())


def score_error(got: Tensor, rows: Tensor, queries: Tensor) -> float:
    norms = rows.norm(dim=1)[:, None] * queries.norm(dim=1)
    return float(((got - rows) @ queries.mT / norms).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e12, 1e30], ids=str)
def test_small_and_large_rows_are_as_exact_as_others(dtype: str, magnitude: float) -> None:
    """Gradients of 1e-12 that float16 would flush to zero, or clamp at 65504; a scale rounded to no power of two."""
    rows = magnitude * normal(5, COLUMNS.dim)
    limit = {"float64": 0.0, "float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1e-2}[dtype]
    assert relative(restored(rows, dtype), rows) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_score_loses(dtype: str) -> None:
    """Rows of several blocks whose magnitudes differ a thousandfold, with heavy tails."""
    columns = Columns({f"layer_{i}": (32, 32) for i in range(4)})
    rows = torch.cat([10.0**-i * normal(64, 1024, seed=i) * normal(64, 1024, seed=9 + i).exp() for i in range(4)], 1)
    queries = torch.cat([10.0**-i * normal(16, 1024, seed=20 + i) for i in range(4)], 1)
    got = restored(rows, dtype, columns).double()
    worst = score_error(got, rows, queries)
    print(f"{dtype}: worst score error {worst:.1e} of the norms")
    assert worst <= SCORE_ERROR[dtype]
    # a block a thousand times smaller than the rest, queried alone
    small = columns.chosen(["layer_3"])
    alone = decode(encode(rows, dtype, columns), columns, small).double()
    worst = score_error(alone, rows[:, 3072:], queries[:, 3072:])
    print(f"{dtype}: worst score error of a small block alone {worst:.1e}")
    assert worst <= SCORE_ERROR[dtype]


def test_bfloat16_keeps_the_bits_of_a_bfloat16_row() -> None:
    """Rounded twice, or scaled into something else."""
    rows = (1e-6 * normal(4, 161)).bfloat16()
    stored = encode(rows.float(), "bfloat16", COLUMNS)
    assert torch.equal(stored.values.view(torch.int16), rows.view(torch.int16))
    assert bool((stored.scale == 1).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_powers_of_two(dtype: str) -> None:
    """Then scaling rounds nothing: a float16 row comes back bit for bit."""
    rows = (normal(50, 161) * torch.logspace(-4, 4, 50, dtype=torch.float64)[:, None]).to(getattr(torch, dtype))
    stored = encode(rows.float(), dtype, COLUMNS)
    assert stored.scale is not None
    assert bool((torch.frexp(stored.scale).mantissa == 0.5).all())
    assert torch.equal(decode(stored, COLUMNS), rows.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_zero(dtype: str) -> None:
    """A division by the largest entry, 0."""
    rows = torch.zeros(2, COLUMNS.dim)
    rows[1, 3] = 1.0
    assert torch.equal(restored(rows, dtype).float(), rows)
    assert restored(rows[:0], dtype).shape == (0, COLUMNS.dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_blocks_are_those_of_the_whole(dtype: str) -> None:
    """int8 scales of the wrong blocks."""
    rows = normal(6, COLUMNS.dim)
    stored = encode(rows, dtype, COLUMNS)
    chosen = COLUMNS.chosen(["c", "a"])
    whole = COLUMNS.split(decode(stored, COLUMNS))
    some = chosen.split(decode(stored, COLUMNS, chosen))
    assert list(some) == ["a", "c"]
    assert all(torch.equal(some[name], whole[name]) for name in some)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(dtype: str, bad: float) -> None:
    """An inf that int8 clamps to 127 steps, or NaN steps."""
    rows = normal(3, COLUMNS.dim)
    rows[1, 40] = bad
    with pytest.raises(Unstorable, match=r"row 1 of these 3 .* nonfinite='zero'") as caught:
        encode(rows, dtype, COLUMNS)
    assert caught.value.row == 1


def test_rows_beyond_float32_need_float64() -> None:
    rows = 1e40 * normal(2, COLUMNS.dim)
    with pytest.raises(Unstorable, match="Store as float64"):
        encode(rows, "float16", COLUMNS)
    assert torch.equal(restored(rows, "float64"), rows)


def test_int8_uses_all_of_its_steps() -> None:
    stored: Encoded = encode(normal(5, COLUMNS.dim), "int8", COLUMNS)
    assert stored.scale is not None
    assert stored.scale.shape == (5, 3)
    assert stored.values[:, :128].abs().amax(1).tolist() == [127] * 5


def test_columns_refuse_other_blocks() -> None:
    rows = {"a": torch.zeros(2, 8, 16), "b": torch.zeros(2, 31), "c": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"differ in .*\('b', \(31,\)\)"):
        COLUMNS.joined(rows)
    with pytest.raises(ValueError, match=r"no blocks \['d'\] here"):
        COLUMNS.chosen(["a", "d"])
    joined = COLUMNS.joined({"c": torch.ones(2), "b": torch.zeros(2, 32), "a": torch.zeros(2, 8, 16)})
    assert joined[:, -1].tolist() == [1, 1]  # by name, not in the order of the dictionary
