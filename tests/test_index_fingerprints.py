"""Fingerprints: what two sides must share, or what adds up, changed alone, is refused; what fits is accepted."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import (
    Heads,
    Moments,
    Transform,
    as_blocks,
    chain,
    eigen_whiten,
    hessians,
    one_sided,
    per_example_grads_fn,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    two_sided,
    unit_norm,
)
from influence.index import Fingerprint, FingerprintError, build, check, fingerprint_of, narrowed

D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


PARAMS = {"a.weight": normal(12, 6), "b.weight": normal(12, 12, seed=1), "c.weight": normal(3, 12, seed=2)}
BATCH = {"x": normal(9, 6, seed=3), "y": normal(9, 3, seed=4)}
MOMENTS = [Moments({name: p.square() + k for name, p in PARAMS.items()}) for k in (1, 2)]


def loss_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    hidden = (batch["x"] @ params["a.weight"].T).tanh() @ params["b.weight"].T
    return (hidden.tanh() @ params["c.weight"].T - batch["y"]).square().sum(1)


def factors(seed: int = 0) -> hessians.Factors:
    batch = {name: x + normal(*x.shape, seed=seed) for name, x in BATCH.items()}
    return hessians.autocorrelation.fit(loss_fn, PARAMS, [batch], transform=as_blocks())


FACTORS = [factors(), factors(5)]


def made(transform: Transform, params: dict[str, Tensor] = PARAMS, **how: Any) -> Fingerprint:
    plan = per_example_grads_fn(loss_fn, params, BATCH, transform=transform).plan
    return fingerprint_of(loss_fn, params, transform, plan.folded.row_shapes, layout=plan.layout, **how)


def sketch(*steps: Transform, **how: Any) -> Transform:
    return chain(as_blocks(), *steps, project(how.pop("dim", 4), **how))


def fewer(fingerprint: Fingerprint) -> Fingerprint:
    """Return the fingerprint of rows of all blocks but one."""
    known = dict(fingerprint.recorded["unprojected"])
    known.popitem()
    return replace(fingerprint, recorded={**fingerprint.recorded, "unprojected": known})


HEADS = {"b": Heads(3, 4)}
CASES: dict[str, tuple[Callable[[], Fingerprint], Callable[[], Fingerprint], str]] = {
    # what differs: query, stored, the field that the refusal names
    "weights": (
        lambda: made(sketch(), {**PARAMS, "c.weight": PARAMS["c.weight"] + 1}),
        lambda: made(sketch()),
        "weights",
    ),
    "blocks": (
        lambda: made(sketch(), {name: PARAMS[name] for name in PARAMS}, weights="w"),
        lambda: replace(made(sketch(), weights="w"), shapes={}),
        "shapes",
    ),
    "bias": (lambda: made(chain(as_blocks(bias=True), project(4))), lambda: made(sketch()), "as_blocks.bias"),
    "heads": (lambda: made(sketch(split_heads(HEADS))), lambda: made(sketch()), "split_heads"),
    "other heads": (
        lambda: made(sketch(split_heads(HEADS))),
        lambda: made(sketch(split_heads({"b": Heads(2, 6)}))),
        "split_heads.heads.b.count",
    ),
    "projection kind": (lambda: made(sketch(kind="normal")), lambda: made(sketch()), "project.kind"),
    "no projection": (lambda: made(as_blocks()), lambda: made(sketch()), "project"),
    "larger dim": (lambda: made(sketch(dim=8)), lambda: made(sketch()), "project.dim"),
    "dim that does not nest": (
        lambda: made(sketch(dim=2, kind="sparse")),
        lambda: made(sketch(dim=4, kind="sparse")),
        "project.dim",
    ),
    "dim under a norm": (
        lambda: made(sketch(dim=2)),
        lambda: made(chain(sketch(), unit_norm())),
        "unit_norm",
    ),
    "seed": (lambda: made(sketch(seed=1)), lambda: made(sketch()), "project.seed"),
    "target": (
        lambda: made(sketch(kind="sparse", target="global")),
        lambda: made(sketch(kind="sparse")),
        "project.target",
    ),
    "other blocks under one global sketch": (
        lambda: fewer(made(sketch(kind="sparse", target="global"))),
        lambda: made(sketch(kind="sparse", target="global")),
        "unprojected",
    ),
    "signs": (lambda: made(sketch(kind="sparse", signs=2)), lambda: made(sketch(kind="sparse")), "project.signs"),
    "square": (lambda: made(sketch(reshape_to_square=True)), lambda: made(sketch()), "project.reshape_to_square"),
    "metric": (lambda: made(chain(sketch(), unit_norm())), lambda: made(sketch()), "unit_norm"),
    "order": (
        lambda: made(chain(as_blocks(), unit_norm(), project(4))),
        lambda: made(chain(as_blocks(), project(4), unit_norm())),
        "order",
    ),
    "eigenbasis": (
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[0]))),
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[1]))),
        "eigen_whiten.factors",
    ),
    "half an inverse": (
        lambda: made(two_sided(FACTORS[0]).query),
        lambda: made(chain(as_blocks(), unit_norm())),
        "curvature",
    ),
    "the other half": (
        lambda: made(as_blocks()),
        lambda: made(chain(as_blocks(), precondition(FACTORS[0], power=-0.5))),
        "curvature",
    ),
    "two inverses": (lambda: made(one_sided(FACTORS[0]).query), lambda: made(one_sided(FACTORS[0]).query), "curvature"),
    "two inverses of two curvatures": (
        lambda: made(one_sided(FACTORS[0]).query),
        lambda: made(one_sided(FACTORS[1]).query),
        "curvature",
    ),
    "roots of two curvatures": (
        lambda: made(two_sided(FACTORS[0]).query),
        lambda: made(two_sided(FACTORS[1]).query),
        "curvature",
    ),
    "roots of two dampings": (
        lambda: made(two_sided(FACTORS[0], damping=0.1).query),
        lambda: made(two_sided(FACTORS[0], damping=0.2).query),
        "curvature",
    ),
    "roots of two inversions": (
        lambda: made(two_sided(FACTORS[0]).query),
        lambda: made(two_sided(FACTORS[0], inversion="tikhonov").query),
        "curvature",
    ),
    "an inverse and a half": (
        lambda: made(chain(as_blocks(), precondition(FACTORS[0], power=-1.0))),
        lambda: made(chain(as_blocks(), precondition(FACTORS[0], power=-0.5))),
        "curvature",
    ),
    "scale on the query alone": (
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
        lambda: made(sketch()),
        "scale_by_adam",
    ),
    "two moments": (
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
        lambda: made(sketch(scale_by_adam(MOMENTS[1]))),
        "scale_by_adam.moments",
    ),
    "two optimizers": (
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
        lambda: made(sketch(scale_by_adafactor(MOMENTS[0]))),
        "scale_by_adafactor",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_with_the_field_and_both_values(name: str) -> None:
    query, stored, field = (CASES[name][0](), CASES[name][1](), CASES[name][2])
    with pytest.raises(
        FingerprintError, match=rf"the query's {field} is .+, and the stored rows' is .+\(field '{field}'\)"
    ):
        check(query, stored)
    with pytest.warns(UserWarning, match=rf"forced past \d+ differences: .*'{field}': the query's"):
        check(query, stored, force=True)


FITS: dict[str, tuple[Callable[[], Fingerprint], Callable[[], Fingerprint]]] = {
    "the same": (lambda: made(sketch()), lambda: made(sketch())),
    "other data": (lambda: made(sketch(), recorded={"data": "one"}), lambda: made(sketch(), recorded={"data": "two"})),
    "another loss": (
        lambda: replace(made(sketch()), recorded={"loss": "log_odds", "reduction": "mean"}),
        lambda: made(sketch()),
    ),
    "the whole inverse on the query": (
        lambda: made(one_sided(FACTORS[0]).query),
        lambda: made(one_sided(FACTORS[0]).train),
    ),
    "the whole inverse on the training side": (
        lambda: made(one_sided(FACTORS[0]).train),
        lambda: made(one_sided(FACTORS[0]).query),
    ),
    "the whole inverse before a projection": (
        lambda: made(one_sided(FACTORS[0], dim=4).query),
        lambda: made(one_sided(FACTORS[0], dim=4).train),
    ),
    "half on both": (lambda: made(two_sided(FACTORS[0]).query), lambda: made(two_sided(FACTORS[0]).train)),
    "three tenths and seven": (
        lambda: made(chain(as_blocks(), precondition(FACTORS[0], power=-0.3))),
        lambda: made(chain(as_blocks(), precondition(FACTORS[0], power=-0.7))),
    ),
    "one eigenbasis": (
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[0]))),
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[0]))),
    ),
    "no curvature in one eigenbasis": (
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[0], power=-1.0))),
        lambda: made(chain(as_blocks(), eigen_whiten(FACTORS[0], power=0.0))),
    ),
    "one scale on both": (
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
    ),
    "a scale on the training side alone (LESS)": (
        lambda: made(sketch()),
        lambda: made(sketch(scale_by_adam(MOMENTS[0]))),
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_accepted(name: str) -> None:
    query, stored = (side() for side in FITS[name])
    assert check(query, stored) is None


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("before", [(), (scale_by_adam(MOMENTS[0]),)], ids=["plain", "scaled"])
def test_a_smaller_dim_that_nests_is_read_from_the_stored_rows(kind: str, before: tuple[Transform, ...]) -> None:
    """A side of exactly the stored dim, which was kept exact and has to be projected now; one smaller than both."""
    batches = [{k: v[i : i + 4] for k, v in BATCH.items()} for i in (0, 4, 8)]
    for large, small in ((12, 4), (12, 6), (8, 3), (6, 2)):
        wide = build(loss_fn, PARAMS, batches, dtype="float64", transform=sketch(*before, dim=large, kind=kind))
        expected = build(loss_fn, PARAMS, batches, dtype="float64", transform=sketch(*before, dim=small, kind=kind))
        dim = check(expected.fingerprint, wide.fingerprint)
        assert dim == small
        index = narrowed(wide, dim)
        assert check(expected.fingerprint, index.fingerprint) is None
        assert index.blocks == expected.blocks
        torch.testing.assert_close(index.matrix(), expected.matrix(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(index.matrix(1, 5, ["c"]), expected.matrix(1, 5, ["c"]), rtol=1e-12, atol=1e-12)
        assert torch.equal(index.loss, wide.loss)
        assert [len(piece.values) for piece in index.pieces(4)] == [4, 4, 1]


def test_what_cannot_be_narrowed_says_why() -> None:
    def of(transform: Transform) -> Any:
        return build(loss_fn, PARAMS, [BATCH], transform=transform)

    with pytest.raises(ValueError, match=r"stored at dim 4, and is read at a smaller one from 1 on; got 4"):
        narrowed(of(sketch()), 4)
    with pytest.raises(ValueError, match=r"only rademacher and normal projections per block nest"):
        narrowed(of(sketch(kind="srht")), 2)
    with pytest.raises(ValueError, match="something followed the projection"):
        narrowed(of(chain(sketch(), unit_norm())), 2)


def test_fingerprints_survive_json_and_name_the_first_thing_first() -> None:
    for transform in (sketch(scale_by_adam(MOMENTS[0])), two_sided(FACTORS[0]).query, sketch(split_heads(HEADS))):
        found = made(transform, recorded={"data": ("a", 1)})
        again = Fingerprint.from_json(json.loads(json.dumps(found.json())))
        assert again == found
        assert again.digest == found.digest


def test_several_differences_are_all_said_when_forced() -> None:
    with pytest.warns(UserWarning, match="forced past 2 differences") as caught:
        check(made(sketch(seed=1, kind="normal")), made(sketch()), force=True)
    (said,) = (str(one.message) for one in caught)
    assert "'project.seed'" in said
    assert "'project.kind'" in said
