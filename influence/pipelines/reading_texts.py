"""The texts of an index's examples, whole, for a page: from its own dataset, wherever its configuration leads."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from influence.index import Index, open_index
from influence.pipelines.frame import recorded
from influence.pipelines.frame.configs import DataConfig, ModelConfig
from influence.pipelines.frame.loading import load_tokenizer
from influence.pipelines.frame.texts import by_part, texts_of, token_texts
from influence.pipelines.query import datasets_of


class Texts(NamedTuple):
    """What examples say.

    Attributes:
        texts: each text; where the page has it as tokens, what is behind them.
        pieces: each text as its tokens, where every token has a row.
        lengths: how many tokens are there.
        cut: how many texts were cut.
    """

    texts: list[str]
    pieces: list[list[str]] | None
    lengths: Int[Tensor, " n"]
    cut: int


def texts_for(
    index: Index,
    numbers: Int[Tensor, " n"],
    source: str | None = None,
    most: int = 1000,
    tokens: int = 0,
    trust: bool = False,
) -> Texts:
    """Return what examples say.

    Args:
        index: their index, whose configuration says where texts are.
        numbers: the examples' numbers in their dataset.
        source: another dataset to read them from.
        most: characters of each to keep.
        tokens: how many of each to return apart, where every token has a row.
        trust: whether code that comes with the model may run; the index cannot allow it.

    Returns:
        The texts.

    Raises:
        ValueError: if the index does not say where its texts are, or they cannot be read, with the way on.
    """
    stored = index.about.config
    if not {"model", "data"} <= set(stored) and source is None:
        raise ValueError(
            f"{index.path} was built from Python, so it does not say where its texts are: pass --texts FILE, a dataset "
            "whose rows are numbered as the index's"
        )
    begins, parts = _parts(index, source)
    model = recorded.tokenizer_of(stored["model"], index.path, trust) if "model" in stored else None
    try:
        whole, pieces = _read(begins, parts, model, numbers.tolist(), index.per_token and tokens > 0)
    except IndexError as error:
        raise ValueError(
            f"examples of {index.path} are numbered up to {int(numbers.max())}, and {source or 'its dataset'} has "
            "fewer rows: pass --texts FILE, a dataset whose rows are numbered as the index's"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the texts of {index.path} cannot be read: {' '.join(str(error).split())[:300]}. Pass --texts FILE, where "
            "they are now"
        ) from error
    if pieces is not None:
        whole = ["".join(one[tokens:]) for one in pieces]
        pieces = [one[:tokens] for one in pieces]
    lengths = torch.tensor([0] * len(whole) if pieces is None else [len(one) for one in pieces])
    return Texts([text[:most] for text in whole], pieces, lengths, sum(len(text) > most for text in whole))


def query_texts(path: str, number: int, trust: bool = False) -> list[str]:
    """Return what queries say: their texts, or, where they are no texts of their own, the run and the row."""
    if (Path(path) / "index.h5").exists():
        index = open_index(path)
        if index.about.kind == "index" and index.examples == number:
            try:
                return texts_for(index, index.index, trust=trust).texts
            except ValueError:
                pass
        elif index.about.kind == "reduce":
            return [f"{index.about.config['method']} of {index.about.config['data']['dataset']}"]
    return [f"row {row} of {path}" for row in range(number)]


def _parts(index: Index, source: str | None) -> tuple[list[int], list[DataConfig]]:
    if "data" not in index.about.config:
        assert source is not None
        return [0], [DataConfig(source)]
    stored = index.about.config["data"]
    if source is not None:
        return [0], [recorded.data_of(stored, index.path, source)]
    return datasets_of(index, recorded.data_of(stored, index.path))


def _read(
    begins: list[int], parts: list[DataConfig], model: ModelConfig | None, numbers: list[int], per_token: bool
) -> tuple[list[str], list[list[str]] | None]:
    chunks = any(part.chunk_length is not None for part in parts)
    tokenizer, config = _tokenizer(model, needed=chunks or per_token)
    if per_token and tokenizer is not None:
        pieces = _joined(begins, [token_texts(part, tokenizer, config) for part in parts])(numbers)
        return ["".join(one) for one in pieces], pieces
    return _joined(begins, [texts_of(part, tokenizer, config, strict=True) for part in parts])(numbers), None


def _joined(begins: Sequence[int], parts: Sequence[Callable[..., list[Any]]]) -> Callable[..., list[Any]]:
    return parts[0] if len(parts) == 1 else by_part(begins, parts)


def _tokenizer(model: ModelConfig | None, needed: bool) -> tuple[Any, Any]:
    """Return a model's tokenizer and config; where plain texts do without them, a model that is gone is no error."""
    if model is None:
        return None, None
    from transformers import AutoConfig

    tokenizer = config = None
    with contextlib.nullcontext() if needed else contextlib.suppress(ValueError, OSError):
        tokenizer = load_tokenizer(model)
    with contextlib.suppress(ValueError, OSError):  # an adapter's folder has none
        config = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code)
    return tokenizer, config
