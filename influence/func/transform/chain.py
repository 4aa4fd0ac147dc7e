"""Transforms: pure maps of rows, which compose, fold into the probe, and carry a fingerprint.

A transform is a description: a tuple of steps. Bound to a `Layout` it becomes a `Folded`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence.func.fingerprint import describe, fingerprint
from influence.func.transform.folding import Folded, into_blocks, placed, start
from influence.func.transform.layout import Layout, bare_layout, block_name
from influence.types import Rows


class Step(NamedTuple):
    """One transform of a chain.

    Attributes:
        name: its verb, as in the code.
        settings: everything that changes a number; tensors are hashed into the fingerprint.
        extend: how it extends a folded transform.
        changes_basis: whether a row is no longer indexed by parameters after it.
        needs: names of steps, one of which must come before.
        refuses: names of steps that must not come before, each with the reason.
    """

    name: str
    settings: Mapping[str, Any]
    extend: Callable[[Folded], Folded]
    refuses: Mapping[str, str]
    needs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the step as it was written."""
        shown = ", ".join(f"{key}={describe(value)}" for key, value in self.settings.items())
        return f"{self.name}({shown})"


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
            ValueError: if a step follows one that it cannot follow, or lacks one that it needs.
        """
        for position, step in enumerate(self.steps):
            for earlier in reversed(self.steps[:position]):
                if earlier.name in step.refuses:
                    order = f"write chain(…, {step.name}(…), {earlier.name}(…), …) or "
                    way_out = f"{order if step.name != earlier.name else ''}leave one out"
                    raise ValueError(f"{step} cannot follow {earlier}: {step.refuses[earlier.name]}; {way_out}")

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
            if step.needs and not set(step.needs) & set(folded.history):
                raise ValueError(
                    f"{step} needs blocks: put {' or '.join(f'{need}()' for need in step.needs)} before it, "
                    f"as in chain({step.needs[0]}(), {step.name}(…))"
                )
            folded = replace(step.extend(folded), made=(*folded.made, (step.name, step.settings)))
        return folded

    def apply(self, rows: Rows, layout: Layout) -> Rows:
        """Apply the transform to rows already at hand: the same numbers as folded into a probe.

        Args:
            rows: gradients by parameter name `[n, *shape]`, or blocks `[n, o, i]` made by `as_blocks`.
            layout: `loss_fn.layout`, or the plan's.

        Returns:
            The transformed rows.

        """
        raw = all(name in layout.params and tuple(row.shape[1:]) == layout[name].shape for name, row in rows.items())
        made = rows.transform.steps if isinstance(rows, CollectedRows) else ()
        starts = bool(self.steps) and self.steps[0].name == "as_blocks"
        are_blocks = any(step.name == "as_blocks" for step in made) or any(step.needs for step in self.steps)
        if raw and (starts or not are_blocks):
            return self.bind(layout.restrict(rows)).rows(rows)
        before = tuple((step.name, step.settings) for step in made) or (BLOCKS_AT_HAND,)
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


BLOCKS_AT_HAND: tuple[str, Any] = ("as_blocks", None)
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
