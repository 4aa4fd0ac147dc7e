"""An index as a Hugging Face dataset."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from influence.index.reading import Index


def to_dataset(index: "Index") -> Any:
    """Return a dataset of `index`, `loss`, `length`, `gradients` (and `position` of tokens)."""
    import datasets
    import pyarrow

    if index.dim >= 2**31:
        raise ValueError(f"a dataset's list holds less than 2^31 entries, and a row has {index.dim:,}: choose blocks")
    counts = index.offsets.diff()
    columns: dict[str, Any] = {
        "index": index.index.repeat_interleave(counts),
        "loss": index.loss.repeat_interleave(counts),
        "length": index.length.repeat_interleave(counts),
    }
    if index.per_token:
        columns["position"] = index.position
    pieces = []
    for piece in index.pieces():
        matrix = index.matrix(piece.begin, piece.begin + len(piece.values))
        pieces.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(matrix.flatten().numpy()), index.dim))
    kind = pyarrow.list_(pyarrow.float64() if index.dtype == "float64" else pyarrow.float32(), index.dim)
    arrays = {name: pyarrow.array(torch.as_tensor(column).numpy()) for name, column in columns.items()}
    return datasets.Dataset(pyarrow.table({**arrays, "gradients": pyarrow.chunked_array(pieces, kind)}))
