"""What rows are, and whether two sides of a score fit.

Sides compare step by step, as the steps declare it. Most have the same settings on both sides. Powers of one curvature
add up to 0 or −1; an optimizer's scale is on both sides, on neither, or on the training side alone (LESS). A query may
be projected to a smaller dim, where projections nest. It may measure another loss, under another name or other
settings; a loss which says that it is the same has to say the same of the same examples.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from influence.func.fingerprint import differences, weights_hash
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.loss.described import differing
from influence.func.loss.trial import Trial, again, apart, can_repeat, tried
from influence.func.transform.chain import CollectedRows, Transform
from influence.func.transform.layout import Layout
from influence.func.transform.nested import nests, projection, unprojected
from influence.index.recipe import StepFacts, plain, recipe
from influence.store.schema import conform
from influence.types import Batch, LossFn, Params


@dataclass(frozen=True)
class Fingerprint:
    """What rows are, as fields that JSON can write.

    Attributes:
        weights: hash of every number that the model computes with.
        function: what it makes of them, as its settings say it; `None` of a function by hand.
        shapes: shape of each block's row.
        steps: what was made of the gradients.
        recorded: what else is known: data, loss, reduction, and what the function says of a few examples (`trial`).
        live: the loss function and its parameters, where they are at hand: they can say what they say of the examples
            that another side was tried on. No part of what is written.
    """

    weights: str | None = None
    function: Mapping[str, Any] | None = None
    shapes: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[StepFacts, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    live: tuple[LossFn, Params] | None = field(default=None, compare=False, repr=False)

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON writes them."""
        steps = [step._asdict() for step in self.steps]
        fields = (self.weights, self.function, self.shapes, steps, self.recorded)
        return dict(zip(FingerprintFacts._fields, plain(fields), strict=True))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], live: tuple[LossFn, Params] | None = None) -> "Fingerprint":
        """Return a fingerprint from its JSON, and from the function where it is at hand."""
        held = conform(fields, FingerprintFacts, "a fingerprint")
        if "trial" in held.recorded:
            conform(held.recorded["trial"], Trial, "the trial of a fingerprint")
        return cls(held.weights, held.function, held.shapes, held.steps, held.recorded, live)

    @property
    def digest(self) -> str:
        """A hash of every field."""
        return hash_of(self.json())

    @property
    def sketch(self) -> StepFacts | None:
        """The projection, if there is one."""
        return next((step for step in self.steps if step.kind == "sketch"), None)

    @property
    def dim(self) -> int | None:
        """The projection's dim, if there is one."""
        return None if self.sketch is None else self.sketch.settings.get("dim")

    @property
    def cosine(self) -> bool:
        """Whether rows have unit norm, so that inner products are cosines."""
        return any(step.kind == "norm" for step in self.steps)

    @property
    def powers(self) -> list[StepFacts]:
        """The steps that apply a power of a curvature."""
        return [step for step in self.steps if step.kind == "curvature"]

    def at_dim(self, dim: int, shapes: Mapping[str, Any]) -> "Fingerprint":
        """Return the fingerprint of the same rows at another dim of their projection."""
        steps = tuple(
            step._replace(settings={**step.settings, "dim": dim}) if step is self.sketch else step
            for step in self.steps
        )
        return replace(self, steps=steps, shapes=plain(shapes))


class FingerprintFacts(NamedTuple):
    """A fingerprint as JSON holds it."""

    weights: str | None
    function: dict[str, Any] | None
    shapes: dict[str, list[int]]
    steps: tuple[StepFacts, ...]
    recorded: dict[str, Any]


def provenance(
    loss_fn: LossFn, params: Params, rows: CollectedRows, recorded: Mapping[str, Any] | None = None
) -> Fingerprint:
    """Return the fingerprint of rows that come straight from `per_example_grads`, for a search.

    Args:
        loss_fn: the loss function they were made by.
        params: the parameters they were made at, as they were then.
        rows: the rows.
        recorded: anything else to record.

    Returns:
        The fingerprint.
    """
    shapes = {name: tuple(row.shape[1:]) for name, row in rows.items()}
    return fingerprint_of(loss_fn, params, rows.transform, shapes, recorded=recorded, layout=rows.layout)


def fingerprint_of(
    loss_fn: LossFn | None,
    params: Params | None,
    transform: Transform,
    shapes: Mapping[str, tuple[int, ...]],
    weights: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    batch: Batch = None,
) -> Fingerprint:
    """Return the fingerprint of rows.

    Args:
        loss_fn: the loss function; what it says of itself is recorded.
        params: its parameters, which are hashed together with those it closes over, unless `weights` is given.
        transform: what was made of the gradients.
        shapes: each row's shape by block: `rows_of.plan.folded.row_shapes`.
        weights: the hash of the weights, if it is known: `influence.func.fingerprint.weights_hash(loss_fn, params)`.
        recorded: anything else to record, as `{"data": "wikitext"}`.
        layout: the parameters' layout, `rows_of.plan.layout`; without it projected rows of a loss that has none cannot
            be read at a smaller dim.
        batch: examples for a trial, of rows that are to be stored: the first batch. A language model under a loss of
            ours is tried on made-up token ids, and of anything else up to four examples are kept in the fingerprint if
            they are small.

    Returns:
        The fingerprint.

    Example:
        >>> from influence import as_blocks, chain, project
        >>> found = fingerprint_of(None, None, chain(as_blocks(), project(8)), {"w": (8, 8)}, weights="abc")
        >>> found.dim, found.cosine, [step.name for step in found.steps]
        (8, False, ['as_blocks', 'project'])
    """
    if weights is None:
        weights = weights_hash(loss_fn, params or {})
    said = {"loss": getattr(loss_fn, "name", getattr(loss_fn, "__qualname__", type(loss_fn).__name__))}
    said["reduction"] = getattr(loss_fn, "reduction", "own")
    said["transform"] = repr(transform)
    settings = getattr(loss_fn, "settings", None)
    if settings is not None:
        said |= {"loss_settings": settings, "params": list(params or ())}
    if layout is None and params is not None and getattr(loss_fn, "layout", None) is not None:
        layout = loss_fn.layout.restrict(params)  # type: ignore[union-attr]
    if projection(transform) is not None and layout is not None:
        said["unprojected"] = unprojected(transform, layout)
    live = None if loss_fn is None or params is None else (loss_fn, params)
    if "reference" not in (recorded or {}) and (reference := getattr(loss_fn, "reference", None)) is not None:
        said["reference"] = reference
    if live is not None and batch is not None:
        said["trial"] = tried(*live, batch)
    function, steps = getattr(loss_fn, "function", None), tuple(StepFacts(**s) for s in recipe(transform, layout))
    return Fingerprint(weights, plain(function), plain(shapes), steps, plain({**said, **(recorded or {})}), live)


WHY_ELSE = "inner products of such rows mean nothing. Collect the query as the index was collected, or build another"
WHY = {
    "weights": "gradients of different weights have no inner product. Query with the model that the index is of",
    "function": "gradients of different functions have no inner product, though the weights be the same. Query with "
    "the model that the index is of, config and code included",
    "reference": "it is another divergence. Query with the reference that the index is of",
    "loss": "it is another loss under the same name. Query with the loss that the index is of, or name the other as "
    "another if it is meant",
    "unprojected": "one projection summed other blocks. Collect the query as the index was collected, or build another",
}
WHY_OF_KIND = {
    "sketch": "only a smaller dim of a nesting projection per block can be read from the stored rows. Project the "
    "query as the index was projected, or build another",
    "norm": "put unit_norm() on both sides or on neither",
    "scale": "an optimizer's scale is on both sides, on neither, or on the training side alone",
}
"""Why the two sides of a score have the same step of a kind."""


class FingerprintError(ValueError):
    """Two sides of a score do not fit; the message names the field and both values."""


def check(query: Fingerprint, stored: Fingerprint, force: bool = False) -> int | None:
    """Refuse a query whose rows do not fit those that are stored.

    Args:
        query: the query's side.
        stored: the training side.
        force: warn instead.

    Returns:
        The smaller dim at which the stored rows are to be read, if the query's rows have one (see `index.narrowed`).

    Raises:
        FingerprintError: naming the field and both values.
    """
    found = list(problems(query, stored))
    if found and not force:
        name, problem = found[0]
        raise FingerprintError(f"{problem} (field {name!r})")
    if found:
        listed = "; ".join(f"{name!r}: {problem}" for name, problem in found)
        warnings.warn(f"forced past {len(found)} differences: {listed}", stacklevel=2)
    return query.dim if _is_smaller(query, stored) else None


def problems(query: Fingerprint, stored: Fingerprint) -> Iterator[tuple[str, str]]:
    """Yield every field that does not fit, causes before what follows from them: its name, and what is wrong."""
    smaller = _is_smaller(query, stored)
    if None not in (query.function, stored.function) and query.function != stored.function:  # one by hand has none
        yield "function", _said("function", query.function, stored.function)  # before the buffers that it filled
    if query.weights != stored.weights:
        yield "weights", _said("weights", query.weights, stored.weights)
    for name, mine, theirs, kind in _steps_apart(_with_sides(query, "equal"), _with_sides(stored, "equal")):
        if not (smaller and kind == "sketch" and name.endswith(".dim")):
            yield name, _said(name, mine, theirs, kind)
    if query.shapes != stored.shapes and not smaller:
        yield "shapes", _said("shapes", query.shapes, stored.shapes)
    references = [side.recorded.get("reference") for side in (query, stored)]
    if None not in references and references[0] != references[1]:
        yield "reference", _said("reference", *references)
    for name, mine, theirs in trials_apart(query, stored, same_loss(query, stored)):
        yield name, _said(name, mine, theirs)
    words = [side.recorded.get("vocabulary") for side in (query, stored)]
    if None not in words and words[0] != words[1]:
        values = f"the query's vocabulary is {shown(*words)}, and the stored rows' is {shown(*reversed(words))}"
        yield "vocabulary", f"{values}: their tokenizers give one word different numbers. Use the index's tokenizer"
    whole = [side.recorded.get("unprojected") for side in (query, stored)]
    summed = stored.sketch is not None and stored.sketch.settings.get("target") == "global"
    if summed and None not in whole and whole[0] != whole[1]:
        yield "unprojected", _said("unprojected", *whole)
    powers = [_powers_of(side) for side in (query, stored)]
    sums = {key: powers[0].get(key, 0.0) + powers[1].get(key, 0.0) for key in {**powers[0], **powers[1]}}
    if any(min(abs(total), abs(total + 1)) > 1e-9 for total in sums.values()) or sum(sums.values()) < -1.5:
        listed = [_listed(side) for side in (query, stored)]
        yield (
            "curvature",
            f"the query's curvature is {listed[0]}, and the stored rows' is {listed[1]}: the powers of one curvature "
            "have to add up to 0 or -1, and one inverse is applied in all. Make both sides with power=-0.5, or "
            "one with power=-1.0 and the other without curvature",
        )
    trained = _with_sides(query, "train only")
    if trained:
        for name, mine, theirs, kind in _steps_apart(trained, _with_sides(stored, "train only")):
            yield name, _said(name, mine, theirs, kind)


def _with_sides(side: Fingerprint, sides: str) -> list[StepFacts]:
    return [step for step in side.steps if step.sides == sides]


def _said(name: str, mine: Any, theirs: Any, kind: str | None = None) -> str:
    values = f"the query's {name} is {shown(mine, theirs)}, and the stored rows' is {shown(theirs, mine)}"
    return f"{values}: {WHY.get(name) or WHY_OF_KIND.get(kind or '', WHY_ELSE)}"


def _steps_apart(
    one: Iterable[StepFacts], other: Iterable[StepFacts], powers: bool = False
) -> Iterator[tuple[str, Any, Any, str | None]]:
    """Yield where two lists of steps differ, both values, and the kind of the step: steps that one lacks come first.

    Powers of a curvature are left out unless they are asked for: of two sides of a score they add up.
    """
    mine, theirs = _by_name(one), _by_name(other)
    both = [name for name in mine if name in theirs]
    for name, step in {**theirs, **mine}.items():
        if name not in both:
            own = step.settings
            yield name, own if name in mine else None, own if name in theirs else None, step.kind
    if [name for name in theirs if name in mine] != both:
        yield "order", list(mine), list(theirs), None
    for name in both:
        pair = [mine[name], theirs[name]]
        decided = all(step.resolved for step in pair)  # what a layout decided says more, where it is known of both
        told = [{**step.settings, **(step.resolved if decided else {})} for step in pair]
        if not powers and pair[0].kind == "curvature":
            told = [{key: value for key, value in each.items() if key != "power"} for each in told]
        for path, one_value, other_value in differences(told[0], told[1], name):
            yield path, one_value, other_value, pair[0].kind


def _by_name(steps: Iterable[StepFacts]) -> dict[str, StepFacts]:
    """Return steps by name; the second of one name as `name 2`."""
    found: dict[str, StepFacts] = {}
    for step in steps:
        before = sum(other.name == step.name for other in found.values())
        found[f"{step.name} {before + 1}" if before else step.name] = step
    return found


def same_loss(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether both sides say that they measure the same loss: by its name, and by the settings of a loss of ours.

    A function of the user's is called by its own name, or by `package.module:function` where the command line was told;
    all functions without a name have one.
    """
    said = [_claim(side) for side in (one, other)]
    names = [name for name, _ in said]
    dotted = all(":" in name for name in names)
    short = [name if dotted else name.rpartition(":")[2] for name in names]
    return bool(names[0]) and short[0] == short[1] and said[0][1] == said[1][1]


def _claim(side: Fingerprint) -> tuple[str, Any]:
    """Return the name of a side's loss, and the settings that make another loss of it."""
    name, settings = str(side.recorded.get("loss", "")), side.recorded.get("loss_settings")
    name = "<lambda>" if name.endswith("<lambda>") else name
    if settings is None or settings["own"]:
        return name, settings is None
    return name, [settings["reduction"], settings["label_smoothing"]]


def trials_apart(one: Fingerprint, other: Fingerprint, losses: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two sides say differently of the same examples, though their weights and settings be the same.

    Where they were not tried on the same, the side that is at hand is tried on the other's; where neither is, or only
    the hash of the examples was kept, nothing is known.

    Args:
        one: a side.
        other: the other.
        losses: compare the losses too, beside what the model returns.

    Yields:
        `function` or `loss`, and what both sides say.
    """
    functions = [one.function, other.function]
    if one.weights != other.weights:
        return
    if None not in functions and functions[0] != functions[1]:
        return
    mine, theirs = (side.recorded.get("trial") for side in (one, other))
    try:
        if mine is None or theirs is None or mine["on"] != theirs["on"]:
            if theirs is not None and one.live is not None and can_repeat(theirs):
                mine = again(*one.live, theirs, losses)
            elif mine is not None and other.live is not None and can_repeat(mine):
                theirs = again(*other.live, mine, losses)
            else:
                return
    except Exception as error:  # whatever the user's code raises on examples that the other side's took
        name = "loss" if losses else "function"
        yield name, f"one that fails on the other's trial ({type(error).__name__}: {error})", "one that does not"
        return
    for name, what in (("function", "outputs"), ("loss", "losses")):
        if (losses or what == "outputs") and apart(mine, theirs, what):
            yield name, {f"{what} of a trial": mine[what]}, {f"{what} of a trial": theirs[what]}
            return


def _is_smaller(query: Fingerprint, stored: Fingerprint) -> bool:
    """Whether the query's rows have a smaller dim of the stored projection, and the stored ones can be read at it."""
    mine, theirs = query.sketch, stored.sketch
    if mine is None or theirs is None or not nests(theirs.settings) or not stored.recorded.get("unprojected"):
        return False
    small = mine.settings.get("dim")
    if small is None or small >= theirs.settings["dim"] or stored.steps[-1] is not theirs:
        return False
    return query.shapes.keys() == stored.shapes.keys() and all(
        list(query.shapes[name]) == [min(size, small) for size in shape] for name, shape in stored.shapes.items()
    )


def all_differences(one: Fingerprint, other: Fingerprint, free: Iterable[str] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Yield every field in which two runs differ, and both values, causes first; some of what is recorded is free to.

    A trial differs where it says something else of the same examples, by more than rounding.
    """
    for name in ("function", "weights"):
        if getattr(one, name) != getattr(other, name):
            yield name, getattr(one, name), getattr(other, name)
    for name, mine, theirs, _ in _steps_apart(one.steps, other.steps, powers=True):
        yield name, mine, theirs
    if one.shapes != other.shapes:
        yield "shapes", one.shapes, other.shapes
    for name in sorted({*one.recorded, *other.recorded} - {*free, "trial", "transform"}):
        if one.recorded.get(name) != other.recorded.get(name):
            yield name, one.recorded.get(name), other.recorded.get(name)
    yield from trials_apart(one, other)


def _powers_of(side: Fingerprint) -> dict[str, float]:
    """Return the power of each curvature, by all that must be the same for two to be powers of one matrix."""
    of = (({key: v for key, v in step.settings.items() if key != "power"}, step) for step in side.powers)
    return {hash_of(same): step.settings["power"] for same, step in of}


def _listed(side: Fingerprint) -> str:
    return " · ".join(_power(step.settings) for step in side.powers) or "none"


def _power(settings: Mapping[str, Any]) -> str:
    how = {key: value for key, value in settings.items() if key not in ("factors", "power", "missing")}
    listed = (v if isinstance(v, str) else f"{key} {v:g}" for key, v in how.items() if v is not None)
    return f"{settings['factors']}^{settings['power']:g} ({', '.join(listed)})"


def shown(value: Any, other: Any) -> str:
    """Return a value for a message; of long mappings what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        own = differing(value, other)[0]
        if all(item is None for item in own.values()) and len(own) > 3:
            return f"of {len(value)} entries"
        listed = ", ".join(f"{key}: {_brief(item, other.get(key))}" for key, item in list(own.items())[:3])
        more = f", … ({len(own)} differ)" if len(own) > 3 else ""
        return f"{{{listed}{more}}}"
    return _brief(value, other)


def _brief(value: Any, other: Any) -> str:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return shown(value, other)
    text = str(value)
    return repr(value) if len(text) <= 80 else f"{text[:70]}…"
