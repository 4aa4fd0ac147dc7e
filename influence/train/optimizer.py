"""The optimizer's state as `Moments`: what a gradient was divided by when it moved the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from influence.func.loss.functionalize import select
from influence.func.transform.scale import Factored, Moments, unfactor
from influence.train.checkpoints import read_state
from influence.train.entries import Entry, check_numbers, checked, name_entries, name_live, read_entry
from influence.types import Params

EPS = 1e-8
"""Adam's `ε` where the source says none."""


class OptimizerState(NamedTuple):
    """What an optimizer knows of each parameter, in the parameter's own shape and orientation.

    Attributes:
        entries: kind, moments and number of updates, by parameter name.
        settings: its group's settings (`lr`, `betas`, `eps`, …), by parameter name.
    """

    entries: Mapping[str, Entry]
    settings: Mapping[str, Mapping[str, Any]]

    def moments(self, bias_correction: bool = False) -> Moments:
        r"""Return the second moments.

        $$\hat v = v / (1 - \beta_2^t)$$

        Args:
            bias_correction: divide Adam's by `1 - β₂^t`, as its update does; Adafactor's need none.
        """
        return Moments({name: self._second(name, bias_correction) for name in self.entries})

    def first(self, bias_correction: bool = False) -> Params:
        r"""Return the first moments, `m` or `m / (1 - β₁^t)`.

        Raises:
            ValueError: if the optimizer keeps none of some parameters; naming them.
        """
        without = [name for name, entry in self.entries.items() if entry.first is None]
        if without:
            raise ValueError(f"the optimizer keeps no first moment of {', '.join(without)}: it has β₁ = 0")
        found = {name: entry.first for name, entry in self.entries.items() if entry.first is not None}
        return {name: m / self._debias(name, 0) if bias_correction else m for name, m in found.items()}

    def direction(self) -> Params:
        r"""Return Adam's update direction, the parameters' step over `-lr`.

        $$\hat m / (\sqrt{\hat v} + \varepsilon)$$

        Kingma & Ba, "Adam", arXiv 1412.6980, algorithm 1.
        """
        first, second = self.first(True), self.moments(True).second
        return {name: m / (unfactor(second[name]).sqrt() + self._eps(name)) for name, m in first.items()}

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each parameter, as its group has it."""
        missing = [name for name in self.entries if self.settings[name].get("lr") is None]
        if missing:
            raise ValueError(f"the source says no learning rate for {', '.join(missing)}: it has no param_groups")
        return {name: float(self.settings[name]["lr"]) for name in self.entries}

    def _eps(self, name: str) -> float:
        return float(self.settings[name].get("eps", EPS))

    def _second(self, name: str, bias_correction: bool) -> Tensor | Factored:
        entry = self.entries[name]
        if not bias_correction or entry.kind != "adam" or isinstance(entry.second, Factored):
            return entry.second
        return entry.second / self._debias(name, 1)

    def _debias(self, name: str, which: int) -> float:
        step, betas = self.entries[name].step, self.settings[name].get("betas")
        if step is None or betas is None:
            lacking = "step count" if step is None else "betas"
            raise ValueError(f"bias correction needs the {lacking} of {name!r}, which the source does not have")
        if not step:
            raise ValueError(f"{name!r} had no update yet, so its moments cannot be corrected: read a later checkpoint")
        return 1 - float(betas[which]) ** step


def load_from_optimizer(
    model: nn.Module,
    source: str | Path | torch.optim.Optimizer | Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
    *,
    bias_correction: bool = False,
) -> Moments:
    """Load an optimizer's second moments, for `scale_by_adam` and `scale_by_adafactor`.

    Args:
        model: the model that it trained; with its adapters, if it trained adapters.
        source: a live optimizer; its state dict; or a path: a file of `torch.save` or safetensors, a checkpoint of the
            Trainer, of accelerate, or of DCP shards. Nothing is unpickled but tensors and plain data.
        targets: globs over parameter names; default: every parameter that the optimizer has, but for frozen ones
            without a moment.
        bias_correction: divide Adam's moments by `1 - β₂^t`, as its update does.

    Returns:
        The moments, by parameter name, in the parameter's own shape (a `Conv1D`'s stays `[i, o]`: the scalers turn it).
        They are copies.

    Raises:
        FileNotFoundError: if the folder has no optimizer.
        ValueError: if it is of another model or an unknown optimizer, or a parameter has no moment; naming each.

    Example:
        >>> import torch
        >>> from influence.train import load_from_optimizer
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.75))
        >>> model(torch.tensor([2.0, 4.0])).backward()
        >>> optimizer.step()
        >>> load_from_optimizer(model, optimizer).second["weight"]
        tensor([[1., 4.]])
        >>> load_from_optimizer(model, optimizer, bias_correction=True).second["weight"]
        tensor([[ 4., 16.]])
    """
    return read_optimizer(model, source, targets).moments(bias_correction)


def read_optimizer(
    model: nn.Module,
    source: str | Path | torch.optim.Optimizer | Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
    *,
    copy: bool = True,
) -> OptimizerState:
    """Read all that an optimizer knows: both moments, updates, learning rates.

    Args:
        model: as for `load_from_optimizer`.
        source: as for `load_from_optimizer`.
        targets: as for `load_from_optimizer`.
        copy: copy what a live optimizer goes on to change.

    Returns:
        The state.

    Raises:
        FileNotFoundError: as `load_from_optimizer`.
        ValueError: as `load_from_optimizer`.
    """
    inner = getattr(source, "optimizer", source)  # accelerate's wrapper
    where = f"{source}" if isinstance(source, str | Path) else "the optimizer"
    groups: Sequence[Mapping[str, Any]]
    if isinstance(inner, torch.optim.Optimizer):
        groups = inner.param_groups
        live, numbers = name_live(model, groups)
        kept = {name: inner.state.get(p, {}) for name, p in live.items()}
    else:
        held = checked(inner if isinstance(inner, Mapping) else read_state(inner), where)
        groups = held["param_groups"]
        entries, numbers = name_entries(model, held["state"], groups, where)
        kept = {name: held["state"].get(key, {}) for name, key in entries.items()}
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    trained = {name for name, p in model.named_parameters() if name in kept and (p.requires_grad or kept[name])}
    chosen = [name for name in names if name in trained] if targets is None else select(names, targets, None)
    missing = [name for name in chosen if not kept.get(name)]
    if missing:
        raise ValueError(
            f"{where} has no moment of {len(missing)} of {len(chosen)} parameters: {', '.join(missing)}. They were not "
            "trained, or no update was made yet; leave them out by targets="
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    read = {name: read_entry(name, kept[name], shapes[name]) for name in chosen}
    settings = {name: groups[numbers[name]] if groups else {} for name in chosen}
    for name in chosen:
        check_numbers(where, name, read[name], settings[name])
    return OptimizerState({name: _copied(entry) for name, entry in read.items()} if copy else read, settings)


def _copied(entry: Entry) -> Entry:
    second = entry.second
    own = Factored(second.row.clone(), second.col.clone()) if isinstance(second, Factored) else second.clone()
    return entry._replace(second=own, first=None if entry.first is None else entry.first.clone())
