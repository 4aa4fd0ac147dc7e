"""Bad input to what is about training, and what is answered: `python -m tests.messages` prints it with the rest."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence import as_blocks, chain, functionalize, per_example_grads, project
from influence.pipelines import less, tracin
from influence.pipelines.frame.configs import DataConfig, ModelConfig, TransformConfig
from influence.pipelines.frame.prepare import transform_of
from influence.pipelines.recipes.checkpoint_sums import learning_rates
from influence.train import (
    Checkpoint,
    GradientCollectorCallback,
    adam_update,
    prepare_for_gradient_collection,
    read_optimizer,
    scale_by_optimizer,
    subtask_means,
)
from influence.train import tracin as tracin_of
from tests.messages import Bad
from tests.shard_optimizer import small


def stepped(model: nn.Module, kind: Any = torch.optim.AdamW, params: Any = None, **settings: Any) -> Any:
    """A model's optimizer after an update of what it trains."""
    optimizer = kind(list(model.parameters()) if params is None else params, lr=1e-2, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def of_another() -> Any:
    return read_optimizer(small(), stepped(nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))).state_dict())


def of_fewer() -> Any:
    return read_optimizer(small(), stepped(nn.Linear(3, 4)).state_dict())


def unknown() -> Any:
    model = small()
    return read_optimizer(model, stepped(model, torch.optim.SGD, momentum=0.9))


def some_missing() -> Any:
    model = small()
    return read_optimizer(model, stepped(model, params=list(model[0].parameters())), targets="*.weight")


def some_left_out() -> Any:
    model = small()
    loss_fn, params = functionalize(model, loss=lambda output, batch: output.sum(-1))
    update = adam_update(read_optimizer(model, stepped(model), "2.*"))
    return per_example_grads(loss_fn, params, (torch.ones(2, 3), torch.ones(2)), transform=chain(as_blocks(), update))


def several_eps() -> Any:
    model = small()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "eps": 1e-6}]
    return scale_by_optimizer(read_optimizer(model, stepped(model, params=groups)))


def trainer(*callbacks: Any) -> Any:
    import transformers

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1
    )
    return transformers.Trainer(small(), arguments, train_dataset=[{"x": 1}], callbacks=list(callbacks))


def folder(**files: Any) -> str:
    """A checkpoint's folder with some files."""
    place = Path(tempfile.mkdtemp()) / "checkpoint-6"
    place.mkdir()
    for name, content in files.items():
        if name == "optimizer":
            torch.save(content, place / "optimizer.pt")
        else:
            (place / f"{name}.json").write_text(json.dumps(content))
    return str(place)


def recipe(room: Any, checkpoints: Any, **settings: Any) -> Any:
    data = Path(tempfile.mkdtemp()) / "questions.jsonl"
    data.write_text('{"text": "babo"}\n')
    kind, known = getattr(room, f"{room.__name__.rpartition('.')[2].capitalize()}Config"), DataConfig(str(data))
    run = str(Path(tempfile.mkdtemp()) / "run")
    return room.run(kind(run, ModelConfig("nowhere"), known, known, tuple(checkpoints), **settings))


STATE = {"global_step": 6, "log_history": [{"step": 6, "loss": 1.0}]}
ENDED = {"state": {}, "param_groups": [{"params": [], "lr": 0.0}]}

CASES = [
    Bad("an optimizer of another model", of_another, ("'0.weight' has shape [7, 9]", "the optimizer of another model")),
    Bad(
        "an optimizer of fewer parameters", of_fewer, ("2 parameters in groups of [2]", "gives [4]", "of another model")
    ),
    Bad("an unknown optimizer", unknown, ("momentum_buffer", "'0.weight'", "Adam or AdamW", "Adafactor")),
    Bad("moments missing for some blocks", some_missing, ("no moment of 1 of 2 parameters: 2.weight", "targets=")),
    Bad(
        "moments of some blocks left out",
        some_left_out,
        ("adam_update: no moments of 0.bias, 0.weight", "read them too"),
    ),
    Bad("groups with several eps", several_eps, ("have eps 1e-08, 1e-06", "a scale has one")),
    Bad(
        "a Trainer without the callback", lambda: prepare_for_gradient_collection(trainer()), ("add_callback", "has 0")
    ),
    Bad(
        "a Trainer that was not prepared",
        lambda: trainer(GradientCollectorCallback(tempfile.mkdtemp())).train(),
        ("this Trainer was not prepared", "prepare_for_gradient_collection(trainer)"),
    ),
    Bad("an unknown scale", lambda: GradientCollectorCallback("x", scale="adam"), ("'optimizer' or None", "'adam'")),
    Bad("no checkpoint at all", lambda: tracin_of([]), ("there is no checkpoint",)),
    Bad(
        "rows of other blocks at a checkpoint",
        lambda: tracin_of([Checkpoint({"a": torch.ones(1, 2)}, {"b": torch.ones(1, 2)}, 1.0)]),
        ("checkpoint 0", "other blocks"),
    ),
    Bad(
        "a subtask without an example",
        lambda: subtask_means({"a": torch.ones(2, 2)}, torch.tensor([0, 2])),
        ("subtasks [1] have no example",),
    ),
    Bad("no checkpoints on the command line", lambda: recipe(tracin, ()), ("pass --checkpoints",)),
    Bad(
        "fewer learning rates than checkpoints",
        lambda: recipe(tracin, ("a", "b"), learning_rates=(0.1,)),
        ("1 learning rates came for 2 checkpoints",),
    ),
    Bad(
        "a learning rate that is no number",
        lambda: recipe(less, ("a",), learning_rates=(float("inf"),)),
        ("must be a finite number", "at least 0; got inf"),
    ),
    Bad(
        "a checkpoint that says no learning rate",
        lambda: learning_rates([folder(trainer_state=STATE)]),
        ("does not say its learning rate", "has no optimizer", "--learning-rates"),
    ),
    Bad(
        "a checkpoint at the end of a decay",
        lambda: learning_rates([folder(trainer_state=STATE, optimizer=ENDED)]),
        ("the learning rate 0.0 for its next update", "logging_steps", "--learning-rates"),
    ),
    Bad(
        "a checkpoint without an optimizer",
        lambda: recipe(less, (folder(trainer_state=STATE),), learning_rates=(0.1,)),
        ("holds no optimizer: looked for optimizer.pt", "save_only_model=False"),
    ),
    Bad(
        "one optimizer for several checkpoints",
        lambda: recipe(tracin, ("a",), transform=TransformConfig(optimizer="a")),
        ("--optimizer a is the state at one checkpoint", "influence less"),
    ),
    Bad(
        "a column of subtasks that is not there",
        lambda: recipe(less, (folder(optimizer=ENDED),), learning_rates=(0.1,), subtask="task"),
        ("no column 'task' of subtasks; it has 'text'",),
    ),
    Bad(
        "a view of no optimizer",
        lambda: transform_of(TransformConfig(optimizer_view="update")),
        ("optimizer_view", "pass --optimizer"),
    ),
    Bad(
        "an update of what was projected",
        lambda: chain(as_blocks(), project(2), adam_update(read_optimizer(*pair()))),
        ("adam_update(", "cannot follow project", "whole gradients"),
    ),
]


def pair() -> tuple[nn.Module, Any]:
    model = small()
    return model, stepped(model)
