"""`load` opens a model from a folder or the Hub, in a precision, with adapters."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from influence.models.quantised import make_pure

PRECISIONS: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
QUANTISED = ("int8", "int4")
TASKS: Mapping[str, tuple[str, str | None]] = {
    "causal": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "masked": ("AutoModelForMaskedLM", None),
    "sequence": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "image": ("AutoModelForImageClassification", None),
}
"""The tasks of models: transformers' class and PEFT's name for each."""
LEAD_TO_CODE = ("trust_remote_code", "weights_only", "allow_all_kernels", "code_revision")
"""Arguments of `from_pretrained` that would run code from the model's files; `trust_remote_code=` alone allows that."""


def load(
    path: str | Path,
    *,
    task: str = "causal",
    precision: str = "auto",
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    peft_init_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model, in eval mode.

    Args:
        path: a folder or a Hub id; of an adapter too, which names its base.
        task: `"causal"`, `"seq2seq"`, `"masked"`, `"sequence"` (classification), `"token"`, `"image"`.
        precision: `"auto"` (as saved), `"fp32"`, `"bf16"`, `"fp16"`, `"fp64"`; `"int8"` and `"int4"` by bitsandbytes.
        revision: branch, tag or commit of `path` on the Hub.
        model_kwargs: more arguments of transformers' `from_pretrained`.
        adapter: folder or Hub id of a saved PEFT adapter.
        peft_init_kwargs: settings of fresh LoRA, those of `peft.LoraConfig`. It begins at zero, so the gradients of its
            `A` are zero; `init_lora_weights=False` draws `B` too.
        seed: the seed of a fresh adapter.
        device: the device; by default the one that transformers chooses.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model; what requires gradients is as transformers and PEFT leave it.

    Raises:
        ValueError: if an option is unknown or two exclude each other, the checkpoint lacks weights that the task
            needs, or the adapter was made for another base.
        ImportError: if bitsandbytes or PEFT is needed and missing.
        FileNotFoundError: if a folder is missing.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if adapter is not None and peft_init_kwargs is not None:
        raise ValueError("adapter= loads a saved adapter, peft_init_kwargs= makes a fresh one: give one of them")
    taken = [name for name in LEAD_TO_CODE if name in (model_kwargs or {})]
    if taken:
        raise ValueError(
            f"model_kwargs has {taken[0]!r}, by which a model's files may run: pass trust_remote_code=True"
        )
    path = _existing(path)
    at, found = revision, _base_of(path, revision)
    if found is not None:
        base, revision = found
        if adapter is not None or peft_init_kwargs is not None:
            raise ValueError(f"{path} is an adapter (of {base}) itself: load it alone, or give its base as path=")
        try:
            path, adapter = _existing(base), path
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: {path} names it as its base; load(base, adapter={path!r})") from error
    if adapter is not None or peft_init_kwargs is not None:
        _require("peft", "an adapter needs PEFT", "peft")
    settings = {**_precision_arguments(precision, device, model_kwargs or {}), **(model_kwargs or {})}
    source = {"revision": revision, "trust_remote_code": trust_remote_code, **settings}
    model: Any = _whole(path, task, source)
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = make_pure(model, model.dtype)
    elif device is not None:
        model = model.to(device)
    if adapter is not None:
        model = _with_saved(model, path, _existing(adapter), at if found is not None else None)
    if peft_init_kwargs is not None:
        model = _with_fresh(model, {"task_type": TASKS[task][1], **peft_init_kwargs}, seed)
    return model.eval()


def _whole(path: str, task: str, source: Mapping[str, Any]) -> nn.Module:
    """Return a model, refused if a weight would be random or if it doesn't fit the task."""
    try:
        kind = getattr(transformers, TASKS[task][0])
        model, report = kind.from_pretrained(path, output_loading_info=True, **source)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers has no {TASKS[task][0]} for {path}: give another task= than {task!r}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} has no weights for {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}: they would be "
            f"random; it is a checkpoint for another task than {task!r}"
        )
    sees_all = any(getattr(module, "is_causal", True) is False for module in model.modules())
    if task == "causal" and sees_all and getattr(model.config, "is_decoder", True) is False:
        raise ValueError(
            f"{path} sees the tokens that it is to predict: it is no causal model; load it with task='masked', or with "
            "model_kwargs={'is_decoder': True} if it was trained as a decoder"
        )
    return model


def _existing(path: str | Path) -> str:
    """Return a Hub id, or the path of a folder, which must exist."""
    place = Path(path).expanduser()
    local = isinstance(path, Path) or place.is_absolute() or str(path).startswith((".", "~"))
    if local and not place.is_dir():
        raise FileNotFoundError(f"there is no folder {place}; give a folder with a saved model, or a Hub id")
    return str(place) if place.is_dir() else str(path)


def _base_of(path: str, revision: str | None) -> tuple[str, str | None] | None:
    """Return the base of a saved adapter and its revision; `None` if the path holds a model."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if (Path(path) / "config.json").exists():
        return None
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    _require("peft", f"{path} is an adapter, which needs PEFT", "peft")
    import peft

    config = peft.PeftConfig.from_pretrained(path, revision=revision)
    if not config.base_model_name_or_path:
        raise ValueError(f"{path} is an adapter that does not name its base: load(base, adapter={path!r})")
    return str(config.base_model_name_or_path), config.revision


def _require(package: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{what}: pip install 'influence[{extra}]'")


def _precision_arguments(precision: str, device: str | torch.device | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a precision."""
    if precision not in (*PRECISIONS, *QUANTISED):
        raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, *QUANTISED))}; got {precision!r}")
    twice = {"dtype", "torch_dtype", "quantization_config"} & {*given}
    if twice and precision != "auto":
        raise ValueError(f"precision={precision!r} and model_kwargs' {', '.join(sorted(twice))} say the same: give one")
    if precision in PRECISIONS:
        return {} if twice else {"dtype": PRECISIONS[precision]}
    _require("bitsandbytes", f"precision={precision!r} needs bitsandbytes", "bnb")
    config = (
        transformers.BitsAndBytesConfig(load_in_8bit=True)
        if precision == "int8"
        else transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    )
    place = {} if device is None or "device_map" in given else {"device_map": {"": device}}
    return {"quantization_config": config, "dtype": "auto", **place}


def _with_saved(model: nn.Module, path: str, adapter: str, revision: str | None) -> nn.Module:
    """Put a saved adapter on its base."""
    import peft

    config = peft.PeftConfig.from_pretrained(adapter, revision=revision)
    made_for = config.base_model_name_or_path or "an unnamed base"
    _refuse_megatron(config, f"the adapter {adapter}")
    refusal = f"the adapter {adapter} was made for {made_for} and does not fit {path}"
    saved = peft.load_peft_weights(adapter, device="cpu", revision=revision)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is an error below
            adapted = peft.PeftModel.from_pretrained(
                model, adapter, config=config, autocast_adapter_dtype=False, revision=revision
            )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{refusal}: {' '.join(str(error).split())[:300]}") from error  # a line for each weight
    own = peft.get_peft_model_state_dict(adapted)
    wrong = {name for name in {*saved, *own} if name not in own or name not in saved}
    if wrong:
        raise ValueError(f"{refusal}: one of them lacks {', '.join(sorted(wrong)[:5])} and {len(wrong)} weights in all")
    if Path(made_for).name != Path(path).name:
        warnings.warn(
            f"the adapter {adapter} fits {path}, but was made for {made_for}: check that they are the same weights",
            stacklevel=3,
        )
    return adapted


def _refuse_megatron(config: Any, what: str) -> None:
    """Refuse settings that make PEFT import a module named in them."""
    if getattr(config, "megatron_config", None):
        raise ValueError(f"{what} has a megatron_config, for which PEFT imports the module that it names: not loaded")


def _with_fresh(model: nn.Module, settings: Mapping[str, Any], seed: int) -> nn.Module:
    """Put fresh LoRA on a model: `A` uniform in `±1/√i`, as a linear layer's weight, and `B` zero.

    PEFT draws from the global generator. So its adapters are made without values, on the meta device, and drawn here.
    """
    import peft

    refusal = "peft_init_kwargs makes plain LoRA of linear layers; make another adapter with PEFT and give adapter=; {}"
    config = peft.LoraConfig(**settings)
    _refuse_megatron(config, "peft_init_kwargs")
    if config.init_lora_weights not in (True, False):
        raise ValueError(refusal.format(f"init_lora_weights={config.init_lora_weights!r} is another"))
    adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(seed)
    for path, layer in adapted.named_modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            if not p.is_meta:
                continue
            owner, _, kind = path.rpartition(".lora_")
            if kind[:2] not in ("A.", "B."):
                raise ValueError(refusal.format(f"{path}.{name} has other initial values"))
            bound = 0.0 if kind[0] == "B" and config.init_lora_weights else p[0].numel() ** -0.5
            values = bound * (2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1)
            base = adapted.get_submodule(owner).get_base_layer().weight
            setattr(layer, name, nn.Parameter(values.to(base.device, base.dtype)))
    return adapted
