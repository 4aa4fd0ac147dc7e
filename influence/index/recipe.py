"""Recipes: a transform and a loss from their stored settings. Tensors must be given, and are checked by hash."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from influence.func.fingerprint import canonical, fingerprint
from influence.func.loss.functionalize import functionalize
from influence.func.transform.blocks import as_blocks, split_heads
from influence.func.transform.chain import Transform, chain
from influence.func.transform.layout import Heads
from influence.func.transform.precondition import BlockCurvature, precondition
from influence.func.transform.project import project
from influence.func.transform.scale import Moments, scale_by_adafactor, scale_by_adam, unit_norm
from influence.func.transform.whiten import eigen_whiten
from influence.types import LossFn, Params


def recipe(transform: Transform) -> list[list[Any]]:
    """Return a transform's steps as JSON holds them: names and settings; tensors are hashes.

    Args:
        transform: the transform.

    Returns:
        `[[name, settings], …]`, whose `fingerprint` is the transform's.

    Example:
        >>> from influence import as_blocks, chain, project
        >>> recipe(chain(as_blocks(), project(8)))[0]
        ['as_blocks', {'bias': False}]
    """
    return [[step.name, canonical(step.settings)] for step in transform.steps]


def rebuild(
    steps: Sequence[Sequence[Any]], factors: Sequence[BlockCurvature] = (), moments: Moments | None = None
) -> Transform:
    """Return the transform that `recipe` described.

    Args:
        steps: the recipe.
        factors: curvature for steps that apply one; the one with the stored hash is taken.
        moments: second moments for steps that scale by an optimizer's.

    Returns:
        The transform, whose fingerprint is the recipe's.

    Raises:
        ValueError: if a step is unknown, or needs factors or moments that are not given, or other ones are given.

    Example:
        >>> from influence import as_blocks, chain, project, unit_norm
        >>> made = chain(as_blocks(bias=True), project(8, seed=3), unit_norm())
        >>> rebuild(recipe(made)).fingerprint == made.fingerprint
        True
    """
    by_hash = {f"{f.method}:{f.digest[:16]}": f for f in factors}

    def curvature(settings: Mapping[str, Any]) -> tuple[BlockCurvature, dict[str, Any]]:
        wanted = settings["factors"]
        if wanted not in by_hash:
            given = f"; those given are {', '.join(by_hash)}" if by_hash else ""
            raise ValueError(f"the rows were made with the factors {wanted}{given}: pass factors=[…] or transform=")
        return by_hash[wanted], {key: _plain(value) for key, value in settings.items() if key != "factors"}

    def curved(make: Callable[..., Transform]) -> Callable[[Mapping[str, Any]], Transform]:
        def made(settings: Mapping[str, Any]) -> Transform:
            found, rest = curvature(settings)
            return make(found, **rest)

        return made

    def scaled(make: Callable[..., Transform]) -> Callable[[Mapping[str, Any]], Transform]:
        def made(settings: Mapping[str, Any]) -> Transform:
            if moments is None:
                raise ValueError("the rows were scaled by an optimizer's moments: pass moments= or transform=")
            return make(moments, **{key: _plain(value) for key, value in settings.items() if key != "moments"})

        return made

    makers: dict[str, Callable[[Mapping[str, Any]], Transform]] = {
        "as_blocks": lambda settings: as_blocks(**settings),
        "split_heads": lambda settings: split_heads(_heads(settings["heads"])),
        "project": lambda settings: project(**settings),
        "unit_norm": lambda settings: unit_norm(**{key: _plain(value) for key, value in settings.items()}),
        "precondition": curved(precondition),
        "eigen_whiten": curved(eigen_whiten),
        "scale_by_adam": scaled(scale_by_adam),
        "scale_by_adafactor": scaled(scale_by_adafactor),
    }
    unknown = [name for name, _ in steps if name not in makers]
    if unknown:
        raise ValueError(f"the steps {', '.join(unknown)} cannot be made from their settings: pass transform=")
    made = chain(*(makers[name](settings) for name, settings in steps))
    if made.fingerprint != fingerprint(list(steps)):
        raise ValueError(f"{made} is not what was stored: the moments are others, or another version wrote it")
    return made


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
            "it is not the model that the index is of (field 'blocks')"
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


def _heads(stored: Any) -> dict[str, Heads] | None:
    if stored is None:
        return None
    return {name: Heads(**heads["Heads"]) for name, heads in stored.items()}


def _plain(value: Any) -> Any:
    """Undo what `canonical` did to a setting: floats are hexadecimal."""
    if isinstance(value, str) and value.lstrip("-").startswith("0x"):
        return float.fromhex(value)
    return value
