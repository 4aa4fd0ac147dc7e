"""A module as a function of its parameters' values."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.families import masks_plainly
from influence.func.unembedding import Logits, Unembedding
from influence.types import Batch, Params

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
