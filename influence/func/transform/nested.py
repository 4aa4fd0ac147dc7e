r"""Nested projections: rows stored at one dim, read at a smaller one.

`down_project` is linear, `D(G) = M_L G M_R^T`, so `⟨D(g), q⟩ = ⟨g, D^T q⟩` with `D^T q = M_L^T q M_R`: a query of the
smaller dim is raised once by `raise_project`, and the stored rows stay as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from influence.func.transform.chain import Step, Transform
from influence.func.transform.layout import Layout
from influence.func.transform.project import NESTING, project, sketch
from influence.types import Rows


def down_project(rows: Rows, dim: int, *, stored: Transform | None = None, layout: Layout | None = None) -> Rows:
    r"""Read projected rows at a smaller dim: the corner of each row, rescaled, `(p/p') P[:p', :p']`.

    The result equals `project(dim)` with the stored seed and kind, so accuracy-against-p curves need one collection.

    Args:
        rows: projected rows; those of `per_example_grads` know their own transform and layout.
        dim: the smaller dim.
        stored: the transform the rows were collected under, where they do not know it.
        layout: the layout they were collected from, likewise.

    Returns:
        The rows at the smaller dim.

    Raises:
        ValueError: if the sketch does not nest, or something followed it.

    Example:
        >>> import torch
        >>> from influence import as_blocks, chain, down_project, per_example_grads, project
        >>> def loss_fn(params, x):
        ...     return (x @ params["w"]).square().sum(-1)
        >>> w, x = {"w": torch.randn(9, 9)}, torch.randn(2, 9)
        >>> wide, narrow = (per_example_grads(loss_fn, w, x, transform=chain(as_blocks(), project(p))) for p in (8, 4))
        >>> torch.allclose(down_project(wide, 4)["w"], narrow["w"], rtol=1e-4)
        True
    """
    stored = stored or getattr(rows, "transform", None)
    layout = layout or getattr(rows, "layout", None)
    if stored is None or layout is None:
        raise ValueError(
            "down_project: these rows do not know how they were made; pass stored=the transform they were collected "
            "under and layout=loss_fn.layout"
        )
    at = _place_of_projection(stored)
    if at is None:
        raise ValueError(f"down_project: these rows were not projected; they were collected under {stored}")
    settings = stored.steps[at].settings
    if not nests(settings):
        raise ValueError(
            f"down_project: {stored.steps[at]} does not nest; only {' and '.join(NESTING)} sketches per block do. "
            "Collect again at the smaller dim"
        )
    p, kind = settings["dim"], settings["kind"]
    if dim < 1:
        raise ValueError(f"down_project: dim must be at least 1; got {dim}")
    if dim > p:
        raise ValueError(f"down_project: the rows are stored at dim {p}, which cannot be read at the larger {dim}")
    if stored.steps[at + 1 :]:
        after = ", ".join(step.name for step in stored.steps[at + 1 :])
        raise ValueError(
            f"down_project: {after} followed the projection and cannot be undone; "
            "store the rows without it and apply it on reading"
        )
    blocks = {block.into: block for block in Transform(stored.steps[:at]).bind(layout).blocks}
    found: Rows = {}
    for name in rows:
        if name not in blocks:
            raise ValueError(f"down_project: {name!r} is no block of this layout; its blocks are {list(blocks)[:5]}")
        block, row = blocks[name], rows[name]
        expected = tuple(min(size, p) for size in block.shape)
        if tuple(row.shape[1:]) != expected:
            raise ValueError(f"down_project: row {name!r} is {list(row.shape[1:])}; stored at dim {p} it is {expected}")
        found[name] = corner(row, block.name, block.shape, p, dim, settings["seed"], kind)
    return found


def nests(sketch: Mapping[str, Any]) -> bool:
    """Whether rows of a sketch, given by its step's settings, hold its rows at every smaller dim: as their corners."""
    per_block = sketch.get("target") == "per_block" and not sketch.get("reshape_to_square")
    return per_block and sketch.get("kind") in NESTING


def corner(
    row: Float[Tensor, "n ..."], name: str, shape: tuple[int, ...], p: int, dim: int, seed: int, kind: str
) -> Float[Tensor, "n ..."]:
    """Return one block's projected rows at a smaller dim.

    Args:
        row: the block's rows, projected.
        name: the block.
        shape: the block's shape before it was projected.
        p: the dim it was projected to.
        dim: the smaller dim.
        seed: of the projection.
        kind: its kind; one that nests.

    Returns:
        What `project(dim, seed, kind)` gives.
    """
    for axis, (size, side) in enumerate(zip(shape, ("left", "right"), strict=False)):
        row = shrunk(row.movedim(axis + 1, -1), size, side, name, p, dim, seed, kind).movedim(-1, axis + 1)
    return row


def shrunk(
    row: Shaped[Tensor, "... P"], size: int, side: str, name: str, p: int, dim: int, seed: int, kind: str
) -> Shaped[Tensor, "... p"]:
    """Read the last axis of a row, a side that was `size` long and is stored at dim `p`, at a smaller dim."""
    if size <= dim:
        return row
    if size <= p:
        return row @ sketch(name, side, dim, size, seed, kind).to(row).mT
    return row[..., :dim] * math.sqrt(p / dim)


def projection(transform: Transform) -> Step | None:
    """Return the step of a transform that projects, if there is one."""
    at = _place_of_projection(transform)
    return None if at is None else transform.steps[at]


def _place_of_projection(transform: Transform) -> int | None:
    return next((place for place, step in enumerate(transform.steps) if step.kind == "sketch"), None)


def at_dim(transform: Transform, dim: int) -> Transform:
    """Return the same transform with its projection, which nests, at another dim."""
    steps = (
        project(**{**step.settings, "dim": dim}).steps if step.kind == "sketch" else (step,) for step in transform.steps
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
    if dim < small or not nests(step.settings):
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
    blocks = Transform(transform.steps[: _place_of_projection(transform)]).bind(layout).blocks
    return {block.into: block.shape for block in blocks}
