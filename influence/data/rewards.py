"""Dr. GRPO advantages: rewards turned into weights of examples."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def advantages(
    rewards: Float[Tensor, " n"], prompts: Sequence[Hashable], skip_nan: bool = False
) -> Float[Tensor, " n"]:
    r"""Dr. GRPO advantages: rewards minus the mean of their prompt's, without dividing by a standard deviation.

    $$A_i = r_i - \frac{1}{|G_i|} Σ_{j ∈ G_i} r_j, \qquad G_i = \{ j : \text{prompt}_j = \text{prompt}_i \}$$

    (Liu et al. 2025). A prompt with a single reward has advantage 0.

    Args:
        rewards: one reward per example.
        prompts: what the example answers; equal ones form a group.
        skip_nan: leave NaN rewards out of the mean and give them advantage 0, instead of refusing them.

    Returns:
        The advantages, in float64.

    Raises:
        ValueError: if a reward is infinite, or NaN and not skipped, or the lengths differ.

    Example:
        >>> advantages(torch.tensor([1.0, 0.0, 1.0, 3.0]), ["a", "a", "a", "b"])
        tensor([ 0.3333, -0.6667,  0.3333,  0.0000], dtype=torch.float64)
    """
    if len(prompts) != len(rewards):
        raise ValueError(f"one prompt per reward: got {len(prompts)} prompts and {len(rewards)} rewards")
    reward = rewards.double()
    refused = reward.isinf() if skip_nan else ~reward.isfinite()
    if bool(refused.any()):
        rows = refused.nonzero().flatten().tolist()
        raise ValueError(
            f"{len(rows)} of {len(reward)} rewards are not finite: rows {rows[:10]}{' …' if len(rows) > 10 else ''}. "
            "Repair them, or pass skip_nan_rewards=True to leave NaN rewards out (an infinite one is never left out)"
        )
    number: dict[Hashable, int] = {}
    group = torch.tensor([number.setdefault(prompt, len(number)) for prompt in prompts], dtype=torch.int64)
    known = ~reward.isnan()
    reward = reward.nan_to_num(0.0)
    total = torch.zeros(len(number), dtype=torch.float64).index_add_(0, group, reward)
    count = torch.zeros(len(number), dtype=torch.float64).index_add_(0, group, known.double())
    return torch.where(known, reward - (total / count.clamp_min(1))[group], 0.0)
