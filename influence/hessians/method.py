"""A curvature method as a value: the passes of its fit, its options, and how much its factors hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Int
from torch import Tensor

from influence.func.engine.plan import Plan
from influence.func.engine.sums import add_grams
from influence.func.transform.chain import Transform
from influence.func.transform.curvature import Curvature
from influence.hessians.factors import Factors
from influence.hessians.labels import Labels
from influence.types import Batch, LossFn, Params

BlockSums: TypeAlias = dict[str, Tensor]


class Sums(NamedTuple):
    """Sums over documents: what a fit folds. They add, so batches, ranks and resumed runs merge.

    Attributes:
        blocks: sums by block and name.
        positions: real positions by block.
        documents: number of documents.
    """

    blocks: dict[str, BlockSums]
    positions: dict[str, int]
    documents: int


def add(a: Sums, b: Sums) -> Sums:
    """Add two sums; a tensor which blocks share in both stays shared."""
    if not a.documents or not b.documents:
        return a if a.documents else b
    made: dict[tuple[int, int], Tensor] = {}

    def plus(x: Tensor, y: Tensor) -> Tensor:
        key = (id(x), id(y))
        if key not in made:
            made[key] = add_grams(x, y)
        return made[key]

    blocks = {
        name: {
            key: plus(mine[key], theirs[key]) if key in mine and key in theirs else mine.get(key, theirs.get(key))
            for key in (*mine, *(key for key in theirs if key not in mine))
        }
        for name, mine in a.blocks.items()
        for theirs in [b.blocks[name]]
    }
    positions = {name: a.positions.get(name, 0) + b.positions.get(name, 0) for name in {**a.positions, **b.positions}}
    return Sums(blocks, positions, a.documents + b.documents)  # type: ignore[arg-type]


class FitSetup(NamedTuple):
    """What one pass of a fit works with.

    Attributes:
        loss_fn: the loss function.
        transform: the transform whose rows get the curvature.
        labels: whose gradients.
        factors: what the pass before it fitted; `None` in a first pass.
    """

    loss_fn: LossFn
    transform: Transform
    labels: Labels
    factors: Factors | None = None


class Summing(NamedTuple):
    """The planned sums of a pass.

    Attributes:
        plan: the plan, made on a first batch.
        sums: `(params, batch, index) -> Sums`; `index` says which rows of the dataset the batch holds, where labels
            are drawn by it.
        notes: for blocks whose curvature is coarser than the method's, the reason.
    """

    plan: Plan
    sums: Callable[[Params, Batch, Int[Tensor, " n"] | None], Sums]
    notes: Mapping[str, str] = {}


class About(NamedTuple):
    """What sums are sums of.

    Attributes:
        method: the name of the method.
        setup: what the pass works with.
        reduction: of the loss.
        weights: hash of the parameters.
        shapes: the shape of each block's rows.
        notes: for blocks whose curvature is coarser than the method's, the reason.
        function: what the model makes of the weights, as `ModuleLoss.function` says.
    """

    method: str
    setup: FitSetup
    reduction: str
    weights: str
    shapes: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str]
    function: Mapping[str, Any] | None

    def factors(self, sums: Sums, blocks: Mapping[str, Curvature]) -> Factors:
        """Return the factors made of sums; their notes say where they are coarser than the method."""
        notes = {name: note for name, c in blocks.items() if (note := self._note(name, c))}
        transform = self.setup.transform
        return Factors(
            self.method,
            blocks,
            sums.documents,
            sums.positions,
            self.reduction,
            self.setup.labels,
            transform.fingerprint,
            repr(transform),
            transform,
            self.weights,
            notes,
            self.function,
        )

    def _note(self, name: str, curvature: Curvature) -> str:
        if curvature.moment(1) == 0:
            return "zero: no gradient reached it"
        if curvature.kind == "diagonal":
            why = self.notes.get(name, "a vector" if len(curvature.shape) == 1 else "")
            return f"diagonal: {why}" if why else ""
        if len(curvature.bases) == 1:
            return ""
        sides = zip(("left", "right"), curvature.bases, strict=True)
        short = [side for side, basis in sides if basis.vectors is None]
        return f"its {' and '.join(short)} side is a diagonal" if short else ""


class Pass(NamedTuple):
    """One pass of a fit over the batches.

    Attributes:
        name: for progress bars, and for the files of a run that was interrupted.
        sums: `(setup, params, first batch) -> Summing`: plans the sums of a batch.
        assemble: `(about, sums) -> Factors`.
    """

    name: str
    sums: Callable[[FitSetup, Params, Batch], Summing]
    assemble: Callable[[About, Sums], Factors]


@dataclass(frozen=True, repr=False)
class Method:
    """A curvature method with its options: what `hessians.fit` takes.

    The builders return it: `hessians.kfac.build(max_side=4096)`.

    Attributes:
        name: as factors and command lines name it.
        passes: its passes over the batches, in order; each is given the factors of the one before.
        entries: how many numbers its factors hold of a block whose rows have a shape.
        default_labels: whose gradients it is fitted to by default: `"sampled"`, `"data"` or `"exact"`.
        options: the builder's arguments, as a run records them.
        kronecker: whether it keeps two sides of each matrix, whose eigenvalues `ekfac.build` can correct.
    """

    name: str
    passes: tuple[Pass, ...]
    entries: Callable[[tuple[int, ...]], int]
    default_labels: str = "sampled"
    options: Mapping[str, Any] = field(default_factory=dict)
    kronecker: bool = False

    def __repr__(self) -> str:
        """Return the method as one would write it."""
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"
