r"""Nested projections, seen from the other side: a query of a smaller dim against rows stored at a larger one.

`down_project` is linear, `D(G) = M_L G M_R^T`, so `⟨D(g), q⟩ = ⟨g, D^T q⟩` with `D^T q = M_L^T q M_R`: the query is
raised once, and the stored rows stay as they are.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from influence.func.layout import Layout
from influence.func.project import NESTING, project, shrunk
from influence.func.transform import Step, Transform
from influence.types import Rows


def projection(transform: Transform) -> Step | None:
    """Return the step of a transform that projects, if there is one."""
    return next((step for step in transform.steps if step.name == "project"), None)


def at_dim(transform: Transform, dim: int) -> Transform:
    """Return the same transform with its projection at another dim."""
    steps = (
        project(**{**step.settings, "dim": dim}).steps if step.name == "project" else (step,)
        for step in transform.steps
    )
    return replace(transform, steps=tuple(step for made in steps for step in made))


def raise_project(rows: Rows, dim: int, step: Step, shapes: Mapping[str, tuple[int, ...]]) -> Rows:
    r"""Return projected rows in the space of a larger projection: the adjoint of `down_project`.

    $$\langle \text{down\_project}(g), q \rangle = \langle g, \text{raise\_project}(q) \rangle$$

    Args:
        rows: projected rows.
        dim: the larger dim.
        step: the projection that they went through, one that nests.
        shapes: each block's shape before it was projected.

    Returns:
        The rows, of the shapes of `project(dim)`.

    Raises:
        ValueError: if the projection was to more than `dim`, or does not nest.

    Example:
        >>> import torch
        >>> from influence import project
        >>> raise_project({"w": torch.ones(1, 4, 4)}, 8, project(4).steps[0], {"w": (9, 9)})["w"].shape
        torch.Size([1, 8, 8])
    """
    small, kind, seed = (step.settings[key] for key in ("dim", "kind", "seed"))
    if dim < small or kind not in NESTING:
        raise ValueError(
            f"raise_project: rows of {step} are not read at dim {dim}: expected a nesting kind, and dim ≥ {small}"
        )
    found: Rows = {}
    for name, row in rows.items():
        for axis, (size, side) in enumerate(zip(shapes[name], ("left", "right"), strict=False)):
            identity = torch.eye(min(size, dim), dtype=row.dtype, device=row.device)
            lower = shrunk(identity, size, side, name, dim, small, seed, kind)
            row = (row.movedim(axis + 1, -1) @ lower.mT).movedim(-1, axis + 1)
        found[name] = row
    return found


def unprojected(transform: Transform, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return each block's shape before a transform projects it."""
    names = [step.name for step in transform.steps]
    blocks = Transform(transform.steps[: names.index("project")]).bind(layout).blocks
    return {block.into: block.shape for block in blocks}
