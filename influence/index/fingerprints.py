"""Fingerprints with named fields: what rows are, as far as another side of a score has to know.

Three kinds of field. *Must match*: the weights, the function that the model makes of them, the blocks, how they were
projected, and the metric. *Complement*: powers of curvature and an optimizer's scale. *Recorded*: the data and the
loss; a query may measure something else, and says so by another name. `agreement` says when two sides fit.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from influence.func.fingerprint import canonical, weights_hash
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.layout import Layout
from influence.func.nested import unprojected
from influence.func.transform import CollectedRows, Step, Transform
from influence.func.trial import Trial, tried
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
