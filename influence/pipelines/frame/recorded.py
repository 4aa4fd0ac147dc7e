"""What an index or a run says of itself, taken as data: it may be a stranger's.

Its configuration may name code: a model that comes with some, a loss by its dotted name, arguments of other libraries
that lead to code. Whatever executes code is only ever taken from the command line of this call.
"""

import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from influence.data.sources import BUILDERS, mapping_of
from influence.func.loss.module_loss import LOSSES
from influence.pipelines.frame.config_file import FieldError, from_mapping
from influence.pipelines.frame.configs import DataConfig, LossConfig, ModelConfig, TransformConfig

C = TypeVar("C")

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


MODEL_KWARGS: Mapping[str, Callable[[Any], bool]] = {
    "attn_implementation": lambda value: value in ATTENTION,
    "dtype": lambda value: value in DTYPES,
    "torch_dtype": lambda value: value in DTYPES,
    "is_decoder": _is_bool,
    "use_cache": _is_bool,
    "tie_word_embeddings": _is_bool,
    "low_cpu_mem_usage": _is_bool,
    "use_safetensors": _is_bool,
    "variant": _is_text,
    "subfolder": _is_text,
}
"""Arguments of `from_pretrained` that are taken from an index; none of them leads to code."""
LORA = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "task_type",
)
"""Settings of fresh LoRA that are taken from an index."""
DATA_KWARGS = (
    "data_files",
    "data_dir",
    "revision",
    "field",
    "columns",
    "column_names",
    "names",
    "header",
    "sep",
    "delimiter",
    "skiprows",
    "nrows",
    "usecols",
    "index_col",
    "quotechar",
    "quoting",
    "doublequote",
    "escapechar",
    "comment",
    "thousands",
    "decimal",
    "skipinitialspace",
    "na_values",
    "keep_default_na",
    "true_values",
    "false_values",
    "encoding",
    "encoding_errors",
    "sample_by",
    "keep_linebreaks",
    "chunksize",
    "batch_size",
    "verification_mode",
)
"""Arguments of `datasets.load_dataset` that are taken from an index: how a file is read, and not where to anything is
written, nor by which builder."""


def model_of(stored: Any, where: object, trust: bool = False, kwargs: str | None = None) -> ModelConfig:
    """Return a recorded model, with as much trust as this call's command line has.

    Args:
        stored: what was recorded.
        where: whose record it is, for messages.
        trust: whether `--trust-remote-code` was typed.
        kwargs: what was typed as `--model-kwargs`, which stands in the place of what was recorded.

    Returns:
        The model.

    Raises:
        ValueError: if it names settings that may lead to code.
    """
    found = _read(ModelConfig, stored, where, "model.")
    lora = [name for name in mapping_of(found.peft_init_kwargs, "peft_init_kwargs") if name not in LORA]
    if lora:
        raise ValueError(
            f"{where} made its adapters with {lora[0]!r}, which is not taken from an index: only {', '.join(LORA)} are"
        )
    given = found.model_kwargs if kwargs is None else kwargs
    strange = [] if kwargs is not None else _strange(mapping_of(given, "model_kwargs"))
    if strange:
        raise ValueError(
            f"{where} loads its model with {given!r}, and {strange[0]!r} is not taken from an index, because such "
            "settings can lead to code of its maker's choice. If you know that they do not, type --model-kwargs "
            f"{shlex.quote(str(given))}; to do without them, --model-kwargs '{{}}'"
        )
    return replace(found, model_kwargs=given, trust_remote_code=trust)


def tokenizer_of(stored: Any, where: object, trust: bool = False) -> ModelConfig:
    """Return a recorded model, to load its tokenizer alone.

    Args:
        stored: what was recorded.
        where: whose record it is, for messages.
        trust: whether `--trust-remote-code` was typed.

    Returns:
        Model, tokenizer and revision.
    """
    found = _read(ModelConfig, stored, where, "model.")
    return ModelConfig(found.model, found.tokenizer, revision=found.revision, trust_remote_code=trust)


def _strange(kwargs: Mapping[str, Any]) -> list[str]:
    return [name for name, value in kwargs.items() if name not in MODEL_KWARGS or not MODEL_KWARGS[name](value)]


def refuse_remote_code(stored: Any, where: object) -> None:
    """Refuse a record whose model ran code of its own, where this call's command line does not allow it.

    Raises:
        ValueError: saying whose code it would be, and what to type.
    """
    found = _read(ModelConfig, stored, where, "model.")
    if found.trust_remote_code:
        place = Path(found.model).expanduser()
        source = str(place.absolute()) if place.is_dir() else f"https://huggingface.co/{found.model}"
        raise ValueError(
            f"{where} was built with --trust-remote-code: its model {found.model!r} comes with code of its maker's, "
            f"which would run here as you. An index cannot allow that. Look at the code ({source}); if you trust it, "
            "type --trust-remote-code"
        )


def loss_of(stored: Any, where: object, asked: str | None = None) -> LossConfig:
    """Return a recorded loss, or the one that was asked for by this call's command line.

    Args:
        stored: what was recorded.
        where: whose record it is, for messages.
        asked: what was typed as `--loss`.

    Returns:
        The loss.

    Raises:
        ValueError: if it is a function, which nobody asked for.
    """
    found = _read(LossConfig, stored, where, "loss.")
    if asked is not None and asked != found.loss:
        warnings.warn(
            f"the query measures {asked}, and the rows of {where} are gradients of {found.loss!r}", stacklevel=3
        )
        return LossConfig(asked, found.reduction)
    if asked is None and found.loss not in LOSSES:
        name = found.loss if re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", found.loss) else None
        if name is None:
            raise ValueError(
                f"{where} says that its loss is {found.loss!r}, which is no loss and no package.module:function: pass "
                f"--loss, one of {', '.join(LOSSES)} or a function of your own"
            )
        raise ValueError(
            f"{where} was built with a function as its loss, {name}. To measure a query by it, the module "
            f"{name.partition(':')[0]} would be imported from {os.getcwd()}, or from what is installed, and would run "
            f"here as you. An index cannot allow that. If you know that code, type --loss {name}; to measure another "
            f"loss, type --loss with a function of your own or one of {', '.join(LOSSES)}"
        )
    return found


def data_of(stored: Any, where: object, instead: str | None = None) -> DataConfig:
    """Return a recorded dataset.

    Args:
        stored: what was recorded.
        where: whose record it is, for messages.
        instead: the dataset that this call's command line names in its place; of settings that are not taken from an
            index it does without.

    Returns:
        The dataset.

    Raises:
        ValueError: if it names a builder or settings that may do more than read a dataset.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILT_IN

    found = _read(DataConfig, stored, where, "data.")
    strange = [name for name in mapping_of(found.data_kwargs) if name not in DATA_KWARGS]
    if instead is not None:
        return replace(found, dataset=instead, data_kwargs=None if strange else found.data_kwargs)
    if found.dataset in BUILT_IN and found.dataset not in BUILDERS.values():
        strange = [found.dataset]
    if strange:
        raise ValueError(
            f"{where} reads its dataset with {strange[0]!r}, which is not taken from an index: only "
            f"{', '.join(DATA_KWARGS)} are. Ask the index from Python (Attributor), or write the texts to a plain file "
            "and show them with influence explore --texts FILE"
        )
    return found


def view_of(stored: Any, where: object) -> TransformConfig:
    """Return a recorded transform; the files that it names are read as data."""
    return _read(TransformConfig, stored, where, "transform.")


def _read(kind: type[C], stored: Any, where: object, group: str) -> C:
    """Return a group of a record's configuration."""
    try:
        return from_mapping(kind, stored, group)
    except ValueError as error:
        raise FieldError(f"the configuration in {where}: {error}") from error
