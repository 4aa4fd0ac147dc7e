r"""Embeddings: `embedding(ids, W)`. The row of a token is the sum of the output gradients where it stands.

$$G_n = \sum_s e_{\mathrm{id}_{ns}} g_{ns}^\top$$

with one-hot vectors `e`, which are never formed. Torch gives the padding token no gradient, and so does this.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from influence.func.engine.batched import Contributions, Factor, Family, Feed, Route, Scene, Use, outer_products
from influence.func.engine.ops.linear import Dense, late, tokens
from influence.func.engine.trace import Call, Expr, TracedUse, base_name, known_axis, positions
from influence.func.loss.losses import widen
from influence.func.transform.folding import Side


def arguments(call: Call) -> dict[str, Any]:
    """Return the arguments by name."""
    return call.arguments(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"))


def serves(use: TracedUse) -> bool:
    """Whether the table is a parameter that is only looked up in."""
    named = arguments(use.call)
    plain = use.call.func is F.embedding and base_name(named["weight"]) is not None
    return plain and not _rescales(named) and use.axis(named["input"]) is not None


def _rescales(named: dict[str, Any]) -> bool:
    return bool(named["max_norm"] or named["scale_grad_by_freq"])


def layout(use: TracedUse) -> dict[str, dict[str, Any]]:
    """Return what a use tells of its table."""
    return {name: {"family": "embedding"} for name in use.call.params}


def see(call: Call, route: Route, scene: Scene) -> Use:
    """Return one use: tokens came in, on the left side."""
    named = arguments(call)
    ids, n, keep = named["input"], scene.n, scene.keep
    axis, out_axis = known_axis(route.inputs[call.place(ids)]), known_axis(route.outputs[0])
    name = base_name(named["weight"])
    assert name is not None
    real = tokens(ids[..., None], axis, scene, name)
    arranged = positions(ids[..., None], axis, n, keep)[..., 0]
    return _looked_up(name, arranged, named["padding_idx"], real, lambda g: positions(g, out_axis, n, keep), scene)


def _looked_up(
    name: str,
    ids: Int[Tensor, "n ..."],
    padding_idx: int | None,
    live: Bool[Tensor, "n s"] | None,
    arrange: Callable[[Tensor], Tensor],
    scene: Scene,
) -> Use:
    """Return the use of a table at tokens `[n, s]`, or `[n, s, r]` with positions kept."""
    table = scene.values[name]
    if padding_idx is not None:
        others = ids != padding_idx % table.shape[0]
        live = others if live is None else live & others

    def arranged(g: Tensor) -> Tensor:
        return arrange(g) if live is None else arrange(g) * live[..., None]

    known = OneHot(ids, table.new_ones(()).expand(table.shape[0]), live)
    return Use(name, None, known, not scene.params[name].transposed, arranged, late)


FAMILY = Family("embedding", ("embedding",), serves, see, layout=layout)


def table_pieces(source: Expr, grad: Float[Tensor, "n ..."], scene: Scene) -> Contributions | None:
    """Feed the gradient of what every example looks up alike (positions) to its table; `None` if it is not that."""
    if source.func is not F.embedding or scene.keep is not None:
        return None
    named = arguments(Call(source.func, list(source.leaves), source.spec))
    name = base_name(named["weight"])
    if name is None or _rescales(named):
        return None
    n = grad.shape[0]
    ids = named["input"].reshape(1, -1).expand(n, -1)
    use = _looked_up(name, ids, named["padding_idx"], None, lambda g: g.reshape(n, ids.shape[1], -1), scene)
    saved, backward = outer_products(use, scene)
    return backward(saved, [grad])


class OneHot(NamedTuple):
    """One-hot tokens, never formed: a side is looked up, and their second moment is exactly diagonal.

    Attributes:
        ids: the tokens, `[n, s]` or, with positions kept, `[n, s, r]`.
        scale: what each token's entry is.
        live: which positions count; `None` for all.
    """

    ids: Int[Tensor, "n *s"]
    scale: Float[Tensor, " v"]
    live: Bool[Tensor, "n *s"] | None = None

    @property
    def memory(self) -> Tensor:
        """The tokens."""
        return self.ids

    def forget(self) -> "OneHot":
        """Return the factor: tokens are small."""
        return self

    def through(self, side: Side) -> Tensor:
        """Return the columns of a side's matrix at the tokens."""
        assert side.matrix is not None
        whole = F.pad(side.matrix, (side.start, side.source - side.stop))
        return F.embedding(self.ids, whole.mT)

    def meet(
        self, side: Side, memory: Tensor, other: Float[Tensor, "n ... q"], constant: Tensor | None = None
    ) -> Float[Tensor, "n ... q"]:
        """Return `Σ_s (side onehot_s) ⊗ other_s`, `[n, v, q]`, by scattering; an embedding has no bias."""
        assert constant is None
        out = other.new_zeros(*other.shape[:-2], self.scale.shape[0], other.shape[-1])
        return side.apply(out.scatter_add(-2, memory[..., None].expand_as(other), other).mT).mT

    def factor(self, side: Side, bias: Feed | None, max_side: int) -> Factor:
        """Return the factor behind a side: still tokens, unless the side is a matrix."""
        live = torch.ones_like(self.ids, dtype=torch.bool) if self.live is None else self.live
        if side.dense:
            return Dense(self.through(side) * live[..., None], live, side.size > max_side)
        return OneHot(self.ids, side.apply(self.scale), live)

    @property
    def positions(self) -> int:
        """How many positions count."""
        return self.ids.numel() if self.live is None else int(self.live.sum())

    def _squares(self) -> Float[Tensor, "n s"]:
        squares = widen(self.scale).square()[self.ids]
        return squares if self.live is None else squares * self.live

    def gram(self, weight: Float[Tensor, " n"] | None = None) -> Shaped[Tensor, "d *d"]:
        """Return the weighted counts of tokens: the diagonal."""
        squares = self._squares() if weight is None else self._squares() * weight[:, None]
        return squares.new_zeros(self.scale.shape).index_add(0, self.ids.flatten(), squares.flatten())

    def energy(self) -> Float[Tensor, " n"]:
        """Return each example's sum of squares."""
        return self._squares().sum(1)
