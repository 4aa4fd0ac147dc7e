"""Recipes: a transform and a loss from their stored settings. Tensors must be given, and are checked by hash."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from influence.func.fingerprint import canonical
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.loss.functionalize import functionalize
from influence.func.transform.chain import Transform, chain
from influence.func.transform.layout import Layout
from influence.func.transform.precondition import BlockCurvature
from influence.func.transform.scale import Moments
from influence.func.transform.steps import STEPS
from influence.types import LossFn, Params


class StepFacts(NamedTuple):
    """What JSON holds of a step.

    Attributes:
        name: its name.
        kind: what a chain has at most one of, if it is such a step.
        sides: how its settings on the two sides of a score relate; see `Step`.
        settings: its settings as they were written; of tensors a hash.
        resolved: those that the layout decided, as it decided them.
    """

    name: str
    kind: str | None
    sides: str
    settings: dict[str, Any]
    resolved: dict[str, Any] = {}  # noqa: RUF012 (nothing changes it)


def recipe(transform: Transform, layout: Layout | None = None) -> list[dict[str, Any]]:
    """Return a transform's steps as JSON holds them; tensors are hashes.

    Args:
        transform: the transform.
        layout: the parameters' layout, which decides what the settings leave to it: a family's heads.

    Returns:
        The fields of a `StepFacts` for each step.

    Example:
        >>> from influence import as_blocks, chain, project
        >>> recipe(chain(as_blocks(), project(8)))[0]
        {'name': 'as_blocks', 'kind': None, 'sides': 'equal', 'settings': {'bias': False}, 'resolved': {}}
    """
    resolved: Sequence[Mapping[str, Any]] = [{}] * len(transform.steps)
    resolved = resolved if layout is None else transform.resolved(layout)
    return [
        StepFacts(step.name, step.kind, step.sides, _held(step.settings), _held(bound))._asdict()
        for step, bound in zip(transform.steps, resolved, strict=True)
    ]


def _held(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hash_of(value) if has_tensors(value) else plain(value) for name, value in settings.items()}


def has_tensors(value: Any) -> bool:
    """Whether there are tensors in a value."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return plain(canonical(value)) if canonical(value) is not value else repr(value)


def rebuild(
    steps: Iterable[StepFacts | Mapping[str, Any]],
    factors: Sequence[BlockCurvature] = (),
    moments: Moments | None = None,
) -> Transform:
    """Return the transform that `recipe` described.

    Args:
        steps: the recipe, as `fingerprint.steps` holds it.
        factors: curvature for steps that apply one; the one with the stored hash is taken.
        moments: second moments for steps that scale by an optimizer's.

    Returns:
        The transform, whose recipe is the same.

    Raises:
        ValueError: if a step is unknown, or needs factors or moments that are not given, or other ones are given.

    Example:
        >>> from influence import as_blocks, chain, project, unit_norm
        >>> made = chain(as_blocks(bias=True), project(8, seed=3), unit_norm())
        >>> rebuild(recipe(made)).fingerprint == made.fingerprint
        True
    """
    held = [step if isinstance(step, StepFacts) else StepFacts(**step) for step in steps]
    unknown = [step.name for step in held if step.name not in STEPS]
    if unknown:
        raise ValueError(f"the steps {', '.join(unknown)} cannot be made from their settings: pass transform=")
    made = chain(*(STEPS[step.name](**_given(step.settings, factors, moments)) for step in held))
    if [(step["name"], step["settings"]) for step in recipe(made)] != [(step.name, step.settings) for step in held]:
        raise ValueError(f"{made} is not what was stored: the moments are others, or another version wrote it")
    return made


def _given(settings: Mapping[str, Any], factors: Sequence[BlockCurvature], moments: Moments | None) -> dict[str, Any]:
    """Return settings with the tensors of which they hold the hashes.

    Raises:
        ValueError: if they are not given.
    """
    found = dict(settings)
    if "factors" in settings:
        by_hash = {f"{f.method}:{f.digest[:16]}": f for f in factors}
        if settings["factors"] not in by_hash:
            given = f"; those given are {', '.join(by_hash)}" if by_hash else ""
            raise ValueError(
                f"the rows were made with the factors {settings['factors']}{given}: pass factors=[…] or transform="
            )
        found["factors"] = by_hash[settings["factors"]]
    if "moments" in settings:
        if moments is None:
            raise ValueError("the rows were scaled by an optimizer's moments: pass moments= or transform=")
        found["moments"] = moments
    return found


def loss_of(model: nn.Module, recorded: Mapping[str, Any]) -> tuple[LossFn, Params]:
    """Return a model's loss function and parameters, as those of an index were.

    Args:
        model: the model.
        recorded: what the index's fingerprint recorded.

    Returns:
        `(loss_fn, params)`.

    Raises:
        ValueError: if the model lacks a parameter, or the loss was a function of the user's, or needs another model.
    """
    settings, names = recorded.get("loss_settings"), recorded.get("params")
    if settings is None or names is None or settings["own"] or settings["loss"] == "kl":
        what = recorded.get("loss") if settings is None else settings["loss"]
        raise ValueError(
            f"the loss of this index, {what}, cannot be made from a model alone: pass (loss_fn, params), as "
            "functionalize returns them"
        )
    present = dict(model.named_parameters())
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no parameter {missing[0]!r} ({len(missing)} of {len(names)} are missing): "
            "it is not the model that the index is of (field 'shapes')"
        )
    return functionalize(
        model,
        loss=settings["loss"],
        reduction=settings["reduction"],
        targets=[_literal(name) for name in names],
        label_smoothing=settings["label_smoothing"],
    )


def _literal(name: str) -> str:
    """Return a glob that matches a name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
