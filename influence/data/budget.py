"""The largest token budget that fits a device, found by trials and cached in a file."""

import gc
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.data.batches import collate
from influence.data.parsing import json_of
from influence.data.tokenized import Tokenized
from influence.store import BadFileError, output_file


def auto_token_budget(
    trial: Callable[[dict[str, Tensor]], object],
    tokenized: Tokenized,
    *,
    most: int | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    key: Mapping[str, Any] | None = None,
) -> int:
    """Find the largest token budget whose batches fit in memory, by trying.

    A trial batch repeats the longest example, which is what asks for most memory at a given budget. The number of
    repetitions doubles until one does not fit, and is then bisected to within a sixteenth. Only a lack of memory counts
    as not fitting; any other error is the caller's to see.

    Args:
        trial: does with a batch what the run will do with it, on the device.
        tokenized: the dataset.
        most: the largest budget worth having; by default all examples in one batch. Where memory does not end in an
            error but in swapping, as on a CPU, give one.
        device: where the trial runs.
        cache: a JSON file of earlier results.
        key: what the result depends on besides the longest example, `most`, the device and the version of torch: the
            model and its dtype, the engine, the transform, the loss, how many processes share the device.

    Returns:
        The budget.

    Raises:
        ValueError: if there is nothing to try, a cache is given without a key, or not even one example fits.

    Example:
        >>> data = Tokenized(torch.arange(6).int(), None, torch.tensor([0, 2, 6]), torch.arange(2))
        >>> auto_token_budget(lambda batch: batch["input_ids"].sum(), data)
        8
    """
    width = int(tokenized.lengths.max()) if len(tokenized) else 0
    if not width:
        raise ValueError("there is nothing to try: the dataset has no token")
    if cache is not None and not key:
        raise ValueError(
            "a cached budget is right for one model, dtype, engine, transform and loss: pass them as key={…}"
        )
    top = len(tokenized) if most is None else most // width
    if top < 1:
        raise ValueError(f"most={most} has no room for the longest example, of {width} tokens")
    about = {"key": dict(key or {}), "width": width, "rows": top, **_machine(torch.device(device))}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    known = json_of(cache) if cache is not None and Path(cache).is_file() else {}
    found = known.get(name, {"token_budget": 1}) if isinstance(known, dict) else None
    budget = found.get("token_budget") if isinstance(found, dict) else None
    if not isinstance(budget, int) or budget < 1:
        raise BadFileError(
            f"{cache} holds no budgets: it is damaged, or of another kind. Delete it, or pass another cache"
        )
    if name in known:
        return budget
    longest = tokenized.lengths.argmax()

    def fits(rows: int) -> bool:
        return _fits(trial, collate(tokenized, longest.expand(rows)))

    if not fits(1):
        raise ValueError(
            f"not even one example of {width} tokens fits on {device}: tokenize with truncation=True and a smaller "
            "max_length, or with chunk_length"
        )
    low, high = 1, 2
    while high <= top and fits(high):
        low, high = high, 2 * high
    if high > top and (low == top or fits(top)):
        low = high = top
    high = min(high, top)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if cache is not None:
        with output_file(cache) as file:
            file.write_text(json.dumps(known | {name: about | {"token_budget": low * width}}, indent=1))
    return low * width


def _fits(trial: Callable[[dict[str, Tensor]], object], batch: dict[str, Tensor]) -> bool:
    try:
        trial(batch)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
    else:
        return True
    # what the failed trial held is free only once its traceback, and with it the handler above, is gone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what a budget depends on besides the run: torch and the device."""
    about: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"name": properties.name, "memory": properties.total_memory}
    return about
