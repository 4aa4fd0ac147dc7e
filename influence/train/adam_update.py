"""Adam's update as a transform: what it would do to the weights if an example were the whole batch."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from influence.func.loss.losses import widen
from influence.func.transform.chain import Transform
from influence.func.transform.folding import Block, Folded, apply_part, with_rows
from influence.func.transform.scale import scale_step, unfactor
from influence.train.optimizer import EPS, OptimizerState


def adam_update(state: OptimizerState) -> Transform:
    r"""Take each example's gradient to the update that Adam would make of it alone.

    $$\Gamma(g) = \frac{\hat m}{\sqrt{\hat v} + \varepsilon}, \qquad
    \hat m = \frac{\beta_1 m + (1 - \beta_1)\, g}{1 - \beta_1^{t+1}}, \quad
    \hat v = \frac{\beta_2 v + (1 - \beta_2)\, g^2}{1 - \beta_2^{t+1}}$$

    Xia et al., "LESS", arXiv 2402.04333, section 3. Not linear: whole gradients of all blocks exist at once, so it is
    for adapters and small models.

    Args:
        state: what `read_optimizer(model, checkpoint)` returns of an Adam.

    Returns:
        The transform; it follows `as_blocks()` and comes before any projection.

    Raises:
        ValueError: if the optimizer keeps no first moment, or is an amsgrad; when bound, if a parameter has no moments.
    """
    doing = [name for name, settings in state.settings.items() if settings.get("amsgrad")]
    if doing:
        raise ValueError(
            f"adam_update: {', '.join(doing[:3])} is trained with amsgrad, whose update needs the largest moment and "
            "the running one: use scale_by_optimizer, or train without amsgrad"
        )
    without = [name for name in state.entries if state.settings[name].get("betas") is None]
    if without:
        raise ValueError(f"adam_update: the source says no betas of {', '.join(without[:3])}: it has no param_groups")
    first, second = state.first(), {name: unfactor(v) for name, v in state.moments().second.items()}
    settings = {
        "first": first,
        "second": second,
        "steps": {name: entry.step for name, entry in state.entries.items()},
        "betas": {name: list(state.settings[name]["betas"]) for name in first},
        "eps": {name: float(state.settings[name].get("eps", EPS)) for name in first},
    }

    def extend(folded: Folded) -> Folded:
        missing = sorted({part.source for block in folded.blocks for part in block.parts} - set(first))
        if missing:
            raise ValueError(
                f"adam_update: no moments of {', '.join(missing)}: read them too, or leave these parameters out of the "
                "targets"
            )
        maps = {block.into: _update(state, first, second, block, folded) for block in folded.blocks}
        return with_rows(folded, lambda rows: {name: maps[name](row) for name, row in rows.items()})

    return Transform((scale_step("adam_update", settings, extend, needs_blocks=True),))


def _update(
    state: OptimizerState, first: dict[str, Tensor], second: dict[str, Tensor], block: Block, folded: Folded
) -> Callable[[Float[Tensor, "n ..."]], Float[Tensor, "n ..."]]:
    """Return the map of one block's rows."""
    name = block.parts[0].source
    m, v = (
        sum(apply_part(part, _oriented(kept[part.source], part.source, folded))[0] for part in block.parts)
        for kept in (first, second)
    )
    step = state.entries[name].step
    if step is None:
        raise ValueError(f"adam_update: the source does not say how many updates {name!r} had")
    betas, eps = state.settings[name]["betas"], float(state.settings[name].get("eps", EPS))
    one, two = (float(beta) for beta in betas)
    assert isinstance(m, Tensor)
    assert isinstance(v, Tensor)

    def update(rows: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        wide = widen(rows)  # squares leave the range of half precision
        top = (one * m.to(wide) + (1 - one) * wide) / (1 - one ** (step + 1))
        below = (two * v.to(wide) + (1 - two) * wide.square()) / (1 - two ** (step + 1))
        return (top / (torch.sqrt(below) + eps)).to(rows)

    return update


def _oriented(moment: Tensor, source: str, folded: Folded) -> Float[Tensor, "1 ..."]:
    """Return a parameter's moment in block orientation, in front of which an example would be."""
    layout = folded.layout[source]
    return layout.orient(moment.double().reshape(1, *layout.shape))
