"""Transforms: pure maps of rows, which compose, fold into the probe, and carry a fingerprint.

A transform is a description: a tuple of steps. Bound to a `Layout` it becomes a `Folded`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from influence.func.fingerprint import describe, fingerprint
from influence.func.transform.folding import Folded, into_blocks, placed, start
from influence.func.transform.layout import Layout, bare_layout, block_name
from influence.types import Rows


class Stage(IntEnum):
    """Where a step stands in a chain. A step may not follow one of a later stage.

    Up to `SCALE` rows are in the coordinates of the parameters; `REST` may leave them.
    """

    BLOCKS = 0
    HEADS = 1
    SCALE = 2
    REST = 3


class Step(NamedTuple):
    """One transform of a chain. It declares where it may stand and what it asks of the other side of a score.

    Attributes:
        name: its verb, as in the code: the factory's name, under which `STEPS` has it.
        settings: everything that changes a number, named as the factory's arguments are, so that `factory(**settings)`
            makes the step again; tensors are hashed into the fingerprint.
        extend: how it extends a folded transform.
        stage: where it stands; of blocks and of heads there is one step.
        kind: what a chain has at most one of, if it is such a step.
        sides: how its settings on the two sides of a score relate. `"equal"`: they are the same (but for the `power` of
            a curvature: powers add up to 0 or −1). `"power"`: likewise, and leaving the step out is a power of 0.
            `"train only"`: the same, or only the training side has the step.
        needs_blocks: whether it works on blocks alone, and not on plain parameters.
        resolve: what a layout makes of settings that leave something to it, if any do.
    """

    name: str
    settings: Mapping[str, Any]
    extend: Callable[[Folded], Folded]
    stage: Stage = Stage.REST
    kind: Literal["scale", "sketch", "curvature", "norm"] | None = None
    sides: Literal["equal", "power", "train only"] = "equal"
    needs_blocks: bool = False
    resolve: Callable[[Folded], Mapping[str, Any]] | None = None

    def __repr__(self) -> str:
        """Return the step as it was written."""
        shown = ", ".join(f"{key}={describe(value)}" for key, value in self.settings.items())
        return f"{self.name}({shown})"


STAGE = {
    Stage.BLOCKS: "blocks are made from parameters, so they come first",
    Stage.HEADS: "heads are slices of untouched blocks",
    Stage.SCALE: "an optimizer scales whole gradients, before anything else changes them",
}
"""Why a step of a stage may not follow one of a later stage."""
SCALED_LATE = {
    "sketch": "projected rows are not indexed by parameters any more, and an optimizer scales whole gradients",
    "norm": "an optimizer scales whole gradients, not unit vectors",
}
"""The same of a scale, by what came before it."""
ONCE = {
    "scale": "one gradient is scaled once",
    "sketch": "rows are projected once; to read them at a smaller dim use down_project",
    "curvature": "H is applied once: give one transform the whole power",
    "norm": "rows are normalised once",
}
"""Why there is one step of a kind."""


def _refusal(earlier: Step, step: Step) -> str | None:
    """Return why a step may not follow an earlier one, and what to do; `None` if it may."""
    if earlier.stage > step.stage:
        why = SCALED_LATE.get(earlier.kind or "", STAGE[step.stage]) if step.stage is Stage.SCALE else STAGE[step.stage]
        return f"{why}; write chain(…, {step.name}(…), {earlier.name}(…), …) or leave one out"
    if earlier.stage == step.stage < Stage.SCALE:
        return f"{STAGE[step.stage]}; leave one out"
    if step.kind is not None and earlier.kind == step.kind:
        return f"{ONCE[step.kind]}; leave one out"
    return None


@dataclass(frozen=True)
class Transform:
    """A pure map of rows: a tuple of steps, applied from left to right.

    Example:
        >>> import torch
        >>> from influence import as_blocks, chain, unit_norm
        >>> from influence.func.transform.layout import bare_layout
        >>> rows = {"w": torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])}
        >>> chain(as_blocks(), unit_norm()).apply(rows, layout=bare_layout({"w": rows["w"][0]}))["w"]
        tensor([[[0.6000, 0.0000],
                 [0.0000, 0.8000]]])
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an order that makes no sense.

        Raises:
            ValueError: if a step follows one of a later stage, or there are two of what there is one of.
        """
        for position, step in enumerate(self.steps):
            for earlier in reversed(self.steps[:position]):
                why = _refusal(earlier, step)
                if why is not None:
                    raise ValueError(f"{step} cannot follow {earlier}: {why}")

    def __repr__(self) -> str:
        """Return the chain as it was written."""
        return repr(self.steps[0]) if len(self.steps) == 1 else f"chain({', '.join(map(repr, self.steps))})"

    def bind(self, layout: Layout) -> Folded:
        """Bind the description to a layout.

        Args:
            layout: the parameters' layout.

        Returns:
            The folded transform.

        Raises:
            ValueError: if a step needs another before it.
        """
        return placed(self.extend(start(layout)))

    def extend(self, folded: Folded) -> Folded:
        """Extend a folded transform by these steps."""
        for step in self.steps:
            if step.needs_blocks and not _makes_blocks(folded.made):
                raise ValueError(
                    f"{step} needs blocks: put as_blocks() before it, as in chain(as_blocks(), {step.name}(…))"
                )
            norm = next((earlier for earlier in folded.made if earlier.kind == "norm"), None)
            if step.kind == "sketch" and norm is not None:
                note = f"{norm.name} comes before {step.name}: projected rows no longer have unit norm"
                folded = replace(folded, warnings=(*folded.warnings, note))
            folded = replace(step.extend(folded), made=(*folded.made, step))
        return folded

    def resolved(self, layout: Layout) -> list[dict[str, Any]]:
        """Return each step's settings that a layout decides, as the heads of a model's family."""
        found: list[dict[str, Any]] = []
        folded = start(layout)
        for step in self.steps:
            found.append({} if step.resolve is None else dict(step.resolve(folded)))
            if step.stage < Stage.SCALE:  # a layout decides what blocks there are, and nothing after that
                folded = step.extend(folded)
        return found

    def apply(self, rows: Rows, layout: Layout) -> Rows:
        """Apply the transform to rows already at hand: the same numbers as folded into a probe.

        Args:
            rows: gradients by parameter name `[n, *shape]`, or blocks `[n, o, i]` made by `as_blocks`.
            layout: `loss_fn.layout`, or the plan's.

        Returns:
            The transformed rows.

        Raises:
            ValueError: if the rows come through steps that these cannot follow.
        """
        raw = all(name in layout.params and tuple(row.shape[1:]) == layout[name].shape for name, row in rows.items())
        made = rows.transform.steps if isinstance(rows, CollectedRows) else ()
        starts = bool(self.steps) and self.steps[0].stage is Stage.BLOCKS
        are_blocks = _makes_blocks(made) or any(step.needs_blocks for step in self.steps)
        if raw and (starts or not are_blocks):
            return self.bind(layout.restrict(rows)).rows(rows)
        before = Transform((*made, *self.steps)).steps[: len(made)] or (BLOCKS_AT_HAND,)
        found = unblock(rows, layout)
        if found is not None:
            grads, merged = found
            blocks = replace(into_blocks(start(layout.restrict(grads)), merged), made=before)
            return placed(self.extend(blocks)).rows(grads)
        inner = bare_layout({name: row[0] for name, row in rows.items()})
        return placed(self.extend(replace(start(inner), raw=False, made=before))).rows(rows)

    @property
    def fingerprint(self) -> str:
        """A hash of every setting that changes a number, the same in every process and on every machine."""
        return fingerprint([[step.name, step.settings] for step in self.steps])


def _makes_blocks(steps: tuple[Step, ...]) -> bool:
    return any(step.stage is Stage.BLOCKS for step in steps)


BLOCKS_AT_HAND = Step("BLOCKS_AT_HAND", {}, lambda folded: folded, Stage.BLOCKS)
"""What is known of rows that came as blocks and do not say how they were made."""


class CollectedRows(dict[str, Tensor]):
    """Rows which remember how they were made.

    Attributes:
        transform: the transform they were collected under.
        layout: the layout of the parameters they come from.
    """

    def __init__(self, rows: Rows, transform: Transform, layout: Layout) -> None:
        """Hold rows and their provenance."""
        super().__init__(rows)
        self.transform, self.layout = transform, layout


def unblock(rows: Rows, layout: Layout) -> tuple[Rows, bool] | None:
    """Return parameter gradients from rows that are whole blocks, and whether biases were in them.

    `None` where the rows are something else (heads, projections, some of the experts).
    """
    owners = {block_name(name): name for name in layout.params}
    grads: Rows = {}
    merged = False
    for key, row in joined_experts(rows, owners, layout).items():
        name = key if key in layout.params else owners.get(key)
        if name is None:
            return None
        param, shape = layout[name], tuple(row.shape[1:])
        if shape == param.oriented:
            grads[name] = param.restore(row)
        elif param.bias and len(shape) == 2 and shape == (param.oriented[0], param.oriented[1] + 1):
            merged = True
            grads[name] = param.restore(row[..., :-1])
            grads[param.bias] = layout[param.bias].restore(row[..., -1])
        else:
            return None
    return grads, merged


def joined_experts(rows: Rows, owners: Mapping[str, str], layout: Layout) -> Rows:
    """Return rows in which the experts of one parameter lie one behind the other, where all of them are there."""
    stacks = {block: [f"{block}.expert_{e}" for e in range(layout[name].experts)] for block, name in owners.items()}
    whole = {expert: block for block, experts in stacks.items() if rows.keys() >= {*experts} for expert in experts}
    names = dict.fromkeys(whole.get(key, key) for key in rows)
    return {name: rows[name] if name in rows else torch.cat([rows[e] for e in stacks[name]], 1) for name in names}


def chain(*transforms: Transform) -> Transform:
    """Compose transforms, applied from left to right.

    Composition is associative: `chain(chain(a, b), c)`, `chain(a, chain(b, c))` and `chain(a, b, c)` are equal.

    Args:
        *transforms: transforms.

    Returns:
        Their composition.

    Example:
        >>> from influence import as_blocks, chain, unit_norm
        >>> chain(as_blocks(bias=True), unit_norm())
        chain(as_blocks(bias=True), unit_norm(eps=1e-12))
    """
    return Transform(tuple(step for transform in transforms for step in transform.steps))
