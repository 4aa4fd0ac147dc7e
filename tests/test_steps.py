"""Steps declare themselves: each step of the table is what it declares, and no list of names stands elsewhere.

Nothing here names a step to cover it: a new line of the table is covered as soon as it is there.
"""

import ast
import contextlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence
from influence import (
    Heads,
    Moments,
    Transform,
    as_blocks,
    chain,
    functionalize,
    hessians,
    per_example_grads,
    precondition,
    scale_by_adam,
    split_heads,
    unit_norm,
)
from influence.func.fingerprint import differences
from influence.func.transform.chain import CollectedRows, Stage, Step
from influence.func.transform.folding import start, with_sides
from influence.func.transform.layout import Layout, ParamLayout
from influence.func.transform.steps import FACTORIES, STEPS, written_step
from influence.index import FingerprintError, check, fingerprint_of, rebuild, recipe
from influence.pipelines.frame.configs import TransformConfig
from influence.pipelines.frame.prepare import transform_of

D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def world() -> tuple[Any, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss_fn, params = functionalize(net, loss="squared_error")
    return loss_fn, params, (normal(5, 4, seed=1), normal(5, 3, seed=2))


LOSS, PARAMS, BATCH = world()
RAW = per_example_grads(LOSS, PARAMS, BATCH, engine="loop")
MOMENTS = [Moments({name: p.square() + k for name, p in PARAMS.items()}) for k in (1.0, 2.0)]
BLOCKS = next(make() for make in FACTORIES if not {*inspect.signature(make).parameters} - {"bias"})


def fitted(under: Transform, seed: int = 0) -> hessians.Factors:
    batch = tuple(x + normal(*x.shape, seed=seed) for x in BATCH)
    return hessians.autocorrelation.fit(LOSS, PARAMS, [batch], transform=under, labels="data", progress=False)


FACTORS = [fitted(BLOCKS), fitted(BLOCKS, 5)]
GIVEN: dict[str, tuple[Any, Any]] = {
    "factors": (FACTORS[0], FACTORS[1]),
    "moments": (MOMENTS[0], MOMENTS[1]),
    "heads": ({"0": Heads(2, 3)}, {"0": Heads(3, 2)}),
    "dim": (3, 4),
}
"""Values of parameters which have no default, or one that the world here has no use for, by the parameter's name."""


def arguments(make: Callable[..., Transform]) -> dict[str, Any]:
    return {name: GIVEN[name][0] for name in inspect.signature(make).parameters if name in GIVEN}


def made(make: Callable[..., Transform], **changed: Any) -> Transform:
    """Return a chain of the step alone, behind blocks where it needs them."""
    own = make(**{**arguments(make), **changed})
    return chain(BLOCKS, own) if own.steps[0].needs_blocks else own


def others(make: Callable[..., Transform], name: str, parameter: inspect.Parameter) -> list[Any]:
    """Return other values of an argument; of words those that the docstring has in quotes."""
    if name in GIVEN:
        return [GIVEN[name][1]]
    default = parameter.default
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int | float):
        return [default + 1, *([default * 0.9] if isinstance(default, float) else [])]
    words = re.findall(r'"(\w+)"', f"{inspect.getdoc(make)}")
    return [word for word in words if word != default]


def alike(one: Any, other: Any) -> bool:
    """Whether two values are one; those of tensors are if they are the same object."""
    return one is other if isinstance(one, tuple) else type(one) is type(other) and one == other


def variants(make: Callable[..., Transform]) -> Iterator[tuple[str, Transform, Transform]]:
    """Yield, for each argument alone, a transform and one in which it is another; what is refused is left out."""
    parameters = inspect.signature(make).parameters
    for name, parameter in parameters.items():
        for more in ({}, *([{"kind": "sparse"}] if "kind" in parameters else [])):
            before = made(make, **more)
            for value in others(make, name, parameter):
                if not alike(before.steps[-1].settings.get(name), value):
                    with contextlib.suppress(ValueError):
                        yield name, before, made(make, **{**more, name: value})


@pytest.mark.parametrize("name", STEPS)
def test_folded_is_unfolded(name: str) -> None:
    transform = made(STEPS[name])
    folded = per_example_grads(LOSS, PARAMS, BATCH, transform=transform)
    unfolded = transform.apply(RAW, LOSS.layout)
    assert list(folded) == list(unfolded)
    for block, row in unfolded.items():
        torch.testing.assert_close(folded[block], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_the_fingerprint_is_stable_and_changed_by_every_setting(name: str) -> None:
    make = STEPS[name]
    transform = made(make)
    assert transform.fingerprint == made(make).fingerprint
    assert transform.steps[-1].name == name
    changed = set()
    for argument, before, after in variants(make):
        if argument in before.steps[-1].settings or argument in after.steps[-1].settings:
            assert before.fingerprint != after.fingerprint, argument
            assert list(differences(recipe(before), recipe(after))), argument
            changed.add(argument)
    assert changed >= transform.steps[-1].settings.keys()


@pytest.mark.parametrize("name", STEPS)
def test_its_json_makes_it_again(name: str) -> None:
    for transform in (made(STEPS[name]), *(after for _, _, after in variants(STEPS[name]))):
        steps = json.loads(json.dumps(recipe(transform, LOSS.layout)))
        moments = [s.settings["moments"] for s in transform.steps if "moments" in s.settings] or [None]
        again = rebuild(steps, FACTORS, moments[0])
        assert again.fingerprint == transform.fingerprint
        assert repr(again) == repr(transform)


@pytest.mark.parametrize("name", STEPS)
def test_two_sides_agree_as_the_step_declares(name: str) -> None:
    def side(transform: Transform) -> Any:
        shapes = transform.bind(LOSS.layout).row_shapes
        return fingerprint_of(None, None, transform, shapes, weights="w", layout=LOSS.layout)

    step = made(STEPS[name]).steps[-1]
    for argument, before, after in variants(STEPS[name]):
        if argument not in {*before.steps[-1].settings, *after.steps[-1].settings}:
            continue
        if step.sides == "train only":
            assert check(side(BLOCKS), side(chain(BLOCKS, *(Transform((s,)) for s in after.steps)))) is None
        if argument in ("power", "dim"):  # powers add up; a smaller dim may nest
            continue
        with pytest.raises(FingerprintError, match=f"{name}|curvature|shapes|order"):
            check(side(after), side(before))


@pytest.mark.parametrize(("first", "second"), [*itertools.product(STEPS, STEPS)])
def test_what_chain_accepts_works(first: str, second: str) -> None:
    """An order is refused by the declarations, or serves: nothing is accepted and dies of a shape."""
    one, two = (STEPS[name](**arguments(STEPS[name])) for name in (first, second))
    before = Transform() if Stage.BLOCKS in (one.steps[0].stage, two.steps[0].stage) else BLOCKS
    try:
        both = chain(before, one, two)
    except ValueError as error:
        assert f"{two} cannot follow {one}: " in str(error)  # noqa: PT017
        assert one.steps[0].stage >= two.steps[0].stage or one.steps[0].kind == two.steps[0].kind
        return
    if "factors" in arguments(STEPS[second]):
        both = chain(before, one, STEPS[second](**{**arguments(STEPS[second]), "factors": fitted(chain(before, one))}))
    folded = per_example_grads(LOSS, PARAMS, BATCH, transform=both)
    for block, row in both.apply(RAW, LOSS.layout).items():
        torch.testing.assert_close(folded[block], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_it_is_written_as_it_prints(name: str) -> None:
    step = made(STEPS[name]).steps[-1]
    if {"factors", "moments"} & step.settings.keys():
        with pytest.raises(ValueError, match=f"{name} needs tensors, which cannot be written"):
            written_step(f"{name}('kfac:0123')")
        return
    assert written_step(repr(step)).fingerprint == Transform((step,)).fingerprint
    if step.stage is not Stage.BLOCKS:
        config = TransformConfig(steps=(repr(step),), projection_dim=0)
        assert transform_of(config).fingerprint == chain(BLOCKS, Transform((step,))).fingerprint


def test_what_is_no_step_says_what_to_write() -> None:
    for text, said in {
        "project(8": "is no step: write it as name",
        "project(dim=open('x'))": "is no step: write it as name",
        "unit_normal()": "did you mean unit_norm",
        "project(size=8)": "does not fit project: .*'size'",
    }.items():
        with pytest.raises(ValueError, match=said):
            written_step(text)


def test_heads_are_not_split_after_curvature() -> None:
    heads = split_heads({"0": Heads(2, 3)})
    with pytest.raises(
        ValueError, match=r"split_heads\(.* cannot follow precondition\(.*: heads are slices of untouched"
    ):
        chain(as_blocks(), precondition(FACTORS[0]), heads)
    rows = per_example_grads(LOSS, PARAMS, BATCH, transform=chain(as_blocks(), precondition(FACTORS[0])))
    with pytest.raises(ValueError, match="cannot follow precondition"):
        heads.apply(rows, LOSS.layout)


def scale_inputs(factor: float, **declared: Any) -> Transform:
    def sides(block: Any, part: Any) -> tuple[Tensor | None, Tensor | None]:
        return None, None if part.right is None else torch.full((block.shape[1],), factor, dtype=D)

    step = Step("scale_inputs", {"factor": factor}, lambda folded: with_sides(folded, sides), **declared)
    return Transform((step,))


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_are_made_of_raw_parameters_alone(bias: bool) -> None:
    """A scale of the inputs before them would leave the bias's column as it was."""
    for before in (scale_inputs(2.0), scale_by_adam(MOMENTS[0]), unit_norm()):
        with pytest.raises(ValueError, match=r"as_blocks\(.* cannot follow .*: blocks are made from parameters"):
            chain(before, as_blocks(bias))
    touched = scale_inputs(2.0).extend(start(LOSS.layout))
    with pytest.raises(ValueError, match=r"made from untouched parameters: put as_blocks\(\) first"):
        as_blocks(bias).extend(touched)
    with pytest.raises(ValueError, match="heads are slices of untouched blocks"):
        split_heads({"0": Heads(2, 3)}).extend(chain(as_blocks(bias), scale_inputs(2.0)).bind(LOSS.layout))
    both = per_example_grads(LOSS, PARAMS, BATCH, transform=chain(as_blocks(bias), scale_inputs(2.0)))
    plain = per_example_grads(LOSS, PARAMS, BATCH, transform=as_blocks(bias))
    assert all(torch.equal(both[name], 2 * row if row.ndim == 3 else row) for name, row in plain.items())


def test_an_optimizer_scales_parameters_and_blocks() -> None:
    plain = scale_by_adam(MOMENTS[0]).apply(RAW, LOSS.layout)
    blocks = chain(as_blocks(bias=True), scale_by_adam(MOMENTS[0])).apply(RAW, LOSS.layout)
    for name in ("0", "2"):
        expected = torch.cat([plain[f"{name}.weight"], plain[f"{name}.bias"][..., None]], -1)
        torch.testing.assert_close(blocks[name], expected)


def test_one_step_of_a_kind_whatever_its_name() -> None:
    with pytest.raises(ValueError, match="rows are normalised once; leave one out"):
        chain(unit_norm(), Transform((Step("other_norm", {}, lambda folded: folded, kind="norm"),)))
    with pytest.raises(ValueError, match="one gradient is scaled once; leave one out"):
        chain(scale_by_adam(MOMENTS[0]), scale_inputs(1.0, stage=Stage.SCALE, kind="scale"))


def test_a_changed_fused_order_is_another_fingerprint() -> None:
    """The family decides the heads; what it decided is stored, so another decision is refused by name."""

    def of(fused: str, heads: Any = None) -> Any:
        fields = {"attn.weight": ParamLayout((12, 4), D, family="linear", heads=Heads(2, 2, fused=fused))}
        layout, transform = Layout(fields), chain(as_blocks(), split_heads(heads))
        shapes = transform.bind(layout).row_shapes
        return fingerprint_of(None, None, transform, shapes, weights="w", layout=layout)

    one, other = of("concatenated"), of("interleaved")
    assert one.shapes == other.shapes
    assert one.digest != other.digest
    said = r"the query's split_heads.heads.attn.fused is 'interleaved', and the stored rows' is 'concatenated'"
    with pytest.raises(FingerprintError, match=said):
        check(other, one)
    assert check(of("interleaved", {"at*": Heads(2, 2, fused="concatenated")}), one) is None  # the same, spelled out
    assert rebuild(one.steps).steps[1].settings == {"heads": None}


def test_rows_remember_steps_and_refuse_what_cannot_follow() -> None:
    rows = per_example_grads(LOSS, PARAMS, BATCH, transform=chain(as_blocks(), unit_norm()))
    assert isinstance(rows, CollectedRows)
    with pytest.raises(ValueError, match=r"scale_by_adam\(.* cannot follow unit_norm.*not unit vectors"):
        scale_by_adam(MOMENTS[0]).apply(rows, LOSS.layout)


LIBRARY = Path(influence.__file__).parent
PUBLIC = "__init__.py"
"""What a package exports is listed by name."""


def names_of_steps(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.lower().endswith("step"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def strings(node: ast.AST, inside: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield every string constant, the function that it stands in (or the constant), and its line."""
    if isinstance(node, ast.FunctionDef | ast.Assign):
        inside = inside or (node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.targets[0]))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, inside, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from strings(child, inside)


def test_no_list_of_step_names_stands_outside_the_table() -> None:
    """A step's name stands in the function that makes it, and nowhere else."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(LIBRARY.rglob("*.py")) if path.name != PUBLIC}
    names = {*STEPS, *(name for tree in trees.values() for name in names_of_steps(tree))}
    assert names > {*STEPS}  # those that are in no table too
    found = [
        f"{path.relative_to(LIBRARY)}:{line}: {text!r}"
        for path, tree in trees.items()
        for text, inside, line in strings(tree)
        if text in names and inside != text
    ]
    assert not found, found
