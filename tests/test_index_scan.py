"""Scans against the dense float64 matrix of scores, for every way rows can be stored."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from influence.func import top
from influence.index import scan
from influence.index.columns import Chosen, Piece, choose

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2), "d": (6,)}
D = 27
DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "int8 by row")


def rows_of(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D, generator=draw, dtype=torch.float64)
    return rows * torch.rand(n, 1, generator=draw, dtype=torch.float64) * 1e-6


def stored(rows: Tensor, dtype: str, at_once: int) -> list[Piece]:
    """Rows as each dtype keeps them, cut into pieces."""
    scale = None
    if dtype in ("float16", "bfloat16"):
        scale = rows.abs().amax(1, keepdim=True).log2().ceil().exp2().float()
        values = (rows / scale).to(getattr(torch, dtype))
        values = values.view(torch.uint16) if dtype == "bfloat16" else values
    elif dtype.startswith("int8"):
        ends = [12, 17, 21, 27] if dtype == "int8" else [27]
        parts = [rows[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]
        scale = torch.stack([part.abs().amax(1) / 127 for part in parts], 1).float()
        values = torch.cat([(p / s[:, None]).round() for p, s in zip(parts, scale.mT, strict=True)], 1).to(torch.int8)
    else:
        values = rows.to(getattr(torch, dtype))
    cut = [slice(b, b + at_once) for b in range(0, len(rows), at_once)]
    return [Piece(s.start, values[s], None if scale is None else scale[s]) for s in cut]


def bound(queries: Tensor, rows: Tensor, dtype: str) -> Tensor:
    """How far a score can be off: half a unit in the last place of every entry."""
    q, g = queries.abs(), rows.abs()
    if dtype == "int8":
        ends = [0, 12, 17, 21, 27]
        parts = [slice(a, b) for a, b in pairwise(ends)]
        return torch.stack([q[:, p].sum(1)[:, None] * (g[:, p].amax(1) / 253)[None] for p in parts]).sum(0)
    if dtype == "int8 by row":
        return q.sum(1)[:, None] * (g.amax(1) / 253)[None]
    unit = {"float64": 2**-50, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    # an entry 2^-14 below the largest of its row is subnormal in float16: its last place is 2^-24 of the scale
    floor = 2**-24 * g.amax(1) * 2 if dtype == "float16" else g.amax(1) * 0
    return (q @ g.mT) * unit + q.sum(1)[:, None] * floor[None]


def all_columns() -> Chosen:
    return choose(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [1, 7, 64, 1000])
def test_scores_are_within_the_rounding_of_the_stored_dtype(dtype: str, at_once: int) -> None:
    rows, queries = rows_of(100), rows_of(5, seed=1)
    found = scan.scores(stored(rows, dtype, at_once), queries, all_columns())
    assert ((found - queries @ rows.mT).abs() <= bound(queries, rows, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_top_is_that_of_all_scores(dtype: str, k: int, reverse: bool) -> None:
    rows, queries = rows_of(100), rows_of(5, seed=1)
    every = scan.scores(stored(rows, dtype, 100), queries, all_columns())
    expected = every.sort(dim=1, descending=not reverse, stable=True)
    for at_once in (1, 7, 100):
        found = scan.scan(stored(rows, dtype, at_once), queries, all_columns(), k, reverse)
        torch.testing.assert_close(found.values, expected.values[:, :k], rtol=1e-12, atol=0)
        assert found.indices.equal(expected.indices[:, :k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [["a"], ["d"], ["a", "c"], ["c", "b"], ["d", "a"], ["[ab]", "d"]])
def test_a_subset_of_blocks_is_the_product_over_their_columns(dtype: str, blocks: list[str]) -> None:
    rows, queries = rows_of(50), rows_of(3, seed=1)
    places = {"a": (0, 12), "b": (12, 17), "c": (17, 21), "d": (21, 27)}
    names = ["a", "b", "d"] if "[ab]" in blocks else sorted(blocks)
    keep = torch.cat([torch.arange(*places[name]) for name in names])
    columns = choose(SHAPES, blocks)
    pieces = stored(rows, dtype, 7)
    found = scan.scores(pieces, queries[:, keep], columns)
    masked = torch.zeros_like(queries)
    masked[:, keep] = queries[:, keep]
    torch.testing.assert_close(found, scan.scores(pieces, masked, all_columns()), rtol=1e-12, atol=1e-25)
    parts = scan.block_scores(pieces, queries[:, keep], columns)
    assert list(parts) == names
    torch.testing.assert_close(sum(parts.values()), found, rtol=1e-12, atol=1e-25)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_document_and_squared_norms(dtype: str) -> None:
    rows, queries = rows_of(60), rows_of(3, seed=1)
    pieces = stored(rows, dtype, 7)
    groups = torch.arange(60) * 7 % 11
    every = scan.scores(pieces, queries, all_columns())
    expected = torch.stack([every[:, groups == g].sum(1) for g in range(12)], 1)
    found = scan.summed(pieces, queries, all_columns(), groups, 12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-25)
    assert (found[:, 11] == 0).all()
    decoded = torch.cat([p.clone() * (1 if s is None else s) for p, s in decoded_pieces(pieces)])
    norms = scan.squared_norms(pieces, all_columns(), torch.float64)
    torch.testing.assert_close(norms, decoded.square().sum(1), rtol=1e-12, atol=0)


def decoded_pieces(pieces: list[Piece]) -> list[tuple[Tensor, Tensor | None]]:
    found = scan.all_decoded(pieces, all_columns(), torch.float64, torch.device("cpu"))
    return [(rows.clone(), scale) for rows, scale in found]


def test_products_of_half_precision_are_taken_in_float32() -> None:
    # 4096 + 1 is 4096 in float16, and 300² overflows it
    rows = torch.tensor([[300.0] * D, [1.0] * D]).half()
    found = scan.scores([Piece(0, rows, None)], torch.full((1, D), 300.0), all_columns())
    assert found.tolist() == [[300.0 * 300 * D, 300.0 * D]]


@pytest.mark.parametrize("at_once", [1, 2, 5, 40])
def test_ties_are_broken_by_row(at_once: int) -> None:
    draw = torch.Generator().manual_seed(3)
    every = torch.randint(0, 4, (6, 40), generator=draw).double()
    for k in (1, 2, 5, 17, 40):
        state = top.start(every, k)
        for begin in range(0, 40, at_once):
            state = top.update(state, every[:, begin : begin + at_once], begin)
        expected = every.sort(dim=1, descending=True, stable=True)
        assert state.values.equal(expected.values[:, :k])
        assert state.indices.equal(expected.indices[:, :k])


def test_tops_merge_in_any_order_and_bracketing() -> None:
    every = torch.randint(0, 5, (4, 30), generator=torch.Generator().manual_seed(4)).double()
    parts = [top.update(top.start(every, 7), every[:, b : b + 10], b) for b in (0, 10, 20)]
    whole = top.update(top.start(every, 7), every, 0)
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for merged in (
            top.merge(top.merge(parts[a], parts[b]), parts[c]),
            top.merge(parts[a], top.merge(parts[b], parts[c])),
        ):
            assert merged.values.equal(whole.values)
            assert merged.indices.equal(whole.indices)
    few = top.update(top.start(every, 7), every[:, :2], 0)
    assert few.indices[:, 2:].eq(-1).all()
    assert top.merge(few, top.update(top.start(every, 7), every[:, 2:], 2)).indices.equal(whole.indices)


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = rows_of(20)
    rows[13, 2] = float("nan")
    with pytest.raises(ValueError, match="row 13 is not finite"):
        scan.scan(stored(rows, "float64", 6), rows_of(2, seed=1), all_columns(), 3)


def test_nothing_is_copied_when_rows_are_wide_and_whole() -> None:
    rows = rows_of(20)
    (piece,) = stored(rows, "float64", 20)
    ((seen, _),) = scan.all_decoded([piece], all_columns(), torch.float64, torch.device("cpu"))
    assert seen.data_ptr() == piece.values.data_ptr()
    ((seen, _),) = scan.all_decoded([piece], choose(SHAPES, ["b", "c"]), torch.float64, torch.device("cpu"))
    assert seen.data_ptr() == piece.values[:, 12:].data_ptr()


def test_names_of_blocks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"'aa' matches none of the index's 4 blocks; near misses: a"):
        choose(SHAPES, ["aa"])
    with pytest.raises(ValueError, match=r"blocks=\[\] looks at nothing"):
        choose(SHAPES, [])
    rows = {name: torch.zeros(2, *shape) for name, shape in SHAPES.items()}
    columns = all_columns()
    assert all(back.equal(rows[name]) for name, back in columns.rows(columns.matrix(rows)).items())
    with pytest.raises(ValueError, match=r"lack 1 of the 4 blocks that are looked at \(c\)"):
        columns.matrix({name: row for name, row in rows.items() if name != "c"})
    with pytest.raises(ValueError, match=r"'a' have shape \[4, 3\]; the index has \[3, 4\]"):
        columns.matrix(rows | {"a": torch.zeros(2, 4, 3)})
