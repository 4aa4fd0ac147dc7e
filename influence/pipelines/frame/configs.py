"""The settings of runs, as frozen dataclasses for the command line, YAML and JSON.

Each field is a flag of the command line, and a key of the YAML file under its group.
"""

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from influence.data.parsing import LARGEST_ROW

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "fp64", "int8", "int4"]
Stored: TypeAlias = Literal["float64", "float32", "float16", "bfloat16", "int8"]
Inversion: TypeAlias = Literal["damped", "absolute", "tikhonov", "pseudoinverse", "factored"]


def at_least(config: Any, least: float | int, *names: str, most: float | int = math.inf, above: bool = False) -> None:
    """Refuse numbers that are too small, too large or not finite; `None` is none.

    Args:
        config: the configuration.
        least: the smallest that is allowed.
        names: its fields: numbers, or lists of them.
        most: the largest.
        above: whether `least` itself is refused too.

    Raises:
        ValueError: naming the flag and the value.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            sized = abs(number) < 1 << 63 if isinstance(number, int) else math.isfinite(number)
            if sized and least <= number <= most and not (above and number == least):
                continue
            low = "" if least == -math.inf else f" above {least}" if above else f" at least {least}"
            bound = f" from {least} to {most}" if most < math.inf else low
            kind = "" if sized else " a finite number of 64 bits" + "," * bool(bound)
            raise ValueError(f"--{name.replace('_', '-')} must be{kind}{bound}; got {number}")


@dataclass(frozen=True)
class ModelConfig:
    """The model and how to load it.

    Attributes:
        model: a folder with a saved model, or a Hub id. For a saved PEFT adapter, its base model is loaded too.
        tokenizer: a folder or Hub id of a tokenizer. Default: the model's own.
        task: what the model predicts: the next token (causal) or masked tokens (masked).
        precision: dtype of the weights and of the arithmetic. auto keeps the saved dtype.
        revision: a branch, tag or commit on the Hub.
        adapter: a saved PEFT adapter to load on the model. Its matrices become the default targets.
        peft_init_kwargs: add a new LoRA adapter with these arguments, as JSON or YAML: '{r: 8, target_modules:
            [q_proj]}'.
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
    """The dataset and how it becomes tokens.

    Attributes:
        dataset: a file (.jsonl, .json, .csv, .parquet, .arrow, .txt), a folder written by save_to_disk, or a Hub id.
        split: a split, a slice of it, or a sum: 'train[:10%]+test'. Default: the only split, or train.
        subset: the configuration name of a Hub dataset.
        data_kwargs: more arguments of datasets.load_dataset, as JSON or YAML.
        max_examples: use only the first rows.
        prompt_column: the text column. Default: text, or input_ids if the data are tokenised.
        completion_column: the column with the answer to the prompt. Only the answer is labelled.
        conversation_column: a column with a list of messages (role, content). Only the assistant's turns are labelled.
        template: a YAML file with doc_to_text and doc_to_target in Jinja, or with multiple_choice.
        end_of_turn: also label the token that ends a labelled turn.
        max_length: the longest document allowed, in tokens. Default: the limit of model and tokenizer.
        truncation: cut longer documents. Otherwise they are refused.
        chunk_length: join all documents and cut them into chunks of this many tokens.
        max_tokens: keep the first documents, up to this many tokens in total.
        reward_column: a reward per example. Examples are weighted by their Dr. GRPO advantage over other answers to
            the same prompt.
        advantage_column: a column of weights, one per example.
        skip_nan_rewards: give rows with a NaN reward the weight 0. Otherwise they are refused.
        max_document_bytes: refuse documents larger than this, because tokenizing needs many times their memory.
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
    max_document_bytes: int = LARGEST_ROW

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "max_examples", "max_length", "max_tokens", "chunk_length", "max_document_bytes")


@dataclass(frozen=True)
class LossConfig:
    """The loss of each example.

    Attributes:
        loss: cross_entropy, squared_error, kl, log_odds, or your own function as package.module:function. It is
            called as function(model_output, batch) and returns one loss per example.
        reduction: sum or mean over each example's labelled positions.
        label_smoothing: label smoothing of the cross-entropy.
        reference: for kl, a folder or Hub id of the reference model. Default: the model without its adapters.
    """

    loss: str = "cross_entropy"
    reduction: Literal["sum", "mean"] = "sum"
    label_smoothing: float = 0.0
    reference: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        at_least(self, 0, "label_smoothing", most=1)


@dataclass(frozen=True)
class TransformConfig:
    """The steps from a gradient to a stored row: blocks, heads, optimizer, steps, curvature, projection, norm.

    Attributes:
        targets: globs of the parameter names to use. Default: the matrices of the repeated layers.
        exclude: globs of parameter names to leave out.
        bias: append each matrix's bias as a last column.
        heads: use one block per attention head.
        projection_dim: sketch each side of a block to this many numbers, so a row has its square per block. With
            --projection-target global the whole row has this many numbers. 0 keeps whole gradients.
        projection_kind: kind of random matrices. Default: rademacher per block, sparse for global.
        projection_target: project each block on its own (per_block), or all blocks together (global).
        projection_seed: seed of the random matrices.
        projection_signs: non-zeros per column of a sparse sketch.
        optimizer: divide gradients by an optimizer's second moments, as Adam or Adafactor do. Takes a checkpoint
            folder or an optimizer file.
        steps: more steps after the optimizer's, each as it is written in Python: 'unit_norm(eps=1e-6)'.
        optimizer_view: scale only divides. update is the full step that Adam would take on the example's gradient.
        hessian: precondition with these factors: a run of influence hessian, or its factors.h5.
        power: power of the curvature: -1 on one side of a score, or -0.5 on both.
        whiten: how to project whitened gradients: eigen keeps the strongest eigenvectors, kfac sketches at random.
            Needs --power -0.5.
        damping: added to the spectrum, relative to its mean.
        inversion: how small eigenvalues are inverted.
        missing: blocks without curvature: refuse them (error), or leave them as they are (identity).
        unit_norm: divide each row by its norm over all blocks, so that scores are cosines. This is the last step.
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
    optimizer: str | None = None
    optimizer_view: Literal["scale", "update"] = "scale"
    steps: tuple[str, ...] = ()
    hessian: str | None = None
    power: float = -0.5
    whiten: Literal["eigen", "kfac"] | None = None
    damping: float = 0.1
    inversion: Inversion = "damped"
    missing: Literal["error", "identity"] = "error"
    unit_norm: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, 0, "projection_dim", "damping")
        at_least(self, -1, "power", most=0)
        at_least(self, 1, "projection_signs")


@dataclass(frozen=True)
class RunConfig:
    """How the pass runs. Only dtype and nonfinite change results beyond rounding.

    Attributes:
        token_budget: most tokens per batch, padding included.
        max_rows: most examples per batch.
        shard_size: examples per shard. A crash loses at most the unfinished shard; processes share whole shards.
        dtype: dtype of stored rows. float16, bfloat16 and int8 also store a scale per row.
        engine: how gradients are computed. auto chooses.
        compile: compile the step. Its result is used only where it agrees with the eager one.
        device: cpu, cuda, cuda:1 or mps. With torchrun each process takes its own GPU.
        nonfinite: rows that are not finite: refuse them (error), or set them to zero and count them (zero).
        overwrite: replace what is in the run directory.
        resume: continue an unfinished run that has the same plan.
        progress: show a progress bar. Default: only in a terminal.
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

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "token_budget", "max_rows", "shard_size")


Run: TypeAlias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""A run directory, which every command takes by its place: `influence build RUN`."""
Model: TypeAlias = Annotated[ModelConfig, tyro.conf.OmitArgPrefixes]
Data: TypeAlias = Annotated[DataConfig, tyro.conf.OmitArgPrefixes]
Loss: TypeAlias = Annotated[LossConfig, tyro.conf.OmitArgPrefixes]
View: TypeAlias = Annotated[TransformConfig, tyro.conf.OmitArgPrefixes]
Execution: TypeAlias = Annotated[RunConfig, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class PassConfig:
    """Settings of every command that passes over a dataset.

    Attributes:
        run: the run directory to write.
        model: the model.
        data: the dataset.
        loss: the loss.
        transform: what is stored of each gradient.
        execution: how the pass runs.
    """

    run: Run
    model: Model
    data: Data
    _: KW_ONLY
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)
