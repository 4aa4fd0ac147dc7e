r"""Nested projections, seen from the other side: a query of a smaller dim against rows stored at a larger one.

`down_project` is linear, `D(G) = M_L G M_R^T`, so `⟨D(g), q⟩ = ⟨g, D^T q⟩` with `D^T q = M_L^T q M_R`: the query is
raised once, and the stored rows stay as they are.
"""

from dataclasses import replace

import torch

from influence.func.layout import Layout
from influence.func.project import project, shrunk
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


def raise_project(rows: Rows, dim: int, transform: Transform, layout: Layout) -> Rows:
    r"""Return projected rows in the space of a larger projection: the adjoint of `down_project`.

    $$\langle \text{down\_project}(g), q \rangle = \langle g, \text{raise\_project}(q) \rangle$$

    Args:
        rows: projected rows.
        dim: the larger dim.
        transform: the transform the rows were collected under.
        layout: the layout they were collected from.

    Returns:
        The rows, of the shapes of `project(dim)`.

    Raises:
        ValueError: if the rows were not projected, or to more than `dim`.

    Example:
        >>> import torch
        >>> from influence import as_blocks, chain, project
        >>> from influence.func.layout import bare_layout
        >>> small, layout = chain(as_blocks(), project(4)), bare_layout({"w": torch.zeros(9, 9)})
        >>> raise_project({"w": torch.ones(1, 4, 4)}, 8, small, layout)["w"].shape
        torch.Size([1, 8, 8])
    """
    step = projection(transform)
    small = None if step is None else step.settings["dim"]
    if step is None or small is None or dim < small:
        raise ValueError(
            f"raise_project(dim={dim}): these rows were made by {transform}; expected a projection to less"
        )
    at = transform.steps.index(step)
    blocks = {block.into: block for block in Transform(transform.steps[:at]).bind(layout).blocks}
    found: Rows = {}
    for name, row in rows.items():
        block = blocks[name]
        for axis, (size, side) in enumerate(zip(block.shape, ("left", "right"), strict=False)):
            identity = torch.eye(min(size, dim), dtype=row.dtype, device=row.device)
            lower = shrunk(identity, size, side, block.name, dim, small, step.settings)
            row = (row.movedim(axis + 1, -1) @ lower.mT).movedim(-1, axis + 1)
        found[name] = row
    return found
