"""Fingerprints with named fields: what two sides of a score must have in common, and how they must fit together.

Three kinds of field. *Must match*: the weights, the blocks, how they were projected, and the metric. *Complement*:
powers of one curvature add up to 0 or −1 over both sides; an optimizer's scale is on both sides, on neither, or on the
training side alone (LESS). *Recorded*: the data and the loss; a query may measure something else.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from influence.func.fingerprint import canonical, weights_hash
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.layout import Layout
from influence.func.nested import unprojected
from influence.func.project import NESTING
from influence.func.transform import CollectedRows, Step, Transform
from influence.index.recipe import recipe
from influence.types import LossFn, Params

CURVATURE = ("precondition", "eigen_whiten")
SCALES = ("scale_by_adam", "scale_by_adafactor", "adam_update")
PROJECTION = ("kind", "dim", "seed", "target", "signs", "reshape_to_square")


class FingerprintError(ValueError):
    """Two sides of a score do not fit; the message names the field and both values."""


@dataclass(frozen=True)
class Fingerprint:
    """What rows are, as fields that JSON can write.

    Attributes:
        must_match: fields that have to be equal on both sides (the dim may be smaller on the query's).
        complement: fields that have to fit: `curvature` (a list of applied powers) and `scaling`.
        recorded: what else is known: data, loss, reduction.
    """

    must_match: Mapping[str, Any] = field(default_factory=dict)
    complement: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, dict[str, Any]]:
        """Return the fields as JSON writes them."""
        return {"must_match": _plain(self.must_match), **self._rest()}

    def _rest(self) -> dict[str, dict[str, Any]]:
        return {"complement": _plain(self.complement), "recorded": _plain(self.recorded)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Fingerprint":
        """Return a fingerprint from its JSON."""
        return cls(*(dict(fields[kind]) for kind in ("must_match", "complement", "recorded")))

    @property
    def digest(self) -> str:
        """A hash of every field."""
        return hash_of(self.json())

    @property
    def dim(self) -> int | None:
        """The projection's dim, if there is one."""
        return self.must_match.get("dim")


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
    return Fingerprint(_plain(must_match), _plain(complement), _plain({**said, **(recorded or {})}))


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
        if nested and name in ("dim", "blocks"):
            continue
        values = f"the query's {name} is {_shown(mine, theirs)}, and the stored rows' is {_shown(theirs, mine)}"
        yield name, f"{values}: {WHY.get(name, WHY_ELSE)}"
    words = [side.recorded.get("vocabulary") for side in (query, stored)]
    if None not in words and words[0] != words[1]:
        values = f"the query's vocabulary is {_shown(*words)}, and the stored rows' is {_shown(*reversed(words))}"
        yield "vocabulary", f"{values}: their tokenizers give one word different numbers. Use the index's tokenizer"
    whole = [side.recorded.get("unprojected") for side in (query, stored)]
    if stored.must_match.get("target") == "global" and None not in whole and whole[0] != whole[1]:
        values = f"the query's blocks is {_shown(*whole)}, and the stored rows' is {_shown(*reversed(whole))}"
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
            f"the query's scaling is {_shown(mine, theirs)}, and the stored rows' is {_shown(theirs, mine)}: an "
            "optimizer's scale is on both sides, on neither, or on the training side alone",
        )


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
    """Yield every field that differs, with both values, causes before what follows from them; some are free to."""
    for kind in kinds:
        mine, theirs = getattr(one, kind), getattr(other, kind)
        for name in sorted({*mine, *theirs} - set(free), key=lambda name: (name in ("blocks", "order"), name)):
            if mine.get(name) != theirs.get(name):
                yield name, mine.get(name), theirs.get(name)


WHY_ELSE = "inner products of such rows mean nothing. Collect the query as the index was collected, or build another"
WHY = {
    "weights": "gradients of different weights have no inner product. Query with the model that the index is of",
    "dim": "only a smaller dim of a nesting projection per block can be read from the stored rows",
    "metric": "put unit_norm() on both sides or on neither",
}


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


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _plain(canonical(value)) if canonical(value) is not value else repr(value)


def _shown(value: Any, other: Any) -> str:
    """Return a value for a message; of long mappings what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        differing = {key: item for key, item in value.items() if other.get(key) != item}
        listed = ", ".join(f"{key}: {item}" for key, item in list(differing.items())[:3])
        more = f", … ({len(differing)} differ)" if len(differing) > 3 else ""
        return f"{{{listed}{more}}}" if differing else f"of {len(value)} entries"
    text = str(value)
    return repr(value) if len(text) <= 80 else f"{text[:70]}…"
