r"""Labels: whose loss the output gradients of a curvature fit belong to.

| labels | cotangents of the outputs | what `Σ G G^T` estimates |
|---|---|---|
| `"data"` | the loss itself | the empirical Fisher |
| `"sampled"` | `√w ∇nll(z, ŷ)`, `ŷ ~ p(z)`, a few draws | the Fisher, which is the Gauss-Newton matrix |
| `"exact"` | `√w r_c` at one position, for every position and class | the same, without sampling |

`w` is the weight of a position in its example's loss, `1` or `1/length`: with its root the sum is the curvature of the
loss *as reduced*.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.func.loss.likelihood import Likelihood, Natural, keyed_uniform
from influence.func.transform.project import key_of
from influence.types import Batch, LossFn, Params

SOURCES = ("sampled", "data", "exact")


class Labels(NamedTuple):
    """Where labels come from.

    Attributes:
        source: `"sampled"`, `"data"` or `"exact"`.
        seed: another seed draws other labels.
        draws: draws per position.
    """

    source: str = "sampled"
    seed: int = 0
    draws: int = 1

    def check(self, loss_fn: LossFn) -> None:
        """Refuse what is no source of labels, or cannot be one for this loss.

        Raises:
            ValueError: saying what is missing.
        """
        if self.source not in SOURCES:
            raise ValueError(f"labels must be one of {', '.join(SOURCES)}; got {self.source!r}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1; got {self.draws}")
        if self.source != "data" and getattr(loss_fn, "likelihood", None) is None:
            raise ValueError(
                f"labels={self.source!r} needs a loss with a likelihood, and this one has none (loss_fn.likelihood); "
                "use functionalize(loss='cross_entropy' or 'squared_error'), or labels='data'"
            )

    def head(self, loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Tensor, Natural | None]:
        """Return what cotangents are pulled back from, and what the likelihood says of it."""
        if self.source == "data":
            return loss_fn(params, batch), None
        natural = loss_fn.natural(params, batch)  # type: ignore[attr-defined]
        return natural.outputs, natural

    def cotangents(
        self, loss_fn: LossFn, said: Natural | None, out: Tensor, index: Int[Tensor, " n"] | None
    ) -> Iterator[Tensor]:
        """Yield every cotangent; the sum over them of what each brings is the batch's.

        Raises:
            ValueError: if labels are to be drawn and nothing says for which rows of the dataset.
        """
        if said is None:
            yield torch.ones_like(out)
            return
        likelihood: Likelihood = loss_fn.likelihood  # type: ignore[attr-defined]
        outputs, root = out.detach(), check_weight(said.weight.detach()).sqrt()
        if self.source == "exact":
            live = (root != 0).any(0).nonzero().flatten().tolist()
            if not live:
                yield torch.zeros_like(outputs)
                return
            for root_of_class in likelihood.expectation(outputs):
                weighted = (root[..., None] * root_of_class).to(outputs.dtype)
                for t in live:
                    cotangent = torch.zeros_like(weighted)
                    cotangent[:, t] = weighted[:, t]
                    yield cotangent
            return
        if index is None:
            raise ValueError(_NO_INDEX)
        rows, place = index.to(outputs.device), rank(root)
        for draw in range(self.draws):
            key = key_of("labels", self.seed, draw)
            labels = likelihood.sample(outputs, partial(keyed_uniform, key, rows, place))
            gradient = likelihood.gradient(outputs, labels)
            yield (gradient * root[..., None] / self.draws**0.5).to(outputs.dtype)


_NO_INDEX = (
    "labels='sampled' draws each example's labels from its own key, so a batch must say which rows of the dataset it "
    "holds: pass a dictionary with 'index', int64 [n] (or use labels='data' or 'exact')"
)


def index_of(batch: Batch, n: int) -> Int[Tensor, " n"] | None:
    """Return which rows of the dataset a batch says that it holds; `None` where it does not say.

    Raises:
        ValueError: if its `index` is something else.
    """
    if not isinstance(batch, Mapping) or "index" not in batch:
        return None
    index: Any = batch["index"]
    whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
    if not whole or index.shape != (n,):
        raise ValueError(_NO_INDEX)
    return index.long()


def rank(root: Float[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """Return each position's number among its example's labelled ones: the same with or without padding."""
    return ((root != 0).cumsum(-1) - 1).clamp_min(0)


def check_weight(weight: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
    """Refuse negative weights.

    Raises:
        ValueError: if there is one.
    """
    if bool((weight < 0).any()):
        raise ValueError(
            "a negative weight turns a likelihood upside down: there is no label to draw and no positive curvature. "
            "Use labels='data', or leave the weights out"
        )
    return weight
