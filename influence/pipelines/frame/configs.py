"""What a run is made of, as values: frozen dataclasses which are command line, YAML and JSON at once.

Every field is a flag of the command line under its own name, and a key of the YAML file under its group's.
"""

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from influence.data.parsing import LARGEST_ROW
from influence.index.faiss_search import FaissConfig

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
        if value is None or value is tyro.MISSING:
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
        max_document_bytes: refuse larger documents, which may take more memory than there is.
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

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        at_least(self, 0, "label_smoothing", most=1)


@dataclass(frozen=True)
class TransformConfig:
    """What is made of each gradient, in this order: blocks, heads, optimizer, steps, curvature, projection, unit norm.

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
        optimizer: a checkpoint's folder or an optimizer's file: divide by its second moments, as Adam or Adafactor do.
        steps: more steps after the optimizer's, each as it is written in Python: 'unit_norm(eps=1e-6)'.
        optimizer_view: scale divides alone; update is the whole step that Adam would make of the example's gradient.
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

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "token_budget", "max_rows", "shard_size")


@dataclass(frozen=True)
class NeighbourConfig:
    """FAISS, which is faster where a miss may be missed.

    Attributes:
        index_factory: FAISS's own description: Flat is exact, IVF1024,Flat looks into nprobe of 1024 cells,
            IVF1024,PQ64 stores 64 bytes per row; default no FAISS: all rows are scanned, which is exact.
        mmap_index: leave the FAISS index on disk and map it, instead of holding it in memory.
        max_train_examples: rows that cells and codes are learned from; default as many as FAISS looks at.
        batch_size: rows added at a time.
        num_shards: cut it into so many files.
        nprobe: cells that are looked into; more are more exact.
    """

    index_factory: str | None = None
    mmap_index: bool = False
    max_train_examples: int | None = None
    batch_size: int = 1024
    num_shards: int = 1
    nprobe: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        at_least(self, 1, "max_train_examples", "batch_size", "num_shards", "nprobe")

    def made(self) -> FaissConfig | None:
        """Return what a search takes; `None` scans."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return None if self.index_factory is None else FaissConfig(**fields)


Run: TypeAlias = Annotated[str, tyro.conf.arg(aliases=("-r",))]
"""The run directory. Under torchrun write `-r`: Python 3.11 takes `--run` for an abbreviation of torchrun's options."""
Model: TypeAlias = Annotated[ModelConfig, tyro.conf.OmitArgPrefixes]
Data: TypeAlias = Annotated[DataConfig, tyro.conf.OmitArgPrefixes]
Loss: TypeAlias = Annotated[LossConfig, tyro.conf.OmitArgPrefixes]
View: TypeAlias = Annotated[TransformConfig, tyro.conf.OmitArgPrefixes]
Execution: TypeAlias = Annotated[RunConfig, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class PassConfig:
    """What every command takes that passes over a dataset.

    Attributes:
        run: the run directory to write.
        model: the model.
        data: the dataset.
        loss: the loss.
        transform: what is wanted of each gradient.
        execution: the pass.
    """

    run: Run
    model: Model
    data: Data
    _: KW_ONLY
    loss: Loss = field(default_factory=LossConfig)
    transform: View = field(default_factory=TransformConfig)
    execution: Execution = field(default_factory=RunConfig)
