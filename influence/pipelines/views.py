"""Views of gradients: from a configuration to a transform, with the curvature and the optimizer that it names."""

import glob
from pathlib import Path

from torch import nn

from influence import hessians
from influence.func.blocks import as_blocks, split_heads
from influence.func.normalize import unit_norm
from influence.func.precondition import precondition
from influence.func.project import project
from influence.func.transform import Transform, chain
from influence.func.whiten import eigen_whiten, kfac_whiten
from influence.hessians import Factors
from influence.pipelines.configs import TransformConfig
from influence.store.folder import run_id
from influence.types import Params


def optimizer_step(config: TransformConfig, module: nn.Module, params: Params) -> Transform:
    """Return what a configuration's optimizer makes of gradients.

    Args:
        config: the configuration, with an `optimizer`.
        module: the model that the optimizer trained.
        params: the parameters whose gradients are taken.

    Raises:
        FileNotFoundError: if there is no such optimizer.
        ValueError: if it is another model's, of an unknown kind, or has no moments of a parameter; naming each.
    """
    from influence.train import adam_update, read_optimizer, scale_by_optimizer

    assert config.optimizer is not None
    state = read_optimizer(module, config.optimizer, [glob.escape(name) for name in params])
    return adam_update(state) if config.optimizer_view == "update" else scale_by_optimizer(state)


def transform_of(config: TransformConfig, factors: Factors | None = None, scale: Transform | None = None) -> Transform:
    """Return the transform that a configuration describes.

    Curvature comes where its factors were fitted: on whole blocks, before the projection, or on projected rows.

    Args:
        config: the configuration.
        factors: those of its `hessian`, if they are loaded already.
        scale: what `optimizer_step` makes of its `optimizer`, if it has one.

    Returns:
        The transform.

    Raises:
        ValueError: if the factors belong to other rows, or options exclude one another.
    """
    if config.optimizer is None and config.optimizer_view != "scale":
        raise ValueError("optimizer_view says how an optimizer is applied: pass --optimizer, a checkpoint's folder")
    blocks = as_blocks(config.bias)
    start = chain(blocks, *([split_heads()] if config.heads else []), *([] if scale is None else [scale]))
    sketch = Transform()
    if config.projection_dim:
        sketch = project(
            config.projection_dim,
            config.projection_seed,
            config.projection_kind,
            config.projection_target,
            signs=config.projection_signs,
        )
    end = unit_norm() if config.unit_norm else Transform()
    if config.hessian is None:
        if config.whiten:
            raise ValueError(
                "whiten needs the curvature to whiten with: pass --hessian RUN, as influence hessian wrote"
            )
        return chain(start, sketch, end)
    factors = load_factors(config.hessian) if factors is None else factors
    if factors.under == start.fingerprint:
        return chain(start, *_preconditioned(config, factors, sketch), end)
    if factors.under != chain(start, sketch).fingerprint:
        raise ValueError(
            f"the factors in {config.hessian} were fitted under {factors.description}; here rows are made by "
            f"{chain(start, sketch)}. Pass the same bias, heads and projection options, or fit them under these"
        )
    if config.whiten:
        raise ValueError(
            "whiten chooses the projection by the curvature of whole blocks; these factors are of projected"
        )
    root = precondition(factors, config.power, config.damping, config.inversion, config.missing)
    return chain(start, sketch, root, end)


def _preconditioned(config: TransformConfig, factors: Factors, sketch: Transform) -> tuple[Transform, ...]:
    """Return curvature and projection of whole blocks, one inside the other where that is asked for."""
    dim = config.projection_dim or None
    if config.whiten == "eigen":
        return (eigen_whiten(factors, dim, config.damping, config.inversion, config.power, config.missing),)
    if config.whiten == "kfac":
        kind = config.projection_kind or "rademacher"
        return (kfac_whiten(factors, config.damping, dim, config.projection_seed, kind, config.missing),)
    return (precondition(factors, config.power, config.damping, config.inversion, config.missing), sketch)


def load_factors(path: str | Path) -> Factors:
    """Return the factors of a run of `hessian` or `mix`, or of a file.

    Raises:
        FileNotFoundError: if there are none.
    """
    file = Path(path) / "factors.h5" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        state = (
            "its run is not finished, or it is no run of influence hessian" if Path(path).is_dir() else "no such file"
        )
        raise FileNotFoundError(f"no factors in {path}: {state}; run influence hessian --run {path} first")
    return hessians.load(file, run_id(file.parent))
