"""Checkpoints of a training run: which model each is, and the learning rate that led to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence.data.parsing import json_of
from influence.pipelines.configs import ModelConfig
from influence.store import BadFileError

STATE = "trainer_state.json"


def model_at(model: ModelConfig, checkpoint: str) -> ModelConfig:
    """Return the model of a checkpoint: a whole model with the first one's tokenizer, or an adapter on the model."""
    place = Path(checkpoint).expanduser()
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        return replace(model, adapter=checkpoint)
    return replace(model, model=checkpoint, tokenizer=model.tokenizer or model.model)


def learning_rates(checkpoints: Sequence[str], given: Sequence[float] = ()) -> tuple[list[float], str]:
    """Return how far training went towards each checkpoint, per unit of gradient.

    The Trainer logs the rate of each update. A checkpoint's is the mean of those logged since the checkpoint before it.
    Where one has none, all are those that the optimizers were saved with, which are the next update's.

    Args:
        checkpoints: folders.
        given: the rates, if they are known.

    Returns:
        The rates, and where they are from.

    Raises:
        ValueError: if there is not one for each, or a checkpoint says none; naming it.
    """
    if not checkpoints:
        raise ValueError("there is no checkpoint: pass --checkpoints, the folders which training saved")
    if given:
        if len(given) != len(checkpoints):
            raise ValueError(
                f"{len(given)} learning rates came for {len(checkpoints)} checkpoints: give one for each, in order"
            )
        if not all(math.isfinite(rate) and rate >= 0 for rate in given):
            raise ValueError(f"learning rates are finite and at least 0; got {', '.join(map(str, given))}")
        return list(given), "given"
    logged = _logged([_trainer_state(checkpoint) for checkpoint in checkpoints])
    if None not in logged:
        return [rate for rate in logged if rate is not None], f"logged in {STATE}"
    return [_saved(checkpoint) for checkpoint in checkpoints], "of the update after each"


def _trainer_state(checkpoint: str) -> Mapping[str, Any]:
    path = Path(checkpoint).expanduser() / STATE
    state = json_of(path) if path.is_file() else {}
    if not _is_state(state):
        raise BadFileError(
            f"{path} is no state of a Trainer: expected a global_step and a log_history of steps and learning rates, "
            "all finite and at least 0. It is damaged: take another checkpoint, or pass --learning-rates"
        )
    return state


def _is_state(state: Any) -> bool:
    """Whether all that is read of a Trainer's state is there, as it should be."""
    entries = state.get("log_history", []) if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return False
    numbers = [state.get("global_step", 0), *(entry.get("learning_rate", 0) for entry in entries)]
    numbers += [entry.get("step") for entry in entries if "learning_rate" in entry]
    return all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers)


def _logged(states: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the mean of the rates logged since the checkpoint before each; `None` where none was."""
    steps, rates = [int(state.get("global_step", 0)) for state in states], []
    for state, step in zip(states, steps, strict=True):
        before = max((other for other in steps if other < step), default=0)
        entries = [entry for entry in state.get("log_history", ()) if "learning_rate" in entry]
        found = [float(entry["learning_rate"]) for entry in entries if before < entry["step"] <= step]
        rates.append(math.fsum(found) / len(found) if found else None)
    return rates


def _saved(checkpoint: str) -> float:
    """Return the rate in a checkpoint's optimizer."""
    from influence.train.checkpoints import read_state

    ways = "log it during training (logging_steps), or pass --learning-rates, one for each checkpoint"
    try:
        groups = read_state(checkpoint)["param_groups"]
    except FileNotFoundError as error:
        raise ValueError(
            f"{checkpoint} does not say its learning rate: its {STATE} logged none since the checkpoint before, and it "
            f"has no optimizer; {ways}"
        ) from error
    rate = groups[0].get("lr") if groups else None
    if not rate:
        raise ValueError(
            f"the optimizer in {checkpoint} has the learning rate {rate} for its next update, and {STATE} logged none "
            f"since the checkpoint before; {ways}"
        )
    return float(rate)
