"""How many tokens a model can see."""

from typing import Any

UNLIMITED = 10**9
"""What `transformers` means by more: a tokenizer that knows no limit says 1e30."""

FROM_PADDING = ("camembert", "data2vec-text", "longformer", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Models that count positions from behind the padding id, and lose that many of their position embeddings."""


def context_length(tokenizer: Any = None, config: Any = None) -> int | None:
    """Return the longest document that a model takes.

    Args:
        tokenizer: its tokenizer, which may know a limit (`model_max_length`).
        config: its config, which may know another (`max_position_embeddings`).

    Returns:
        The smaller of the limits; `None` where there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> context_length(SimpleNamespace(model_max_length=int(1e30)), SimpleNamespace(max_position_embeddings=128))
        128
    """
    limits = [getattr(tokenizer, "model_max_length", None)]
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(inner, "max_position_embeddings", None)
    if positions is not None and getattr(inner, "model_type", None) in FROM_PADDING:
        positions -= (inner.pad_token_id or 0) + 1
    limits.append(positions)
    return min((int(limit) for limit in limits if limit is not None and 0 < limit < UNLIMITED), default=None)
