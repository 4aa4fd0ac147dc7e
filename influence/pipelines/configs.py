"""What a run is made of, as values: frozen dataclasses which are command line, YAML and JSON at once.

Every field is a flag of the command line under its own name, and a key of the YAML file under its group's.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

C = TypeVar("C")
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "fp64", "int8", "int4"]
Stored: TypeAlias = Literal["float64", "float32", "float16", "bfloat16", "int8"]
Inversion: TypeAlias = Literal["damped", "absolute", "tikhonov", "pseudoinverse", "factored"]


@dataclass(frozen=True)
class ModelConfig:
    """The model, and how it is loaded.

    Attributes:
        model: a folder with a saved model, or a Hub id; a saved PEFT adapter names its base itself.
        tokenizer: a folder or Hub id of another tokenizer than the model's own.
        task: what the model is for; it decides where labels sit.
        precision: of the weights and of the arithmetic; auto takes what was saved.
        revision: branch, tag or commit on the Hub.
        adapter: a saved PEFT adapter to put on the model; its matrices are then the default targets.
        peft_init_kwargs: fresh LoRA instead, as JSON or YAML: '{r: 8, target_modules: [q_proj]}'.
        model_kwargs: more arguments of from_pretrained, as JSON or YAML: '{attn_implementation: eager}'.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    tokenizer: str | None = None
    task: Literal["causal", "masked"] = "causal"
    precision: Precision = "auto"
    revision: str | None = None
    adapter: str | None = None
    peft_init_kwargs: str | None = None
    model_kwargs: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The data, and how they become tokens.

    Attributes:
        dataset: a file (.jsonl, .json, .csv, .parquet, .arrow, .txt), a folder save_to_disk wrote, or a Hub id.
        split: a split, a slice or a sum of them: 'train[:10%]+test'. Default: the only one, or train.
        subset: the configuration of a Hub dataset.
        data_kwargs: more arguments of datasets.load_dataset, as JSON or YAML.
        max_examples: use the first rows only.
        prompt_column: the column with the text; default text (or input_ids where the data are tokenised).
        completion_column: what answers the prompt: only it is labelled, the prompt is context.
        conversation_column: a list of messages with role and content; only the assistant's turns are labelled.
        template: a YAML file with doc_to_text and doc_to_target (Jinja), or multiple_choice.
        end_of_turn: label the token which ends a labelled turn too.
        max_length: the longest document allowed; default what the model and the tokenizer take.
        truncation: cut longer documents instead of refusing them.
        chunk_length: cut the documents, one after the other, into chunks of so many tokens instead.
        max_tokens: keep the first documents, as many as have so many tokens together.
        reward_column: weigh each example by its Dr. GRPO advantage over the other answers to its prompt.
        advantage_column: weigh each example by this column.
        skip_nan_rewards: rows with a NaN reward weigh 0 instead of being refused.
    """

    dataset: str
    split: str | None = None
    subset: str | None = None
    data_kwargs: str | None = None
    max_examples: int | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    conversation_column: str | None = None
    template: str | None = None
    end_of_turn: bool = True
    max_length: int | None = None
    truncation: bool = False
    chunk_length: int | None = None
    max_tokens: int | None = None
    reward_column: str | None = None
    advantage_column: str | None = None
    skip_nan_rewards: bool = False


@dataclass(frozen=True)
class LossConfig:
    """What is measured of each example.

    Attributes:
        loss: cross_entropy, squared_error, kl, log_odds, or a function of your own, package.module:function, called as
            function(model_output, batch) and returning one loss per example.
        reduction: sum or mean over an example's own labelled positions.
        label_smoothing: of the cross-entropy.
        reference: for kl, a folder or Hub id of the other model; default the model without its adapters.
    """

    loss: str = "cross_entropy"
    reduction: Literal["sum", "mean"] = "sum"
    label_smoothing: float = 0.0
    reference: str | None = None


@dataclass(frozen=True)
class TransformConfig:
    """What is wanted of each gradient, in this order: blocks, heads, curvature, projection, unit norm.

    Attributes:
        targets: globs over parameter names to attribute to; default the matrices of the repeated layers.
        exclude: globs to leave out.
        bias: put each matrix's bias behind its last column.
        heads: one block per attention head.
        projection_dim: sketch each side of a block to so many numbers (a row has their square per block), or everything
            to one vector of so many with --projection-target global; 0 keeps whole gradients.
        projection_kind: of the random matrices; default rademacher per block, sparse globally.
        projection_target: project block by block, or all blocks together.
        projection_seed: another seed draws other matrices.
        projection_signs: non-zeros per column of a sparse sketch.
        hessian: factors that influence hessian wrote (a run directory or its factors.h5), to precondition with.
        power: of the curvature, -1 for one side of a score alone, -0.5 for both sides.
        whiten: project what is whitened: eigen keeps the strongest eigenvectors, kfac sketches at random; power -0.5.
        damping: what is added to the spectrum, relative to its mean.
        inversion: how small eigenvalues are met.
        missing: what to do with blocks that have no curvature: refuse, or let them through as they are.
        unit_norm: divide each row by its norm over all blocks, last: scores become cosines.
    """

    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    bias: bool = False
    heads: bool = False
    projection_dim: int = 16
    projection_kind: Literal["rademacher", "normal", "sparse", "srht"] | None = None
    projection_target: Literal["per_block", "global"] = "per_block"
    projection_seed: int = 0
    projection_signs: int = 1
    hessian: str | None = None
    power: float = -0.5
    whiten: Literal["eigen", "kfac"] | None = None
    damping: float = 0.1
    inversion: Inversion = "damped"
    missing: Literal["error", "identity"] = "error"
    unit_norm: bool = False


@dataclass(frozen=True)
class RunConfig:
    """How the pass is run. Nothing here changes a number beyond rounding, but for dtype and nonfinite.

    Attributes:
        token_budget: most positions of a batch, padding included.
        max_rows: most examples of a batch.
        shard_size: examples of a shard, the unit of progress: what a crash loses, and what ranks deal out.
        dtype: of stored rows; float16, bfloat16 and int8 keep a scale for each row.
        engine: how gradients are computed; auto plans it.
        compile: compile the step; trusted only where it agrees with the eager one.
        device: where: cpu, cuda, cuda:1, mps. Ranks take their own GPU.
        nonfinite: refuse rows that are not finite, or set them to zero and count them.
        overwrite: replace what is in the run directory.
        resume: go on with an unfinished run of the same plan; otherwise it is refused.
        progress: show a progress bar; default where there is a terminal.
        dry_run: print the plan and stop.
    """

    token_budget: int = 4096
    max_rows: int | None = None
    shard_size: int = 1024
    dtype: Stored = "float32"
    engine: Literal["auto", "batched", "vmap", "loop"] = "auto"
    compile: bool = False
    device: str = "cpu"
    nonfinite: Literal["error", "zero"] = "error"
    overwrite: bool = False
    resume: bool = True
    progress: bool | None = None
    dry_run: bool = False


Run: TypeAlias = Annotated[str, tyro.conf.arg(aliases=("-r",))]
"""The run directory. Under torchrun write `-r`: Python 3.11 takes `--run` for an abbreviation of torchrun's options."""
Model: TypeAlias = Annotated[ModelConfig, tyro.conf.OmitArgPrefixes]
Data: TypeAlias = Annotated[DataConfig, tyro.conf.OmitArgPrefixes]
Loss: TypeAlias = Annotated[LossConfig, tyro.conf.OmitArgPrefixes]
View: TypeAlias = Annotated[TransformConfig, tyro.conf.OmitArgPrefixes]
Execution: TypeAlias = Annotated[RunConfig, tyro.conf.OmitArgPrefixes]


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON can write it."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return list(value) if isinstance(value, tuple) else value


def from_mapping(kind: type[C], mapping: Mapping[str, Any], where: str = "", partial: bool = False) -> C:
    """Return a configuration from what JSON or YAML hold.

    Args:
        kind: a dataclass of this package.
        mapping: its fields; those left out have their defaults.
        where: the group, for messages.
        partial: let fields without a default be missing, for the command line to fill in.

    Returns:
        The configuration.

    Raises:
        ValueError: naming the unknown field, the missing one, or the one that holds something else.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where or kind.__name__} must be a mapping of its fields; got {mapping!r}")
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in mapping if name not in fields]
    if unknown:
        raise ValueError(
            f"unknown field {where}{unknown[0]}; {kind.__name__} has {', '.join(fields)}: correct or remove it"
        )
    hints = get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        hint, inside = hints[name], f"{where}{name}."
        if name not in mapping:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and dataclasses.is_dataclass(hint):
                values[name] = from_mapping(hint, {}, inside, partial)  # type: ignore[arg-type]
            elif required and not partial:
                raise ValueError(f"field {where}{name} is missing, and it has no default")
            elif required:
                values[name] = tyro.MISSING
        elif dataclasses.is_dataclass(hint):
            values[name] = from_mapping(hint, mapping[name], inside, partial)  # type: ignore[arg-type]
        else:
            values[name] = _checked(mapping[name], hint, f"{where}{name}")
    return kind(**values)


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Return a value that is of its type, a list as the tuple it means."""
    from beartype.door import is_bearable

    value = tuple(value) if isinstance(value, list) else value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-3, without a point, as a string
    lists = get_origin(hint) is tuple and isinstance(value, tuple)  # of which beartype looks at one item alone
    if not is_bearable(value, hint) or (lists and not all(is_bearable(item, get_args(hint)[0]) for item in value)):
        raise ValueError(f"field {name} must be {_said(hint)}; got {value!r}")
    return value


def _said(hint: Any) -> str:
    """Return a type as a user would say it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_said(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_said(get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return str(getattr(hint, "__name__", hint))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file of a configuration.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no mapping.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        read = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} must hold a mapping of fields; it holds a {type(read).__name__}")
    return dict(read)


def command_of(path: str | Path) -> str:
    """Return the command that wrote a configuration, as its first line says."""
    return Path(path).read_text().split()[2]


def write_config(path: str | Path, config: Any, command: str) -> None:
    """Write a configuration as YAML, which replays the run: `influence COMMAND --config PATH --run ANOTHER`."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    path = Path(path)
    head = f"# influence {command} --config {shlex.quote(str(path))} --run ANOTHER_RUN\n"
    temporary = path.with_suffix(".partial")
    temporary.write_text(head + yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True))
    temporary.replace(path)
