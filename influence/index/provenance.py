"""Whether two sides of a score fit: what they must have in common, and what has to add up over both.

Powers of one curvature add up to 0 or −1; an optimizer's scale is on both sides, on neither, or on the training side
alone (LESS). A query may be projected to a smaller dim, where projections nest. It may measure another loss, under
another name or other settings; a loss which says that it is the same has to say the same of the same examples.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from influence.func.fingerprint import canonical, weights_hash
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.loss.described import differing
from influence.func.loss.trial import Trial, again, apart, can_repeat, tried
from influence.func.transform.chain import CollectedRows, Step, Transform
from influence.func.transform.layout import Layout
from influence.func.transform.nested import unprojected
from influence.func.transform.project import NESTING
from influence.index.recipe import recipe
from influence.store.schema import conform
from influence.types import Batch, LossFn, Params

CURVATURE = ("precondition", "eigen_whiten")
SCALES = ("scale_by_adam", "scale_by_adafactor", "adam_update")
PROJECTION = ("kind", "dim", "seed", "target", "signs", "reshape_to_square")


@dataclass(frozen=True)
class Fingerprint:
    """What rows are, as fields that JSON can write.

    Attributes:
        must_match: fields that have to be equal on both sides (the dim may be smaller on the query's).
        complement: fields that have to fit: `curvature` (a list of applied powers) and `scaling`.
        recorded: what else is known: data, loss, reduction, and what the function says of a few examples (`trial`).
        live: the loss function and its parameters, where they are at hand: they can say what they say of the examples
            that another side was tried on. No part of what is written.
    """

    must_match: Mapping[str, Any] = field(default_factory=dict)
    complement: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)
    live: tuple[LossFn, Params] | None = field(default=None, compare=False, repr=False)

    def json(self) -> dict[str, dict[str, Any]]:
        """Return the fields as JSON writes them."""
        return {"must_match": _plain(self.must_match), **self._rest()}

    def _rest(self) -> dict[str, dict[str, Any]]:
        return {"complement": _plain(self.complement), "recorded": _plain(self.recorded)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], live: tuple[LossFn, Params] | None = None) -> "Fingerprint":
        """Return a fingerprint from its JSON, and from the function where it is at hand."""
        held = conform(fields, FingerprintFacts, "a fingerprint")
        if "trial" in held.recorded:
            conform(held.recorded["trial"], Trial, "the trial of a fingerprint")
        return cls(held.must_match, held.complement, held.recorded, live)

    @property
    def digest(self) -> str:
        """A hash of every field."""
        return hash_of(self.json())

    @property
    def dim(self) -> int | None:
        """The projection's dim, if there is one."""
        return self.must_match.get("dim")


class FingerprintFacts(NamedTuple):
    """A fingerprint as JSON holds it."""

    must_match: dict[str, Any]
    complement: dict[str, Any]
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
        >>> found.must_match["dim"], found.must_match["projection"], found.must_match["metric"]
        (8, 'rademacher', 'inner product')
    """
    if weights is None:
        weights = weights_hash(loss_fn, params or {})
    steps = {step.name: step.settings for step in transform.steps}
    projection = steps.get("project", {})
    others = [
        [step.name, canonical(step.settings)]
        for step in transform.steps
        if step.name not in ("as_blocks", "split_heads", "project", "unit_norm", *CURVATURE, *SCALES)
    ]
    must_match = {
        "weights": weights,
        "function": getattr(loss_fn, "function", None),
        "blocks": {name: list(shape) for name, shape in shapes.items()},
        "bias": steps["as_blocks"]["bias"] if "as_blocks" in steps else None,
        "heads": canonical(steps["split_heads"]["heads"]) or "the family's" if "split_heads" in steps else None,
        "projection": projection.get("kind"),
        **{key: projection.get(key) for key in PROJECTION if key != "kind"},
        "basis": _basis(transform.steps),
        "metric": "cosine" if "unit_norm" in steps else "inner product",
        "order": [step.name for step in transform.steps if step.name not in ("precondition", *SCALES)],
        "other steps": others,
    }
    complement = {"curvature": list(_powers(transform.steps)), "scaling": _scaling(transform.steps)}
    said = {"loss": getattr(loss_fn, "name", getattr(loss_fn, "__qualname__", type(loss_fn).__name__))}
    said["reduction"] = getattr(loss_fn, "reduction", "own")
    said["transform"] = repr(transform)
    said["steps"] = recipe(transform)
    settings = getattr(loss_fn, "settings", None)
    if settings is not None:
        said |= {"loss_settings": settings, "params": list(params or ())}
    if layout is None and params is not None and getattr(loss_fn, "layout", None) is not None:
        layout = loss_fn.layout.restrict(params)  # type: ignore[union-attr]
    if projection and layout is not None:
        said["unprojected"] = unprojected(transform, layout)
    live = None if loss_fn is None or params is None else (loss_fn, params)
    if "reference" not in (recorded or {}) and (reference := getattr(loss_fn, "reference", None)) is not None:
        said["reference"] = reference
    if live is not None and batch is not None:
        said["trial"] = tried(*live, batch)
    return Fingerprint(_plain(must_match), _plain(complement), _plain({**said, **(recorded or {})}), live)


def _basis(steps: Iterable[Step]) -> dict[str, Any] | None:
    for step in steps:
        if step.name == "eigen_whiten":
            return {key: value for key, value in step.settings.items() if key != "power"}
    return None


def _powers(steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
    before = 0
    for step in steps:
        if step.name in CURVATURE:
            yield {"step": step.name, **step.settings, "after": before}
        elif step.name not in SCALES:
            before += 1


def _scaling(steps: Iterable[Step]) -> dict[str, Any] | None:
    for step in steps:
        if step.name in SCALES:
            kept = step.settings if step.name == "adam_update" else step.settings["moments"]
            return {"step": step.name, "moments": hash_of(kept), "eps": step.settings["eps"]}
    return None


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _plain(canonical(value)) if canonical(value) is not value else repr(value)


WHY_ELSE = "inner products of such rows mean nothing. Collect the query as the index was collected, or build another"
WHY = {
    "weights": "gradients of different weights have no inner product. Query with the model that the index is of",
    "function": "gradients of different functions have no inner product, though the weights be the same. Query with "
    "the model that the index is of, config and code included",
    "reference": "it is another divergence. Query with the reference that the index is of",
    "loss": "it is another loss under the same name. Query with the loss that the index is of, or name the other as "
    "another if it is meant",
    "dim": "only a smaller dim of a nesting projection per block can be read from the stored rows",
    "metric": "put unit_norm() on both sides or on neither",
}


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
    return query.dim if nests(query, stored) else None


def problems(query: Fingerprint, stored: Fingerprint) -> Iterator[tuple[str, str]]:
    """Yield every field that does not fit: its name, and what is wrong with it."""
    nested = nests(query, stored)
    for name, mine, theirs in differences(query, stored, kinds=("must_match",)):
        unknown = name == "function" and (mine is None or theirs is None)  # a function by hand has no settings
        if unknown or (nested and name in ("dim", "blocks")):
            continue
        yield name, _said(name, mine, theirs)
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
    if stored.must_match.get("target") == "global" and None not in whole and whole[0] != whole[1]:
        values = f"the query's blocks is {shown(*whole)}, and the stored rows' is {shown(*reversed(whole))}"
        yield "blocks", f"{values} before one projection of all: {WHY_ELSE}"
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
    mine, theirs = (side.complement.get("scaling") for side in (query, stored))
    if mine is not None and mine != theirs:
        yield (
            "scaling",
            f"the query's scaling is {shown(mine, theirs)}, and the stored rows' is {shown(theirs, mine)}: an "
            "optimizer's scale is on both sides, on neither, or on the training side alone",
        )


def _said(name: str, mine: Any, theirs: Any) -> str:
    values = f"the query's {name} is {shown(mine, theirs)}, and the stored rows' is {shown(theirs, mine)}"
    return f"{values}: {WHY.get(name, WHY_ELSE)}"


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
    functions = [side.must_match.get("function") for side in (one, other)]
    if one.must_match.get("weights") != other.must_match.get("weights"):
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


def nests(query: Fingerprint, stored: Fingerprint) -> bool:
    """Whether the query's projection is a corner of the stored one."""
    small, large = query.dim, stored.dim
    there = stored.must_match
    if small is None or large is None or small >= large:
        return False
    if there.get("projection") not in NESTING or there.get("target") == "global" or there.get("reshape_to_square"):
        return False
    order = there.get("order", [])
    after = [one for one in stored.complement.get("curvature", ()) if one["after"] == len(order)]
    if order[-1:] != ["project"] or after or not stored.recorded.get("unprojected"):
        return False
    mine, theirs = query.must_match.get("blocks", {}), there.get("blocks", {})
    return mine.keys() == theirs.keys() and all(
        list(mine[name]) == [min(size, small) for size in shape] for name, shape in theirs.items()
    )


def differences(
    one: Fingerprint,
    other: Fingerprint,
    free: Iterable[str] = (),
    kinds: Iterable[str] = ("must_match", "complement", "recorded"),
) -> Iterator[tuple[str, Any, Any]]:
    """Yield every field that differs, with both values, causes before what follows from them; some are free to.

    A trial differs where it says something else of the same examples, by more than rounding.
    """
    kinds, free = tuple(kinds), {*free, "trial"}
    for kind in kinds:
        mine, theirs = getattr(one, kind), getattr(other, kind)
        for name in sorted({*mine, *theirs} - free, key=lambda name: (name in ("blocks", "order"), name)):
            if mine.get(name) != theirs.get(name):
                yield name, mine.get(name), theirs.get(name)
    if "recorded" in kinds:
        yield from trials_apart(one, other)


def _key(power: Mapping[str, Any]) -> str:
    """Return what must be the same for two powers to be powers of one matrix."""
    return hash_of({key: value for key, value in power.items() if key not in ("power", "after", "step")})


def _powers_of(side: Fingerprint) -> dict[str, float]:
    return {_key(one): one["power"] for one in side.complement.get("curvature", ())}


def _listed(side: Fingerprint) -> str:
    found = [
        f"{one['factors']}^{one['power']:g} (damping {one['damping']:g}, {one['inversion']})"
        for one in side.complement.get("curvature", ())
    ]
    return " · ".join(found) or "none"


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
