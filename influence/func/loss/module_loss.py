"""The loss function made from a module, and what it carries for those who need more than losses."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from influence.families import masks_plainly
from influence.func.fingerprint import fingerprint
from influence.func.loss.likelihood import Likelihood, Natural, categorical, gaussian
from influence.func.loss.losses import IGNORED, cross_entropy, kl_divergence, log_odds, reduce_positions, widen
from influence.func.loss.unembedding import ENTRIES, Unembedding, by_chunks, positions_at_once
from influence.func.transform.layout import Layout
from influence.types import Batch, ExampleLoss, Params

NOT_INPUTS = ("labels", "index", "weight")
"""Keys of a dictionary batch which the model does not see."""

UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
"""What Python says of an argument that a function does not take."""


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
    try:
        return torch.func.functional_call(skeleton, dict(values), (), kwargs)
    except TypeError as error:
        unknown = UNEXPECTED.search(str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        raise ValueError(_unknown_key(skeleton, unknown[1], batch)) from error


def _unknown_key(skeleton: nn.Module, key: str, batch: Mapping[str, Any]) -> str:
    name, taken = type(skeleton).__name__, ", ".join(inspect.signature(skeleton.forward).parameters)
    if key not in batch:
        return (
            f"{name} is called as a causal language model of transformers is, with {key}=False, which its forward does "
            f"not take (it takes {taken}): let it take that too, or give the class a name with another ending"
        )
    return (
        f"the batch has {key!r}, which {name}.forward does not take (it takes {taken}): leave it out of the batch, or "
        f"name it as the model does. Only {', '.join(NOT_INPUTS)} may be in a batch without going to the model"
    )


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


def constants_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module computes with beside its parameters, by name.

    Buffers are copied: some rotary embeddings write theirs anew in every forward. They all count, whether they are
    saved with the weights (BatchNorm's statistics) or made from the config (rotary frequencies).
    """
    constants: dict[str, Any] = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    for name, layer in module.named_modules():
        state = getattr(layer, "quantisation", None)
        if state is not None:
            constants[f"{name}.quantisation"] = state
    return constants


class Logits(NamedTuple):
    """A model's logits, or what they are made of.

    Attributes:
        seen: the logits themselves, or what the unembedding sees.
        fixed: the unembedding's weight and bias; nothing where `seen` are the logits.
        cap: as in `Unembedding`.
    """

    seen: Float[Tensor, "*n d"]
    fixed: tuple[Tensor, ...] = ()
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """How many there are at a position."""
        return self.fixed[0].shape[0] if self.fixed else self.seen.shape[-1]

    def made(self, seen: Float[Tensor, "*n d"], *fixed: Tensor) -> Float[Tensor, "*n v"]:
        """Return the logits of some positions."""
        if not fixed:
            return seen
        z = F.linear(seen, *fixed)
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


class Model(NamedTuple):
    """A module as a function of its parameters.

    Attributes:
        skeleton: the module without storage.
        task: where its labels sit: `"causal"`, `"position"`, `"example"` or `"plain"`.
        unembedding: the module cut before its last map, where its logits are large.
        constants: what it computes with beside its parameters, as it was when the function was made.
        function: what else decides its outputs (`described`), as it was then: a run may leave traces in the skeleton.
    """

    skeleton: nn.Module
    task: str
    unembedding: Unembedding | None
    constants: dict[str, Any]
    function: dict[str, Any]

    def outputs(self, values: Params, batch: Batch) -> Any:
        """Return what the module returns."""
        return call_model(self.skeleton, values, batch, self.task)

    def logits(self, values: Params, batch: Batch, whole: bool = True) -> Logits:
        """Return its logits, whole or as what they are made of."""
        cut = self.unembedding
        if whole or cut is None:
            return Logits(output_logits(self.outputs(values, batch)))
        kept = {name: value for name, value in values.items() if name in cut.needed}
        fixed = tuple(values[name] for name in (cut.weight, cut.bias) if name is not None)
        return Logits(output_logits(call_model(cut.before, kept, batch, self.task)), fixed, cut.cap)


LOSSES = ("cross_entropy", "squared_error", "kl", "log_odds")


Pieces: TypeAlias = tuple[Callable[..., Tensor], list[Tensor], tuple[Tensor, ...]]
"""A loss of positions as `by_chunks` takes it: the function, what each position has of its own, and what all share."""


class ModuleLoss:
    """A pure loss function made from a module.

    Attributes:
        layout: the layout of all its parameters.
        name: which loss it is.
        reduction: `"sum"` or `"mean"`.
        frozen: the parameters that are not differentiated.
        constants: what else the model computes with, as it was when the function was made: its buffers, and the states
            of its quantised layers.
        function: which function of all these numbers the model is, as its classes, attributes and config say.
        encoder_decoder: whether two streams of positions meet in it.
        likelihood: what labels the model would give, where the loss says so; otherwise `None`.
        positional: whether `positions` can tell the loss of every position.
        family: the model's family, as its config says.
        unembedding: name of the weight that its logits are made with, where the model says.
    """

    likelihood: Likelihood | None

    def __init__(
        self,
        model: Model,
        frozen: Params,
        layout: Layout,
        loss: str | ExampleLoss,
        reduction: str,
        label_smoothing: float,
        reference: tuple[Model, Params] | None,
    ) -> None:
        """Close over everything but the parameters to differentiate."""
        self._model, self.frozen, self._reference, self._task = model, frozen, reference, model.task
        self.constants, self.function = model.constants, model.function
        self.encoder_decoder = bool(getattr(getattr(model.skeleton, "config", None), "is_encoder_decoder", False))
        self._loss, self._smoothing = loss, label_smoothing
        self.layout, self.reduction = layout, reduction
        self.name = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
        known = {"cross_entropy": categorical, "squared_error": gaussian}
        self.likelihood = known[loss]() if isinstance(loss, str) and loss in known else None
        self.positional = isinstance(loss, str)
        self.family: str | None = getattr(getattr(model.skeleton, "config", None), "model_type", None)
        self.unembedding = _head_name(model.skeleton)

    @property
    def settings(self) -> dict[str, Any]:
        """What `functionalize` was asked for, as JSON writes it; a function of the user's by its name."""
        own = callable(self._loss)
        return {"loss": self.name, "own": own, "reduction": self.reduction, "label_smoothing": self._smoothing}

    @property
    def reference(self) -> dict[str, Any] | None:
        """What the other model of a KL is, if there is one: the hash of its weights, and its function."""
        if self._reference is None:
            return None
        model, values = self._reference
        return {"weights": fingerprint({**model.constants, **values}), "function": model.function}

    @property
    def vocabulary(self) -> int | None:
        """Size of the vocabulary, where token ids alone are a batch with labels; otherwise `None`."""
        skeleton: Any = self._model.skeleton
        if self._task != "causal" or not self.positional or self._loss == "squared_error" or self.encoder_decoder:
            return None
        if getattr(skeleton, "main_input_name", None) != "input_ids" or not hasattr(skeleton, "get_input_embeddings"):
            return None
        size = getattr(getattr(skeleton.get_input_embeddings(), "weight", None), "shape", [None])[0]
        return None if size is None else int(size)

    @property
    def longest(self) -> int:
        """How many positions the model takes, as its config says."""
        said = getattr(getattr(self._model.skeleton, "config", None), "max_position_embeddings", None)
        return said if isinstance(said, int) and said > 0 else 1 << 30

    def __call__(self, params: Params, batch: Batch) -> Float[Tensor, " n"]:
        """Return one loss per example."""
        if callable(self._loss):
            return self._loss(self.outputs(params, batch), batch)
        return self.reduce(*self.positions(params, batch), batch)

    def outputs(self, params: Params, batch: Batch) -> Any:
        """Return the model's output."""
        return self._model.outputs({**self.frozen, **params}, batch)

    def positions(self, params: Params, batch: Batch) -> tuple[Float[Tensor, "n t"], Bool[Tensor, "n t"]]:
        """Return the loss of every position, and which are labelled.

        Positions index `input_ids`; a token's loss sits at the token it predicts.

        Raises:
            ValueError: if the loss is a function of the user's, which knows no positions.
        """
        whole = self._pieces(params, batch) is None
        logits, labels, labelled = self._aligned(params, batch, whole)
        losses = self._position_losses(logits, labels, labelled, batch)
        if self._task == "causal" and self._loss != "squared_error":
            losses, labelled = (F.pad(x[:, :-1], (1, 0)) for x in (losses, labelled))
        return losses, labelled

    def of_outputs(self, outputs: Any, batch: Batch) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """Return each example's summed loss from what the model returned, and its labelled positions.

        A function of the user's is taken as it is, one position each.

        Raises:
            ValueError: if the loss is no function of the outputs and the batch alone.
        """
        if callable(self._loss):
            losses = self._loss(outputs, batch)
            return losses, torch.ones(losses.shape, dtype=torch.int64, device=losses.device)
        if self._reference is not None:
            raise ValueError("loss='kl' needs its other model too: it is no function of the outputs and the batch")
        logits, labels, labelled = self._align(Logits(output_logits(outputs)), batch)
        losses = self._position_losses(logits, labels, labelled, batch)
        return weighted(losses.sum(-1), batch), labelled.sum(-1)

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
        logits, _, labelled = self._aligned(params, batch)
        outputs = logits.seen
        weight = labelled.to(outputs if outputs.dtype == torch.float64 else torch.float32)
        if self.reduction == "mean":
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        weight = weighted(weight.mT, batch).mT
        return Natural(outputs, weight)

    def note(self, params: Params, batch: Batch) -> str | None:
        """Return what a plan should say of the loss: whether logits are computed in pieces."""
        cut = self._pieces(params, batch)
        if cut is None:
            return None
        positions, size = self.labels(batch).numel(), positions_at_once(cut.vocabulary)
        return f"logits of {positions:,} × {cut.vocabulary:,} are computed {size} positions at a time"

    def _pieces(self, params: Params, batch: Batch) -> Unembedding | None:
        """Return the model's unembedding if a batch's logits are not to exist whole: too large, and of no other use."""
        at = self._model.unembedding
        if at is None or callable(self._loss) or {at.weight, at.bias} & {*params}:
            return None
        return at if self.labels(batch).numel() * at.vocabulary > ENTRIES else None

    def _aligned(
        self, params: Params, batch: Batch, whole: bool = True
    ) -> tuple[Logits, Shaped[Tensor, "n t *v"], Bool[Tensor, "n t"]]:
        """Return outputs and labels position by position, `[n, t, …]`, and which are labelled."""
        if callable(self._loss):
            raise ValueError(
                "positions need loss='cross_entropy', 'squared_error', 'kl' or 'log_odds'; this loss is a function "
                "of yours"
            )
        return self._align(self._model.logits({**self.frozen, **params}, batch, whole), batch)

    def _align(self, logits: Logits, batch: Batch) -> tuple[Logits, Shaped[Tensor, "n t *v"], Bool[Tensor, "n t"]]:
        """Return logits and labels position by position, and which are labelled."""
        labels, outputs = self.labels(batch), logits.seen
        if self._loss == "squared_error":
            if outputs.shape != labels.shape or not labels.is_floating_point() or outputs.ndim > 3:
                raise ValueError(
                    f"loss='squared_error' compares outputs {list(outputs.shape)} with labels {list(labels.shape)} of "
                    f"{labels.dtype}: they must be of one shape, [n], [n, d] or [n, t, d], and floating-point"
                )
            shape = (outputs.shape[0], *(1,) * (3 - outputs.ndim), *outputs.shape[1:])
            outputs, labels = outputs.reshape(shape), labels.reshape(shape)
            return Logits(outputs), labels, torch.ones(shape[:2], dtype=torch.bool, device=outputs.device)
        if outputs.ndim == 2:
            outputs, labels = outputs[:, None], labels[:, None]
        if outputs.ndim != 3 or labels.ndim != 2 or labels.is_floating_point():
            raise ValueError(
                f"logits {list(outputs.shape)} and labels {list(labels.shape)} of {labels.dtype} are no classification "
                "of positions; pass loss=your own (output, batch) -> [n]"
            )
        if self._task == "causal":
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return logits._replace(seen=outputs), labels, labels != IGNORED

    def _position_losses(
        self, logits: Logits, labels: Shaped[Tensor, "n t *v"], labelled: Bool[Tensor, "n t"], batch: Batch
    ) -> Float[Tensor, "n t"]:
        """Return the losses; a few positions at a time where their logits are large."""
        if self._loss == "squared_error":
            return (widen(logits.seen) - labels).square().sum(-1) / 2
        if self._reference is None:
            loss_of, each, fixed = self._of_labels(logits, labels)
        else:
            loss_of, each, fixed = self._divergence(logits, labelled, self._reference, batch)
        if labelled.numel() * logits.vocabulary <= ENTRIES:
            return loss_of(logits.seen, *each, *fixed)
        return by_chunks(loss_of, logits.seen, each, fixed, positions_at_once(logits.vocabulary))

    def _of_labels(self, logits: Logits, labels: Int[Tensor, "n t"]) -> Pieces:
        def loss_of(seen: Tensor, y: Tensor, *fixed: Tensor) -> Tensor:
            z = logits.made(seen, *fixed)
            return log_odds(z, y) if self._loss == "log_odds" else cross_entropy(z, y, self._smoothing)

        return loss_of, [labels], logits.fixed

    def _divergence(
        self, logits: Logits, labelled: Bool[Tensor, "n t"], reference: tuple[Model, Params], batch: Batch
    ) -> Pieces:
        model, values = reference
        with torch.no_grad():
            other = model.logits(values, batch, whole=not logits.fixed)
        own = len(logits.fixed)

        def loss_of(seen: Tensor, counts: Tensor, theirs: Tensor, *fixed: Tensor) -> Tensor:
            return kl_divergence(logits.made(seen, *fixed[:own]), other.made(theirs, *fixed[own:]), counts)

        return loss_of, [labelled, other.seen.reshape(*labelled.shape, -1)], (*logits.fixed, *other.fixed)

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
        seen = F.pad(mask[:, :-1], (1, 0), value=1)
        return torch.where(mask.bool() & seen.bool(), batch["input_ids"], IGNORED)

    def counts(self, batch: Batch) -> Int[Tensor, " n"]:
        """Return how many positions of each example have a loss."""
        labels = self.labels(batch)
        if labels.ndim == 1 or labels.is_floating_point():
            number = labels.shape[1] if labels.ndim == 3 else 1
            return torch.full((len(labels),), number, dtype=torch.int64, device=labels.device)
        return (labels[:, 1:] if self._task == "causal" else labels).ne(IGNORED).sum(1)

    def reduce(self, losses: Float[Tensor, "n t"], labelled: Bool[Tensor, "n t"], batch: Batch) -> Float[Tensor, " n"]:
        """Reduce position losses to the example's loss, weights included."""
        return weighted(reduce_positions(losses, labelled, self.reduction), batch)


def weighted(losses: Float[Tensor, "*t n"], batch: Batch) -> Float[Tensor, "*t n"]:
    """Return losses times the batch's weights, if it has any."""
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    return losses if weight is None else losses * weight.to(losses)


def _head_name(skeleton: Any) -> str | None:
    """Return the name of a model's output embedding, as its parameters are named: a tied one's first name."""
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return next((name for name, p in skeleton.named_parameters() if p is weight), None)
