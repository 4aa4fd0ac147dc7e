"""A dataset: its rows, its tokens, and what identifies them."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from influence import data
from influence.func.fingerprint import fingerprint
from influence.pipelines.frame.configs import DataConfig
from influence.pipelines.frame.loading import looked_up
from influence.pipelines.frame.prepare import Measured


def read_data(config: DataConfig, measured: Measured) -> data.Tokenized:
    """Return a dataset's tokens.

    Raises:
        ValueError: if no document has a token to predict: every gradient would be zero.
    """
    tokens = tokens_of(config, load_rows(config), measured.tokenizer, measured.config)
    seen = tokens.counts
    if tokens.document is None and seen.empty + seen.single + seen.unlabelled == len(tokens):
        raise ValueError(
            f"none of the {len(tokens):,} documents of {config.dataset} has a token to predict, so every gradient is "
            f"zero ({tokens.report()}): a conversation needs turns of the role assistant, a text two tokens"
        )
    return tokens


def load_rows(config: DataConfig) -> Any:
    """Return a dataset's rows.

    Raises:
        ValueError: if there is no such dataset.
    """
    with _read(config.dataset):
        rows = data.load(
            config.dataset,
            split=config.split,
            subset=config.subset,
            data_kwargs=config.data_kwargs,
            max_document_bytes=config.max_document_bytes,
        )
    return rows if config.max_examples is None else rows.select(range(min(config.max_examples, len(rows))))


@contextlib.contextmanager
def _read(dataset: str) -> Iterator[None]:
    """Say in a line what datasets could not read."""
    try:
        with looked_up(dataset):
            yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the dataset {dataset!r} cannot be read: {said}") from error


def text_format(config: DataConfig) -> data.TextFormat:
    """Return which columns hold the text."""
    return data.TextFormat(
        config.prompt_column, config.completion_column, config.conversation_column, config.template, config.end_of_turn
    )


def tokens_of(config: DataConfig, rows: Any, tokenizer: Any, model: Any) -> data.Tokenized:
    """Return the tokens of rows.

    Args:
        config: how they become tokens.
        rows: what `load_rows` returns.
        tokenizer: the tokenizer.
        model: transformers' config of the model, which knows its longest document.

    Returns:
        The tokens.
    """
    limit = config.max_length if config.max_length is not None else data.context_length(tokenizer, model)
    tokens = data.tokenize(
        rows,
        tokenizer,
        text_format(config),
        max_length=None if config.chunk_length is not None else limit,
        truncation=config.truncation,
        chunk_length=config.chunk_length,
        max_tokens=config.max_tokens,
        reward_column=config.reward_column,
        advantage_column=config.advantage_column,
        skip_nan_rewards=config.skip_nan_rewards,
        max_document_bytes=config.max_document_bytes,
    )
    return within(tokens, vocabulary_of(model), tokenizer)


def vocabulary_of(model: Any) -> int | None:
    """Return how many tokens a model knows; `None` where its config does not say."""
    text = model.get_text_config() if hasattr(model, "get_text_config") else model
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def within(tokens: data.Tokenized, vocabulary: int | None, tokenizer: Any = None) -> data.Tokenized:
    """Return tokens that a model knows: a padding beyond its vocabulary, which is masked anyway, becomes 0.

    Args:
        tokens: the tokens.
        vocabulary: how many tokens the model knows, if that is known.
        tokenizer: what can say the token.

    Raises:
        ValueError: if the data have a token that the model does not know.
    """
    if vocabulary is None or not len(tokens.ids):
        return tokens
    largest = int(tokens.ids.max())
    if largest >= vocabulary:
        said = "" if tokenizer is None else f", {tokenizer.convert_ids_to_tokens(largest)!r}"
        raise ValueError(
            f"the data have the token {largest}{said}, and the model knows {vocabulary:,}, 0 to {vocabulary - 1}: pass "
            "the tokenizer that the model was trained with, or resize the model's embedding to the tokenizer's size"
        )
    if tokens.labels is not None and (label := int(tokens.labels.max())) >= vocabulary:
        raise ValueError(
            f"the data have the label {label}, and the model knows {vocabulary:,} tokens, 0 to {vocabulary - 1}: "
            "tokenise them with the model's own tokenizer"
        )
    return tokens if tokens.pad < vocabulary else replace(tokens, pad=0)


def vocabulary_hash(tokenizer: Any) -> str | None:
    """Return the hash of which number a tokenizer gives to which token; `None` where there is no tokenizer."""
    return None if tokenizer is None else fingerprint(tokenizer.get_vocab())


def data_hash(tokens: data.Tokenized) -> str:
    """Return the hash of everything a pass sees of its data."""
    return fingerprint({name: getattr(tokens, name) for name in ("ids", "labels", "offsets", "weight")})
