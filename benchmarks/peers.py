"""Other libraries, each driven through its own public pieces in the leanest way that we found in its code."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.models import Workload, twin


def importable(package: str) -> bool:
    """Whether a peer is installed here, without importing it."""
    return importlib.util.find_spec(package) is not None


def bergson(work: Workload, dim: int) -> tuple[Callable[[], dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Bergson's `InMemoryCollector`, one batch at a time as its `CollectorComputer` does it.

    Timed: registering its hooks, its own forward and backward (`fwd_bwd_factory`), its hooks, and `process_batch`,
    which copies the rows into its buffer in memory. Not timed, in its favour: tokenising, padding, progress bars,
    files, and the generation of its projection matrices. As in its own set-up, all that requires a gradient is the
    embedding, and the modules are those of `model.base_model`, without the head.

    Returns:
        A step that returns the rows of its buffer as `{block: [n, p, p]}`, and the matrices it drew.
    """
    with torch_settings_kept():
        from bergson import GradientProcessor, IndexConfig, InMemoryCollector
        from bergson.collector.collector import fwd_bwd_factory
        from datasets import Dataset

    ids = work.batch["input_ids"]
    embedding = next(name for name, p in work.model.named_parameters() if p is work.model.get_input_embeddings().weight)
    model = twin(work.model, {embedding})
    prefix = f"{model.base_model_prefix}."
    config = IndexConfig(run_path=tempfile.mkdtemp(), projection_dim=dim, loss_reduction="sum")
    processor = GradientProcessor(projection_dim=dim)
    collector = InMemoryCollector(
        model=model.base_model,
        data=Dataset.from_dict({"input_ids": ids.tolist()}),
        cfg=config,
        processor=processor,
        target_modules={name.removeprefix(prefix) for name in work.blocks},
    )
    forward_backward = fwd_bwd_factory(config)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    indices = list(range(len(ids)))

    def step() -> dict[str, Tensor]:
        with collector.with_batch(mask):
            losses = forward_backward(model, ids, ids, {})
        collector.process_batch(indices, losses=losses)
        rows = torch.from_numpy(collector.builder.grad_buffer)
        blocks = rows.split([shape.numel() for shape in collector.shapes().values()], dim=1)
        return {f"{prefix}{name}": row.view(-1, dim, dim) for name, row in zip(collector.shapes(), blocks, strict=True)}

    matrices = {}
    for name, module in work.blocks.items():
        sides = (("left", module.out_features), ("right", module.in_features))
        left, right = (
            collector.projection(name.removeprefix(prefix), dim, size, side, torch.device("cpu"), torch.float32)
            for side, size in sides
        )
        matrices[name] = (left, right)
    return step, matrices


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """A peer's import must not change how the other variants run."""
    threads, precision, attention = torch.get_num_threads(), torch.get_float32_matmul_precision(), _attention()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    if _attention() != attention:
        raise RuntimeError(f"importing a peer changed torch's attention backends: {attention} became {_attention()}")


def _attention() -> tuple[bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
