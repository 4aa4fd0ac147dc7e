"""Which examples share a batch, within a shard and by nothing else."""

from jaxtyping import Int
from torch import Tensor


def pack(lengths: Int[Tensor, " n"], token_budget: int, max_rows: int | None = None) -> list[Int[Tensor, " b"]]:
    """Put examples into batches, longest first, so that each padded batch holds at most `token_budget` positions.

    The widest example left sets the width `w` of a batch, which then takes the `token_budget // w` longest ones. No
    randomness: equal lengths keep their order, and each batch lists its examples in the order of the shard.

    Args:
        lengths: tokens of each example; an empty one takes one position.
        token_budget: most positions of a batch, padding included.
        max_rows: most examples of a batch.

    Returns:
        The examples of each batch: every example in exactly one.

    Raises:
        ValueError: if an example is longer than the budget, or a limit is below 1.

    Example:
        >>> import torch
        >>> [batch.tolist() for batch in pack(torch.tensor([2, 5, 1, 3]), token_budget=6)]
        [[1], [0, 3], [2]]
    """
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"token_budget and max_rows must be at least 1; got {token_budget} and {max_rows}")
    width = lengths.clamp_min(1)
    long = width > token_budget
    if bool(long.any()):
        raise ValueError(
            f"{int(long.sum())} of {len(lengths)} examples have more than token_budget={token_budget} tokens (the "
            f"longest has {int(lengths.max())}): pass token_budget of at least {int(lengths.max())}, or tokenize with "
            "truncation=True and a smaller max_length, or with chunk_length"
        )
    order = width.argsort(descending=True, stable=True)
    widths = width[order].tolist()
    packed, begin = [], 0
    while begin < len(widths):
        count = min(token_budget // widths[begin], max_rows or len(widths))
        packed.append(order[begin : begin + count].sort().values)
        begin += count
    return packed
