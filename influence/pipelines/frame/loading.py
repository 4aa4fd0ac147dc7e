"""Models and tokenizers, from a folder or the Hub."""

import contextlib
import functools
import json
import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence import models
from influence.data.sources import BUILDERS, mapping_of
from influence.pipelines.frame.configs import ModelConfig
from influence.store import BadFileError

SECONDS = 3.0
"""How long the Hub may take to answer a knock."""


@contextlib.contextmanager
def looked_up(name: str) -> Iterator[None]:
    """Look a name up: a file or folder here, or what the Hub has; without the Hub, what was downloaded before.

    Libraries of the Hub try each of their files for half a minute where there is no network.

    Args:
        name: a path, or an id on the Hub.
    """
    import huggingface_hub.constants

    if (
        not _may_be_there(name)
        or huggingface_hub.constants.HF_HUB_OFFLINE
        or reachable(huggingface_hub.constants.ENDPOINT)
    ):
        yield
        return
    warnings.warn(f"the Hub cannot be reached: {name!r} is looked for among what was downloaded before", stacklevel=3)
    with _offline():
        yield


def _may_be_there(name: str) -> bool:
    place = Path(name).expanduser()
    if place.exists():
        return (place / "adapter_config.json").exists()  # an adapter's base may be on the Hub
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and place.suffix.lower() not in BUILDERS


@functools.cache
def reachable(endpoint: str) -> bool:
    """Whether a connection to a web address, or to the proxy before it, can be opened; asked once in a process."""
    asked = urllib.parse.urlsplit(endpoint)
    proxy = None if urllib.request.proxy_bypass(asked.hostname or "") else urllib.request.getproxies().get(asked.scheme)
    place = urllib.parse.urlsplit(proxy) if proxy else asked
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the libraries of the Hub read their cache alone, for a while."""
    import datasets.config
    import huggingface_hub.constants

    rooms: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [room.HF_HUB_OFFLINE for room in rooms]
    try:
        for room in rooms:
            room.HF_HUB_OFFLINE = True
        yield
    finally:
        for room, was in zip(rooms, before, strict=True):
            room.HF_HUB_OFFLINE = was


def usable(device: str) -> str:
    """Refuse a device that is not there, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"the device {device!r} cannot be used here ({said}): pass --device cpu, or another"
        ) from error
    return device


def load_model(config: ModelConfig, device: str = "cpu") -> nn.Module:
    """Load a model.

    Raises:
        ValueError: if there is no such model.
    """
    fresh = None if config.peft_init_kwargs is None else mapping_of(config.peft_init_kwargs, "peft_init_kwargs")
    with _found(config.model, "model"):
        return models.load(
            config.model,
            task=config.task,
            precision=config.precision,
            revision=config.revision,
            model_kwargs=mapping_of(config.model_kwargs, "model_kwargs"),
            adapter=config.adapter,
            peft_init_kwargs=fresh,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )


def load_tokenizer(config: ModelConfig) -> Any:
    """Load a model's tokenizer; `None` where it has none and none is named."""
    from transformers import AutoTokenizer

    path = config.tokenizer or config.model
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if config.tokenizer is None and Path(path).is_dir() and not any((Path(path) / name).exists() for name in files):
        return None
    with _found(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


@contextlib.contextmanager
def _found(path: str, what: str) -> Iterator[None]:
    """Say in a line that there is no such thing, where transformers needs a page."""
    try:
        with looked_up(path):
            yield
    except ValueError as error:
        if "custom code" not in str(error) or "trust_remote_code" not in str(error):
            if isinstance(error, json.JSONDecodeError) or (what == "tokenizer" and path not in str(error)):
                raise _unreadable(path, what, error) from error
            raise
        raise ValueError(
            f"the {what} {path!r} comes with code of its maker's, which would run here as you: look at it, and if you "
            "trust it, pass trust_remote_code=True"
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) or Path(path).is_dir():
            raise
        raise ValueError(
            f"no {what} {path!r}: it is no folder here, and the Hub has none that can be reached "
            f"({str(error).splitlines()[0]}). Give a folder which save_pretrained wrote, or the id of a Hub model"
        ) from error
    except (ImportError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a file that is cut off, or an argument that is none, transformers raises anything
        raise _unreadable(path, what, error) from error


def _unreadable(path: str, what: str, error: Exception) -> BadFileError:
    said = " ".join(str(error).split())[:300]
    return BadFileError(
        f"the {what} {path!r} cannot be loaded ({type(error).__name__}: {said}): one of its files is damaged or cut "
        "off, or an argument of model_kwargs or peft_init_kwargs is not for it"
    )
