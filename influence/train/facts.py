"""What a collection is, beside its rows: what two runs must have in common to be one, and its manifest."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from influence.func.fingerprint import differences
from influence.func.transform.chain import Stage, Transform
from influence.func.transform.layout import Layout
from influence.index import Columns, Fingerprint, fingerprint_of
from influence.index.columns import DTYPES, from_json
from influence.index.recipe import StepFacts
from influence.store import BadFileError
from influence.store.folder import Manifest, manifest_of, read_manifest
from influence.store.schema import conform
from influence.train.scratch import Stored

RUN_KIND = "training"
ENDED, SUM = "ended.log", "sum"
MOST = 1 << 16
"""More processes than anyone trains with."""
WEIGHTS = "those of each step of a training run"
"""What the fingerprint says of the weights: rows of one index are of many."""


class Plan(NamedTuple):
    """What a collection's manifest plans: all that its rows depend on, but for the training itself.

    Attributes:
        examples: how many the dataset has.
        world: how many processes train.
        blocks: the blocks of a row.
        dtype: the stored type.
        shard_size: most examples of a shard.
        share: whether rows are of the training's own forward.
        scale: what they are divided by.
        reduction: over an example's positions.
        transform: the fingerprint of what was made of the gradients.
    """

    examples: int
    world: int
    blocks: list[dict[str, Any]]
    dtype: str
    shard_size: int
    share: bool
    scale: str | None
    reduction: str
    transform: str


class Training(NamedTuple):
    """A collection as its directory has it.

    Attributes:
        path: the directory.
        manifest: its manifest.
        plan: what that plans.
        stored: how its rows are stored.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    stored: Stored

    @property
    def id(self) -> str:
        """The run's id."""
        return self.manifest.id


class Facts(NamedTuple):
    """What is known of a run's rows once the first batch was planned.

    Attributes:
        columns: the blocks of a row.
        plan: what the manifest plans.
        transform: what was made of the gradients, without the optimizer's scale.
        loss_fn: the examples' loss.
        layout: the parameters' layout.
    """

    columns: Columns
    plan: Plan
    transform: Transform
    loss_fn: Any
    layout: Layout

    def manifest(self) -> Manifest:
        """Return the run's manifest."""
        config = {key: getattr(self.plan, key) for key in ("share", "scale", "reduction")}
        fields = self.fingerprint(config).json()
        ranks = [f"order-{rank}.jsonl" for rank in range(self.plan.world)]
        files = [ENDED, f"{SUM}/", "epoch-#/", *ranks]
        return manifest_of(RUN_KIND, config, (), self.plan._asdict(), fields, files, ["rows-#-#.bin"])

    def fingerprint(self, config: dict[str, Any]) -> Fingerprint:
        """Return the fingerprint of the rows; an optimizer's live scale counts as one on the training side."""
        found = fingerprint_of(self.loss_fn, None, self.transform, self.columns.shapes, WEIGHTS, config, self.layout)
        if self.plan.scale is None:
            return found
        live = StepFacts("the optimizer's own scale", "scale", "train only", {"moments": "those of each step"})
        at = sum(step.stage < Stage.SCALE for step in self.transform.steps)
        return replace(found, steps=(*found.steps[:at], live, *found.steps[at:]), live=None)


def read_training(path: str | Path) -> Training:
    """Read what a directory's collection is.

    Raises:
        FileNotFoundError: if there is none.
        BadFileError: if it is damaged, or a run of another kind is there.
    """
    path = Path(path)
    return training_of(path, read_manifest(path))


def training_of(path: Path, manifest: Manifest) -> Training:
    """Return the collection that a manifest is of.

    Raises:
        BadFileError: if it is of something else.
    """
    if manifest.kind != RUN_KIND:
        raise BadFileError(f"{path} holds a run of kind {manifest.kind!r}, and no rows of a training run")
    plan = conform(manifest.plan, Plan, f"{path}: the plan")
    if plan.dtype not in DTYPES or plan.shard_size < 1 or not 0 < plan.world <= MOST:
        raise BadFileError(
            f"{path} is not what it says: no training has dtype={plan.dtype!r}, shard_size={plan.shard_size} and "
            f"world={plan.world}"
        )
    return Training(path, manifest, plan, Stored(plan.dtype, from_json(plan.blocks, str(path))))


def refuse_another(path: Path, there: Manifest, mine: Manifest) -> None:
    """Refuse to mix rows of two collections in one directory.

    Raises:
        ValueError: naming what differs, and both values.
    """
    for kind in ("plan", "fingerprint"):
        for name, theirs, own in differences(getattr(there, kind), getattr(mine, kind)):
            raise ValueError(
                f"{path} holds rows of a run whose {name} is {f'{theirs}'[:200]}, and this run's is {f'{own}'[:200]}: "
                "resume with the same, or write to another directory"
            )
