r"""Factors: what every curvature fit returns. A value with units, provenance and a picture of itself.

The curvature of a block is the mean over documents of the loss as reduced, `H ≈ (1/N) Σ_n …`; nothing is summed over
documents, so factors of one method on different data have one scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from influence.func.fingerprint import fingerprint, weights_hash
from influence.func.loss.described import differing
from influence.func.transform.blocks import as_blocks
from influence.func.transform.chain import Transform, unblock
from influence.func.transform.curvature import Basis, Curvature, inverse_weights
from influence.func.transform.layout import Layout
from influence.hessians.labels import Labels
from influence.terminal import human
from influence.types import LossFn, Params, Rows
from influence.visible import visible

SCHEMA = 1


@dataclass(frozen=True)
class Factors:
    """The curvature of every block.

    Attributes:
        method: how it was fitted.
        blocks: the curvature of each block, mean per document.
        documents: how many documents were seen, `N`.
        positions: how many real positions each block saw, `T`, where it has factors.
        reduction: of the loss: `"sum"`, `"mean"`, or `"own"` for a function of the user's.
        labels: where the labels came from.
        under: fingerprint of the transform whose rows these are the curvature of.
        description: that transform, as it was written.
        transform: the transform itself, if it is at hand.
        weights: hash of the parameters.
        notes: blocks whose curvature is coarser than the method's, and why.
        function: what the model makes of the weights, as `ModuleLoss.function` says; `None` of a function by hand.
    """

    method: str
    blocks: Mapping[str, Curvature]
    documents: int
    positions: Mapping[str, int]
    reduction: str
    labels: Labels
    under: str
    description: str
    transform: Transform | None
    weights: str
    notes: Mapping[str, str] = field(default_factory=dict)
    function: Mapping[str, Any] | None = None

    @cached_property
    def digest(self) -> str:
        """A hash of every number and of what they are the curvature of."""
        content = {name: [*(basis for basis in c.bases), c.corrected, list(c.shape)] for name, c in self.blocks.items()}
        return fingerprint({"method": self.method, "under": self.under, "blocks": content})

    def __repr__(self) -> str:
        """Return the factors in a line."""
        return (
            f"<{self.method} of {len(self.blocks)} blocks, {self.documents} documents, labels={self.labels.source!r}>"
        )

    def __str__(self) -> str:
        """Return a table of every block's spectrum, the units and what is not covered."""
        source = self.labels
        drawn = f", seed {source.seed}, {source.draws} per position" if source.source == "sampled" else ""
        shown = {name: visible(name, lines=False) for name in (*self.blocks, *self.notes)}
        lines = [
            f"{self.method}: curvature per document (mean over N = {self.documents:,}) of the loss as reduced "
            f"({self.reduction}); labels: {source.source}{drawn}",
            f"rows: {self.description}",
        ]
        lines = [visible(line, lines=False) for line in lines]  # a file says them
        width = max([5, *(len(shown[name]) for name in self.blocks)])
        lines.append(
            f"{'block':{width}}  {'shape':>12}  {'kind':10} {'positions':>9}  {'trace':>9} {'largest':>9} "
            f"{'condition':>9} {'eff. rank':>9}"
        )
        for name, c in self.blocks.items():
            shape = "×".join(map(str, c.shape))
            seen = human(self.positions[name]) if name in self.positions else ""
            lines.append(
                f"{shown[name]:{width}}  {shape:>12}  {c.kind:10} {seen:>9}  {c.moment(1):9.3g} {c.extremes[1]:9.3g} "
                f"{c.condition:9.2g} {c.effective_rank:9.1f}"
            )
        whole = sum(prod(c.shape) for c in self.blocks.values())
        lines.append(f"{len(self.blocks)} blocks, {human(whole)} directions, trace {self.trace:.4g}")
        notes = (f"note: {shown[name]}: {visible(why, lines=False)}" for name, why in self.notes.items())
        return "\n".join([*lines, *notes])

    @property
    def trace(self) -> float:
        """Trace over all blocks. EK-FAC's and Shampoo's is the mean squared norm of a document's gradient."""
        return sum(c.moment(1) for c in self.blocks.values())

    @property
    def mean(self) -> float:
        """Mean eigenvalue over all blocks."""
        return self.trace / sum(prod(c.shape) for c in self.blocks.values())

    def spectra(self) -> dict[str, Tensor]:
        """Return each block's eigenvalues, largest first, to plot."""
        return {name: c.eigenvalues.flatten().sort(descending=True).values for name, c in self.blocks.items()}

    def solve(
        self, vectors: Params, layout: Layout, power: float = -1.0, damping: float = 0.1, inversion: str = "damped"
    ) -> Params:
        """Apply `H^power` to directions in parameter space, as a conjugate-gradient solve wants its preconditioner.

        Args:
            vectors: `{parameter: [q, *shape]}`.
            layout: `loss_fn.layout`.
            power: in [-1, 0].
            damping: `c`.
            inversion: as in `precondition`.

        Returns:
            The same parameters.

        Raises:
            ValueError: if the factors are not those of plain blocks, or cover other parameters.
        """
        bias = next((b for b in (True, False) if as_blocks(bias=b).fingerprint == self.under), None)
        if bias is None:
            raise ValueError(
                f"only factors of as_blocks() map parameters to parameters; these are of {self.description}"
            )
        rows = as_blocks(bias=bias).apply(vectors, layout.restrict(vectors))
        if rows.keys() != self.blocks.keys():
            raise ValueError(
                f"factors and vectors cover other blocks; they differ in {sorted(rows.keys() ^ self.blocks.keys())[:4]}"
            )
        solved: Rows = {
            name: c.apply(rows[name], inverse_weights(c, power, damping, inversion, name).grid)
            for name, c in self.blocks.items()
        }
        found = unblock(solved, layout)
        assert found is not None
        return {name: found[0][name] for name in vectors}

    def check_model(self, loss_fn: LossFn, params: Params) -> None:
        """Refuse a loss or parameters (frozen ones included) other than those the factors were fitted at.

        Raises:
            ValueError: naming what differs.
        """
        reduction = getattr(loss_fn, "reduction", "own")
        if reduction != self.reduction:
            raise ValueError(
                f"these factors are of a loss with reduction={self.reduction!r}; this one has {reduction!r}, so its "
                "curvature has other units"
            )
        weights = weights_hash(loss_fn, params)
        if weights != self.weights:
            raise ValueError(
                f"these factors were fitted at other weights (hash {self.weights[:12]}…, these parameters have "
                f"{weights[:12]}…). Fit them on this model, or load the checkpoint they belong to"
            )
        self.check_function(getattr(loss_fn, "function", None))

    def check_function(self, function: Mapping[str, Any] | None) -> None:
        """Refuse another function of the same weights: another epsilon, activation or scale.

        Raises:
            ValueError: naming what differs, and both values.
        """
        if self.function is None or function is None or self.function == function:
            return
        theirs, mine = differing(self.function, function)
        raise ValueError(
            f"these factors were fitted with another function of the same weights: theirs has {theirs}, this one "
            f"{mine}. Fit them on this model, or load it with the config that they belong to"
        )

    def save(self, path: str | Path, run: str = "") -> None:
        """Write the factors to one HDF5 file, atomically, with checksums.

        Args:
            path: where; an existing file is replaced, and in an existing folder it is `factors.h5`.
            run: the id of the run that the file belongs to.
        """
        from influence import store

        arrays: dict[str, Tensor] = {}
        names: dict[int, str] = {}

        def put(tensor: Tensor | None, what: str) -> str | None:
            if tensor is None:
                return None
            if id(tensor) not in names:
                names[id(tensor)] = what
                arrays[what] = tensor
            return names[id(tensor)]

        blocks = {}
        for number, (name, c) in enumerate(self.blocks.items()):
            bases = [
                {"vectors": put(b.vectors, f"{number}/vectors_{k}"), "values": put(b.values, f"{number}/values_{k}")}
                for k, b in enumerate(c.bases)
            ]
            corrected = put(c.corrected, f"{number}/corrected")
            blocks[name] = {"shape": list(c.shape), "bases": bases, "corrected": corrected}
        about = {
            "method": self.method,
            "documents": self.documents,
            "positions": dict(self.positions),
            "reduction": self.reduction,
            "labels": self.labels._asdict(),
            "under": self.under,
            "description": self.description,
            "weights": self.weights,
            "notes": dict(self.notes),
            "function": self.function,
            "blocks": blocks,
        }
        store.write(_file(path), arrays, about, kind="factors", schema=SCHEMA, run=run)


def _file(path: str | Path) -> Path:
    """Return the file of factors that a path names: itself, or the one in a folder."""
    return Path(path) / "factors.h5" if Path(path).is_dir() else Path(path)


def load(path: str | Path, run: str | None = None) -> Factors:
    """Read factors of any method that `Factors.save` or a command wrote; every checksum is verified.

    Args:
        path: the file, or a folder that holds it as `factors.h5`, such as the run of `influence hessian`.
        run: the id of the run that the file should belong to; `None` takes any file, and of a folder its own run's.

    Returns:
        The factors. Their `transform` is there again if it was `as_blocks(…)` alone; another must be given where one is
        needed, and is checked against the fingerprint.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: if the file is no file of factors, is damaged, or its blocks are no curvature.
    """
    from influence import store
    from influence.store.folder import run_id
    from influence.store.schema import conform

    file = _file(path)
    if not file.is_file():
        there = Path(path).is_dir()
        state = "its run is not finished, or it is no run of influence hessian" if there else "no such file"
        raise FileNotFoundError(f"no factors in {path}: {state}; run influence hessian {path} first")
    if run is None and Path(path).is_dir():
        run = run_id(path)
    arrays, about = store.read(file, kind="factors", schema=SCHEMA, run=run)
    held: FactorFacts = conform(about, FactorFacts, str(file))
    if not held.blocks or any(name not in held.blocks for name in held.positions):
        raise store.BadFileError(f"{file} is not what it says: it has no blocks, or positions of others")
    where = f"{file} is not what it says: its block"
    blocks = {name: _curvature(block, arrays, f"{where} {name[:200]!r}") for name, block in held.blocks.items()}
    known = (as_blocks(bias=bias) for bias in (False, True))
    transform = next((t for t in known if t.fingerprint == held.under), None)
    return Factors(**{**held._asdict(), "blocks": blocks, "transform": transform})


class BasisFacts(NamedTuple):
    """The names of a basis's tensors."""

    vectors: str | None
    values: str


class BlockFacts(NamedTuple):
    """What a file says of a block's curvature: its shape, and the names of its tensors."""

    shape: tuple[int, ...]
    bases: list[BasisFacts]
    corrected: str | None


class FactorFacts(NamedTuple):
    """The facts of factors as JSON holds them; see `Factors`."""

    method: str
    documents: int
    positions: dict[str, int]
    reduction: str
    labels: Labels
    under: str
    description: str
    weights: str
    notes: dict[str, str]
    function: dict[str, Any] | None
    blocks: dict[str, BlockFacts]


def _curvature(said: BlockFacts, arrays: Mapping[str, Tensor], where: str) -> Curvature:
    """Return a block's curvature from a file, checked: what it is made of fits together, and is a curvature.

    Raises:
        BadFileError: naming the file and the block.
    """
    from influence.store import BadFileError

    def get(name: str, shape: tuple[int, ...], eigenvalues: bool) -> Tensor:
        tensor = arrays[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise BadFileError(f"{where} has {name!r} as {tensor.dtype} {list(tensor.shape)}; expected {list(shape)}")
        if not bool(tensor.isfinite().all()) or (eigenvalues and tensor.numel() and bool(tensor.amin() < 0)):
            raise BadFileError(f"{where} has numbers in {name!r} that are not finite, or negative eigenvalues")
        return tensor

    sides = said.shape if len(said.bases) == len(said.shape) else (prod(said.shape),)
    if len(said.bases) != len(sides) or not said.shape or min(said.shape) < 1:
        raise BadFileError(f"{where} has the shape {list(said.shape)} and {len(said.bases)} bases")
    bases = tuple(
        Basis(None if each.vectors is None else get(each.vectors, (d, d), False), get(each.values, (d,), True))
        for each, d in zip(said.bases, sides, strict=True)
    )
    corrected = None if said.corrected is None else get(said.corrected, tuple(sides), True)
    return Curvature(said.shape, bases, corrected)
