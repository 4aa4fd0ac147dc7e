"""The loss function made from a module, and what it carries for those who need more than losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from influence.families import masks_plainly
from influence.func.layout import Layout
from influence.func.likelihood import Likelihood, Natural, categorical, gaussian
from influence.func.losses import IGNORED, cross_entropy, kl_divergence, log_odds, reduce_positions, widen
from influence.types import Batch, ExampleLoss, Params

LOSSES = ("cross_entropy", "squared_error", "kl", "log_odds")
NOT_INPUTS = ("labels", "index", "weight")
"""Keys of a dictionary batch which the model does not see."""


def call_model(skeleton: nn.Module, values: Mapping[str, Tensor], batch: Batch, task: str) -> Any:
    """Run a skeleton on a batch with given parameter values."""
    if not isinstance(batch, Mapping):
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        return torch.func.functional_call(skeleton, dict(values), (inputs,))
    kwargs = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    if task == "causal":
        kwargs["use_cache"] = False
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and torch._C._functorch.is_functorch_wrapped_tensor(mask):
        config = getattr(skeleton, "config", None)
        if config is not None and masks_plainly(config):
            dtype = next(p.dtype for p in values.values() if p.is_floating_point())
            kwargs["attention_mask"] = ready_mask(mask, task == "causal", dtype)
    return torch.func.functional_call(skeleton, dict(values), (), kwargs)


def ready_mask(mask: Int[Tensor, "n s"], causal: bool, dtype: torch.dtype) -> Float[Tensor, "n 1 s s"]:
    """Return a padding mask as an additive 4-D one: under `vmap`, transformers cannot build it itself."""
    s = mask.shape[1]
    visible = mask.bool()[:, None, None, :].expand(-1, 1, s, s)
    if causal:
        visible = visible & torch.ones(s, s, dtype=torch.bool, device=mask.device).tril()
    blocked = torch.zeros(visible.shape, dtype=dtype, device=mask.device)
    return blocked.masked_fill(~visible, torch.finfo(dtype).min)


def output_logits(output: Any) -> Tensor:
    """Return the logits of a model's output."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__} without logits; pass loss=your own (output, batch) -> [n]"
        )
    return logits


class ModuleLoss:
    """A pure loss function made from a module.

    Attributes:
        layout: the layout of all its parameters.
        name: which loss it is.
        reduction: `"sum"` or `"mean"`.
        frozen: the parameters that are not differentiated.
        encoder_decoder: whether two streams of positions meet in it.
        likelihood: what labels the model would give, where the loss says so; otherwise `None`.
    """

    likelihood: Likelihood | None

    def __init__(
        self,
        skeleton: nn.Module,
        frozen: Params,
        layout: Layout,
        loss: str | ExampleLoss,
        reduction: str,
        label_smoothing: float,
        reference: Callable[[Batch], Tensor] | None,
        task: str,
    ) -> None:
        """Close over everything but the parameters to differentiate."""
        self._skeleton, self.frozen, self._reference, self._task = skeleton, frozen, reference, task
        self.encoder_decoder = bool(getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False))
        self._loss, self._smoothing = loss, label_smoothing
        self.layout, self.reduction = layout, reduction
        self.name = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
        known = {"cross_entropy": categorical, "squared_error": gaussian}
        self.likelihood = known[loss]() if isinstance(loss, str) and loss in known else None

    @property
    def settings(self) -> dict[str, Any]:
        """What `functionalize` was asked for, as JSON writes it; a function of the user's by its name."""
        own = callable(self._loss)
        return {"loss": self.name, "own": own, "reduction": self.reduction, "label_smoothing": self._smoothing}

    def __call__(self, params: Params, batch: Batch) -> Float[Tensor, " n"]:
        """Return one loss per example."""
        if callable(self._loss):
            return self._loss(self.outputs(params, batch), batch)
        return self.reduce(*self.positions(params, batch), batch)

    def outputs(self, params: Params, batch: Batch) -> Any:
        """Return the model's output."""
        return call_model(self._skeleton, {**self.frozen, **params}, batch, self._task)

    def positions(self, params: Params, batch: Batch) -> tuple[Float[Tensor, "n t"], Bool[Tensor, "n t"]]:
        """Return the loss of every position, and which are labelled.

        Positions index `input_ids`; a token's loss sits at the token it predicts.

        Raises:
            ValueError: if the loss is a function of the user's, which knows no positions.
        """
        outputs, labels, labelled = self._aligned(params, batch)
        losses = self._position_losses(outputs, labels, labelled, batch)
        if self._task == "causal" and self._loss != "squared_error":
            losses, labelled = (torch.nn.functional.pad(x[:, :-1], (1, 0)) for x in (losses, labelled))
        return losses, labelled

    def natural(self, params: Params, batch: Batch) -> Natural:
        """Return what the likelihood sees: outputs, and the weight of each position in the example's loss.

        Raises:
            ValueError: if the loss has no likelihood.
        """
        if self.likelihood is None:
            what = "this loss is a function of yours" if callable(self._loss) else f"loss={self._loss!r}"
            raise ValueError(
                f"{what} has no likelihood, so no labels can be drawn from it and it has no Gauss-Newton matrix; "
                "use functionalize(loss='cross_entropy' or 'squared_error'), or labels='data'"
            )
        outputs, _, labelled = self._aligned(params, batch)
        weight = labelled.to(outputs if outputs.dtype == torch.float64 else torch.float32)
        if self.reduction == "mean":
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        weight = weighted(weight.mT, batch).mT
        return Natural(outputs, weight)

    def _aligned(
        self, params: Params, batch: Batch
    ) -> tuple[Float[Tensor, "n t v"], Shaped[Tensor, "n t *v"], Bool[Tensor, "n t"]]:
        """Return outputs and labels position by position, and which are labelled."""
        if callable(self._loss):
            raise ValueError(
                "positions need loss='cross_entropy', 'squared_error', 'kl' or 'log_odds'; this loss is a function "
                "of yours"
            )
        outputs, labels = output_logits(self.outputs(params, batch)), self.labels(batch)
        if self._loss == "squared_error":
            if outputs.shape != labels.shape or not labels.is_floating_point() or outputs.ndim > 3:
                raise ValueError(
                    f"loss='squared_error' compares outputs {list(outputs.shape)} with labels {list(labels.shape)} of "
                    f"{labels.dtype}: they must be of one shape, [n], [n, d] or [n, t, d], and floating-point"
                )
            shape = (outputs.shape[0], *(1,) * (3 - outputs.ndim), *outputs.shape[1:])
            outputs, labels = outputs.reshape(shape), labels.reshape(shape)
            return outputs, labels, torch.ones(shape[:2], dtype=torch.bool, device=outputs.device)
        if outputs.ndim == 2:
            outputs, labels = outputs[:, None], labels[:, None]
        if outputs.ndim != 3 or labels.ndim != 2 or labels.is_floating_point():
            raise ValueError(
                f"logits {list(outputs.shape)} and labels {list(labels.shape)} of {labels.dtype} are no classification "
                "of positions; pass loss=your own (output, batch) -> [n]"
            )
        if self._task == "causal":
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return outputs, labels, labels != IGNORED

    def _position_losses(
        self,
        outputs: Float[Tensor, "n t v"],
        labels: Shaped[Tensor, "n t *v"],
        labelled: Bool[Tensor, "n t"],
        batch: Batch,
    ) -> Float[Tensor, "n t"]:
        if self._loss == "squared_error":
            return (widen(outputs) - labels).square().sum(-1) / 2
        if self._loss == "kl":
            assert self._reference is not None
            return kl_divergence(outputs, self._reference(batch).reshape(outputs.shape), labelled)
        if self._loss == "log_odds":
            return log_odds(outputs, labels)
        return cross_entropy(outputs, labels, self._smoothing)

    def labels(self, batch: Batch) -> Shaped[Tensor, "n *t"]:
        """Return a batch's labels; a causal LM's default to its unpadded tokens that are not predicted from padding.

        Raises:
            ValueError: if there are none.
        """
        if not isinstance(batch, Mapping):
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise ValueError("the batch has no labels: pass (x, y), or a dictionary with 'labels'")
            return batch[1]
        if "labels" in batch:
            return batch["labels"]
        if self._task != "causal":
            raise ValueError(f"the batch has no 'labels'; it has {', '.join(map(str, batch))}")
        mask = batch.get("attention_mask")
        if mask is None:
            return batch["input_ids"]
        seen = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
        return torch.where(mask.bool() & seen.bool(), batch["input_ids"], IGNORED)

    def reduce(self, losses: Float[Tensor, "n t"], labelled: Bool[Tensor, "n t"], batch: Batch) -> Float[Tensor, " n"]:
        """Reduce position losses to the example's loss, weights included."""
        return weighted(reduce_positions(losses, labelled, self.reduction), batch)


def weighted(losses: Float[Tensor, "*t n"], batch: Batch) -> Float[Tensor, "*t n"]:
    """Return losses times the batch's weights, if it has any."""
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    return losses if weight is None else losses * weight.to(losses)
